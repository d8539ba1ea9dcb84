"""Read config.json of transformers: every key is read, compared with the tensors, or refused by name.

The tables of keys are in transformers_keys.py. The types of all values are checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedetr.errors import EdgedetrError, ModelError, did_you_mean
from edgedetr.models import FAMILY
from edgedetr.models.backbones import hgnetv2
from edgedetr.models.backbones.resnet import DEPTHS
from edgedetr.models.backbones.vit_designs import DESIGNS, ROTARY_DESIGNS
from edgedetr.models.checkpoints.transformers_keys import (
    ALONE,
    BACKBONES,
    VIT_HEAD,
    WINDOWED_VITS,
    Key,
    Only,
    Read,
    Same,
    TransformersClass,
)
from edgedetr.storage.reading import read_json

JSON_LIMIT = 4 << 20  # bytes of a configuration; one of a thousand classes has 60 kB
STAGES = 5  # stem and four stages, which out_indices count from 0, or from the end below 0
# By model_type in config.json: the member that reads it, and the class of transformers.
MEMBER_OF = {kind: member.name for member in FAMILY.values() for kind in member.transformers}
SOURCES = {kind: source for member in FAMILY.values() for kind, source in member.transformers.items()}
TIMM = re.compile(r"(resnet(?:18|34|50|101))(d?)(?:\.\w+)?$")
HUB = re.compile(r"microsoft/(resnet-(?:18|34|50|101))$")
# By model_type of a nested backbone: transformers' defaults of the keys that tell its sizes.
_RESNET_50: dict[str, Any] = {
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
}
STAGED_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet": _RESNET_50,
    "rt_detr_resnet": _RESNET_50,
    "hgnet_v2": {
        "stem_channels": [3, 32, 48],
        "stage_in_channels": [48, 128, 512, 1024],
        "stage_mid_channels": [48, 96, 192, 384],
        "stage_out_channels": [128, 512, 1024, 2048],
        "stage_num_blocks": [1, 1, 3, 1],
        "stage_numb_of_layers": [6, 6, 6, 6],
        "stage_light_block": [False, False, True, True],
        "stage_kernel_size": [3, 3, 5, 5],
        "use_learnable_affine_block": False,
    },
}
HEADS_OF_64 = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
# Of a windowed transformer: LwDetrViTConfig and RfDetrDinov2Config.
WINDOWED_DEFAULTS: dict[str, dict[str, Any]] = {
    "lw_detr_vit": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 16, "num_windows": 16},
    "rf_detr_dinov2": {"hidden_size": 768, "num_attention_heads": 12, "patch_size": 14, "num_windows": 4},
}
# DINOv3ViTConfig.
DINOV3_DEFAULTS: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "use_gated_mlp": False,
    "hidden_act": "gelu",
    "apply_layernorm": True,
}
FIX = "import an ONNX export of it: edgedetr import FILE.onnx"


@dataclass(frozen=True)
class TransformersConfig:
    """A checked config.json.

    where     the file, for messages
    raw       its keys
    source    the class of transformers that it configures
    values    of fields of the member's configuration
    backbone  our name of the backbone, if the file names one of timm or of the hub; else ""
    """

    where: str
    raw: Mapping[str, Any]
    source: TransformersClass
    values: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""

    def require_agreement(self, found: Mapping[str, Any]) -> None:
        """Compare with the configuration of the tensors. Errors: ModelError that names the key and both values."""
        width = found.get("encoder_width") or found.get("hidden")
        for key, entry in self.source.keys.items():
            if not isinstance(entry, (Read, Same)) or (key not in self.raw and not _has_default(entry)):
                continue
            ours = width if entry.field == "encoder_width" else found.get(entry.field)
            stated = self.raw.get(key, entry.default)
            theirs = self.values.get(entry.field) if isinstance(entry, Read) else entry.of(stated)
            unknown = ours is None and (isinstance(entry, Read) or key not in self.raw)
            if unknown or _equal(entry.field, ours, theirs, width):
                continue
            raise ModelError(
                f"{self.where}: {key} is {as_text(stated)}, but the tensors say "
                f"{'none' if ours is None else as_text(ours)}{_reason(entry)}; expected the config.json "
                "that belongs to the weights"
            )
        if self.backbone and (found.get("backbone"), found.get("backbone_width")) != (self.backbone, 1):
            raise ModelError(
                f"{self.where}: backbone is {self.backbone}, but the tensors are those of "
                f"{found.get('backbone')} at width {found.get('backbone_width')}; expected the "
                "config.json that belongs to the weights"
            )
        self._require_agreement_of_stages(found)
        self._require_agreement_of_windowed_vit(found)
        self._require_agreement_of_dinov3(found)

    def _require_agreement_of_stages(self, found: Mapping[str, Any]) -> None:
        """Compare the sizes of a nested backbone, or transformers' defaults of them, with those of the tensors."""
        nested = self.raw.get("backbone_config")
        if not isinstance(nested, dict) or nested.get("model_type") not in STAGED_DEFAULTS:
            return
        kind, name = str(nested["model_type"]), str(found.get("backbone"))
        if (kind == "hgnet_v2") != (name in hgnetv2.NAMES):
            raise ModelError(
                f"{self.where}: backbone_config: model_type is {kind}, but the tensors are those of {name}; expected "
                "the config.json that belongs to the weights"
            )
        for key, value in _stages(name, found.get("backbone_width", 1)).items():
            stated = nested.get(key, STAGED_DEFAULTS[kind][key])
            if stated != value:
                raise ModelError(
                    f"{self.where}: backbone_config: {key} is {as_text(stated)}, but the tensors say "
                    f"{as_text(value)}; expected the config.json that belongs to the weights"
                )

    def _require_agreement_of_windowed_vit(self, found: Mapping[str, Any]) -> None:
        """Compare the sizes of a nested windowed transformer with those of the tensors."""
        nested = self.raw.get("backbone_config")
        if not self.source.windowed_vit or not isinstance(nested, dict):
            return
        design = DESIGNS[found["backbone"]]
        ours = {
            "hidden_size": round(design.dim * found["backbone_width"]),
            "num_attention_heads": design.heads,
            "patch_size": found["backbone_patch"],
        }
        for key, value in ours.items():
            stated = nested.get(key, WINDOWED_DEFAULTS[self.source.windowed_vit][key])
            if stated != value:
                raise ModelError(
                    f"{self.where}: backbone_config: {key} is {as_text(stated)}, but the tensors are those of a "
                    f"{found['backbone']} with {as_text(value)}; expected the config.json that belongs to the weights"
                )

    def _require_agreement_of_dinov3(self, found: Mapping[str, Any]) -> None:
        """Compare a nested transformer of DINOv3's kind with the design that the tensors are of."""
        nested = self.raw.get("backbone_config")
        if not isinstance(nested, dict) or nested.get("model_type") != "dinov3_vit":
            return
        where, name = f"{self.where}: backbone_config", str(found.get("backbone"))
        design = ROTARY_DESIGNS.get(name)
        if design is None:
            raise ModelError(
                f"{where}: model_type is dinov3_vit, but the tensors are those of {name}; expected the config.json "
                "that belongs to the weights"
            )
        if not design.pretrained:
            raise ModelError(
                f"{where}: model_type is dinov3_vit, whose last map transformers normalizes; the authors' code does "
                f"not for {name} (DEIMv2-S and M), of which these tensors are, so detections would differ from "
                "what was trained; import the authors' file, the .pth of Intellindust-AI-Lab/DEIMv2"
            )
        dim = round(design.dim * found.get("backbone_width", 1))
        ours: dict[str, Any] = {
            "hidden_size": dim,
            "intermediate_size": 4 * dim,
            "num_attention_heads": design.heads,
            "num_hidden_layers": design.maps[-1] + 1,
            "use_gated_mlp": design.gated,
            "hidden_act": "silu" if design.gated else "gelu",
            "apply_layernorm": True,
        }
        stated: dict[str, Any] = {key: nested.get(key, DINOV3_DEFAULTS[key]) for key in ours}
        ours["out_indices"] = [block + 1 for block in design.maps]
        stated["out_indices"] = _stage_numbers(nested, where)
        for key, value in ours.items():
            if stated[key] != value:
                raise ModelError(
                    f"{where}: {key} is {as_text(stated[key])}, but the tensors are those of {name}, which has "
                    f"{as_text(value)}; expected the config.json that belongs to the weights"
                )


