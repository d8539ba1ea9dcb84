"""config.json of transformers: every key of every class that is imported is read, refused, or without effect; shown
numerically, at random weights, against transformers itself."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
import torch
from references import transformers

from edgedetr.errors import ModelError
from edgedetr.importing.weights import architecture
from edgedetr.models import FAMILY, build, member
from edgedetr.models.checkpoints import conversion
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.pretrained import load_backbone, load_detector, load_weights
from edgedetr.models.checkpoints.transformers_config import MEMBER_OF, SOURCES, check_backbone_config, read_config
from edgedetr.models.checkpoints.transformers_keys import ALONE, BACKBONES, Key, NoEffect, Only, Read, Same, Special
from edgedetr.models.checkpoints.weight_source import WeightSource

SMALL = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": 3,
}
RT = {
    **SMALL,
    "encoder_layers": 1,
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32, 64, 128],
    "decoder_in_channels": [32] * 3,
    "hidden_expansion": 0.5,
}
# What a variant has otherwise, all at once; every key that is read or compared with the tensors is in one of them.
OTHER = {
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_queries": 5,
}


@dataclass(frozen=True)
class Case:
    """A class of transformers: its name there, its model_type, and two sets of options."""

    name: str
    kind: str
    plain: dict[str, Any]
    variant: dict[str, Any]
    levels: tuple[int, ...] = (4,)

    @property
    def member(self) -> str:
        return MEMBER_OF[self.kind]

    def config(self, **options: Any) -> Any:
        options = {**self.plain, **options}
        levels = self.levels
        if self.kind in ("d_fine", "deimv2"):
            levels = levels[-options.get("num_feature_levels", 3) :]
        if options.get("encoder_type") == "lite":
            levels = (3,)
        options = {"backbone_config": backbone(self.member, levels), **options}
        return getattr(transformers, f"{self.name}Config")(**options)


DENSE = {**SMALL, "d_model": 32}
WIDE = {**SMALL, "d_model": 64}  # Deformable DETR normalizes in 32 groups, of at least two channels here
TWO = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 7}
GROUPS = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 1,
    "decoder_cross_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "decoder_n_points": 2,
    "num_queries": 6,
    "group_detr": 3,
    "num_labels": 3,
}
OTHER_GROUPS = {
    "d_model": 64,
    "decoder_layers": 3,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 8,
    "decoder_ffn_dim": 40,
    "decoder_n_points": 3,
    "num_queries": 5,
    "group_detr": 2,
}
CASES = {
    "detr": Case(
        "Detr",
        "detr",
        DENSE,
        {
            **OTHER,
            "d_model": 48,
            "activation_function": "gelu",
            "auxiliary_loss": True,
            "position_embedding_type": "learned",
        },
    ),
    "table": Case(
        "TableTransformer",
        "table-transformer",
        DENSE,
        {
            **OTHER,
            "d_model": 48,
            "activation_function": "silu",
            "auxiliary_loss": True,
            "position_embedding_type": "learned",
        },
    ),
    "conditional": Case(
        "ConditionalDetr",
        "conditional_detr",
        DENSE,
        {**OTHER, "d_model": 48, "activation_function": "swish", "auxiliary_loss": True},
    ),
    "dab": Case(
        "DabDetr", "dab-detr", {**SMALL, "hidden_size": 32}, {**OTHER, "hidden_size": 48, "activation_function": "relu"}
    ),
    "deformable": Case(
        "DeformableDetr",
        "deformable_detr",
        WIDE,
        {
            **OTHER,
            "d_model": 96,
            "activation_function": "gelu",
            "num_feature_levels": 3,
            "encoder_n_points": 3,
            "decoder_n_points": 3,
            "with_box_refine": True,
        },
        (2, 3, 4),
    ),
    "two-stage": Case(
        "DeformableDetr",
        "deformable_detr",
        {**WIDE, **TWO},
        {"two_stage_num_proposals": 9, "activation_function": "silu"},
        (2, 3, 4),
    ),
    "rt": Case(
        "RTDetr",
        "rt_detr",
        RT,
        {
            **OTHER,
            "encoder_layers": 2,
            "d_model": 48,
            "encoder_hidden_dim": 64,
            "decoder_in_channels": [64] * 3,
            "hidden_expansion": 0.7,
            "encoder_activation_function": "silu",
            "activation_function": "gelu",
            "decoder_activation_function": "gelu",
            "decoder_n_points": 3,
        },
        (2, 3, 4),
    ),
    "rt v2": Case(
        "RTDetrV2",
        "rt_detr_v2",
        RT,
        {
            **OTHER,
            "encoder_layers": 2,
            "d_model": 48,
            "encoder_hidden_dim": 64,
            "decoder_in_channels": [64] * 3,
            "hidden_expansion": 1.0,
            "encoder_activation_function": "relu",
            "activation_function": "relu",
            "decoder_activation_function": "silu",
            "decoder_n_points": 3,
            "decoder_method": "discrete",
        },
        (2, 3, 4),
    ),
    "lw": Case(
        "LwDetr",
        "lw_detr",
        {**GROUPS, "projector_scale_factors": [2.0, 0.5]},
        {**OTHER_GROUPS, "projector_scale_factors": [1.0]},
    ),
    "rf": Case("RfDetr", "rf_detr", {**GROUPS, "dropout": 0.0}, OTHER_GROUPS),
    "d_fine": Case(
        "DFine",
        "d_fine",
        {**RT, "depth_mult": 0.67},
        {
            **OTHER,
            "encoder_layers": 2,
            "encoder_ffn_dim": 44,
            "d_model": 48,
            "encoder_hidden_dim": 64,
            "encoder_in_channels": [64, 128],
            "decoder_in_channels": [64] * 2,
            "feat_strides": [16, 32],
            "encode_proj_layers": [1],
            "num_feature_levels": 2,
            "hidden_expansion": 0.7,
            "depth_mult": 0.34,
            "encoder_activation_function": "relu",
            "decoder_activation_function": "silu",
            "decoder_n_points": [2, 5],
            "decoder_method": "discrete",
            "max_num_bins": 8,
            "reg_scale": 8.0,
            "up": 0.7,
        },
        (2, 3, 4),
    ),
}
CASES["deimv2"] = Case(
    "Deimv2",
    "deimv2",
    {**RT, "depth_mult": 0.67},
    {
        **{key: value for key, value in CASES["d_fine"].variant.items() if key != "hidden_expansion"},
        "hidden_expansion": 0.7,
        "encoder_hidden_dim": 48,
        "decoder_in_channels": [48] * 2,
        "encoder_has_trailing_conv": False,
        "use_gateway": False,
        "share_bbox_head": True,
    },
    (2, 3, 4),
)
LITE = {
    "encoder_type": "lite",
    "encoder_layers": 0,
    "encoder_in_channels": [64],
    "decoder_in_channels": [32] * 2,
    "feat_strides": [16, 32],
    "num_feature_levels": 2,
    "decoder_n_points": [3, 2],
}
CASES["deimv2 lite"] = Case("Deimv2", "deimv2", {**RT, **LITE}, {**LITE, "decoder_n_points": [4, 2]}, (2, 3, 4))
# The windowed transformers, with maps of two of their blocks, the last of which is not the last of all.
WINDOWED: dict[str, dict[str, Any]] = {
    "lw_detr": {
        "model_type": "lw_detr_vit",
        "image_size": 128,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "window_block_indices": [0, 2],
        "out_indices": [2, 3],
        "num_windows": 4,
    },
    "rf_detr": {
        "model_type": "rf_detr_dinov2",
        "image_size": 64,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "patch_size": 16,
        "out_indices": [1, 3],
        "num_windows": 2,
    },
}
# Other names of keys, and what no file can vary with transformers 5.23: its model of learned queries does not run.
UNVARIED = {"num_attention_heads", "num_hidden_layers", "hidden_size", "learn_initial_query"}
HYBRID = ("rt_detr", "d_fine", "deimv2")  # members whose encoder and decoder have sizes of their own
# Keys of D-FINE that change together.
OF_LEVELS = ("encoder_in_channels", "feat_strides", "encode_proj_layers", "num_feature_levels", "decoder_n_points")
case = pytest.mark.parametrize("name", CASES)
FILES = TemporaryDirectory(prefix="edgedetr-hub-")  # models are shared by tests; gone when the process ends


def backbone(member: str, levels: tuple[int, ...], **options: Any) -> Any:
    if member in WINDOWED:
        return {**WINDOWED[member], **options}
    kind = transformers.RTDetrResNetConfig if member in HYBRID else transformers.ResNetConfig
    return kind(
        **{
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64, 128],
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
            "out_features": [f"stage{level}" for level in levels],
            **options,
        }
    )


@torch.no_grad()
def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights that keep the size of what passes, so that activations are where they bend."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.requires_grad:  # a constant of the configuration (D-FINE)
            continue
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.4 / fan_in**0.5 if fan_in else 0.3))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm) or hasattr(module, "running_var"):
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
        if isinstance(module, torch.nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
        if hasattr(module, "running_var"):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    heads = [getattr(model, name, None) for name in ("class_embed", "bbox_embed")]
    if isinstance(heads[0], torch.nn.ModuleList) and not getattr(model.config, "two_stage", True):
        # One-stage files hold one class head, and one box head for all layers unless each refines.
        for head in heads[: 1 if model.config.with_box_refine else 2]:
            for copy in head[1:]:
                copy.load_state_dict(head[0].state_dict())
    for name in ("class_embed", "bbox_embed"):
        inner = getattr(getattr(model.model, "decoder", None), name, None)
        outer = getattr(model, name, None) or getattr(model, "bbox_predictor", None)
        if inner is not None and outer is not None:
            inner.load_state_dict(outer.state_dict())
    if hasattr(model.config, "group_detr"):  # sides grow exponentially: boxes of the image's size, and not of 35 images
        for head in (model.bbox_embed, *model.model.enc_out_bbox_embed):
            head.layers[-1].weight.mul_(0.2)
    return model.eval()


@cache
def images(square: bool = False) -> torch.Tensor:
    """square: for transformers' RF-DETR, whose windows of other images mix up rows and columns, as its authors' do"""
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))[..., : 64 if square else None]


def precision(kind: str) -> torch.dtype:
    """float64 for the classes that differ by up to 1.4 times the bound in float32 on a Xeon; not all can run in it."""
    return torch.float64 if kind in ("rt_detr", "deimv2", "d_fine") else torch.float32


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    kind = model.config.model_type
    with torch.no_grad():
        found = deepcopy(model).to(precision(kind))(pixel_values=images(kind == "rf_detr").to(precision(kind)))
    return found.logits, found.pred_boxes


@dataclass(frozen=True)
class Saved:
    """A model of transformers, and its files."""

    model: Any
    folder: Path
    raw: dict[str, Any]


def saved(one: Case, **options: Any) -> Saved:
    model = lively(getattr(transformers, f"{one.name}ForObjectDetection")(one.config(**options)))
    folder = Path(mkdtemp(dir=FILES.name))
    model.save_pretrained(folder)
    return Saved(model, folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))


@cache
def plain(name: str) -> Saved:
    return saved(CASES[name])


def imported(one: Case, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same images through the model that we import."""
    read = architecture(WeightSource(str(folder)), one.member)
    detector = build(one.member, read.recipe.model.config, 3).eval()
    assert load_weights(detector, read.weights, str(folder)).fresh == ()
    with torch.no_grad():
        dtype = precision(one.kind)
        found = detector.to(dtype)(images(one.member == "rf_detr").to(dtype), last_only=True)
    return found.logits[-1], found.boxes[-1]


