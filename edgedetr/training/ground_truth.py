"""What an image should be answered with, one by one and padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The objects of one image.

    labels  [T] int64, contiguous class index
    boxes   [T, 4] float32, cx, cy, w, h in 0..1 of the input image
    """

    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Padded:
    """The objects of B images, filled up to the T of the fullest one.

    labels  [B, T] int64, 0 where filled up
    boxes   [B, T, 4] float32, the whole image where filled up (an area, so that no overlap divides by 0)
    counts  objects of each image, as Python ints
    """

    labels: Tensor
    boxes: Tensor
    counts: list[int]

    @property
    def valid(self) -> Tensor:
        """[B, T] bool, True where there is an object."""
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(self.labels.shape[1], device=self.labels.device)[None] < counts[:, None]

    def to(self, device: torch.device) -> Padded:
        return Padded(self.labels.to(device, non_blocking=True), self.boxes.to(device, non_blocking=True), self.counts)


def pad(targets: Sequence[Target]) -> Padded:
    """Line up the targets of a batch."""
    counts = [len(target) for target in targets]
    most, device = max(counts, default=0), targets[0].labels.device
    labels = torch.zeros(len(counts), most, dtype=torch.int64, device=device)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0], device=device).repeat(len(counts), most, 1)
    for row, target in enumerate(targets):
        labels[row, : counts[row]] = target.labels
        boxes[row, : counts[row]] = target.boxes
    return Padded(labels, boxes, counts)