def _stages(name: str, width: float) -> dict[str, Any]:
    """The sizes of one of our backbones under transformers' keys; none for a backbone that is no ResNet or HGNetV2."""
    if name.removesuffix("vd") in DEPTHS:
        (depths, bottleneck), stem = DEPTHS[name.removesuffix("vd")], round(64 * width)
        return {
            "depths": list(depths),
            "layer_type": "bottleneck" if bottleneck else "basic",
            "embedding_size": stem,
            "hidden_sizes": [stem * 2**stage * (4 if bottleneck else 1) for stage in range(4)],
        }
    if name not in hgnetv2.SIZES:
        return {}
    size = hgnetv2.SIZES[name]
    inside, middle, outputs = (
        [hgnetv2.scaled(item, width) for item in part] for part in (size.stem, size.middle, size.outputs)
    )
    light = [stage in hgnetv2.LIGHT for stage in range(len(outputs))]
    return {
        "stem_channels": [3, *inside],
        "stage_in_channels": [inside[1], *outputs[:-1]],
        "stage_mid_channels": middle,
        "stage_out_channels": outputs,
        "stage_num_blocks": list(size.blocks),
        "stage_numb_of_layers": [size.layers] * len(outputs),
        "stage_light_block": light,
        "stage_kernel_size": [size.light_kernel if item else 3 for item in light],
        "use_learnable_affine_block": size.affine,
    }


