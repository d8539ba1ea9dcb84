"""From predictions and objects to one loss: match every layer, then classes, L1 and GIoU of all layers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou, paired_iou
from edgedetr.models.detector import Outputs
from edgedetr.options import one_of
from edgedetr.training import losses
from edgedetr.training.config import CLASS_LOSSES, TrainConfig, require_loss_of
from edgedetr.training.ground_truth import Padded, Target, pad
from edgedetr.training.matcher import Costs, Matches, match


@dataclass(frozen=True)
class Losses:
    """`total` is what is differentiated; the rest are its weighted parts, for the eye, without gradient.

    class_, l1, giou    of the last decoder layer
    auxiliary           of the other decoder layers
    encoder             of the proposals of two-stage members
    denoising           of the noised queries
    """

    total: Tensor
    class_: Tensor
    l1: Tensor
    giou: Tensor
    auxiliary: Tensor
    encoder: Tensor
    denoising: Tensor

    NAMES = ("loss", "class", "l1", "giou", "auxiliary", "encoder", "denoising")

    def stacked(self) -> Tensor:
        """[7] float32 in the order of NAMES: one copy from the device shows them all."""
        return torch.stack([self.total, self.class_, self.l1, self.giou, self.auxiliary, self.encoder, self.denoising])


@dataclass(frozen=True)
class Denoised:
    """Predictions of the noised queries, and the object each positive one came from.

    logits [L, B, D, K], boxes [L, B, D, 4];  groups: how often each object occurs
    """

    logits: Tensor
    boxes: Tensor
    matches: Matches
    groups: int


class Criterion:
    """Loss of one batch. `class_loss` is the member's own unless the settings name another.

    foreground  to the proposals of the encoder, every object is of class 0 (two-stage Deformable DETR)
    """

    def __init__(self, config: TrainConfig, class_loss: str, foreground: bool = False) -> None:
        self.foreground = foreground
        one_of("class_loss", class_loss, CLASS_LOSSES)
        # A member's own loss says which activation its logits have.
        require_loss_of(config.class_loss, "softmax" if class_loss == "softmax_ce" else "sigmoid")
        self.config, self.class_loss = config, config.class_loss or class_loss
        softmax = self.class_loss == "softmax_ce"
        usual = 2.0 if self.class_loss == "focal" else 1.0
        self.weight_class = config.weight_class if config.weight_class is not None else usual
        cost = config.cost_class if config.cost_class is not None else (1.0 if softmax else 2.0)
        self.costs = Costs(
            "softmax" if softmax else "focal", cost, config.cost_l1, config.cost_giou, corners=config.l1 == "xyxy"
        )

    def __call__(
        self,
        outputs: Outputs,
        targets: Sequence[Target] | Padded,
        denoised: Denoised | None = None,
        boxes_per_process: float | None = None,
    ) -> Losses:
        """Losses of the matching queries, of the proposals, and of the noised queries where there are any.

        boxes_per_process   objects in all processes / processes; default: those of `targets`
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            padded = targets if isinstance(targets, Padded) else pad(targets)
            count = max(float(sum(padded.counts)) if boxes_per_process is None else boxes_per_process, 1.0)
            decoder = (outputs.logits.float(), outputs.boxes.float())
            encoder = None
            if outputs.encoder is not None:
                encoder = (outputs.encoder[0][None].float(), outputs.encoder[1][None].float())
            joined = encoder is not None and encoder[0].shape[1:] == decoder[0].shape[1:] and not self.foreground
            if encoder is not None and joined:  # equally many queries: one more layer, computed in the same calls
                groups = [(torch.cat([decoder[0], encoder[0]]), torch.cat([decoder[1], encoder[1]]))]
            else:
                groups = [decoder] + ([encoder] if encoder is not None else [])
            wanted, matched = [padded] * len(groups), []
            if encoder is not None and self.foreground:
                wanted[-1] = replace(padded, labels=torch.zeros_like(padded.labels))
                for group, objects in zip(groups, wanted):
                    matched += match([group], objects, self.costs)
            else:
                matched = match(groups, padded, self.costs)
            parts = torch.cat(
                [self._layers(*group, found, objects, count) for group, found, objects in zip(groups, matched, wanted)],
                1,
            )
            last, layers = len(outputs.logits) - 1, len(outputs.logits)
            noise = parts.new_zeros(())
            if denoised is not None:
                noise = self._layers(
                    denoised.logits.float(), denoised.boxes.float(), denoised.matches, padded, count * denoised.groups
                ).sum()
            shown = parts.detach()
            return Losses(
                parts.sum() + noise,
                shown[0, last],
                shown[1, last],
                shown[2, last],
                auxiliary=shown[:, :last].sum(),
                encoder=shown[:, layers:].sum(),
                denoising=noise.detach(),
            )

    def _layers(self, logits: Tensor, boxes: Tensor, matches: Matches, padded: Padded, count: float) -> Tensor:
        """Weighted class, L1 and GIoU losses of each layer: [3, G]."""
        predicted = matches.take(boxes)  # [G, P, 4]
        wanted = padded.boxes[matches.image[None], matches.target]
        corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        apart = corners - wanted_corners if self.costs.corners else predicted - wanted
        l1 = apart.abs().sum((1, 2)) / count
        giou = (1 - paired_giou(corners, wanted_corners)).sum(1) / count
        overlap = paired_iou(corners.detach(), wanted_corners)  # [G, P]
        class_ = self._class(logits, overlap, matches, padded, count)
        config = self.config
        return torch.stack([class_ * self.weight_class, l1 * config.weight_l1, giou * config.weight_giou])

    def _class(self, logits: Tensor, overlap: Tensor, matches: Matches, padded: Padded, count: float) -> Tensor:
        config = self.config
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(matches.query)
        image = matches.image[None].expand_as(matches.query)
        labels = padded.labels[image, matches.target]
        if self.class_loss == "softmax_ce":
            wanted_class = torch.full(logits.shape[:3], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device)
            wanted_class[layer, image, matches.query] = labels
            return losses.softmax_ce(logits, wanted_class, config.no_object, config.label_smoothing)
        onehot = torch.zeros_like(logits)
        onehot[layer, image, matches.query, labels] = 1
        if self.class_loss == "focal":
            return losses.focal(logits, onehot, config.focal_alpha, config.gamma, config.label_smoothing) / count
        quality = torch.zeros_like(logits[..., 0])
        quality[layer, image, matches.query] = overlap
        if self.class_loss == "vfl":
            return (
                losses.varifocal(logits, onehot, quality, config.vfl_alpha, config.gamma, config.label_smoothing)
                / count
            )
        if self.class_loss == "mal":
            return losses.matchability(logits, onehot, quality, config.gamma, config.label_smoothing) / count
        raise ValueError(f"class loss {self.class_loss!r}; expected one of {CLASS_LOSSES}")
