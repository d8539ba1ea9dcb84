"""Contrastive denoising: queries made from noised objects, beside the real ones, whose answers are known.

Li et al. 2022, "DN-DETR"; Zhang et al. 2022, "DINO", section 3.3: a positive copy of each object with little noise,
and a negative copy with more noise, which must answer "nothing here".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgedetr.models.detector import Outputs, Queries
from edgedetr.train.criterion import Denoised
from edgedetr.train.matcher import Matches
from edgedetr.train.targets import Padded


@dataclass(frozen=True)
class Noised:
    """D = groups * 2 * T noised queries per picture; in each group T positive ones, then T negative ones.

    labels  [B, D] int64, K where the query is only filling
    boxes   [B, D, 4] cx, cy, w, h in 0..1
    """

    labels: Tensor
    boxes: Tensor
    groups: int
    per_group: int

    def __len__(self) -> int:
        return self.labels.shape[1]


def noise(padded: Padded, classes: int, queries: int, label_noise: float, box_noise: float) -> Noised | None:
    """Noised copies of the objects of a batch, or None where the batch has none.

    queries     positive ones that are wished for; as many groups as fit (at least one), like RT-DETR
    """
    most = padded.labels.shape[1]
    if not most or not queries:
        return None
    groups, device = max(queries // most, 1), padded.labels.device
    valid = padded.valid.repeat(1, 2 * groups)
    labels = padded.labels.repeat(1, 2 * groups)
    boxes = padded.boxes.repeat(1, 2 * groups, 1)
    negative = torch.zeros(groups, 2, most, device=device)
    negative[:, 1] = 1
    negative = negative.reshape(1, -1, 1)

    replaced = torch.rand(labels.shape, device=device) < label_noise * 0.5
    labels = torch.where(replaced, torch.randint(classes, labels.shape, device=device), labels)
    labels = torch.where(valid, labels, classes)

    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
    sign = torch.randint(2, corners.shape, device=device) * 2.0 - 1
    # Positive: 0 to 1, negative: 1 to 2 half sizes, so that a good box is always nearer than its contrast.
    shift = (torch.rand(corners.shape, device=device) + negative) * sign * box_noise
    corners = (corners + shift * (boxes[..., 2:] / 2).repeat(1, 1, 2)).clamp(0, 1)
    low, high = corners[..., :2], corners[..., 2:]
    return Noised(labels, torch.cat([(low + high) / 2, high - low], -1), groups, most)


def prepend(queries: Queries, noised: Noised, embedding: nn.Embedding) -> Queries:
    """The noised queries before the real ones; real ones do not see them, groups do not see each other.

    embedding   [K + 1, C], its last row stands for filling
    """
    if queries.reference is None or queries.position is not None:
        raise ValueError("denoising needs queries whose position follows from reference boxes [B, N, 4]")
    count, real = len(noised), queries.content.shape[1]
    device = queries.content.device
    mask = torch.zeros(count + real, count + real, dtype=torch.bool, device=device)
    mask[count:, :count] = True
    group = torch.arange(count, device=device) // (2 * noised.per_group)
    mask[:count, :count] = group[:, None] != group[None]
    if queries.self_mask is not None:
        mask[count:, count:] = queries.self_mask
    content = embedding(noised.labels).to(queries.content.dtype)
    reference = noised.boxes.to(queries.reference.dtype)
    return replace(queries, content=torch.cat([content, queries.content], 1),
                   reference=torch.cat([reference, queries.reference], 1), self_mask=mask)


def split(outputs: Outputs, noised: Noised, padded: Padded) -> tuple[Outputs, Denoised]:
    """Outputs of decode with prepended queries -> outputs of the real queries, and those of the noised ones."""
    count = len(noised)
    matches = positives(noised, padded, layers=len(outputs.logits))
    denoised = Denoised(outputs.logits[:, :, :count], outputs.boxes[:, :, :count], matches, noised.groups)
    return replace(outputs, logits=outputs.logits[:, :, count:], boxes=outputs.boxes[:, :, count:]), denoised


def positives(noised: Noised, padded: Padded, layers: int) -> Matches:
    """Each positive copy belongs to its object."""
    # From the Python counts, so that nothing waits for the device.
    image = torch.arange(len(padded.counts)).repeat_interleave(torch.tensor(padded.counts))
    target = torch.cat([torch.arange(count) for count in padded.counts])
    start = torch.arange(noised.groups) * 2 * noised.per_group
    query = (start[None] + target[:, None]).flatten()
    image, target = image.repeat_interleave(noised.groups), target.repeat_interleave(noised.groups)
    image, query, target = torch.stack([image, query, target]).to(noised.labels.device, non_blocking=True)
    return Matches(image, query.expand(layers, -1), target.expand(layers, -1))
