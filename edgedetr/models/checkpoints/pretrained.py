"""Load pretrained weights into our models: compare names, sizes and values, then copy."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgedetr.data.coco_classes import coco_classes
from edgedetr.errors import ModelError
from edgedetr.layers.patch_embedding import PatchPosition
from edgedetr.models.backbones.dinov3 import SpatialTuning
from edgedetr.models.backbones.vit import VitPyramid
from edgedetr.models.backbones.vit_designs import ROTARY_DESIGNS
from edgedetr.models.backbones.windowed_vit import WindowedVit
from edgedetr.models.checkpoints import conversion
from edgedetr.models.checkpoints.config_from_state_dict import num_classes
from edgedetr.models.checkpoints.rename_rules import IGNORED
from edgedetr.models.checkpoints.transformers_config import (
    TransformersConfig,
    check_backbone_config,
    config_labels,
    read_config,
    read_json_object,
)
from edgedetr.models.checkpoints.weight_source import SCRATCH, WeightSource
from edgedetr.models.detector import DetrModel

log = logging.getLogger(__name__)

# Backbone weights of "auto": ImageNet weights in torchvision's and timm's layouts; for vd, the backbone of the
# published RT-DETR (trained further on COCO), because its ImageNet weights alone are not on the hub.
PRETRAINED_BACKBONES = {
    **{f"resnet{depth}": f"timm/resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}vd": f"PekingU/rtdetr_r{depth}vd" for depth in (18, 34, 50, 101)},
    # timm's copies of PaddleClas' weights, distilled on ImageNet-1k; D-FINE starts from the stage before.
    **{f"hgnetv2_b{size}": f"timm/hgnetv2_b{size}.ssld_stage2_ft_in1k" for size in range(7)},
    # Trained on ImageNet-21k with pixels in -1..1: model.mean and model.std are 0.5 each.
    **{f"vit_{size}": f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("tiny", "small", "base")},
    **{f"dinov2_{size}": f"facebook/dinov2-{size}" for size in ("small", "base")},
    **{f"dinov2_{size}_registers": f"facebook/dinov2-with-registers-{size}" for size in ("small", "base")},
}
DINOV2_PATCH = 14  # pixels, of the weights above
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class WeightsDoNotFit(ModelError):
    """Weights of another architecture, or of another size."""


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded.

    tensors         number of tensors that were copied
    fresh           names of those newly initialized, in whole or in rows, because the classes differ
    kept_classes    classes whose rows of the class heads were found by name; empty where no names are known
    fresh_classes   the other classes, likewise
    """

    source: str
    tensors: int
    fresh: tuple[str, ...] = ()
    kept_classes: tuple[str, ...] = ()
    fresh_classes: tuple[str, ...] = ()


def load_detector(
    detector: DetrModel,
    member: str,
    source: str | WeightSource,
    config: Any = None,
    classes: Sequence[str] | None = None,
) -> LoadedWeights:
    """Load pretrained weights of a whole detector.

    config    of the detector; if given, a config.json next to the weights must agree with it
    classes   names of the detector's classes: rows of the class heads are kept by name, where the weights' classes are
              known; else they stay newly initialized if the number of classes differs

    Errors: ModelError for weights that do not fit, and for a config.json that does not agree.
    """
    origin = WeightSource(source) if isinstance(source, str) else source
    weights = origin.weights()
    translated = conversion.translate(member, weights, origin.source)
    stored = None
    if config is not None and conversion.layout_of(member, weights, origin.source).startswith("transformers"):
        stored = transformers_config_of(origin, member)
        for name, value in stored.values.items() if stored else ():
            ours = getattr(config, name, value)
            if ours != value and name == "queries":  # of selected queries, a training may use fewer
                log.warning("%s: its model has %s queries, and this one %s", origin.source, value, ours)
            elif ours != value:
                value, ours = (list(one) if isinstance(one, tuple) else one for one in (value, ours))  # as in TOML
                raise ModelError(
                    f"{stored.where if stored else origin.source}: its model has {name} = {value!r}, and this one "
                    f"{ours!r}; use --set model.{name}={str(value).lower()}"
                )
    if config is not None:
        translated, _ = without_unread_blocks(translated, config)
    theirs = None if classes is None or config is None else class_names(origin, stored, translated, config.activation)
    if classes is None or theirs is None:
        return load_weights(detector, translated, origin.source)
    return load_by_name(detector, translated, origin.source, theirs, classes)


