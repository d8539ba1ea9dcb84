"""Building blocks of checkpoint conversion: rename tensors, split packed projections, assign copies of heads.

Our names are those in a member's `state_dict`; a layout is how another library names the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedetr.errors import ModelError

Weights = dict[str, Tensor]
RenameRule = tuple[str, "str | Callable[[re.Match[str]], str]"]  # pattern, replacement; applied wherever it matches

# Not part of our models: ImageNet's classifier, counters of BatchNorm, constants that follow from the configuration.
IGNORED = re.compile(r"^fc\.|^classifier\.|num_batches_tracked$|n_points_scale$|num_points_scale$|anchors$|valid_mask$")
QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Layout:
    """A naming of a member's tensors in files.

    source     who uses these names, for messages
    mark       pattern of a tensor name; a file has the first of a member's layouts whose mark one of its names matches
    translate  the file's tensors -> the same tensors under our names; raises ModelError if copies differ
    """

    source: str
    mark: str
    translate: Callable[[Mapping[str, Tensor]], Weights]

    def fits(self, weights: Mapping[str, Tensor]) -> bool:
        return any(re.search(self.mark, name) for name in weights)


def rename(weights: Mapping[str, Tensor], rules: Iterable[RenameRule]) -> Weights:
    """Apply every rule, in order, to every name. Two names may become one only if their tensors are equal (tied)."""
    rules = list(rules)
    renamed: Weights = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        if IGNORED.search(name):
            continue
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed and not torch.equal(renamed[new], tensor):
            raise ModelError(
                f"{origin[new]} and {name} differ, but this model has one tensor ({new}) for both; "
                "expected equal copies, as the published files have; check the [model] section"
            )
        renamed[new], origin[new] = tensor, name
    return renamed


def split_packed(weights: Mapping[str, Tensor], parts: Sequence[str] = QKV) -> Weights:
    """Packed projections `*.in_proj_weight` [n C, C] and `*.in_proj_bias` [n C] as n Linears named by `parts`.

    parts   names of the n parts; tensors that are packed from another number of parts stay unchanged
    """
    split: Weights = {}
    for name, tensor in weights.items():
        owner, packed, kind = name.partition("in_proj_")
        width = weights[f"{owner}in_proj_weight"].shape[1] if packed else 0
        if not packed or tensor.shape[0] != width * len(parts):
            split[name] = tensor
            continue
        for part, chunk in zip(parts, tensor.chunk(len(parts))):
            split[f"{owner}{part}.{kind}"] = chunk.clone()
    return split


def apply_to_prefix(weights: Mapping[str, Tensor], prefix: str, change: Callable[[Weights], Weights]) -> Weights:
    """Apply `change` to the tensors whose names begin with `prefix`, without the prefix; the others are unchanged."""
    inner = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    return {**rest, **{prefix + name: tensor for name, tensor in change(inner).items()}}


BOX_HEAD = re.compile(r"(decoder\.boxes\.box)\.(\d+)\.(.*)")


def one_box_head(weights: Mapping[str, Tensor]) -> Weights:
    """`decoder.boxes.box.N` as one head, where files show that it serves all layers.

    The authors write it once for every layer, transformers under one number alone; class heads are as many as layers.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    rest: Weights = {}
    for name, tensor in weights.items():
        found = BOX_HEAD.fullmatch(name)
        if found is None:
            rest[name] = tensor
        else:
            heads.setdefault(found[2], {})[found[3]] = tensor
    layers = len({name.split(".")[3] for name in rest if name.startswith("decoder.boxes.score.")})
    first, *others = list(heads.values()) or [{}]
    equal = all(
        one.keys() == first.keys() and all(torch.equal(one[part], first[part]) for part in first) for one in others
    )
    if layers < 2 or not first or not equal:
        return dict(weights)
    return {**rest, **{f"decoder.boxes.box.0.{part}": tensor for part, tensor in first.items()}}


COPY = re.compile(r"^(?:decoder\.)?(class|bbox)_embed\.(\d+)\.")


def untie_heads(weights: Mapping[str, Tensor]) -> Weights:
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
    rules: list[RenameRule] = []
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