def read_json_object(path: Path, error: type[EdgedetrError]) -> dict[str, Any]:
    """The object in a configuration file. Errors: `error`."""
    content = read_json(path, error, limit=JSON_LIMIT, fix="repair it, or remove it")
    if not isinstance(content, dict):
        raise error(f"{path}: {type(content).__name__}; expected an object; repair it, or remove it")
    return content


def config_labels(config: Mapping[str, Any], where: str, error: type[EdgedetrError]) -> list[str] | None:
    """Names of the classes in id2label of transformers' config.json, by index; None if it has none.

    Errors: `error` for labels that are not one name for each number from 0.
    """
    labels = config.get("id2label")
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise error(
            f"{where}: id2label is a {type(labels).__name__}; expected a name for each class; repair or remove it, "
            "or name the classes by --classes FILE"
        )
    if set(labels) != {str(index) for index in range(len(labels))}:
        raise error(
            f"{where}: id2label has {len(labels)} entries, which are not those from 0 to {len(labels) - 1}; repair it, "
            "or name the classes by --classes FILE and move it away"
        )
    listed = [labels[str(index)] for index in range(len(labels))]
    for name in listed:
        if not isinstance(name, (str, int, float)) or isinstance(name, bool):
            raise error(f"{where}: id2label holds a {type(name).__name__}; expected names")
    return [str(name) for name in listed]


def read_config(raw: Mapping[str, Any], member: str, where: str) -> TransformersConfig:
    """Check and read every key of a member's config.json.

    Errors: ModelError that names the key, its value and what is read, for a model that this package would not compute.
    """
    source = _source(raw, member, where)
    values: dict[str, Any] = {}
    stated: dict[str, str] = {}
    _check_keys(raw, source.keys, where)
    for key, entry in source.keys.items():
        if not isinstance(entry, Read):
            continue
        stated_one = key in raw or entry.of is not None
        value = _read(raw.get(key, entry.default), entry, f"{where}: {key}", raw) if stated_one else entry.default
        if value is None:
            continue
        if entry.field in values and values[entry.field] != value:
            raise ModelError(
                f"{where}: {stated[entry.field]} and {key} = {as_text(value)} differ; this package builds "
                f"{entry.why or 'one for both'}; {FIX}"
            )
        values[entry.field], stated[entry.field] = value, f"{key} = {as_text(value)}"
    if source.queries_key is not None:
        name = source.queries_key(raw)
        values["queries"] = _read(raw.get(name, 300), Read("", "queries", 300), f"{where}: {name}", raw)
    if source.windowed_vit:
        return TransformersConfig(where, raw, source, {**values, **_windowed_vit(raw, source.windowed_vit, where)})
    backbone, dilated = _backbone(raw, source, where)
    if dilated:
        values["dilate_last"] = True
    return TransformersConfig(where, raw, source, values, backbone)


