"""Adds denoising queries: noised copies of the objects, put before the real queries, whose targets are known.

"dn"   Li et al. 2022, "DN-DETR", section 4: every copy must predict its object
"cdn"  Zhang et al. 2022, "DINO", section 3.3, as in RT-DETR: a positive copy of each object with little noise, and a
       negative copy with more noise, which must predict "no object"

The model's selector turns labels and boxes into queries (its method `noised`); this module draws the noise, prepends
the queries and splits their outputs off again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgedetr.models.records import Outputs, Queries
from edgedetr.training.config import DenoisingConfig
from edgedetr.training.criterion import DenoisingOutputs
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.matcher import Assignment

BACKGROUND_LOGIT = -1e4  # its probability is exactly 0, and float16 can hold it


@dataclass(frozen=True)
class Noised:
    """D = groups * copies * T noised queries per image; in each group T positive ones, then ("cdn") T negative ones.

    labels     [B, D] int64, K for padding
    boxes      [B, D, 4] cx, cy, w, h in 0..1
    per_group  T, objects of the image with the most
    copies     of each object in a group: 1, or 2 where there are negative ones
    """

    labels: Tensor
    boxes: Tensor
    groups: int
    per_group: int
    copies: int

    def __len__(self) -> int:
        return self.labels.shape[1]


def noise(padded: PaddedTargets, classes: int, config: DenoisingConfig) -> Noised | None:
    """Noised copies of the objects of a batch; None where there are no objects, or train.denoising is 0.

    As many groups as `config.denoising` positive queries allow (at least one), or `config.denoising_groups`.
    """
    most = padded.labels.shape[1]
    if not most or not config.denoising:
        return None
    contrastive = config.denoising_mode == "cdn"
    copies, groups = (2 if contrastive else 1), config.denoising_groups or max(config.denoising // most, 1)
    valid, labels = padded.valid.repeat(1, copies * groups), padded.labels.repeat(1, copies * groups)
    boxes = padded.boxes.repeat(1, copies * groups, 1)
    # RT-DETR redraws half of the fraction in its configuration; DN-DETR all of it.
    fraction = config.label_noise * (0.5 if contrastive else 1.0)
    redrawn = torch.randint(classes, labels.shape, device=labels.device)
    labels = torch.where(torch.rand(labels.shape, device=labels.device) < fraction, redrawn, labels)
    labels = torch.where(valid, labels, classes)
    boxes = (
        _contrastive_boxes(boxes, most, config.box_noise) if contrastive else _shifted_boxes(boxes, config.box_noise)
    )
    return Noised(labels, boxes, groups, most, copies)


def _contrastive_boxes(boxes: Tensor, most: int, amount: float) -> Tensor:
    """Every side shifted: alternating `most` boxes by 0 to 1, and `most` boxes by 1 to 2, half sizes times `amount`.

    As in DINO (its models/dino/dn_components.py), where 44 % of the negative copies end inside out: the left side right
    of the right one, or the top below the bottom. Such sides are swapped, as in RT-DETR version 2 and D-FINE (their
    denoising.py), so that every copy is a box.
    """
    negative = torch.arange(boxes.shape[1], device=boxes.device) // most % 2
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
    sign = torch.randint(2, corners.shape, device=boxes.device) * 2.0 - 1
    # Positive: 0 to 1, negative: 1 to 2 half sizes, so that a positive copy is always nearer than its negative one.
    shift = (torch.rand(corners.shape, device=boxes.device) + negative[:, None]) * sign * amount
    corners = (corners + shift * (boxes[..., 2:] / 2).repeat(1, 1, 2)).clamp(0, 1)
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, (high - low).abs()], -1)


def _shifted_boxes(boxes: Tensor, amount: float) -> Tensor:
    """The center shifted by up to half a side times `amount`, each side longer or shorter by up to that fraction."""
    reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    return (boxes + (torch.rand_like(boxes) * 2 - 1) * reach * amount).clamp(0, 1)


def prepend(queries: Queries, known: Queries, noised: Noised) -> Queries:
    """The noised queries before the real ones; real ones cannot attend to them, nor groups to each other.

    known   the queries that the model made from `noised`
    """
    count, real = len(noised), queries.content.shape[1]
    device = queries.content.device
    mask = torch.zeros(count + real, count + real, dtype=torch.bool, device=device)
    mask[count:, :count] = True
    group = torch.arange(count, device=device) // (noised.copies * noised.per_group)
    mask[:count, :count] = group[:, None] != group[None]
    if queries.self_mask is not None:
        mask[count:, count:] = queries.self_mask
    content = torch.cat([known.content.to(queries.content.dtype), queries.content], dim=1)
    return replace(
        queries,
        content=content,
        position=_concat(known.position, queries.position),
        reference=_concat(known.reference, queries.reference),
        spatial=_concat(known.spatial, queries.spatial),
        self_mask=mask,
    )


def _concat(known: Tensor | None, real: Tensor | None) -> Tensor | None:
    if known is None or real is None:
        if known is not real:
            raise ValueError(
                "noised and real queries have different fields; the selector's `noised` must return the "
                "same fields as its forward"
            )
        return None
    return torch.cat([known.to(real.dtype), real], dim=1)


def split(outputs: Outputs, noised: Noised, padded: PaddedTargets) -> tuple[Outputs, DenoisingOutputs]:
    """Outputs of decode with prepended queries -> outputs of the real queries, and those of the noised ones."""
    count = len(noised)
    assignment, logits = assign_positives(noised, padded, layers=len(outputs.logits)), outputs.logits[:, :, :count]
    sides = None if outputs.sides is None else outputs.sides.of(slice(0, count))
    if noised.copies == 1:
        # DN-DETR has no loss for padding: a probability of 0 costs nothing. RT-DETR trains it to "no object".
        padding = ~padded.valid.repeat(1, noised.groups)
        logits = logits.masked_fill(padding[None, ..., None], BACKGROUND_LOGIT)
        if sides is not None:
            of_first = sides.first[0].masked_fill(padding[..., None], BACKGROUND_LOGIT)
            sides = replace(sides, first=(of_first, sides.first[1]))
    denoising = DenoisingOutputs(logits, outputs.boxes[:, :, :count], assignment, noised.groups, sides)
    real = replace(
        outputs,
        logits=outputs.logits[:, :, count:],
        boxes=outputs.boxes[:, :, count:],
        sides=None if outputs.sides is None else outputs.sides.of(slice(count, None)),
    )
    return real, denoising


def assign_positives(noised: Noised, padded: PaddedTargets, layers: int) -> Assignment:
    """The assignment of every positive copy to its object."""
    # From the Python counts, so that nothing waits for the device.
    image = torch.arange(len(padded.counts)).repeat_interleave(torch.tensor(padded.counts))
    target = torch.cat([torch.arange(count) for count in padded.counts])
    start = torch.arange(noised.groups) * noised.copies * noised.per_group
    query = (start[None] + target[:, None]).flatten()
    image, target = image.repeat_interleave(noised.groups), target.repeat_interleave(noised.groups)
    image, query, target = torch.stack([image, query, target]).to(noised.labels.device, non_blocking=True)
    return Assignment(image, query.expand(layers, -1), target.expand(layers, -1))