def same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=0)


def keys_of(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} | set(config.to_dict())


def other(key: str, value: Any) -> Any:
    """Another value of the same type, for what transformers itself takes."""
    named = {
        "anchor_image_size": [64, 96],
        "dtype": "float16",
        "transformers_version": "1.0",
        "label2id": {"x": 0},
        "initializer_bias_prior_prob": 0.1,
        "problem_type": "regression",
        "tie_last_hidden_states": True,
        "_name_or_path": "elsewhere",
        "encoder_in_channels": [32],
        "decoder_in_channels": [32],
        "feat_strides": [4, 8, 16],
        "encode_proj_layers": [1],
        "eval_size": 64,
        "mal_alpha": 0.3,
        "per_layer_config": {"0": {"x": 1}},
        "sine_position_embedding_scale": 5.0,
        "position_embedding_type": "learned",
        "auto_map": {"AutoModel": "x"},
        "quantization_config": {"bits": 8},
        "pruned_heads": {"0": [1]},
        "hidden_act": "gelu",
        "stage_names": ["stem", "stage1"],
    }
    if key in named:
        return named[key]
    if isinstance(value, (bool, type(None))):
        return not value
    return value + 0.2 if isinstance(value, float) else value + 1 if isinstance(value, int) else "something"


@case
def test_every_key_of_the_configuration_class_is_in_the_table(name: str) -> None:
    """A new version of transformers with a new key fails here."""
    one = CASES[name]
    unknown = keys_of(one.config()) - set(SOURCES[one.kind].keys)
    assert not unknown, f"transformers {transformers.__version__}: {sorted(unknown)} of {one.name}Config"