def check_backbone_config(raw: Mapping[str, Any], where: str) -> None:
    """Check the config.json next to weights of which only the backbone is used.

    Files of other libraries (timm's have no model_type) contain nothing that the tensors do not show.

    Errors: ModelError that names the key, as in `read_config`.
    """
    kind = raw.get("model_type")
    if kind is None:
        return
    if isinstance(kind, str) and kind in ALONE:
        _check_keys(raw, ALONE[kind], where)
        heads = raw.get("num_attention_heads")
        if kind in HEADS_OF_64 and not (isinstance(heads, int) and raw.get("hidden_size") == VIT_HEAD * heads):
            raise ModelError(
                f"{where}: num_attention_heads is {as_text(heads)} for hidden_size "
                f"{as_text(raw.get('hidden_size'))}; expected heads of {VIT_HEAD} channels"
            )
        return
    if not isinstance(kind, str) or kind not in SOURCES:
        raise ModelError(
            f"{where}: model_type is {as_text(kind)}; a backbone is read from {', '.join([*ALONE, *SOURCES])}"
        )
    _backbone(raw, SOURCES[kind], where)


def _source(raw: Mapping[str, Any], member: str, where: str) -> TransformersClass:
    """The class of transformers that a config.json configures. Errors: ModelError if the member reads another one."""
    known = FAMILY[member].transformers
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        other = MEMBER_OF.get(kind, "") if isinstance(kind, str) else ""
        advice = f"use --model {other}" if other else FIX
        raise ModelError(
            f"{where}: model_type is {as_text(kind)}; {member} is read from "
            f"{' or '.join(known) or 'no class of transformers'}; {advice}"
        )
    classes = raw.get("architectures")
    if classes is not None and not (isinstance(classes, list) and known[kind].architecture in classes):
        raise ModelError(f"{where}: architectures is {as_text(classes)}; expected {known[kind].architecture}; {FIX}")
    return known[kind]