def load_by_name(
    detector: DetrModel, weights: Mapping[str, Tensor], source: str, theirs: Sequence[str], ours: Sequence[str]
) -> LoadedWeights:
    """Copy the tensors of a detector of the classes `theirs` into one of `ours`: rows of the class heads by name.

    Errors: as `load_weights`.
    """
    rows = rows_by_name(theirs, ours)
    loaded = load_weights(detector, weights, source, None if list(theirs) == list(ours) else rows)
    return replace(
        loaded,
        fresh=loaded.fresh if None in rows else (),
        kept_classes=tuple(name for name, row in zip(ours, rows) if row is not None),
        fresh_classes=tuple(name for name, row in zip(ours, rows) if row is None),
    )


def class_names(
    origin: WeightSource, stored: TransformersConfig | None, weights: Mapping[str, Tensor], activation: str
) -> list[str] | None:
    """Names of the rows of the class heads: of the published detector, else of config.json; None where nothing says.

    weights   under our names

    Errors: ModelError where there are more or fewer rows than names.
    """
    row = origin.published
    count = num_classes(weights, activation)
    if row is not None:
        if count != row.class_rows:
            raise ModelError(
                f"{origin.source}: its class head has {count} rows, and that of {row.name} {row.class_rows}; expected "
                "the published weights: name a file of other weights by its path"
            )
        return [name for _, name in coco_classes(count) or ()]
    labels = None if stored is None else config_labels(stored.raw, stored.where, ModelError)
    if labels is None or labels == [f"LABEL_{index}" for index in range(len(labels))]:
        return None
    if len(labels) != count:
        raise ModelError(
            f"{stored.where if stored else origin.source}: id2label has {len(labels)} entries; expected one for each "
            f"of the class head's {count} rows"
        )
    return labels


def transformers_config_of(origin: WeightSource, member: str) -> TransformersConfig | None:
    """config.json of transformers next to weights; None if there is none. Errors: as `read_config`."""
    path = origin.file_next_to("config.json")
    return None if path is None else read_config(read_json_object(path, ModelError), member, str(path))


def load_backbone(detector: DetrModel, config: Any) -> LoadedWeights | None:
    """Load `config.backbone_weights` into the backbone; None for "random"."""
    source = config.backbone_weights
    if source == "random":
        return None
    if source == "auto" and config.backbone in ROTARY_DESIGNS:
        raise ModelError(
            f"no weights of {config.backbone} are downloaded unasked: DINOv3's are under a license of their own; "
            f"use model.backbone_weights=FILE, or train from scratch: {SCRATCH}"
        )
    if source == "auto":
        if config.backbone not in PRETRAINED_BACKBONES:
            raise ModelError(
                f"no published weights for {config.backbone} alone; start from a whole detector, use "
                f"model.backbone_weights=FILE, or train from scratch: {SCRATCH}"
            )
        if config.backbone_width != 1:
            raise ModelError(
                f"no published weights for {config.backbone} at width {config.backbone_width}; "
                f"use model.backbone_width=1, or train from scratch: {SCRATCH}"
            )
        source = PRETRAINED_BACKBONES[config.backbone]
        if isinstance(detector.backbone, WindowedVit) and config.backbone_patch != DINOV2_PATCH:
            raise ModelError(
                f"no published weights for {config.backbone} with patches of {config.backbone_patch} px: {source} has "
                f"{DINOV2_PATCH}; start from a whole detector, use model.backbone_patch={DINOV2_PATCH}, or "
                f"train from scratch: {SCRATCH}"
            )
    origin = WeightSource(source)
    weights, backbone = conversion.backbone_of(origin.weights()), detector.backbone
    # Weights of "auto" are known to fit, and a cache filled by an earlier version has no config.json of them.
    path = None if config.backbone_weights == "auto" else origin.file_next_to("config.json")
    if path is not None:
        check_backbone_config(read_json_object(path, ModelError), str(path))
    if isinstance(backbone, (VitPyramid, SpatialTuning)) and not any(
        name.startswith("transformer.") for name in weights
    ):
        # Pretrained weights do not contain its pyramid or adapter.
        return load_weights(backbone.transformer, weights, source)
    if isinstance(backbone, WindowedVit):
        inside = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        weights = {name.removeprefix("backbone."): t for name, t in without_unread_blocks(inside, config)[0].items()}
    return load_weights(backbone, weights, source)


