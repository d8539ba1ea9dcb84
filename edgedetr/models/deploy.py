"""The deployed graph: pixels in, logits and boxes of the last layer out, at one fixed size.

It is both the PyTorch reference and the exported graph, so models need no deploy mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import Bundle
from edgedetr.errors import ModelError
from edgedetr.layers.deformable_attention import SAMPLINGS, DeformableAttention
from edgedetr.layers.deformable_convolution import DeformRead
from edgedetr.models.detector import DetrModel
from edgedetr.options import one_of


class ConstantFolded(nn.Module):
    """The outputs of a module that depends on shapes alone, as constants."""

    def __init__(self, value: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__()
        self.single = isinstance(value, Tensor)
        for index, tensor in enumerate([value] if isinstance(value, Tensor) else value):
            self.register_buffer(f"value{index}", tensor.detach().clone(), persistent=False)

    def forward(self, *inputs: object) -> Tensor | tuple[Tensor, ...]:
        return next(self.buffers()) if self.single else tuple(self.buffers())


@runtime_checkable
class Fusable(Protocol):
    """A module with a cheaper equal at inference: BatchNorm folded into its convolution, RepVGG's branches added."""

    def fused(self) -> nn.Module: ...


@runtime_checkable
class LoadsFused(Protocol):
    """A Fusable with the inverse of `fused`: it takes the weights of such an equal, so that `fused` gives them again.

    Every Fusable of a trained bundle is one; low-rank adapters, which are not, have been merged there.
    """

    def load_fused(self, fused: nn.Module) -> None: ...


class DeployGraph(nn.Module):
    """A copy of the detector for one input size: normalization inside, BatchNorm and RepVGG fused, positions constant.

    images  [B, 3, height, width]  RGB, 0..255, float32
    return  logits [B, N, K*], boxes [B, N, 4] (cx, cy, w, h in 0..1 of the input)
    """

    def __init__(
        self, detector: DetrModel, height: int, width: int, sampling: str = "gather", decoder_layers: int = 0
    ) -> None:
        """sampling        how deformable attention reads its points: "gather" or "grid_sample", the same numbers;
                        "auto": whichever is faster here
        decoder_layers  run only the first ones; 0 = all
        """
        super().__init__()
        one_of("sampling", sampling, SAMPLINGS)
        multiple = detector.size_multiple
        if height % multiple or width % multiple or min(height, width) <= 0:
            raise ModelError(f"input is {height} x {width} pixels; expected multiples of {multiple}")
        self.height, self.width = height, width
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.detector.progress(1.0)  # the number of queries at the end of training
        for module in self.detector.modules():
            if isinstance(module, (DeformableAttention, DeformRead)):
                module.sampling = sampling
        if decoder_layers:
            layers = self.detector.decoder.layers
            if decoder_layers > len(layers):
                raise ModelError(
                    f"{decoder_layers} decoder layers asked for, the model has {len(layers)}; expected "
                    f"--set export.decoder_layers={len(layers)} at most, or 0 for all"
                )
            self.detector.decoder.layers = nn.ModuleList(list(layers)[:decoder_layers])
        fuse(self.detector)
        _replace(self.detector, self._constants())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.detector(self.detector.normalize(images), last_only=True)
        return outputs.logits[0], outputs.boxes[0]

    @torch.no_grad()
    def _constants(self) -> dict[str, nn.Module]:
        """Runs once, and keeps the output of every module marked `shape_only`."""
        folded: dict[str, nn.Module] = {}
        hooks = []
        for name, module in _outermost(self.detector, "shape_only"):

            def keep(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                if name in folded:
                    raise ModelError(f"{name} is called for more than one shape, so it cannot become a constant")
                folded[name] = ConstantFolded(output)

            hooks.append(module.register_forward_hook(keep))
        device = next(self.detector.parameters()).device
        self(torch.zeros(1, 3, self.height, self.width, device=device))
        for hook in hooks:
            hook.remove()
        return folded


def fuse(detector: DetrModel) -> None:
    """Replace every module that has a cheaper equal at inference by that equal."""
    _replace(detector, {name: module.fused() for name, module in fusable(detector)})


def load_fused(detector: DetrModel, fused: DetrModel) -> None:
    """Give a detector the weights of another one of the same configuration, which was fused and may have learned since.

    Weights outside of fused modules are copied by name. Afterwards `fuse` gives the same weights again.
    """
    own = dict(fusable(detector))
    weights = {
        name: value
        for name, value in fused.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in own)
    }
    for path, module in own.items():
        if not isinstance(module, LoadsFused):
            raise ModelError(f"{path}: a {type(module).__name__} does not take fused weights back")
        module.load_fused(fused.get_submodule(path))
    present = detector.state_dict()
    detector.load_state_dict({**present, **{name: value for name, value in weights.items() if name in present}})


def fusable(detector: nn.Module) -> Iterator[tuple[str, Fusable]]:
    """The outermost modules that `fuse` replaces, with their dotted names."""
    for name, module in _outermost(detector, "fused"):
        if isinstance(module, Fusable):
            yield name, module


def load_bundle_model(bundle: Bundle, sampling: str = "gather") -> tuple[DetrModel, DeployGraph]:
    """The trained detector of a bundle (evaluation mode), and its deployed graph at the bundle's input size."""
    detector, size = bundle_detector(bundle), bundle.manifest.input
    return detector, DeployGraph(detector, size.height, size.width, sampling)


def bundle_detector(bundle: Bundle) -> DetrModel:
    """The trained detector of a bundle, in evaluation mode. Errors: ModelError, BundleError."""
    from safetensors.torch import load_file

    from edgedetr.models import build, member

    manifest = bundle.manifest
    chosen = member(manifest.model)
    try:
        # JSON has lists where the configuration has tuples.
        config = chosen.config(**{k: tuple(v) if isinstance(v, list) else v for k, v in manifest.config.items()})
    except TypeError as error:
        raise ModelError(
            f"{bundle.path}: bundle.json does not describe a {manifest.model} of this version ({error}); "
            "expected the keys of its configuration; train it again with this version"
        ) from error
    path = bundle.require(WEIGHTS.file)
    with torch.device("meta"):  # shapes alone: numbers in bundle.json take no memory yet
        described = build(manifest.model, config, len(manifest.classes))
    try:
        _same_shapes(described, path)
        del described
        detector = build(manifest.model, config, len(manifest.classes))
        detector.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own kinds of error without a common base
        raise ModelError(
            f"{path}: the weights do not fit the {manifest.model} that bundle.json describes ({error}); "
            "run: edgedetr train --data DIR"
        ) from error
    return detector.eval()


def _same_shapes(detector: nn.Module, path: Path) -> None:
    """Compare a model, on the meta device as well, with the header of a weight file. Errors: ValueError."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name, tensor in detector.state_dict().items():
        if there.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is missing or of another size")
    if there:
        raise ValueError(f"{min(there)} is left over")


def _outermost(root: nn.Module, attribute: str, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that have `attribute`, with their dotted names; not those inside such a module."""
    for name, module in root.named_children():
        if hasattr(module, attribute):
            yield prefix + name, module
        else:
            yield from _outermost(module, attribute, f"{prefix}{name}.")


def _replace(root: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)
