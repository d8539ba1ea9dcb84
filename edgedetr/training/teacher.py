"""The teacher of a distillation: a trained detector, frozen, asked about the student's training images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import MANIFEST, Bundle
from edgedetr.errors import ModelError
from edgedetr.models.checkpoints.pretrained import rows_by_name
from edgedetr.models.deploy import bundle_detector
from edgedetr.models.detector import DetrModel
from edgedetr.training.distillation import TeacherDetections, detections_of

log = logging.getLogger(__name__)


class Teacher:
    """A frozen detector and the student's classes in it; no nn.Module, so no optimizer, average or checkpoint has it.

    model        in evaluation mode, on the student's device
    columns      for each of the student's classes the teacher's, or None
    least_score  of the detections that are taught
    """

    def __init__(self, model: DetrModel, columns: Sequence[int | None], *, softmax: bool, least_score: float) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.progress(1.0)  # the queries of the end of its training
        self.columns, self.softmax, self.least_score = tuple(columns), softmax, least_score

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> TeacherDetections:
        """The detections in the student's input, [B, 3, H, W] RGB in 0..255.

        Images whose sides this teacher cannot read are resized to the nearest that it can.
        """
        multiple = self.model.size_multiple
        sides = [max(round(side / multiple), 1) * multiple for side in pixels.shape[-2:]]
        if sides != list(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, sides, mode="bilinear", align_corners=False, antialias=True)
        outputs = self.model(self.model.normalize(pixels), last_only=True)
        return detections_of(
            outputs.logits[-1], outputs.boxes[-1], self.columns, softmax=self.softmax, least_score=self.least_score
        )


def load_teacher(source: str, classes: Sequence[str], device: torch.device, least_score: float) -> Teacher:
    """The detector of a bundle as teacher of a student with these classes, matched by name.

    Errors: ModelError where no class is known to both; BundleError.
    """
    bundle = _bundle(source)
    theirs = [item.name for item in bundle.manifest.classes]
    columns = rows_by_name(theirs, list(classes))
    untaught = [name for name, column in zip(classes, columns) if column is None]
    if len(untaught) == len(classes):
        raise ModelError(
            f"train.teacher: {source} knows {_listed(theirs)} and the data set has {_listed(classes)}: no class has "
            "the same name in both; expected a teacher that was trained on these classes, or some of them"
        )
    unused = [name for index, name in enumerate(theirs) if index not in columns]
    if untaught or unused:
        log.warning(
            "train.teacher: %s teaches %d of %d classes by name; not taught: %s; of no use here: %s",
            source,
            len(classes) - len(untaught),
            len(classes),
            _listed(untaught),
            _listed(unused),
        )
    model = bundle_detector(bundle).to(device)
    softmax = bundle.manifest.output.activation == "softmax"
    return Teacher(model, columns, softmax=softmax, least_score=least_score)


def teacher_digest(source: str) -> str:
    """sha256 of the teacher's weights: with another teacher a training cannot be resumed."""
    bundle = _bundle(source)
    bundle.require(WEIGHTS.file)
    return bundle.manifest.files[WEIGHTS.file].sha256


def _bundle(source: str) -> Bundle:
    if not (Path(source) / MANIFEST).is_file():
        raise ModelError(
            f"train.teacher is {source!r}, which is no bundle; expected the folder of one: "
            "run: edgedetr train --data DIR, or edgedetr import SOURCE --model NAME --out B"
        )
    return Bundle.open(source)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
