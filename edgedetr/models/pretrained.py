"""Published weights into our models: which file, and what of it did not fit; names are translated in `names`.

Reads safetensors, or a torch file with `weights_only`: nothing in a weight file is executed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models import names
from edgedetr.models.detector import Detector
from edgedetr.models.names.rules import IGNORED

log = logging.getLogger(__name__)

# Where "auto" takes a backbone from: ImageNet weights in torchvision's layout; for vd, the backbone of the published
# RT-DETR (trained further on COCO), because its ImageNet weights alone are not on the hub.
SOURCES = {
    **{f"resnet{depth}": f"timm/resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}vd": f"PekingU/rtdetr_r{depth}vd" for depth in (18, 34, 50, 101)},
}
RANDOM = "--set model.backbone_weights=random --set model.backbone_norm=trainable --set model.frozen_stages=0"

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
    return fit(detector.backbone, names.backbone_of(read(source)), source)


@torch.no_grad()
def fit(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy tensors of the same names; ModelError that lists every one that is missing, left over or of another size."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not IGNORED.search(name)}
    weights = {name: tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    fresh = [name for name in own if PER_CLASS.match(name) and name in weights
             and own[name].shape[0] != weights[name].shape[0] and own[name].shape[1:] == weights[name].shape[1:]]
    shapes = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in own
              if name in weights and name not in fresh and weights[name].shape != own[name].shape]
    missing, extra = set(own) - set(weights), set(weights) - set(own)
    if missing or extra or shapes:
        raise ModelError(f"{source} does not fit this model: {_list('missing', missing)}{_list('left over', extra)}"
                         f"{_list('of another size', shapes)}expected the same architecture; check the [model] section")
    for name, tensor in own.items():
        if name not in fresh:
            tensor.copy_(weights[name])
    if fresh:
        log.warning("%s: %d tensors kept; started anew, because the number of classes differs: %s",
                    source, len(own) - len(fresh), ", ".join(fresh))
    return Loaded(source, len(own) - len(fresh), tuple(fresh))


def read(source: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, or of a model on the Hugging Face hub ("owner/name")."""
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise ModelError(f"{path}: no such file; expected weights there, or train from scratch: {RANDOM}")
        path = _download(source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch each raise their own kinds, without a common base
        raise ModelError(f"{path}: not readable as weights ({error}); expected safetensors, or a torch file that holds "
                         "nothing but tensors") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in ("ema", "module", "model", "state_dict") if key in content), None)
        if inner is None:
            raise ModelError(f"{path}: no tensors inside; expected a state dict")
        content = inner
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _download(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelError(f"{name} is on the Hugging Face hub, which needs: pip install 'edgedetr[train]'; "
                         f"or train from scratch: {RANDOM}") from error
    try:
        return Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # offline, no such name, no access: the hub client's and its transport's own kinds
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(f"weights {name!r} could not be downloaded ({type(error).__name__}: {reason}); go online "
                         f"once, name a .safetensors file, or train from scratch: {RANDOM}") from error


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} ({len(names)}): {', '.join(names)}; " if names else ""
