"""`model.init = "original"`: every weight is spread as the authors' code spreads it, measured on torch's modules."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build

C = 128


def torch_mha(shape):
    """One of query, key and value of torch's attention, which DETR's code draws once more by the same rule."""
    return nn.MultiheadAttention(shape[1], 8).in_proj_weight


def rcda(shape):
    """One of the five of AnchorDETR's models/row_column_decoupled_attention.py."""
    return nn.init.xavier_uniform_(torch.empty(5 * shape[0], shape[1]))


def xavier(shape):
    return nn.init.xavier_uniform_(torch.empty(*shape))


def linear(shape):
    return nn.Linear(shape[1], shape[0]).weight if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:]).weight


def linear_bias(shape):
    return nn.Linear(C, 10_000).bias


def project_bias(shape):
    return nn.Conv2d(128, 10_000, 1).bias


def normal(shape):
    return nn.Embedding(1000, 10).weight


def fpn(shape):
    """detectron2's c2_xavier_fill."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), a=1)


def zero(shape):
    return torch.zeros(2)


ATTENTION = [
    (r"attention\.[qkv]\.weight", torch_mha),
    (r"attention\.[qkv]\.bias", zero),
    (r"attention\.out\.bias", zero),
]
DETR = [*ATTENTION, (r"attention\.out\.weight", xavier), (r"feedforward\.\w+\.weight", xavier)]
SAMPLED = [(r"cross_attention\.(value|out)\.weight", xavier), (r"attention\.(offsets|weights)\.weight", zero)]
HEADS = [(r"boxes\.score.*weight", linear), (r"boxes\.box.*layers\.[01]\.weight", linear)]
CONDITIONAL = [
    (r"decoder.*attention\.(q|k|v|q_position|k_position|q_spatial)\.weight", xavier),
    (r"decoder.*attention\.(q|k|v|q_position|k_position|q_spatial)\.bias", linear_bias),
    (r"decoder\.spatial\.\w+\.layers\.\d\.weight", xavier),
    (r"box\.layers\.2\.weight", zero),
]
PROJECT = [(r"encoder\.project\.weight", linear), (r"encoder\.project\.bias", project_bias)]
# In the order in which they are tried; sources as in the records of the members.
RULES = {
    "detr": [*PROJECT, *DETR, (r"selector\.position", normal), *HEADS, (r"box\.layers\.2\.weight", linear)],
    "conditional_detr": [
        *PROJECT,
        *CONDITIONAL,
        *DETR,
        *HEADS,
        (r"selector\.position", normal),
        (r"selector\.point\.head\.layers", xavier),
    ],
    "dn_detr": [
        *PROJECT,
        *CONDITIONAL,
        *DETR,
        *HEADS,
        (r"selector\.(box|denoising_class_embed)", normal),
        (r"encoder\.position_scale", xavier),
        (r"decoder\.query_position", xavier),
    ],
    "anchor_detr": [
        (r"encoder\.project\.\w+\.weight", xavier),
        (r"\.(q_x|q_y|k_x|k_y)\.weight", rcda),
        (r"(encoder\.layers.*|cross_)attention\.v\.weight", rcda),
        *ATTENTION,
        (r"attention\.out\.weight", linear),
        (r"feedforward\.\w+\.weight", linear),
        *HEADS,
        (r"box\.layers\.2\.weight", zero),
        (r"adapt\.layers\.\d\.weight", linear),
        (r"selector\.pattern", normal),
        (r"selector\.points\.points", lambda shape: torch.rand(10_000)),
    ],
    "deformable_detr": [
        (r"encoder\.project.*weight", xavier),
        (r"place\.level", normal),
        *SAMPLED,
        *DETR,
        (r"encoder.*attention\.value\.weight", xavier),
        (r"selector\.(project|place)\.weight", xavier),
        (r"selector\.score\.weight", linear),
        (r"box.*layers\.2\.weight", zero),
        *HEADS,
        (r"selector\.box.*weight", linear),
    ],
    "dino": [
        (r"encoder\.project.*weight", xavier),
        (r"place\.level", normal),
        *SAMPLED,
        *DETR,
        (r"encoder.*attention\.value\.weight", xavier),
        (r"selector\.(project|content)\.weight", xavier),
        (r"selector\.denoising", normal),
        (r"selector\.score\.weight", linear),
        (r"box.*layers\.2\.weight", zero),
        *HEADS,
        (r"selector\.box.*weight", linear),
        (r"query_position.*weight", xavier),
    ],
    "sparse_rcnn": [
        (r"encoder\.pyramid\.\w+.*weight", fpn),
        (r"selector\.content", normal),
        *DETR,
        (r"interaction\.\w+\.weight", xavier),
        (r"tower.*weight", xavier),
        (r"boxes\.(score|box)\.\d\.weight", xavier),
        (r"selector\.box", lambda shape: torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(100, 1)),
    ],
    "rt_detr": [
        (r"memory_project.*conv\.weight", xavier),
        (r"encoder\..*conv\.weight", linear),
        (r"encoder.*attention\.out\.weight|self_attention\.out\.weight", linear),
        *SAMPLED,
        *ATTENTION,
        (r"encoder.*feedforward\.\w+\.weight", linear),
        (r"decoder.*feedforward\.\w+\.weight", xavier),
        (r"selector\.project\.weight", xavier),
        (r"selector\.score\.weight", linear),
        (r"box.*layers\.2\.weight", zero),
        *HEADS,
        (r"selector\.box.*weight", linear),
        (r"selector\.denoising", normal),
        (r"query_position.*weight", xavier),
    ],
}


def small(name, **more):
    options = {
        "backbone": "resnet18vd" if name == "rt_detr" else "resnet18",
        "backbone_width": 0.25,
        "hidden": C,
        "decoder_layers": 2,
        **more,
    }
    if name == "anchor_detr":
        options["dilate_last"] = False
    if name == "deformable_detr":
        options |= {"refine": True, "two_stage": True}
    if "encoder_layers" in FAMILY[name].config.__dataclass_fields__ and name != "rt_detr":
        options["encoder_layers"] = 2
    torch.manual_seed(0)
    return build(name, FAMILY[name].config(**options), 80)


@pytest.mark.parametrize("name", RULES)
def test_every_weight_is_spread_as_in_the_authors_code(name):
    torch.manual_seed(1)
    found: dict[tuple, list] = {}
    for parameter_name, parameter in small(name, init="original").named_parameters():
        if parameter_name.startswith("backbone.") or "norm" in parameter_name or "activation" in parameter_name:
            continue
        rule = next(
            (
                rule
                for pattern, rule in RULES[name]
                if re.search(pattern, parameter_name) and (parameter.ndim > 1 or "bias" in pattern)
            ),
            None,
        )
        assert rule or parameter.ndim == 1, f"no rule for {parameter_name}"
        if rule:
            group = re.sub(r"\.\d+", ".*", parameter_name), rule, tuple(parameter.shape)
            found.setdefault(group, []).append(parameter.detach().flatten())
    for (group, rule, shape), values in found.items():
        joined = torch.cat(values)
        wanted = torch.cat([rule(shape).detach().flatten() for _ in range(max(1, 2000 // joined.numel()))])
        # 5 %, and where there are few numbers what their own spread allows (3 sigma of a standard deviation).
        allowed = 0.05 + 3 * 0.7 / joined.numel() ** 0.5 * (joined.numel() < 2000)
        assert float(joined.std()) == pytest.approx(float(wanted.std()), rel=allowed, abs=1e-9), (group, rule.__name__)


def test_our_own_first_weights_stay_the_default():
    for name in ("detr", "conditional_detr"):
        ours, theirs = small(name).state_dict(), small(name, init="original").state_dict()
        query = "decoder.layers.0.self_attention.q.weight" if name == "detr" else "encoder.layers.0.attention.q.weight"
        assert float(ours[query].std() / theirs[query].std()) == pytest.approx(2**0.5, rel=0.05)
        backbone = [key for key in ours if key.startswith("backbone.") and ours[key].is_floating_point()]
        assert all(torch.equal(ours[key], theirs[key]) for key in backbone)


@pytest.mark.parametrize("name", ["dynamic_detr", "efficient_detr"])
def test_a_member_without_published_code_has_no_original_weights(name):
    with pytest.raises(ModelError, match=f"authors of {name} published no code; expected 'default'"):
        small(name, init="original")
