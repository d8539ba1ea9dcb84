"""Computes the loss: match the queries of every layer to objects, then class, L1 and GIoU losses of all layers at once.

Everything is in float32, whatever precision the model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou, paired_iou
from edgedetr.models.records import Outputs, Sides
from edgedetr.options import one_of
from edgedetr.training.config import CLASS_LOSSES, LossConfig, require_loss_of
from edgedetr.training.data.dataset import PaddedTargets, Target, pad
from edgedetr.training.matcher import Assignment, Costs, match, match_and_join
from edgedetr.training.side_losses import side_losses

# Weights of the losses of sides (the authors' dfine_hgnetv2.yml), where train.weight_fgl and weight_ddf name none.
WEIGHT_FGL, WEIGHT_DDF = 0.15, 1.5

LEAST_SCORE = 0.01  # that a matched query learns with iou_aware_bce, however poor its box (LW-DETR's code)


@dataclass(frozen=True)
class Losses:
    """`total` has a gradient; the others are its weighted parts, detached, for the progress bar and the metrics log.

    class_, l1, giou    of the last decoder layer
    auxiliary           of the other decoder layers
    encoder             of the proposals of two-stage members
    denoising           of the noised queries
    sides               of the distributions of boxes' sides in all layers, where the member has them, else 0
    teacher             of the distances from a teacher's detections and features, where there is one, else None
    """

    total: Tensor
    class_: Tensor
    l1: Tensor
    giou: Tensor
    auxiliary: Tensor
    encoder: Tensor
    denoising: Tensor
    sides: Tensor
    teacher: Tensor | None = None

    NAMES = ("loss", "class", "l1", "giou", "auxiliary", "encoder", "denoising", "sides", "teacher")

    def with_teacher(self, distance: Tensor) -> Losses:
        """These losses and one more: [] with a gradient."""
        known = distance.detach() if self.teacher is None else self.teacher + distance.detach()
        return replace(self, total=self.total + distance, teacher=known)

    def stacked(self) -> Tensor:
        """[9] float32 in the order of NAMES, so that one copy from the device has them all."""
        own = [self.total, self.class_, self.l1, self.giou, self.auxiliary, self.encoder, self.denoising, self.sides]
        return torch.stack([*own, self.total.new_zeros(()) if self.teacher is None else self.teacher])


@dataclass(frozen=True)
class DenoisingOutputs:
    """Predictions of the noised queries, and the object that each positive one was made from.

    logits [L, B, D, K], boxes [L, B, D, 4];  groups: copies of every object;  sides: as in Outputs
    """

    logits: Tensor
    boxes: Tensor
    assignment: Assignment
    groups: int
    sides: Sides | None = None


@dataclass(frozen=True)
class _Located:
    """The pairs that the losses of boxes count, where they are not those of the class loss, and how many there are."""

    assignment: Assignment
    count: Tensor


class Criterion:
    """The loss of one batch.

    class_loss                the member's own, used unless config.class_loss names another
    class_agnostic_proposals  the encoder's proposals have one class, 0, for all objects (two-stage Deformable DETR)
    """

    def __init__(self, config: LossConfig, class_loss: str, class_agnostic_proposals: bool = False) -> None:
        self.class_agnostic_proposals = class_agnostic_proposals
        one_of("class_loss", class_loss, CLASS_LOSSES)
        # The member's own loss determines the activation of its logits.
        require_loss_of(config.class_loss, "softmax" if class_loss == "softmax_ce" else "sigmoid")
        self.config, self.class_loss = config, config.class_loss or class_loss
        softmax = self.class_loss == "softmax_ce"
        default_weight = 2.0 if self.class_loss == "focal" else 1.0
        self.weight_class = config.weight_class if config.weight_class is not None else default_weight
        self.weight_fgl = WEIGHT_FGL if config.weight_fgl is None else config.weight_fgl
        self.weight_ddf = WEIGHT_DDF if config.weight_ddf is None else config.weight_ddf
        cost = config.cost_class if config.cost_class is not None else (1.0 if softmax else 2.0)
        self.costs = Costs(
            "softmax" if softmax else "focal", cost, config.cost_l1, config.cost_giou, corners=config.l1 == "xyxy"
        )

    def __call__(
        self,
        outputs: Outputs,
        targets: Sequence[Target] | PaddedTargets,
        denoising: DenoisingOutputs | None = None,
        objects_per_process: float | None = None,
    ) -> Losses:
        """Losses of the matching queries, of the proposals, and of the noised queries where there are any.

        objects_per_process   objects in all processes / processes; default: those of `targets`
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            padded = targets if isinstance(targets, PaddedTargets) else pad(targets)
            objects = float(sum(padded.counts)) if objects_per_process is None else objects_per_process
            count = max(objects, 1.0)
            if outputs.sides is not None:
                return self._with_sides(outputs, outputs.sides, padded, denoising, count)
            parts = self._matched_losses(outputs, padded, max(objects * outputs.groups, 1.0))  # [3, L (+ 1)]
            layers = len(outputs.logits)
            noise = parts.new_zeros(())
            if denoising is not None:
                logits, boxes = denoising.logits.float(), denoising.boxes.float()
                copies = count * denoising.groups
                noise = self._layer_losses(logits, boxes, denoising.assignment, padded, copies).sum()
            shown = parts.detach()
            return Losses(
                parts.sum() + noise,
                shown[0, layers - 1],
                shown[1, layers - 1],
                shown[2, layers - 1],
                auxiliary=shown[:, : layers - 1].sum(),
                encoder=shown[:, layers:].sum(),
                denoising=noise.detach(),
                sides=shown.new_zeros(()),
            )

    def _with_sides(
        self, outputs: Outputs, sides: Sides, padded: PaddedTargets, denoising: DenoisingOutputs | None, count: float
    ) -> Losses:
        """The same for boxes by distributions of their sides (Peng et al. 2024, "D-FINE", section 4).

        The plain head before the first layer is one more layer. Each layer's classes are matched on their own; boxes
        and sides have the pairs that any layer, the plain head or the encoder found.
        """
        if outputs.encoder is None or outputs.encoder[0].shape[1] != outputs.logits.shape[2]:
            raise ValueError("a member with distributions of sides has as many proposals as queries")
        layers = len(outputs.logits)
        logits = torch.cat([sides.first[0][None], outputs.logits, outputs.encoder[0][None]]).float()
        boxes = torch.cat([sides.first[1][None], outputs.boxes, outputs.encoder[1][None]]).float()
        assignment, union = match_and_join((logits, boxes), padded, self.costs)
        pairs = mean_over_processes(logits.new_tensor(float(len(union.image))))
        located = _Located(union.for_layers(len(logits)), pairs.clamp(min=1))
        parts = self._layer_losses(logits, boxes, assignment, padded, count, located)  # [3, L + 2]
        decoder = slice(1, 1 + layers)
        side = side_losses(sides, logits[decoder], boxes[decoder], union, padded, located.count)
        of_sides = (self.weight_fgl * side.fine + self.weight_ddf * side.distilled).sum()
        noise = parts.new_zeros(())
        if denoising is not None and denoising.sides is not None:
            first, copies = denoising.sides.first, count * denoising.groups
            noised = torch.cat([first[0][None], denoising.logits]).float()
            noised_boxes = torch.cat([first[1][None], denoising.boxes]).float()
            known = denoising.assignment.for_layers(1 + layers)
            noise = self._layer_losses(noised, noised_boxes, known, padded, copies).sum()
            share = side.matched_share
            side = side_losses(denoising.sides, noised[1:], noised_boxes[1:], known, padded, copies, share)
            noise = noise + (self.weight_fgl * side.fine + self.weight_ddf * side.distilled).sum()
        shown = parts.detach()
        return Losses(
            parts.sum() + of_sides + noise,
            shown[0, layers],
            shown[1, layers],
            shown[2, layers],
            auxiliary=shown[:, :layers].sum(),
            encoder=shown[:, 1 + layers :].sum(),
            denoising=noise.detach(),
            sides=of_sides.detach(),
        )

    def _matched_losses(self, outputs: Outputs, padded: PaddedTargets, count: float) -> Tensor:
        """Weighted class, L1 and GIoU losses of the L decoder layers, then of the encoder, if any: [3, L (+ 1)].

        Each group of queries finds all objects. A group is matched as a layer of its own, and the loss is the groups'
        mean (Chen et al. 2023, "Group DETR", eq. 6).

        count   objects in all groups
        """
        copies = outputs.groups
        decoder = (by_group(outputs.logits.float(), copies), by_group(outputs.boxes.float(), copies))
        if outputs.encoder is None:
            groups = [decoder]
        else:
            logits, boxes = (part[None].float() for part in outputs.encoder)
            encoder = (by_group(logits, copies), by_group(boxes, copies))
            if encoder[0].shape[1:] == decoder[0].shape[1:] and not self.class_agnostic_proposals:
                # Equally many queries: the encoder is one more layer in the same calls.
                groups = [(torch.cat([decoder[0], encoder[0]]), torch.cat([decoder[1], encoder[1]]))]
            else:
                groups = [decoder, encoder]
        targets = [padded] * len(groups)
        if outputs.encoder is not None and self.class_agnostic_proposals:
            targets[-1] = replace(padded, labels=torch.zeros_like(padded.labels))
            assignments = [match([group], wanted, self.costs)[0] for group, wanted in zip(groups, targets)]
        else:
            assignments = match(groups, padded, self.costs)
        losses = [
            self._layer_losses(*group, assignment, wanted, count)
            for group, assignment, wanted in zip(groups, assignments, targets)
        ]
        parts = torch.cat(losses, 1)
        return parts if copies == 1 else parts.unflatten(1, (-1, copies)).sum(-1)

    def _layer_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        assignment: Assignment,
        padded: PaddedTargets,
        count: float,
        located: _Located | None = None,
    ) -> Tensor:
        """Weighted class, L1 and GIoU losses of each layer: [3, G]."""
        predicted = assignment.take(boxes)  # [G, P, 4]
        wanted = padded.boxes[assignment.image[None], assignment.target]
        corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        quality = paired_iou(corners.detach(), wanted_corners)  # [G, P]
        class_ = self._class_loss(logits, quality, assignment, padded, count)
        box_count: float | Tensor = count
        if located is not None:
            box_count, predicted = located.count, located.assignment.take(boxes)
            wanted = padded.boxes[located.assignment.image[None], located.assignment.target]
            corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        difference = corners - wanted_corners if self.costs.corners else predicted - wanted
        l1 = difference.abs().sum((1, 2)) / box_count
        giou = (1 - paired_giou(corners, wanted_corners)).sum(1) / box_count
        config = self.config
        return torch.stack([class_ * self.weight_class, l1 * config.weight_l1, giou * config.weight_giou])

    def _class_loss(
        self, logits: Tensor, iou: Tensor, assignment: Assignment, padded: PaddedTargets, count: float
    ) -> Tensor:
        """Class loss of each layer, [G]; iou [G, P] of the matched boxes."""
        config = self.config
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(assignment.query)
        image = assignment.image[None].expand_as(assignment.query)
        labels = padded.labels[image, assignment.target]
        if self.class_loss == "softmax_ce":
            wanted = torch.full(logits.shape[:3], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device)
            wanted[layer, image, assignment.query] = labels
            return softmax_ce(logits, wanted, config.no_object, config.label_smoothing)
        onehot = torch.zeros_like(logits)
        onehot[layer, image, assignment.query, labels] = 1
        if self.class_loss == "focal":
            return focal(logits, onehot, config.focal_alpha, config.gamma, config.label_smoothing) / count
        quality = torch.zeros_like(logits[..., 0])
        quality[layer, image, assignment.query] = iou
        if self.class_loss == "vfl":
            loss = varifocal(logits, onehot, quality, config.vfl_alpha, config.gamma, config.label_smoothing)
            return loss / count
        if self.class_loss == "mal":
            return matchability(logits, onehot, quality, config.gamma, config.label_smoothing) / count
        if self.class_loss == "ia_bce":
            loss = iou_aware_bce(logits, onehot, quality, config.focal_alpha, config.gamma, config.label_smoothing)
            return loss / count
        raise ValueError(f"class loss {self.class_loss!r}; expected one of {CLASS_LOSSES}")