@pytest.mark.parametrize(
    "kind, config",
    [
        ("resnet", lambda: transformers.ResNetConfig()),
        ("rt_detr_resnet", lambda: transformers.RTDetrResNetConfig()),
        ("hgnet_v2", lambda: transformers.HGNetV2Config()),
        ("timm_backbone", lambda: transformers.TimmBackboneConfig()),
        ("vit", lambda: transformers.ViTConfig()),
    ],
)
def test_every_key_of_a_backbones_configuration_class_is_in_the_table(kind: str, config: Callable[[], Any]) -> None:
    keys = {**BACKBONES, **ALONE}[kind]
    unknown = {key for key in keys_of(config()) if not key.startswith("_out")} - set(keys)
    assert not unknown, f"transformers {transformers.__version__}: {sorted(unknown)}"


def test_every_member_with_a_layout_of_transformers_has_its_classes() -> None:
    layouts = {
        name for name, one in FAMILY.items() if any(layout.source.startswith("transformers") for layout in one.layouts)
    }
    assert layouts == set(MEMBER_OF.values())
    assert {one.kind for one in CASES.values()} == set(SOURCES)


@case
def test_a_file_of_transformers_computes_the_same_here(name: str) -> None:
    theirs = outputs(plain(name).model)
    assert theirs[0].std() > 0.1 and theirs[1].std() > 0.02, "the reference says something"
    same(imported(CASES[name], plain(name).folder), theirs)


