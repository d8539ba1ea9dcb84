"""Published weights into our models: what of a file fits, and what does not; names are translated in `names`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models.backbones.vit import VitPyramid
from edgedetr.models.checkpoints import conversion as names
from edgedetr.models.checkpoints.rename_rules import IGNORED
from edgedetr.models.checkpoints.transformers_config import TransformersConfig, check_backbone_config, read_config
from edgedetr.models.checkpoints.weight_source import SCRATCH, WeightSource
from edgedetr.models.detector import DetrModel
from edgedetr.storage.reading import read_json

log = logging.getLogger(__name__)

# Where "auto" takes a backbone from: ImageNet weights in torchvision's and timm's layouts; for vd, the backbone of the
# published RT-DETR (trained further on COCO), because its ImageNet weights alone are not on the hub.
SOURCES = {
    **{f"resnet{depth}": f"timm/resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}vd": f"PekingU/rtdetr_r{depth}vd" for depth in (18, 34, 50, 101)},
    # Trained on ImageNet-21k with pixels in -1..1: model.mean and model.std are 0.5 each.
    **{f"vit_{size}": f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("tiny", "small", "base")},
}
JSON_LIMIT = 4 << 20  # bytes of a config.json; one of a thousand classes has 60 kB

STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Loaded:
    """What came from the file, and the names that kept their fresh values because the classes differ."""

    source: str
    tensors: int
    fresh: tuple[str, ...] = ()


def load_detector(detector: DetrModel, member: str, source: str, config: Any = None) -> Loaded:
    """Published weights of a whole detector; class heads start anew where the number of classes differs.

    config   of the detector; with it, a config.json beside the weights must say the same

    Errors: ModelError for weights that do not fit, and for a config.json that says something else.
    """
    origin = WeightSource(source)
    weights = origin.weights()
    translated = names.translate(member, weights, source)
    if config is not None and names.layout_of(member, weights, source).startswith("transformers"):
        told = transformers_config_of(origin, member)
        for name, value in told.values.items() if told else ():
            ours = getattr(config, name, value)
            if ours != value and name == "queries":  # of those that are selected, a training may take fewer
                log.warning("%s: its model has %s queries, and this one %s", source, value, ours)
            elif ours != value:
                raise ModelError(
                    f"{told.where if told else source}: its model has {name} = {value!r}, and this one "
                    f"{ours!r}; use --set model.{name}={str(value).lower()}"
                )
    return load_weights(detector, translated, source)


def transformers_config_of(origin: WeightSource, member: str) -> TransformersConfig | None:
    """config.json of transformers beside weights; None where there is none. Errors: ModelError, see `hub_config`."""
    path = origin.beside("config.json")
    return None if path is None else read_config(config_json(path), member, str(path))


def config_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: ModelError."""
    content = read_json(path, ModelError, limit=JSON_LIMIT, fix="repair it, or remove it")
    if not isinstance(content, dict):
        raise ModelError(f"{path}: {type(content).__name__}; expected an object; repair it, or remove it")
    return content


def load_backbone(detector: DetrModel, config: Any) -> Loaded | None:
    """What `config.backbone_weights` asks for: None for "random"; else the backbone's tensors are replaced."""
    source = config.backbone_weights
    if source == "random":
        return None
    if source == "auto":
        if config.backbone_width != 1 or config.backbone not in SOURCES:
            raise ModelError(
                f"no published weights for {config.backbone} at width {config.backbone_width}; "
                f"use model.backbone_width=1, or train from scratch: {SCRATCH}"
            )
        source = SOURCES[config.backbone]
    origin = WeightSource(source)
    weights, backbone = names.backbone_of(origin.weights()), detector.backbone
    # What "auto" names is known to fit; a cache filled by an earlier version has no config.json of it.
    path = None if config.backbone_weights == "auto" else origin.beside("config.json")
    if path is not None:
        check_backbone_config(config_json(path), str(path))
    if isinstance(backbone, VitPyramid) and not any(name.startswith("transformer.") for name in weights):
        return load_weights(backbone.transformer, weights, source)  # its pyramid is no part of published weights
    return load_weights(backbone, weights, source)