def by_group(values: Tensor, groups: int) -> Tensor:
    """values [L, B, G N, ...] of G groups of queries -> [L G, B, N, ...], as if each group were a layer."""
    return values if groups == 1 else values.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number [] that every process has; the number itself where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


# The class losses, one number per layer G.


def softmax_ce(logits: Tensor, labels: Tensor, no_object: float, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a low weight of the no-object class, weighted mean over all queries (DETR, section 3.2).

    logits     [G, B, N, K + 1], the last class is "no object"
    labels     [G, B, N], K where there is no object
    no_object  weight of the no-object class; the others have 1
    smoothing  fraction of the target that is spread over all classes, "no object" included, by their weights
    return     [G]
    """
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = no_object
    loss = F.cross_entropy(logits.movedim(-1, 1), labels, weight, reduction="none", label_smoothing=smoothing)
    return loss.flatten(1).sum(1) / weight[labels].flatten(1).sum(1)


def focal(logits: Tensor, onehot: Tensor, alpha: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Sigmoid focal loss, summed over queries and classes (Lin et al. 2017, eq. 5); all [G, B, N, K] -> [G].

    smoothing   the targets 0 and 1 of a matched query move towards one half by this fraction; others stay 0
    """
    prob = logits.sigmoid()
    miss = torch.where(onehot > 0, 1 - prob, prob)
    weight = torch.where(onehot > 0, alpha, 1 - alpha)
    wanted = _smoothed(onehot, smoothing)
    loss = weight * miss**gamma * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return loss.flatten(1).sum(1)


def varifocal(
    logits: Tensor, onehot: Tensor, quality: Tensor, alpha: float, gamma: float, smoothing: float = 0.0
) -> Tensor:
    """Varifocal loss (Zhang et al. 2021, eq. 2): the score of a matched query learns the IoU of its box.

    logits, onehot  [G, B, N, K];  quality [G, B, N], IoU of matched queries, else 0;  return [G], summed
    smoothing       as in `focal`: of 0 and the IoU towards half the IoU; the weights do not change
    """
    score = onehot * quality[..., None]
    weight = torch.where(onehot > 0, score, alpha * logits.detach().sigmoid() ** gamma)
    wanted = _smoothed(onehot, smoothing) * quality[..., None]
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="none").flatten(1).sum(1)


