"""First weights: Xavier's rule, the prior of class heads, boxes that start unmoved, and what the authors' code draws.

`model.init = "original"` draws anew what the authors' code draws otherwise. Read in facebookresearch/detr,
Atten4Vis/ConditionalDETR, megvii-research/AnchorDETR, fundamentalvision/Deformable-DETR, IDEA-Research/DN-DETR
(models/DN_DAB_DETR), PeizeSun/SparseR-CNN and lyuwenyu/RT-DETR (rtdetrv2_pytorch). Three things differ: torch's
MultiheadAttention draws query, key and value as one matrix of three times the height, which makes each smaller by 1.41;
DETR and its heirs draw every matrix of their transformer by Xavier's rule, and all outside it by torch's default; and
Linears beside the attention keep torch's default bias.

Ours are the default: on eight images of BCCD, conditional_detr, 200 steps, one seed, they reached 36.3 AP and
the authors' q, k, v 27.8. No long training was compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

PRIOR = 0.01  # class probability that the heads start from (RetinaNet, section 4.1)


def xavier(*parts: nn.Module) -> None:
    """Xavier-uniform weights for every matrix of the parts, as DETR starts its transformer."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def zero_bias(*modules: nn.Conv2d | nn.Linear) -> None:
    for module in modules:
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def head_outputs(owner: nn.Module, name: str) -> list[nn.Linear]:
    """The last Linear of each head under an attribute `name`: one per decoder layer, one for all layers, or none."""
    found = getattr(owner, name, None)
    heads = found if isinstance(found, nn.ModuleList) else [found] if isinstance(found, nn.Module) else []
    return [[part for part in head.modules() if isinstance(part, nn.Linear)][-1] for head in heads]


def prior_bias_init(*owners: nn.Module) -> None:
    """Class heads (`score`) start at the probability PRIOR for every class, by their bias alone."""
    for owner in owners:
        for score in head_outputs(owner, "score"):
            nn.init.constant_(score.bias, -math.log((1 - PRIOR) / PRIOR))


def zero_box_init(*owners: nn.Module) -> None:
    """Box heads (`box`, and the plain head before distributions, `first`) start by leaving every box where it is."""
    for owner in owners:
        for box in (*head_outputs(owner, "box"), *head_outputs(owner, "first")):
            nn.init.zeros_(box.weight)
            nn.init.zeros_(box.bias)


def two_stage_init(selector: nn.Module, heads: nn.Module) -> None:
    """Both stages start with rare classes and boxes that stay; what predicts classes is Xavier-uniform (RT-DETR)."""
    xavier(*head_outputs(selector, "score"), *head_outputs(heads, "score"))
    prior_bias_init(selector, heads)
    zero_box_init(selector, heads)


def box_size_init(owner: nn.Module, logit: float) -> None:
    """The first box head starts with boxes of width and height sigmoid(logit); for references without a size."""
    nn.init.constant_(head_outputs(owner, "box")[0].bias[2:], logit)


# ------------------------------------------------------------------------------------------------ the authors' code

InitRule = Callable[[Tensor, int], None]  # a parameter, and how many numbers go into each of its module's outputs


def xavier_rule(parameter: Tensor, inputs: int) -> None:
    nn.init.xavier_uniform_(parameter)


def torch_default(parameter: Tensor, inputs: int) -> None:
    """Linear's and Conv2d's own, of weight and bias alike: uniform within 1 / sqrt(inputs)."""
    nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))


def part_of(count: int) -> InitRule:
    """Xavier's rule on a matrix of `count` such parts, one below the other."""

    def rule(parameter: Tensor, inputs: int) -> None:
        bound = math.sqrt(6 / (inputs + count * parameter.shape[0]))
        nn.init.uniform_(parameter, -bound, bound)

    return rule


def packed_qkv(attention: str) -> dict[str, InitRule]:
    """The rule of torch's MultiheadAttention for the q, k, v of an attention at a path (or pattern of paths)."""
    return {f"{attention}.{name}.weight": part_of(3) for name in "qkv"}


# The projection of the backbone's map in DETR and its heirs.
PROJECTION: dict[str, InitRule] = {"encoder.project.weight": torch_default, "encoder.project.bias": torch_default}
# Conditional attention is made of single Linears, whose weights Xavier's rule draws, and whose biases stay torch's.
CONDITIONAL_BIASES: dict[str, InitRule] = {
    f"decoder.layers.*attention.{name}.bias": torch_default
    for name in ("q", "k", "v", "q_position", "k_position", "q_spatial")
}


@torch.no_grad()
def redraw(model: nn.Module, rules: Mapping[str, InitRule]) -> None:
    """Draw anew every parameter outside the backbone whose name fits a pattern, by the rule of the first that fits."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        rule = next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)
        if rule is not None and not name.startswith("backbone."):
            weight = modules[name.rpartition(".")[0]].weight
            if isinstance(weight, Tensor):  # of a Linear or Conv2d
                rule(parameter, weight[0].numel())


# What RT-DETR's authors draw anew in a hybrid encoder and a decoder; D-FINE and DEIMv2 keep it.
HYBRID_INIT: dict[str, InitRule] = (
    packed_qkv("decoder.layers.*.self_attention")
    | packed_qkv("encoder.attention.*.attention")
    | {
        "encoder.attention.*.attention.out.weight": torch_default,
        "decoder.layers.*.self_attention.out.weight": torch_default,
        "decoder.layers.*.feedforward.*.weight": xavier_rule,
        "selector.score.weight": torch_default,
        "decoder.boxes.score.*.weight": torch_default,
        "decoder.query_position.*.weight": xavier_rule,
    }
)