def without_unread_blocks(weights: Mapping[str, Tensor], config: Any) -> tuple[dict[str, Tensor], int]:
    """The tensors of a detector without the blocks of its transformer after the last whose map is read.

    return   the tensors, and the number of those left out
    """
    last = max(getattr(config, "backbone_maps", ()), default=len(weights))
    found = {name: re.match(r"backbone\.blocks\.(\d+)\.", name) for name in weights}
    kept = {name: weights[name] for name, block in found.items() if block is None or int(block[1]) <= last}
    return kept, len(weights) - len(kept)


@torch.no_grad()
def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, rows: Sequence[int | None] | None = None
) -> LoadedWeights:
    """Copy tensors by name. Errors: ModelError that lists all tensors missing, left over or of another size.

    rows    for each of our classes, the index of its class in the file, or None if it stays newly initialized; without
            rows, class heads of another size stay newly initialized
    """
    own, weights, fresh = _compare(module, weights, source, reset=rows is not None)
    for name, tensor in own.items():
        if name not in fresh:
            tensor.copy_(weights[name])
    if rows is not None:
        class_agnostic = isinstance(module, DetrModel) and module.class_agnostic_proposals
        for name in fresh:
            # A class-agnostic head uses its first row only.
            first = class_agnostic and name.startswith("selector.score.")
            _copy_rows(own[name], weights[name], [0] + [None] * (len(rows) - 1) if first else rows)
    elif fresh:
        log.warning(
            "%s: %d tensors kept; started anew, because the number of classes differs: %s",
            source,
            len(own) - len(fresh),
            ", ".join(fresh),
        )
    return LoadedWeights(source, len(own) - len(fresh), tuple(fresh))


def _with_fitting_positions(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the position tables of vision transformers interpolated to the grids of the module."""
    tables = {f"{name}.table": part for name, part in module.named_modules() if isinstance(part, PatchPosition)}
    return {name: tables[name].fitted(tensor) if name in tables else tensor for name, tensor in weights.items()}


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """The check of `load_weights`, also for a module on the meta device. Errors: as `load_weights`."""
    _compare(module, weights, source, reset=False)


def _compare(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, reset: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Tensors of the module and of the file, and the names of class heads that stay newly initialized."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not IGNORED.search(name)}
    weights = {name: tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    weights = _with_fitting_positions(module, weights)
    per_class = [
        name
        for name in own
        if isinstance(module, DetrModel)
        and module.member.is_per_class(name)
        and name in weights
        and own[name].shape[1:] == weights[name].shape[1:]
    ]
    fresh = [name for name in per_class if own[name].shape[0] != weights[name].shape[0] or reset]
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and name not in fresh and weights[name].shape != own[name].shape
    ]
    lacking, extra = set(own) - set(weights), set(weights) - set(own)
    if lacking or extra or shapes:
        other = ", or start from a backbone alone: --start none" if isinstance(module, DetrModel) else ""
        raise WeightsDoNotFit(
            f"{source} does not fit this model: {_list('missing', lacking)}{_list('left over', extra)}"
            f"{_list('of another size', shapes)}expected the same architecture; check the [model] section{other}"
        )
    _check_values(weights, source)
    return own, weights, fresh


def _check_values(weights: Mapping[str, Tensor], source: str) -> None:
    """ModelError for integers, which are quantized weights without their scales, and for NaN and infinity."""
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{source}: {name} is stored as {tensor.dtype}; expected "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}: export the model "
                "before it is quantized"
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{source}: {name} holds NaN or infinity, so the model finds nothing; expected weights of "
                "a training that did not diverge, or of an earlier epoch"
            )


def rows_by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """For each of our classes, the index of the first of theirs with the same name, ignoring case; None without."""
    row = {name.casefold(): index for index, name in reversed(list(enumerate(theirs)))}
    return [row.get(name.casefold()) for name in ours]


def _copy_rows(own: Tensor, weights: Tensor, rows: Sequence[int | None]) -> None:
    """Copy rows of a class head by class, and the rows after the classes (no object, padding)."""
    for index, row in enumerate(rows):
        if row is not None:
            own[index] = weights[row]
    after = own.shape[0] - len(rows)
    if after:
        own[-after:] = weights[-after:]


def read_weights(source: str) -> dict[str, Tensor]:
    """Tensors of a file, of a model in a folder, or of a name on the Hugging Face hub; see `weight_files`."""
    return WeightSource(source).weights()


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} ({len(names)}): {', '.join(names)}; " if names else ""