def matchability(logits: Tensor, onehot: Tensor, quality: Tensor, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Matchability-aware loss (Huang et al. 2024, "DEIM", eq. 5): as varifocal, but poor matches have full weight.

    logits, onehot  [G, B, N, K];  quality [G, B, N];  return [G], summed
    smoothing       as in `varifocal`, of the IoU to the power of gamma
    """
    wanted = _smoothed(onehot, smoothing) * quality[..., None] ** gamma
    weight = torch.where(onehot > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="none").flatten(1).sum(1)


def iou_aware_bce(
    logits: Tensor, onehot: Tensor, quality: Tensor, alpha: float, gamma: float, smoothing: float = 0.0
) -> Tensor:
    """IoU-aware cross-entropy (Chen et al. 2024, "LW-DETR", eq. 2 and 3; Cai et al. 2023, "Align-DETR").

    The score p of a matched query learns t = p^alpha IoU^(1 - alpha), which is a constant to the gradient; every other
    score is pushed down with the weight p^gamma.

    logits, onehot  [G, B, N, K];  quality [G, B, N], IoU of matched queries, else 0;  return [G], summed
    smoothing       as in `varifocal`: of 0 and t towards half of t; the weights do not change
    """
    prob = logits.sigmoid()
    score = (prob.detach() ** alpha * quality[..., None] ** (1 - alpha)).clamp(min=LEAST_SCORE)
    wanted = _smoothed(onehot, smoothing) * (onehot * score).sum(-1, keepdim=True)
    down = torch.where(onehot > 0, 1 - wanted, prob**gamma)  # its gradient is part of the loss
    # -wanted log(p) - down log(1 - p), of which logsigmoid keeps the digits where p is near 0 or 1.
    return (down * logits - F.logsigmoid(logits) * (wanted + down)).flatten(1).sum(1)


def _smoothed(onehot: Tensor, smoothing: float) -> Tensor:
    """Targets 0 and 1 of a matched query moved towards one half by a fraction; those of other queries stay 0."""
    if not smoothing:
        return onehot
    return torch.where(onehot.amax(-1, keepdim=True) > 0, onehot * (1 - smoothing) + smoothing / 2, onehot)