@torch.no_grad()
def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, rows: Sequence[int | None] | None = None
) -> Loaded:
    """Copy tensors of the same names; ModelError that lists every one that is missing, left over or of another size.

    rows    for each of our classes, the file's class that it takes over, or None where it starts anew; without it,
            class heads of another size start anew
    """
    own, weights, fresh = _compared(module, weights, source, anew=rows is not None)
    for name, tensor in own.items():
        if name not in fresh:
            tensor.copy_(weights[name])
    if rows is not None:
        foreground = getattr(getattr(module, "selector", None), "foreground", False)
        for name in fresh:
            # To a head that finds objects of any kind, the first row is that, and the others are nothing.
            first = foreground and name.startswith("selector.score.")
            _take_rows(own[name], weights[name], [0] + [None] * (len(rows) - 1) if first else rows)
    elif fresh:
        log.warning(
            "%s: %d tensors kept; started anew, because the number of classes differs: %s",
            source,
            len(own) - len(fresh),
            ", ".join(fresh),
        )
    return Loaded(source, len(own) - len(fresh), tuple(fresh))


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """The check of `fit` alone, which a module on the meta device takes as well. Errors: as `fit`."""
    _compared(module, weights, source, anew=False)


def _compared(
    module: nn.Module, weights: Mapping[str, Tensor], source: str, anew: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Tensors of the module and of the file that are compared, and the class heads that start anew."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not IGNORED.search(name)}
    weights = {name: tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    per_class = [
        name
        for name in own
        if isinstance(module, DetrModel)
        and module.member.is_per_class(name)
        and name in weights
        and own[name].shape[1:] == weights[name].shape[1:]
    ]
    fresh = [name for name in per_class if own[name].shape[0] != weights[name].shape[0] or anew]
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and name not in fresh and weights[name].shape != own[name].shape
    ]
    lacking, extra = set(own) - set(weights), set(weights) - set(own)
    if lacking or extra or shapes:
        raise ModelError(
            f"{source} does not fit this model: {_list('missing', lacking)}{_list('left over', extra)}"
            f"{_list('of another size', shapes)}expected the same architecture; check the [model] section"
        )
    _look_at_values(weights, source)
    return own, weights, fresh


def _look_at_values(weights: Mapping[str, Tensor], source: str) -> None:
    """Errors: ModelError for whole numbers, which are weights without their scales, and for NaN and infinity."""
    for name, tensor in weights.items():
        if tensor.dtype not in STORED:
            raise ModelError(
                f"{source}: {name} is stored as {tensor.dtype}; expected "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in STORED)}: export the model "
                "before it is quantized"
            )
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{source}: {name} holds NaN or infinity, so the model finds nothing; expected weights of "
                "a training that did not diverge, or of an earlier epoch"
            )


def rows_by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """For each of our classes, the first of theirs with the same name (whatever its case), or None."""
    place = {name.casefold(): index for index, name in reversed(list(enumerate(theirs)))}
    return [place.get(name.casefold()) for name in ours]


def _take_rows(own: Tensor, weights: Tensor, rows: Sequence[int | None]) -> None:
    """Rows of a class head by class; what stands behind the classes (no object, padding) is copied as well."""
    for index, row in enumerate(rows):
        if row is not None:
            own[index] = weights[row]
    behind = own.shape[0] - len(rows)
    if behind:
        own[-behind:] = weights[-behind:]


def read_weights(source: str) -> dict[str, Tensor]:
    """Tensors of a file, of a model in a folder, or of a name on the Hugging Face hub; see `weight_files`."""
    return WeightSource(source).weights()


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} ({len(names)}): {', '.join(names)}; " if names else ""