@case
def test_every_key_that_is_read_is_read_as_transformers_does(name: str) -> None:
    one = CASES[name]
    keys = {key for key, entry in SOURCES[one.kind].keys.items() if isinstance(entry, (Read, Same))}
    varied = set().union(*(other_case.variant for other_case in CASES.values() if other_case.kind == one.kind))
    varied |= set().union(*({"two_stage", "with_box_refine"} for case_ in CASES.values() if case_.kind == one.kind))
    assert keys - varied - UNVARIED - {"d_model", "hidden_size"} == set(), "a key without a variant"
    theirs = saved(one, **one.variant)
    same(imported(one, theirs.folder), outputs(theirs.model))


@case
def test_keys_without_effect_change_nothing_in_transformers_and_nothing_here(name: str) -> None:
    one, before = CASES[name], plain(name)
    fields = before.model.config.to_dict()
    changed = {
        key: other(key, fields[key])
        for key, entry in SOURCES[one.kind].keys.items()
        if isinstance(entry, NoEffect) and key in fields and key not in ("return_dict", "dtype")
    }
    assert len(changed) > 20
    after = getattr(transformers, f"{one.name}ForObjectDetection")(one.config(**changed)).eval()
    after.load_state_dict(before.model.state_dict())
    for ours, theirs in zip(outputs(after), outputs(before.model)):
        # A BatchNorm that is not frozen rounds otherwise: measured 4e-6.
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    table = SOURCES[one.kind].keys
    everything = {key: other(key, before.raw.get(key)) for key, entry in table.items() if isinstance(entry, NoEffect)}
    assert (
        read_config({**before.raw, **everything}, one.member, "c").values
        == read_config(before.raw, one.member, "c").values
    )


