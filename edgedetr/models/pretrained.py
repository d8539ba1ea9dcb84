"""Published weights into our models: which file, and what of it did not fit; names are translated in `names`.

Reads safetensors, or a torch file with `weights_only`: nothing in a weight file is executed.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models import names
from edgedetr.models.detector import Detector
from edgedetr.models.names.rules import IGNORED
from edgedetr.models.vit import VitPyramid
from edgedetr.packages import missing

log = logging.getLogger(__name__)

# Where "auto" takes a backbone from: ImageNet weights in torchvision's and timm's layouts; for vd, the backbone of the
# published RT-DETR (trained further on COCO), because its ImageNet weights alone are not on the hub.
SOURCES = {
    **{f"resnet{depth}": f"timm/resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}vd": f"PekingU/rtdetr_r{depth}vd" for depth in (18, 34, 50, 101)},
    # Trained on ImageNet-21k with pixels in -1..1: model.mean and model.std are 0.5 each.
    **{f"vit_{size}": f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("tiny", "small", "base")},
}
RANDOM = "--set model.backbone_weights=random --set model.backbone_norm=trainable --set model.frozen_stages=0"

WEIGHTS = "model.safetensors"                       # of a model on the hub, or in a folder of transformers
WRAPPERS = ("ema", "module", "model", "state_dict")  # what published files keep their tensors under

# The only weights whose size depends on the number of classes.
PER_CLASS = re.compile(r"^selector\.(score|denoising_class_embed)\.|^decoder\.boxes\.score\.")


@dataclass(frozen=True)
class Loaded:
    """What came from the file, and the names that kept their fresh values because the classes differ."""

    source: str
    tensors: int
    fresh: tuple[str, ...] = ()


def load_detector(detector: Detector, member: str, source: str) -> Loaded:
    """Published weights of a whole detector; class heads start anew where the number of classes differs."""
    return fit(detector, names.translate(member, read(source), source), source)


def load_backbone(detector: Detector, config: Any) -> Loaded | None:
    """What `config.backbone_weights` asks for: None for "random"; else the backbone's tensors are replaced."""
    source = config.backbone_weights
    if source == "random":
        return None
    if source == "auto":
        if config.backbone_width != 1 or config.backbone not in SOURCES:
            raise ModelError(f"no published weights for {config.backbone} at width {config.backbone_width}; "
                             f"use model.backbone_width=1, or train from scratch: {RANDOM}")
        source = SOURCES[config.backbone]
    weights, backbone = names.backbone_of(read(source)), detector.backbone
    if isinstance(backbone, VitPyramid) and not any(name.startswith("transformer.") for name in weights):
        return fit(backbone.transformer, weights, source)       # its pyramid is no part of published weights
    return fit(backbone, weights, source)


@torch.no_grad()
def fit(module: nn.Module, weights: Mapping[str, Tensor], source: str,
        rows: Sequence[int | None] | None = None) -> Loaded:
    """Copy tensors of the same names; ModelError that lists every one that is missing, left over or of another size.

    rows    for each of our classes, the file's class that it takes over, or None where it starts anew; without it,
            class heads of another size start anew
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if not IGNORED.search(name)}
    weights = {name: tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    per_class = [name for name in own if PER_CLASS.match(name) and name in weights
                 and own[name].shape[1:] == weights[name].shape[1:]]
    fresh = [name for name in per_class if own[name].shape[0] != weights[name].shape[0] or rows is not None]
    shapes = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in own
              if name in weights and name not in fresh and weights[name].shape != own[name].shape]
    missing, extra = set(own) - set(weights), set(weights) - set(own)
    if missing or extra or shapes:
        raise ModelError(f"{source} does not fit this model: {_list('missing', missing)}{_list('left over', extra)}"
                         f"{_list('of another size', shapes)}expected the same architecture; check the [model] section")
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
        log.warning("%s: %d tensors kept; started anew, because the number of classes differs: %s",
                    source, len(own) - len(fresh), ", ".join(fresh))
    return Loaded(source, len(own) - len(fresh), tuple(fresh))


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


def beside(source: str, name: str) -> Path | None:
    """Another file of the folder, or of the model on the hub, that holds the weights; None where there is none."""
    path = Path(source)
    if path.exists():
        found = (path if path.is_dir() else path.parent) / name
        return found if found.is_file() else None
    return _download(source, name, needed=False)


def read(source: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, or of a model in a folder or on the Hugging Face hub ("owner/name")."""
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise ModelError(f"{path}: no such file; expected weights there, or train from scratch: {RANDOM}")
        path = _download(source, WEIGHTS) or path
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The authors keep their arguments beside the weights: a Namespace holds values and does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch each raise their own kinds, without a common base
        raise ModelError(f"{path}: not readable as weights ({error}); expected safetensors, or a torch file that holds "
                         "nothing but tensors") from error
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: no tensors inside; expected a state dict")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _download(name: str, file: str, needed: bool = True) -> Path | None:
    """A file of a model on the hub; None where it has no such file and none is needed."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelError(f"{name} is on the Hugging Face hub, and {missing('huggingface_hub', error)}; "
                         f"or train from scratch: {RANDOM}") from error
    try:
        return Path(hf_hub_download(name, file))
    except Exception as error:  # offline, no such name, no access: the hub client's and its transport's own kinds
        if not needed:
            log.info("%s has no %s (%s)", name, file, type(error).__name__)
            return None
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(f"weights {name!r} could not be downloaded ({type(error).__name__}: {reason}); go online "
                         f"once, name a .safetensors file, or train from scratch: {RANDOM}") from error


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} ({len(names)}): {', '.join(names)}; " if names else ""
