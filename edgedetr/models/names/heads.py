"""Deformable DETR's heads: which of the copies in a file belong to a layer, to all layers, or to the proposals."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.names.rules import Weights, rename

COPY = re.compile(r"^(?:decoder\.)?(?:class|bbox)_embed\.(\d+)\.")


def own_heads(weights: Mapping[str, Tensor]) -> Weights:
    """`class_embed.N`, `bbox_embed.N`, and their copies under `decoder.`, as our heads.

    Refined models have one pair per layer; files show that by copies of the box heads inside the decoder. Others repeat
    one pair, which must be equal. In two-stage models the last pair scores the proposals.
    """
    refined = any(name.startswith("decoder.bbox_embed.") for name in weights)
    two_stage = "selector.project.weight" in weights
    copies = [int(found[1]) for name in weights if (found := COPY.match(name))]
    last = max(copies, default=0)
    rules = []
    for kind, ours in (("class", "score"), ("bbox", "box")):
        head = rf"^(?:decoder\.)?{kind}_embed"
        if two_stage:
            rules.append((rf"{head}\.{last}\.", f"selector.{ours}."))
        rules.append((rf"{head}\.(\d+)\.", rf"decoder.boxes.{ours}.\1." if refined else f"decoder.boxes.{ours}."))
    return rename(weights, rules)