@case
def test_a_value_that_we_do_not_compute_is_refused_by_name(name: str) -> None:
    one, raw = CASES[name], plain(name).raw
    for key, entry in SOURCES[one.kind].keys.items():
        if isinstance(entry, Only):
            value = other(key, raw.get(key, entry.values[0]))
            with pytest.raises(ModelError, match=f"{key} is .*{json.dumps(value)[:20].split('[')[0]}"):
                read_config({**raw, key: value}, one.member, "config.json")
        elif isinstance(entry, Read):
            wrong: list[Any] = ["tanh", None, -1, 0.5, [], {}, "x" * 5000] if entry.words else ["x", -1, 1.5, [], {}]
            for value in wrong:
                with pytest.raises(ModelError, match=key):
                    read_config({**raw, key: value}, one.member, "config.json")
    with pytest.raises(ModelError, match=r"unknown key 'num_querys' = 7; did you mean 'num_queries'"):
        read_config({**raw, "num_querys": 7}, one.member, "config.json")


@case
def test_a_key_that_contradicts_the_tensors_is_refused_by_name(name: str) -> None:
    one, before = CASES[name], plain(name)
    weights = conversion.translate(one.member, WeightSource(str(before.folder)).weights())
    for key, entry in SOURCES[one.kind].keys.items():
        if not isinstance(entry, Same) or key not in before.raw or key == "encoder_type":
            continue  # the encoder's type decides which levels are read, so that another is refused before
        if entry.default is not None and json.dumps(entry.default) != json.dumps(before.raw[key]):
            lacking = read_config({k: v for k, v in before.raw.items() if k != key}, one.member, "config.json")
            with pytest.raises(ModelError, match=f"{key} is {json.dumps(entry.default)}, but the tensors say"):
                lacking.require_agreement(config_from_state_dict(member(one.member), weights, 4))
        raw = {**before.raw, key: other(key, before.raw[key])}
        config = read_config(raw, one.member, "config.json")
        with pytest.raises(ModelError, match=re.escape(f"{key} is {json.dumps(raw[key])}, but the tensors say")):
            config.require_agreement(config_from_state_dict(member(one.member), weights, 4))


def test_heads_that_differ_between_encoder_and_decoder_are_refused() -> None:
    raw = {**plain("detr").raw, "decoder_attention_heads": 2}
    with pytest.raises(ModelError, match=r"encoder_attention_heads = 4 and decoder_attention_heads = 2 differ"):
        read_config(raw, "detr", "config.json")


TIMM = {"backbone_config": None, "use_timm_backbone": True}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "maskformer"},
            'model_type is "maskformer"; rt_detr is read from rt_detr or rt_detr_v2; import an ONNX',
        ),
        ({"model_type": "detr"}, 'model_type is "detr"; .* use --model detr'),
        ({"model_type": None}, "model_type is null"),
        ({"model_type": ["rt_detr"]}, "model_type is "),
        ({"architectures": ["RTDetrModel"]}, "architectures is .*RTDetrModel.*expected RTDetrForObjectDetection"),
        ({"architectures": "RTDetrForObjectDetection"}, "architectures is "),
        ({"backbone_config": "resnet"}, 'backbone_config is "resnet"; expected an object'),
        ({"backbone_config": {"model_type": "swin"}}, 'backbone_config: model_type is "swin"'),
        ({"backbone_config": None, "backbone": "microsoft/swin-tiny"}, 'backbone is "microsoft/swin-tiny"'),
        ({**TIMM, "backbone": "efficientnet_b0"}, 'backbone is "efficientnet_b0"'),
        ({**TIMM, "backbone_kwargs": {"output_stride": 8}}, "output_stride is 8"),
        ({**TIMM, "backbone_kwargs": {"act_layer": "x"}}, "backbone_kwargs is "),
        ({**TIMM, "dilation": "yes"}, 'dilation is "yes"'),
    ],
)
def test_another_architecture_is_refused_by_its_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config({**plain("rt").raw, **changes}, "rt_detr", "config.json")


@pytest.mark.parametrize("name", ["rt", "deformable", "detr"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("downsample_in_bottleneck", True),
        ("downsample_in_first_stage", True),
        ("num_channels", 4),
        ("out_features", ["stage2", "stage3"]),
        ("out_features", "stage4"),
        ("unheard_of", 1),
        ("stage_names", ["stem"]),
    ],
)
def test_a_nested_backbone_is_read_as_strictly(name: str, key: str, value: Any) -> None:
    raw = plain(name).raw
    inner = {**raw["backbone_config"], key: value}
    if key == "out_features":
        inner.pop("out_indices", None)
    with pytest.raises(ModelError, match=f"backbone_config.*{key}"):
        read_config({**raw, "backbone_config": inner}, CASES[name].member, "config.json")