def _check_keys(raw: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> None:
    """ModelError for a key that is not in the table, or whose value is not one of those that it may have."""
    for key, value in raw.items():
        entry = keys.get(key)
        if entry is None:
            raise ModelError(
                f"{where}: unknown key {key!r} = {as_text(value)}{did_you_mean(key, keys)}; detections may "
                "depend on it; if they do not, remove it from a copy of the file"
            )
        if isinstance(entry, Only) and not any(_same(entry.of(value), one) for one in entry.values):
            wanted = "" if entry.of(value) != value else f"; expected {' or '.join(map(as_text, entry.values))}"
            raise ModelError(
                f"{where}: {key} is {as_text(value)}, which this package does not compute{_reason(entry)}{wanted}; "
                f"{FIX}"
            )


def _read(value: Any, entry: Read, where: str, raw: Mapping[str, Any]) -> Any:
    """The value of our field. Errors: ModelError for a value of another type or without a counterpart."""
    if entry.of is not None:
        ours = entry.of(value, raw)
        if ours is None:
            raise ModelError(f"{where} is {as_text(value)}; expected a whole number from 1, or one for each level")
        return ours
    if entry.words is not None:
        if isinstance(value, str) and value in entry.words:
            return entry.words[value]
        raise ModelError(
            f"{where} is {as_text(value)}, which this package does not compute{_reason(entry)}; expected "
            f"{' or '.join(entry.words)}; {FIX}"
        )
    if isinstance(entry.default, bool):
        if isinstance(value, bool):
            return value
        raise ModelError(f"{where} is {as_text(value)}; expected true or false")
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
        return value
    raise ModelError(f"{where} is {as_text(value)}; expected a whole number from 1")


def _backbone(raw: Mapping[str, Any], source: TransformersClass, where: str) -> tuple[str, bool]:
    """Name of a backbone of timm or of the hub ("": the tensors show it), and whether C5 is dilated."""
    nested = raw.get("backbone_config")
    if nested is not None:
        if not isinstance(nested, dict):
            raise ModelError(f"{where}: backbone_config is {as_text(nested)}; expected an object")
        where = f"{where}: backbone_config"
        kind = nested.get("model_type")
        if not isinstance(kind, str) or kind not in BACKBONES:
            raise ModelError(f"{where}: model_type is {as_text(kind)}; expected {', '.join(BACKBONES)}; {FIX}")
        _check_keys(nested, BACKBONES[kind], where)
        if kind == "dinov3_vit":
            _stage_numbers(nested, where)  # compared with the tensors, as all of its sizes
            return "", False
        _check_levels(nested, raw, source, where, [STAGES - 1])
        if kind == "timm_backbone":
            return _timm_name(nested.get("backbone"), where), _dilated(nested.get("output_stride"), where)
        return "", False  # transformers' own backbones have no dilation, whatever `dilation` says
    name = raw.get("backbone")
    if raw.get("use_timm_backbone", source.timm) is True:
        options = raw.get("backbone_kwargs") or {}
        if not isinstance(options, dict) or set(options) - {"out_indices", "num_channels", "output_stride"}:
            raise ModelError(
                f"{where}: backbone_kwargs is {as_text(options)}; expected out_indices, num_channels and "
                f"output_stride alone; {FIX}"
            )
        where = f"{where}: backbone_kwargs" if options else where
        if options.get("num_channels", 3) != 3:
            raise ModelError(f"{where}: num_channels is {as_text(options['num_channels'])}; expected 3")
        _check_levels(options, raw, source, where, None)
        dilation = raw.get("dilation", False)
        if not isinstance(dilation, bool):
            raise ModelError(f"{where}: dilation is {as_text(dilation)}; expected true or false")
        return _timm_name(name or "resnet50", where), _dilated(
            options.get("output_stride", 16 if dilation else None), where
        )
    if name is not None and not (isinstance(name, str) and HUB.match(name)):
        raise ModelError(f"{where}: backbone is {as_text(name)}; expected microsoft/resnet-50 or another ResNet; {FIX}")
    return (name.partition("/")[2].replace("-", "") if name else ""), False


def _windowed_vit(raw: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Windows and blocks of a nested windowed transformer, as fields of the member's configuration.

    Their stages count from 1, the output of the first block, and ours from 0.
    """
    nested = raw.get("backbone_config")
    if not isinstance(nested, dict) or nested.get("model_type") != kind:
        shown = nested.get("model_type") if isinstance(nested, dict) else nested
        raise ModelError(f"{where}: the model_type of backbone_config is {as_text(shown)}; expected {kind}; {FIX}")
    scales, levels = raw.get("projector_scale_factors"), raw.get("num_feature_levels")
    if isinstance(scales, list) and levels not in (None, len(scales)):
        raise ModelError(
            f"{where}: num_feature_levels is {as_text(levels)}; expected one for each of the {len(scales)} "
            "projector_scale_factors"
        )
    where = f"{where}: backbone_config"
    _check_keys(nested, WINDOWED_VITS[kind], where)
    stages = _stage_numbers(nested, where)
    windows = nested.get("num_windows", WINDOWED_DEFAULTS[kind]["num_windows"])
    side = windows
    if kind == "lw_detr_vit" and isinstance(windows, int) and not isinstance(windows, bool) and windows > 0:
        side = math.isqrt(windows) if math.isqrt(windows) ** 2 == windows else -1
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise ModelError(f"{where}: num_windows is {as_text(windows)}; expected a number of windows that fill a square")
    blocks = range(stages[-1])
    if kind == "rf_detr_dinov2":  # computed by transformers, whatever the file says: the others are those of the stages
        whole = [block for block in blocks if block in stages]
    else:
        windowed = nested.get("window_block_indices", [])
        if not isinstance(windowed, list) or not all(isinstance(block, int) for block in windowed):
            raise ModelError(f"{where}: window_block_indices is {as_text(windowed)}; expected numbers of blocks")
        whole = [block for block in blocks if block not in windowed]
    return {
        "backbone_windows": side,
        "backbone_maps": tuple(stage - 1 for stage in stages),
        "backbone_full_attention": tuple(whole),
    }


def _stage_numbers(nested: Mapping[str, Any], where: str) -> list[int]:
    """The stages whose maps are read, from 1, by out_indices or out_features, which must agree."""
    found: list[int] = []
    for key in ("out_indices", "out_features"):
        given = nested.get(key)
        if given is None:
            continue
        numbers = [_block_stage(item) for item in given] if isinstance(given, list) else []
        if not numbers or numbers[0] < 1 or numbers != sorted(set(numbers)) or (found and found != numbers):
            raise ModelError(
                f"{where}: {key} is {as_text(given)}; expected stages from 1 that ascend, the same in both keys"
            )
        found = numbers
    if not found:
        raise ModelError(f"{where}: neither out_indices nor out_features; expected the stages whose maps are read")
    return found


def _block_stage(item: Any) -> int:
    """The number of a stage given as a number from 0, or as "stage3"; -1 for anything else."""
    if isinstance(item, str):
        match = re.fullmatch(r"stage(\d{1,3})", item)
        return int(match[1]) if match else -1
    return item if isinstance(item, int) and not isinstance(item, bool) else -1


def _timm_name(name: Any, where: str) -> str:
    """Our name of a ResNet of timm."""
    found = TIMM.match(name) if isinstance(name, str) else None
    if not found:
        raise ModelError(
            f"{where}: backbone is {as_text(name)}; expected resnet18, 34, 50 or 101, or one with a d; {FIX}"
        )
    return found[1] + ("vd" if found[2] else "")


def _dilated(stride: Any, where: str) -> bool:
    if stride not in (None, 16, 32) or isinstance(stride, bool):
        raise ModelError(f"{where}: output_stride is {as_text(stride)}; expected 32, or 16 for a dilated C5; {FIX}")
    return stride == 16


def _check_levels(
    options: Mapping[str, Any], raw: Mapping[str, Any], source: TransformersClass, where: str, absent: list[int] | None
) -> None:
    """ModelError unless the backbone gives the feature levels that the model takes, and none after them.

    absent   the levels given if none are named; None: those that the model takes
    """
    wanted = source.levels(raw)
    listed = {key: options[key] for key in ("out_indices", "out_features") if options.get(key) is not None}
    for key, given in listed.items():
        stages = [_stage(item) for item in given] if isinstance(given, list) else [-1]
        if -1 in stages or (stages != wanted if len(wanted) > 1 else stages[-1:] != wanted):
            raise ModelError(
                f"{where}: {key} is {as_text(given)}; expected the stages {wanted} of {STAGES - 1}, which the model "
                f"takes; {FIX}"
            )
    if not listed and absent is not None and absent != wanted:
        raise ModelError(f"{where}: out_features names no stages, which gives the last alone; expected {wanted}")


def _stage(item: Any) -> int:
    """Number 0..4 of a stage given as a number, "stage3" or "layer3"; -1 for anything else."""
    if isinstance(item, str):
        found = re.fullmatch(r"(?:stage|layer)([1-4])", item)
        return int(found[1]) if found else -1
    if isinstance(item, int) and not isinstance(item, bool) and -STAGES <= item < STAGES:
        return item % STAGES
    return -1


def _has_default(entry: Key) -> bool:
    return isinstance(entry, Same) and entry.default is not None


def _equal(name: str, ours: Any, theirs: Any, width: Any) -> bool:
    if name == "points" and isinstance(theirs, tuple) and isinstance(ours, tuple):
        return sum(ours) == sum(theirs)  # the tensors show the sum alone
    if name == "ffn_activation":
        return bool((ours == "prelu") == (theirs == "prelu"))  # no tensor shows which of the others
    if isinstance(theirs, float) and isinstance(ours, float) and 0 <= theirs < 64:
        return int(width * theirs) == int(width * ours)  # a fraction of the width, in whole channels
    return bool(ours == theirs)


def _same(value: Any, wanted: Any) -> bool:
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def _reason(entry: Key) -> str:
    return f" ({entry.why})" if entry.why else ""


def as_text(value: Any) -> str:
    """A value as JSON, cut to a length that a message can hold."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
