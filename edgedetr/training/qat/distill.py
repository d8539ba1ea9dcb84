"""What the student learns from: the objects, and the float detector, query by query.

The student's queries start from the cells that the float detector selected, so that equal places in both mean the same
query and nothing has to be matched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou
from edgedetr.models.detector import DetrModel
from edgedetr.models.records import Outputs
from edgedetr.models.selection import Selection
from edgedetr.training.config import LossConfig, TrainConfig
from edgedetr.training.criterion import Criterion, mean_over_processes
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.distillation import binary_divergence, softmax_divergence


class QuantizedTraining(nn.Module):
    """A student and its losses as one module, in the form of `training_module.TrainingModule`.

    teacher     the float detector, fused; no part of the module, so that no average or checkpoint has it
    every_layer whether losses of all decoder layers are learned; otherwise those of the last, which is deployed

    The student stays in evaluation mode: BatchNorm is folded, and rounding is noise enough without dropout.
    """

    def __init__(
        self, model: DetrModel, teacher: DetrModel, config: TrainConfig, class_loss: str, *, every_layer: bool
    ) -> None:
        super().__init__()
        self.model, self.config, self.every_layer = model, config, every_layer
        self._teacher = (teacher,)
        self.criterion = Criterion(config, class_loss, model.class_agnostic_proposals)

    def forward(self, images: Tensor, targets: Callable[[], PaddedTargets], objects_per_process: float) -> Tensor:
        """Losses [9] in the order of Losses.NAMES; only the first has a gradient. Arguments: see TrainingModule."""
        pixels = self.model.normalize(images.float().contiguous(memory_format=torch.channels_last))
        selection = Selection()
        with torch.no_grad():
            wanted = self._run(self._teacher[0], pixels, selection)
        outputs = self._run(self.model, pixels, selection)
        losses = self.criterion(outputs, targets(), None, objects_per_process)
        taught = paired_distillation(outputs, wanted, self.config, self.criterion.costs.form == "softmax")
        return losses.with_teacher(self.config.teacher_weight * taught).stacked()

    def _run(self, model: DetrModel, pixels: Tensor, selection: Selection) -> Outputs:
        memory = model.encode(pixels)
        with selection:
            queries = model.select(memory)
        return model.decode(queries, memory, last_only=not self.every_layer)


def paired_distillation(outputs: Outputs, teacher: Outputs, config: LossConfig, softmax: bool) -> Tensor:
    """The distance of each query's classes and box from the teacher's query of the same number: [] with gradient.

    The Kullback-Leibler divergence of the class probabilities of all queries; the L1 distance and the GIoU loss of the
    boxes, weighted as those of objects, and by the teacher's score. The sum is divided by the sum of the scores; layers
    are added up, and the proposals of two-stage members are one more.

    softmax   the last logit is "no object"; else each class has a sigmoid
    """
    total = _distance(outputs.logits, outputs.boxes, teacher.logits, teacher.boxes, config, softmax)
    if outputs.encoder is not None and teacher.encoder is not None:
        (logits, boxes), (wanted, wanted_boxes) = outputs.encoder, teacher.encoder
        total = total + _distance(logits[None], boxes[None], wanted[None], wanted_boxes[None], config, softmax=False)
    return total


def _distance(
    logits: Tensor, boxes: Tensor, wanted: Tensor, wanted_boxes: Tensor, config: LossConfig, softmax: bool
) -> Tensor:
    """Of logits [L, B, N, K*] and boxes [L, B, N, 4] from the wanted ones: []."""
    with torch.autocast(logits.device.type, enabled=False):
        logits, boxes, wanted, wanted_boxes = (x.float() for x in (logits, boxes, wanted, wanted_boxes))
        if softmax:
            probabilities = wanted.softmax(-1)[..., :-1]
            classes = softmax_divergence(logits, probabilities)
        else:
            probabilities = wanted.sigmoid()
            classes = binary_divergence(logits, probabilities).sum(-1)
        scores = probabilities.amax(-1)  # [L, B, N]
        l1 = (boxes - wanted_boxes).abs().sum(-1)
        giou = 1 - paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted_boxes))
        distance = classes + scores * (config.weight_l1 * l1 + config.weight_giou * giou)
        count = mean_over_processes(scores.sum((1, 2))).clamp(min=1)  # [L]
        return (distance.sum((1, 2)) / count).sum()