@pytest.mark.parametrize("name", ["rt", "detr"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("depths", [1, 1, 1, 1]),
        ("depths", None),
        ("hidden_sizes", [16, 32, 64, 256]),
        ("embedding_size", 32),
        ("layer_type", "bottleneck"),
    ],
)
def test_sizes_of_a_nested_backbone_are_those_of_the_tensors(name: str, key: str, value: Any) -> None:
    """Transformers builds what they describe, and leaves out or draws the tensors that do not fit."""
    one, before = CASES[name], plain(name)
    found = config_from_state_dict(
        member(one.member), conversion.translate(one.member, WeightSource(str(before.folder)).weights()), 4
    )
    read_config(before.raw, one.member, "c").require_agreement(found)
    inner = {**before.raw["backbone_config"], key: value}
    with pytest.raises(ModelError, match=f"backbone_config: {key} is .*, but the tensors say"):
        read_config({**before.raw, "backbone_config": inner}, one.member, "c").require_agreement(found)
    del inner[key]
    with pytest.raises(ModelError, match=f"backbone_config: {key} is .*, but the tensors say"):
        read_config({**before.raw, "backbone_config": inner}, one.member, "c").require_agreement(found)


def test_levels_that_contradict_each_other_are_refused() -> None:
    raw = plain("detr").raw
    inner = {**raw["backbone_config"], "out_indices": [4], "out_features": ["stage3"]}
    with pytest.raises(ModelError, match="out_features is .*stage3"):
        read_config({**raw, "backbone_config": inner}, "detr", "c")


@pytest.mark.parametrize(
    "outs",
    [{"out_indices": [1, 2, 3, 4]}, {"out_indices": [4]}, {"out_indices": [-1]}, {"out_features": ["stage4"]}, {}],
)
def test_backbones_may_name_their_levels_in_each_way(outs: dict[str, Any]) -> None:
    raw = plain("detr").raw
    inner = {key: value for key, value in raw["backbone_config"].items() if not key.startswith("out_")}
    read_config({**raw, "backbone_config": {**inner, **outs}}, "detr", "config.json")
    if outs.get("out_indices") != [1, 2, 3, 4]:
        with pytest.raises(ModelError, match="out_"):
            read_config({**plain("rt").raw, "backbone_config": {**inner, **outs}}, "rt_detr", "config.json")


def test_timm_dilates_and_transformers_own_resnet_does_not() -> None:
    raw = plain("detr").raw
    assert "dilate_last" not in read_config({**raw, "dilation": True}, "detr", "c").values
    inner = {"model_type": "timm_backbone", "backbone": "resnet50.a1_in1k", "out_indices": [1, 2, 3, 4]}
    timm = read_config({**raw, "backbone_config": {**inner, "output_stride": 16}}, "detr", "c")
    assert timm.values["dilate_last"] is True and timm.backbone == "resnet50"
    old = {key: value for key, value in raw.items() if key != "backbone_config"}
    assert (
        read_config({**old, "dilation": True, "backbone": "resnet101", "use_timm_backbone": True}, "detr", "c").values[
            "dilate_last"
        ]
        is True
    )
    assert read_config({**old, "use_timm_backbone": True}, "detr", "c").backbone == "resnet50"
    with pytest.raises(ModelError, match="backbone is resnet50, but the tensors are those of resnet18 at width 0.25"):
        read_config({"model_type": "detr"}, "detr", "c").require_agreement(
            {"backbone": "resnet18", "backbone_width": 0.25}
        )


def test_a_backbone_alone_is_looked_at_as_well() -> None:
    vit = transformers.ViTConfig().to_dict()
    check_backbone_config(json.loads(transformers.ViTConfig().to_json_string(use_diff=False)), "c")
    check_backbone_config(json.loads(transformers.ResNetConfig().to_json_string(use_diff=False)), "c")
    check_backbone_config({"architecture": "resnet50", "num_classes": 1000}, "c")
    for key, value in (("hidden_act", "relu"), ("num_attention_heads", 6), ("num_channels", 1)):
        with pytest.raises(ModelError, match=key):
            check_backbone_config({**vit, key: value, "dtype": None}, "c")
    with pytest.raises(ModelError, match='model_type is "swin"'):
        check_backbone_config({"model_type": "swin"}, "c")


