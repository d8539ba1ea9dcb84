"""Distillation of features: the encoder's coarsest map learns to look like that of a frozen vision transformer.

Liao et al. 2025, "RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models": the map
after attention within the coarsest level, through a linear layer, is drawn towards the transformer's patches by their
cosine (deep semantic injector), and the loss's weight follows the encoder's share of the gradient (gradient-guided
adaptive modulation). Read in RT-DETRs/RT-DETRv4: rtv4_criterion.py, dinov2_teacher.py, solver/det_solver.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.models.backbones.vit_designs import DESIGNS
from edgedetr.models.backbones.windowed_vit import WindowedVit
from edgedetr.models.checkpoints.conversion import backbone_of
from edgedetr.models.checkpoints.pretrained import DINOV2_PATCH, PRETRAINED_BACKBONES, load_weights
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.hybrid import HybridEncoder
from edgedetr.training.config import DistillConfig

# DINOv2's transformers (its code): 12 blocks, and positions for the patches of 518 px. Their license is Apache-2.0.
BLOCKS, GRID = 12, 37
TEACHERS = tuple(name for name in PRETRAINED_BACKBONES if name.startswith("dinov2_"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels / 255, as DINOv2 was trained
MOST_CHANGE = 10.0  # of the weight after one epoch (det_solver.py)


class FeatureTeacher:
    """A frozen transformer; no nn.Module, so that no optimizer and no checkpoint has it.

    model   returns one map, normalized
    patch   pixels per side
    """

    def __init__(self, model: WindowedVit, patch: int = DINOV2_PATCH) -> None:
        self.model, self.patch = model.eval().requires_grad_(False), patch
        self.channels = model.channels[-1]
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))

    def to(self, device: torch.device) -> FeatureTeacher:
        self.model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor, shape: tuple[int, int]) -> Tensor:
        """pixels [B, 3, H, W] RGB in 0..255 -> its patches [B, h * w, C], for a map of h x w cells.

        The image is resized so that each cell is one patch, as the authors do for DINOv2.
        """
        size = [side * self.patch for side in shape]
        resized = F.interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)
        found: Tensor = self.model((resized - self._mean) / self._std)[-1]
        return found.flatten(2).transpose(1, 2)


def load_feature_teacher(config: DistillConfig, device: torch.device) -> FeatureTeacher | None:
    """The transformer of train.feature_teacher with its weights; None where the key is empty. Errors: ModelError."""
    name, source = config.feature_teacher, config.feature_teacher_weights
    if not name:
        return None
    if name not in TEACHERS:
        raise ModelError(
            f"train.feature_teacher is {name!r}; expected one of {', '.join(TEACHERS)}{did_you_mean(name, TEACHERS)}"
        )
    # DINOv2's own code antialiases positions of the models with registers alone; RF-DETR's does it for all.
    design = replace(DESIGNS[name], antialias=DESIGNS[name].registers > 0)
    model = WindowedVit(
        design, patch=DINOV2_PATCH, windows=1, maps=(BLOCKS - 1,), full_attention=range(BLOCKS), grid=GRID
    )
    source = PRETRAINED_BACKBONES[name] if source == "auto" else source
    load_weights(model, backbone_of(WeightSource(source).weights()), source)
    return FeatureTeacher(model).to(device)


class FeatureDistillation(nn.Module):
    """The linear layer between student and teacher, and the weight of the loss; it is trained beside the model.

    weight   [] float32, of the loss
    shares   [2] float32, sum and number of the encoder's shares of the gradient in this epoch, percent

    Errors: ModelError for a student without attention within its coarsest level.
    """

    weight: Tensor
    shares: Tensor

    def __init__(self, model: DetrModel, teacher: FeatureTeacher, config: DistillConfig) -> None:
        super().__init__()
        encoder: Any = model.encoder
        if not isinstance(encoder, HybridEncoder) or not len(encoder.attention):
            raise ModelError(
                f"train.feature_teacher needs a model with attention within its coarsest level (rt_detr, d_fine); "
                f"{model.member.name} has none; expected train.feature_teacher='', or another model"
            )
        self.teacher, self.config, self._stride = teacher, config, encoder.strides[-1]
        own: Any = encoder.project[-1]
        self.project = nn.Linear(own.conv.out_channels, teacher.channels)
        self.register_buffer("weight", torch.tensor(float(config.feature_weight)))
        self.register_buffer("shares", torch.zeros(2))
        self._attention = (encoder.attention,)  # in a tuple, so that it is no part of this module
        self._seen: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the attention gives in this block. The hook is removed, so that copies of the model have none."""
        hook = self._attention[0][-1].register_forward_hook(self._keep)
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._seen = output

    def forward(self, pixels: Tensor) -> Tensor:
        """The weighted loss of the map that the encoder made of `pixels` while watched: [] with a gradient."""
        student, self._seen = self._seen, None
        if student is None:
            raise RuntimeError("the student's encoder was not watched before its features were compared")
        shape = (pixels.shape[2] // self._stride, pixels.shape[3] // self._stride)
        wanted = self.teacher(pixels, shape)
        return self.weight * feature_distance(self.project(student), wanted)

    def count(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the encoder's share of the gradient of one step."""
        share = gradient_share(list(self._attention[0].parameters()), parameters)
        self.shares += torch.tensor([share, 1.0]).to(self.shares)

    def adapt(self, *, last: bool) -> None:
        """Set the weight for the next epoch; last: this epoch had weak augmentation already."""
        total, steps = self.shares.tolist()
        config = self.config
        if config.feature_share and steps:
            share = total / steps
            if last or share < 1e-6:  # percent: nothing reaches the encoder
                self.weight.fill_(config.feature_weight_last)
            else:
                self.weight.fill_(adapted_weight(float(self.weight), share, config.feature_share))
        self.shares.zero_()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all cells of 1 - cosine: both [B, S, C], in float32 -> []."""
    with torch.autocast(student.device.type, enabled=False):
        return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def gradient_share(part: Sequence[nn.Parameter], whole: Iterable[nn.Parameter]) -> float:
    """The L1 norm of some parameters' gradients, in percent of that of all; 0 without any gradient."""
    sums = [
        float(torch.stack([gradient.abs().sum() for gradient in gradients]).sum()) if gradients else 0.0
        for gradients in ([p.grad for p in parameters if p.grad is not None] for parameters in (part, whole))
    ]
    return 100 * sums[0] / sums[1] if sums[1] > 0 else 0.0


def adapted_weight(weight: float, share: float, bounds: tuple[float, ...]) -> float:
    """The weight with which the encoder's share of the gradient, in percent, would reach the nearest of two bounds.

    It takes the encoder's whole gradient for the loss's, so the odds of the share change as the weight does.
    """
    low, high = bounds
    if low <= share <= high:
        return weight
    # The authors aim at the far bound, and so come to rest inside.
    target = (high if share < low else low) / 100
    ratio = target * (1 - share / 100) / (share / 100 * (1 - target))
    return weight * min(max(ratio, 1 / MOST_CHANGE), MOST_CHANGE)
