"""Losses of boxes by distributions of their sides (D-FINE): fine-grained localization, distillation between layers.

Peng et al. 2024, "D-FINE", section 4.1 (FGL) and 4.2 (GO-LSD, with the loss DDF); what the paper leaves open is as in
the authors' dfine_criterion.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_iou
from edgedetr.models.records import Sides
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.matcher import Assignment

TEMPERATURE = 5.0  # softens both distributions of the distillation (the authors' loss_local)
TINY = 1e-16  # a box without width or height moves nothing (the authors' bbox2distance)


@dataclass(frozen=True)
class SideLosses:
    """fine, distilled [L] of each layer (the last layer distills nothing); matched_share: see `side_losses`."""

    fine: Tensor
    distilled: Tensor
    matched_share: Tensor


def side_losses(
    sides: Sides,
    logits: Tensor,
    boxes: Tensor,
    assignment: Assignment,
    padded: PaddedTargets,
    count: float | Tensor,
    matched_share: Tensor | None = None,
) -> SideLosses:
    """FGL and DDF of every layer.

    logits [L, B, N, K], boxes [L, B, N, 4]   of every layer; the last layer teaches
    assignment     [1 or L, P]; of the same pairs in all layers
    count          FGL is divided by it
    matched_share  weight of the matched queries in DDF, the others have the rest; None: by the roots of their numbers
    """
    layers = len(sides.logits)
    pairs = assignment.for_layers(layers)
    wanted = cxcywh_to_xyxy(padded.boxes[pairs.image, pairs.target[0]])  # [P, 4]
    iou = paired_iou(cxcywh_to_xyxy(pairs.take(boxes)).detach(), wanted)  # [L, P]
    lower, above = side_targets(wanted, sides.start[pairs.image, pairs.query[0]], sides.values, sides.scale)
    per_side = fine_grained_localization(pairs.take(sides.logits), lower.expand(layers, -1, -1), above)
    fine = (per_side * iou[..., None]).sum((1, 2)) / count

    matched = torch.zeros(logits.shape[1:3], dtype=torch.bool, device=logits.device)
    matched[pairs.image, pairs.query[0]] = True
    if matched_share is None:
        with_object = matched.sum().float().sqrt()
        matched_share = with_object / (with_object + (~matched).sum().float().sqrt())
    # How sure the teacher is of a query; of a matched one, how good the layer's own box is.
    weight = logits[-1].detach().sigmoid().amax(-1).expand(layers, -1, -1).clone()  # [L, B, N]
    weight[:, pairs.image, pairs.query[0]] = iou
    apart = distribution_distance(sides.logits[:-1], sides.logits[-1].detach(), TEMPERATURE)  # [L - 1, B, N, 4]
    apart = (apart * weight[:-1, ..., None]).mean(-1)
    distilled = matched_share * _mean(apart, matched) + (1 - matched_share) * _mean(apart, ~matched)
    return SideLosses(fine, F.pad(distilled, (0, 1)), matched_share)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """values [G, B, N], chosen [B, N] bool -> [G], the mean of the chosen ones; 0 where there is none."""
    return (values * chosen).sum((1, 2)) / chosen.sum().clamp(min=1)


def side_targets(boxes: Tensor, start: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sides of known boxes lie among the bins; without gradient.

    boxes   [..., 4]   x0, y0, x1, y1 in 0..1
    start   [..., 4]   cx, cy, w, h in 0..1, the boxes whose sides move
    values  W [R + 1];  scale [1]
    return  the lower bin [..., 4] int64 (0..R - 1), and the part 0..1 of the target that belongs to the bin above it
    """
    with torch.no_grad():
        center, size = start.split(2, dim=-1)
        low, high = boxes.split(2, dim=-1)
        outwards = torch.cat([center - low, high - center], dim=-1)  # of the image
        steepness = scale.abs()
        # As W: box sides times scale, beyond half a box side.
        wanted = outwards / (torch.cat([size, size], dim=-1) / steepness + TINY) - 0.5 * steepness
        lower = torch.searchsorted(values, wanted.contiguous(), right=True) - 1
        lower = lower.clamp(0, len(values) - 2)
        left, right = values[lower], values[lower + 1]
        return lower, ((wanted - left) / (right - left)).clamp(0, 1)


def fine_grained_localization(logits: Tensor, lower: Tensor, above: Tensor) -> Tensor:
    """Cross-entropy with a target that is spread over two neighboring bins (section 4.1), per side.

    logits        [..., 4, R + 1]
    lower, above  [..., 4] of `side_targets`
    return        [..., 4]
    """
    log = F.log_softmax(logits, -1)
    at_lower = log.gather(-1, lower[..., None])[..., 0]
    at_upper = log.gather(-1, lower[..., None] + 1)[..., 0]
    return -(at_lower * (1 - above) + at_upper * above)


def distribution_distance(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distributions, both softened, times the temperature squared.

    logits, teacher  [..., R + 1], broadcast
    return           [...]
    """
    soft = (teacher / temperature).log_softmax(-1)
    return (soft.exp() * (soft - (logits / temperature).log_softmax(-1))).sum(-1) * temperature**2