# As transformers 4.57 writes a nested configuration, in full.
OLD = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


@case
def test_files_of_older_versions_have_more_keys_and_are_read(name: str) -> None:
    raw = plain(name).raw
    inner = {**raw["backbone_config"], **OLD}
    config = read_config(
        {
            **raw,
            **OLD,
            "is_encoder_decoder": True,
            **({} if CASES[name].member in WINDOWED else {"num_hidden_layers": raw["encoder_layers"]}),
            "max_position_embeddings": 1024,
            "classifier_dropout": 0.0,
            "scale_embedding": False,
            "use_pretrained_backbone": True,
            **({} if CASES[name].member in WINDOWED else {"backbone_kwargs": None}),
            "backbone_config": inner,
        },
        CASES[name].member,
        "config.json",
    )
    assert config.values == read_config(raw, CASES[name].member, "config.json").values


def test_what_is_read_defaults_to_what_transformers_takes() -> None:
    """config.json leaves out what its class has by default."""
    for one in CASES.values():
        default = getattr(transformers, f"{one.name}Config")()
        for key, entry in SOURCES[one.kind].keys.items():
            if isinstance(entry, (Read, Same)) and entry.default is not None:
                ours, theirs = (json.dumps(value) for value in (entry.default, getattr(default, key)))
                assert ours == theirs, f"{one.kind} {key}"  # as JSON, where a tuple is a list
            if isinstance(entry, Only) and hasattr(default, key) and key in keys_of(default):
                value = json.loads(json.dumps(getattr(default, key)))
                assert entry.of(value) in entry.values, f"{one.kind} {key}"


