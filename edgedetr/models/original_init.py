"""First weights as the authors' code draws them, where that differs from ours: `model.init = "original"`.

Read in facebookresearch/detr, Atten4Vis/ConditionalDETR, megvii-research/AnchorDETR, fundamentalvision/Deformable-DETR,
IDEA-Research/DN-DETR (models/DN_DAB_DETR), PeizeSun/SparseR-CNN and lyuwenyu/RT-DETR (rtdetrv2_pytorch). Three things
differ: torch's MultiheadAttention draws query, key and value as one matrix of three times the height, which makes
each smaller by 1.41; DETR and its heirs draw every matrix of their transformer by Xavier's rule, and what lies outside
by torch's default; and Linears beside the attention keep torch's default bias.

Ours stay the default: on eight images of BCCD, conditional_detr, 200 steps, one seed, they gave 36.3 AP and the
authors' q, k, v 27.8. No long training was compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError

Rule = Callable[[Tensor, int], None]  # a parameter, and how many numbers go into each of its module's outputs


def _xavier(parameter: Tensor, inputs: int) -> None:
    nn.init.xavier_uniform_(parameter)


def _default(parameter: Tensor, inputs: int) -> None:
    """Linear's and Conv2d's own, of weight and bias alike: uniform within 1 / sqrt(inputs)."""
    nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def _part_of(count: int) -> Rule:
    """Xavier's rule on a matrix of `count` such parts, one below the other."""

    def rule(parameter: Tensor, inputs: int) -> None:
        bound = math.sqrt(6 / (inputs + count * parameter.shape[0]))
        nn.init.uniform_(parameter, -bound, bound)

    return rule


QKV = {f"*attention.{name}.weight": _part_of(3) for name in "qkv"}
ENCODER_QKV = {f"encoder.layers.*.attention.{name}.weight": _part_of(3) for name in "qkv"}
SELF_QKV = {f"decoder.layers.*.self_attention.{name}.weight": _part_of(3) for name in "qkv"}
PROJECT: dict[str, Rule] = {"encoder.project.weight": _default, "encoder.project.bias": _default}
# Conditional attention is made of single Linears, whose weights Xavier's rule draws, and whose biases stay torch's.
CONDITIONAL: dict[str, Rule] = {
    f"decoder.layers.*attention.{name}.bias": _default
    for name in ("q", "k", "v", "q_position", "k_position", "q_spatial")
}
# member -> pattern of parameter names -> rule; what no pattern fits is drawn alike by both
ORIGINAL: dict[str, dict[str, Rule]] = {
    "detr": QKV | PROJECT,
    "conditional_detr": ENCODER_QKV
    | PROJECT
    | CONDITIONAL
    | {"selector.point.head.layers.*.weight": _xavier, "decoder.spatial.*.weight": _xavier},
    "dn_detr": ENCODER_QKV
    | PROJECT
    | CONDITIONAL
    | {
        "encoder.position_scale.*.weight": _xavier,
        "decoder.query_position.*.weight": _xavier,
        "decoder.spatial.*.weight": _xavier,
    },
    "anchor_detr": SELF_QKV
    | {"*attention.out.weight": _default}
    | {f"*attention.{name}.weight": _part_of(5) for name in ("q_x", "q_y", "k_x", "k_y")}
    | {"encoder.layers.*.attention.v.weight": _part_of(5), "decoder.layers.*.cross_attention.v.weight": _part_of(5)},
    "deformable_detr": SELF_QKV | {"*.feedforward.*.weight": _xavier},
    "sparse_rcnn": SELF_QKV,
    "rt_detr": SELF_QKV
    | {f"encoder.attention.*.attention.{name}.weight": _part_of(3) for name in "qkv"}
    | {
        "encoder.attention.*.attention.out.weight": _default,
        "decoder.layers.*.self_attention.out.weight": _default,
        "decoder.layers.*.feedforward.*.weight": _xavier,
        "selector.score.weight": _default,
        "decoder.boxes.score.*.weight": _default,
        "decoder.query_position.*.weight": _xavier,
        "encoder.memory_project.*.conv.weight": _xavier,
    },
}


@torch.no_grad()
def original(model: nn.Module, member: str) -> None:
    """Draw anew what the authors of a member draw otherwise; the backbone stays.

    Errors: ModelError for a member whose authors published no code.
    """
    if member not in ORIGINAL:
        raise ModelError(f"model.init is 'original', but the authors of {member} published no code; expected 'default'")
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        rule = next((rule for pattern, rule in ORIGINAL[member].items() if fnmatchcase(name, pattern)), None)
        if rule is not None and not name.startswith("backbone."):
            weight: Tensor = modules[name.rpartition(".")[0]].weight  # type: ignore[assignment]  # Linear or Conv2d
            rule(parameter, weight[0].numel())
