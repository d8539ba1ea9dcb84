"""Distillation: the student learns what a teacher detects in the same images, matched one to one with its queries.

The teacher's detections above a score are soft targets: their class probabilities, not one class, and their boxes. They
are matched in each decoder layer with the costs of the objects (Chang et al. 2023, "DETRDistill", section 3.2, without
its negative queries), and each counts by its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou
from edgedetr.models.records import Outputs
from edgedetr.training.config import LossConfig
from edgedetr.training.criterion import by_group, mean_over_processes
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.matcher import Costs, match

SMALLEST = 1e-6  # probability: keeps logarithms finite


@dataclass(frozen=True)
class TeacherDetections:
    """What a teacher detects in B images, padded to the T of the image with the most. Without gradient.

    probabilities  [B, T, K]  of the student's classes, 0 for those that the teacher does not know
    boxes          [B, T, 4]  cx, cy, w, h in 0..1; padding as in PaddedTargets
    scores         [B, T]     the largest probability, padding 0
    known          [K] bool   the classes that the teacher knows
    counts         detections of each image, as Python ints
    """

    probabilities: Tensor
    boxes: Tensor
    scores: Tensor
    known: Tensor
    counts: list[int]

    def as_targets(self) -> PaddedTargets:
        """The most probable class and the box of each, for matching."""
        return PaddedTargets(self.probabilities.argmax(-1), self.boxes, self.counts)


def detections_of(
    logits: Tensor, boxes: Tensor, columns: Sequence[int | None], *, softmax: bool, least_score: float
) -> TeacherDetections:
    """The detections with at least `least_score`, the most certain first.

    logits   [B, N, K*], boxes [B, N, 4] of the teacher's last layer
    columns  for each of the student's classes the teacher's, or None
    softmax  the last logit is "no object"; else each class has a sigmoid
    """
    logits, boxes = logits.detach().float(), boxes.detach().float()
    theirs = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    known = torch.tensor([column is not None for column in columns], device=logits.device)
    index = torch.tensor([column or 0 for column in columns], device=logits.device)
    ours = torch.where(known, theirs[..., index], 0)
    scores, order = ours.amax(-1).sort(dim=-1, descending=True, stable=True)
    counts = (scores >= least_score).sum(-1).tolist()
    order, scores = order[:, : max(counts, default=0)], scores[:, : max(counts, default=0)]
    valid = scores >= least_score
    ours = ours.gather(1, order[..., None].expand(-1, -1, len(columns)))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    whole = boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    return TeacherDetections(
        torch.where(valid[..., None], ours, 0),
        torch.where(valid[..., None], boxes, whole),
        torch.where(valid, scores, 0),
        known,
        counts,
    )


def distillation_loss(
    outputs: Outputs, teacher: TeacherDetections, costs: Costs, config: LossConfig, weight: float = 1.0
) -> Tensor:
    """The distance of a student's detections from a teacher's, summed over its decoder layers: [] with gradient.

    For every detection of the teacher and its query: the Kullback-Leibler divergence of the class probabilities (binary
    cross-entropy without the part that is the teacher's own, so that equal detections give 0), the L1 distance and the
    GIoU loss of the boxes with the weights of the objects; the mean over detections by score, a sum of scores below 1
    counting as 1.

    costs    the student's matching costs; their form tells the activation of its logits
    config   weights of the L1 and the GIoU loss
    weight   of the whole
    """
    with torch.autocast(outputs.logits.device.type, enabled=False):
        targets = teacher.as_targets()
        logits, boxes = (
            by_group(outputs.logits.float(), outputs.groups),
            by_group(outputs.boxes.float(), outputs.groups),
        )
        pairs = match([(logits, boxes)], targets, costs)[0]
        image = pairs.image[None].expand_as(pairs.target)
        scores = teacher.scores[image, pairs.target]  # [G, P]
        wanted, wanted_boxes = teacher.probabilities[image, pairs.target], teacher.boxes[image, pairs.target]
        ours, our_boxes = pairs.take(logits), pairs.take(boxes)
        if costs.form == "softmax":
            classes = softmax_divergence(ours, wanted)
        else:
            classes = (binary_divergence(ours, wanted) * teacher.known).sum(-1)
        corners, wanted_corners = cxcywh_to_xyxy(our_boxes), cxcywh_to_xyxy(wanted_boxes)
        l1 = (our_boxes - wanted_boxes).abs().sum(-1)
        giou = 1 - paired_giou(corners, wanted_corners)
        distance = classes + config.weight_l1 * l1 + config.weight_giou * giou
        total = mean_over_processes(teacher.scores.sum()).clamp(min=1)
        return weight * (scores * distance).sum() / (total * outputs.groups)


def binary_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of sigmoid probabilities from wanted ones, per class: [..., K] and [..., K] -> [..., K]."""
    wanted = wanted.clamp(SMALLEST, 1 - SMALLEST)
    entropy = -(wanted * wanted.log() + (1 - wanted) * (-wanted).log1p())
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none") - entropy


def softmax_divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of softmax probabilities from wanted ones: logits [..., K + 1], wanted [..., K] -> [...].

    What the wanted probabilities leave to 1 is that of "no object"; where they exceed 1 together (a sigmoid teacher),
    they are scaled to 1.
    """
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1)
    wanted = torch.cat([wanted, 1 - wanted.sum(-1, keepdim=True)], -1).clamp(min=SMALLEST)
    return (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1)