@pytest.mark.slow
@case
def test_each_key_alone_is_read_as_transformers_does_and_acts_there(name: str) -> None:
    """One model per key that is read: it changes the outputs there, and in the same way here."""
    one, base = CASES[name], outputs(plain(name).model)
    for key, value in one.variant.items():
        if one.plain.get(key) == value:
            continue
        options = {key: value}
        pair = key.replace("encoder", "decoder")
        if key.startswith("decoder") and key.replace("decoder", "encoder") in one.variant and one.member not in HYBRID:
            if not key.startswith("decoder_layers"):
                continue  # with the encoder's
        elif key in ("encoder_attention_heads", "decoder_attention_heads"):
            options = {"encoder_attention_heads": value, "decoder_attention_heads": value}
        elif key.startswith("encoder") and pair in one.variant and one.member not in HYBRID and key != "encoder_layers":
            options[pair] = value
        elif one.member == "deimv2" and key in ("d_model", "encoder_hidden_dim", "decoder_in_channels"):
            options = {"d_model": 48, "encoder_hidden_dim": 48, "decoder_in_channels": [48] * 3}
        elif key in ("encoder_hidden_dim", "decoder_in_channels"):
            options = {"encoder_hidden_dim": 64, "decoder_in_channels": [64] * 3}
        elif one.member in ("d_fine", "deimv2") and key in OF_LEVELS:
            options = {of: one.variant[of] for of in OF_LEVELS if of in one.variant} | {"decoder_in_channels": [32] * 2}
        theirs = saved(one, **options)
        found = outputs(theirs.model)
        ours = imported(one, theirs.folder)
        # Boxes of random heads span the image; rounding of float32 reaches 1.3e-5 there, measured over all keys.
        torch.testing.assert_close(ours[0], found[0], atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(ours[1], found[1], atol=3e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        if found[0].shape == base[0].shape:
            changed = max(float((a - b).abs().max()) for a, b in zip(found, base))
            if key in ("reg_scale", "up"):  # sides move by fractions of a box's size, and boxes are small here
                changed = float((found[1] / base[1] - 1)[..., 2:].abs().max())
            assert changed > 1e-3, f"{key} does nothing"


def test_learned_queries_are_read_although_transformers_itself_does_not_run_them() -> None:
    """Its 5.23 takes an Embedding for a tensor; once it runs, learn_initial_query belongs into the variants."""
    theirs = saved(CASES["rt"], learn_initial_query=True)
    with pytest.raises(AttributeError, match="tile"):
        outputs(theirs.model)
    assert imported(CASES["rt"], theirs.folder)[0].shape == (1, 6, 3)
    read = architecture(WeightSource(str(theirs.folder)), "rt_detr")
    assert read.recipe.model.config.learned_content
    with pytest.raises(ModelError, match="learn_initial_query is false, but the tensors say true"):
        raw = {"model_type": "rt_detr", "learn_initial_query": False}
        read_config(raw, "rt_detr", "c").require_agreement({"learned_content": True})


def test_a_training_that_starts_from_another_configuration_says_which_key(caplog: pytest.LogCaptureFixture) -> None:
    before = plain("rt")
    config = architecture(WeightSource(str(before.folder)), "rt_detr").recipe.model.config
    detector = build("rt_detr", config, 3)
    assert load_detector(detector, "rt_detr", str(before.folder), config).fresh == ()
    with pytest.raises(ModelError, match=r"its model has heads = 4, and this one 8; use --set model.heads=4"):
        load_detector(detector, "rt_detr", str(before.folder), dataclasses.replace(config, heads=8))
    with pytest.raises(ModelError, match=r"encoder_activation = 'gelu', and this one 'relu'; .*_activation=gelu"):
        load_detector(detector, "rt_detr", str(before.folder), dataclasses.replace(config, encoder_activation="relu"))
    # Of queries that are selected, a training may take fewer.
    load_detector(detector, "rt_detr", str(before.folder), dataclasses.replace(config, queries=5))
    assert "its model has 6 queries, and this one 5" in caplog.text


def test_a_backbone_of_another_architecture_is_refused_where_a_training_names_it(tmp_path: Path) -> None:
    before = plain("rt")
    config = architecture(WeightSource(str(before.folder)), "rt_detr").recipe.model.config
    detector = build("rt_detr", config, 3)
    assert load_backbone(detector, dataclasses.replace(config, backbone_weights=str(before.folder))) is not None
    shutil.copy(before.folder / "model.safetensors", tmp_path)
    inner = {**before.raw["backbone_config"], "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps({**before.raw, "backbone_config": inner}), encoding="utf-8")
    with pytest.raises(ModelError, match='backbone_config: hidden_act is "gelu"'):
        load_backbone(detector, dataclasses.replace(config, backbone_weights=str(tmp_path)))


UNUSUAL: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "relu",
    "\ud800",
    [],
    [None],
    [[]],
    {},
    {"a": []},
    {"model_type": "resnet"},
    {"model_type": "timm_backbone", "backbone": []},
    {"model_type": "resnet", "out_features": [[]]},
    list(range(1000)),
]


@pytest.mark.parametrize("name", ["detr", "deformable", "rt v2"])
def test_unusual_values_of_every_key_are_read_or_one_error(name: str) -> None:
    """Every key and every nested key, twenty values each."""
    one, raw = CASES[name], plain(name).raw
    found = {"hidden": 32, "ffn": 48, "encoder_layers": 2, "points": 4, "expansion": 0.5, "backbone": "resnet18"}
    said: list[str] = []
    for value in UNUSUAL:
        changed = [{**raw, key: value} for key in SOURCES[one.kind].keys]
        changed += [{**raw, "backbone_config": {**raw["backbone_config"], key: value}} for key in BACKBONES["resnet"]]
        for content in changed:
            try:
                read_config(content, one.member, "config.json").require_agreement(found)
            except ModelError as error:
                said.append(str(error))
    assert len(said) > 1000 and max(map(len, said)) < 600


def test_tables_say_why() -> None:
    for source in SOURCES.values():
        for key, entry in source.keys.items():
            assert type(entry) is not Key and isinstance(entry, (Read, Same, Only, NoEffect, Special))
            assert entry.why or isinstance(entry, (Read, Same)), key


def test_blocks_that_are_read_otherwise_than_in_the_file_are_refused_as_a_recipe_writes_them() -> None:
    one = plain("rf")
    config = dataclasses.replace(
        architecture(WeightSource(str(one.folder)), "rf_detr").recipe.model.config, backbone_maps=(1, 2)
    )
    with pytest.raises(
        ModelError, match=r"backbone_maps = \[0, 2\], and this one \[1, 2\]; use --set model.backbone_maps="
    ):
        load_detector(build("rf_detr", config, 3), "rf_detr", str(one.folder), config)
