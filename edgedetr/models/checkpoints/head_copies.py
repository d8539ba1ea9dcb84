"""Deformable DETR's heads: which of the copies in a file belong to a layer, to all layers, or to the proposals."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import Rule, Weights, rename

COPY = re.compile(r"^(?:decoder\.)?(class|bbox)_embed\.(\d+)\.")


def own_heads(weights: Mapping[str, Tensor]) -> Weights:
    """`class_embed.N`, `bbox_embed.N`, and their copies under `decoder.`, as our heads.

    Refined models have one pair per layer; files show that by copies of the box heads inside the decoder. Others repeat
    one pair, which must be equal. In two-stage models the last pair scores the proposals.
    """
    refined = any(name.startswith("decoder.bbox_embed.") for name in weights)
    two_stage = "selector.project.weight" in weights
    copies = {
        kind: {int(found[2]) for name in weights if (found := COPY.match(name)) and found[1] == kind}
        for kind in ("class", "bbox")
    }
    last = max(copies["bbox"], default=0)
    rules: list[Rule] = []
    for kind, ours in (("class", "score"), ("bbox", "box")):
        head = rf"^(?:decoder\.)?{kind}_embed"
        if two_stage:
            rules.append((rf"{head}\.{last}\.", f"selector.{ours}."))
        rules.append((rf"{head}\.(\d+)\.", rf"decoder.boxes.{ours}.\1." if refined else f"decoder.boxes.{ours}."))
    renamed = rename(weights, rules)
    if refined and copies["class"] == {0}:
        # transformers ties the class heads of its refined one-stage form, and writes a tied tensor once.
        for layer in range(1, last + 1):
            for kind in ("weight", "bias"):
                renamed[f"decoder.boxes.score.{layer}.{kind}"] = renamed[f"decoder.boxes.score.0.{kind}"].clone()
    return renamed
