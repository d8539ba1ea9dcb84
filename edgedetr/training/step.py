"""One training step's forward half: pixels and objects to losses, with noised queries beside the real ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from edgedetr.models.detector import DetrModel
from edgedetr.training import denoising
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.ground_truth import Padded


class Trainee(nn.Module):
    """The detector with its criterion as one module, so that what wraps modules (several devices) wraps the whole."""

    def __init__(self, detector: DetrModel, config: TrainConfig, class_loss: str, classes: int) -> None:
        super().__init__()
        self.detector, self.config, self.classes = detector, config, classes
        self.criterion = Criterion(config, class_loss, getattr(detector.selector, "foreground", False))
        self.encode = torch.compile(detector.encode) if config.compile else detector.encode
        self.decode = torch.compile(detector.decode) if config.compile else detector.decode

    def forward(self, images: Tensor, targets: Callable[[], Padded], per_process: float) -> Tensor:
        """Losses [7] in the order of Losses.NAMES; the first is to be differentiated.

        images       [B, 3, H, W] uint8, RGB
        targets      behind a call, because float arguments of a mixed-precision module arrive rounded to 16 bits
        per_process  objects in all processes / processes
        """
        padded, config = targets(), self.config
        # Channels last: a sixth more images per second on a CPU (measured: rt_detr nano, 320 px, one core).
        pixels = images.float().contiguous(memory_format=torch.channels_last)
        memory = self.encode(self.detector.normalize(pixels))
        queries = self.detector.select(memory)
        selector, noised = self.detector.selector, None
        if getattr(selector, "denoising_class_embed", None) is not None:  # a member that makes noised queries
            noised = denoising.noise(padded, self.classes, config)
        if noised is None:
            losses = self.criterion(self.decode(queries, memory), padded, None, per_process)
        else:
            known = selector.noised(noised.labels, noised.boxes)  # type: ignore[operator]  # a method, not a tensor
            outputs = self.decode(denoising.prepend(queries, known, noised), memory)
            outputs, denoised = denoising.split(outputs, noised, padded)
            losses = self.criterion(outputs, padded, denoised, per_process)
        return losses.stacked()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random number of a step (dropout, noised queries) a function of these three."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))
