"""The teacher of a distillation: a trained detector, frozen, asked about the student's training images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import MANIFEST, Bundle
from edgedetr.data.coco_classes import coco_classes
from edgedetr.errors import ModelError
from edgedetr.models import build
from edgedetr.models.checkpoints.pretrained import load_detector, rows_by_name
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.deploy import bundle_detector
from edgedetr.models.detector import DetrModel
from edgedetr.published.published_detectors import LISTED, PublishedDetector, known, nearest
from edgedetr.recipe import Recipe
from edgedetr.training.distillation import TeacherDetections, detections_of

log = logging.getLogger(__name__)


class Teacher:
    """A frozen detector and the student's classes in it; no nn.Module, so no optimizer, average or checkpoint has it.

    model        in evaluation mode, on the student's device
    columns      for each of the student's classes the teacher's, or None
    least_score  of the detections that are taught
    digest       of its weights: with another teacher a training cannot be resumed
    """

    def __init__(
        self, model: DetrModel, columns: Sequence[int | None], *, softmax: bool, least_score: float, digest: str = ""
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model.progress(1.0)  # the queries of the end of its training
        self.columns, self.softmax, self.least_score, self.digest = tuple(columns), softmax, least_score, digest

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


@dataclass(frozen=True)
class _Detector:
    """A teacher before its classes are matched; digest: of its weights."""

    model: DetrModel
    classes: list[str]
    softmax: bool
    digest: str


def load_teacher(
    source: str, classes: Sequence[str], device: torch.device, least_score: float, accepted: Iterable[str] = ()
) -> Teacher:
    """A trained detector as teacher of a student with these classes, matched by name.

    source    a bundle, or the name of a published detector
    accepted  names of licenses whose terms the user accepts

    Errors: ModelError where no class is known to both; BundleError; LicenseError.
    """
    found = _from_bundle(source) if (Path(source) / MANIFEST).is_file() else _published(source, accepted)
    columns = rows_by_name(found.classes, list(classes))
    untaught = [name for name, column in zip(classes, columns) if column is None]
    if len(untaught) == len(classes):
        raise ModelError(
            f"train.teacher: {source} knows {_listed(found.classes)} and the data set has {_listed(classes)}: no class "
            "has the same name in both; expected a teacher that was trained on these classes, or some of them"
        )
    unused = [name for index, name in enumerate(found.classes) if index not in columns]
    if untaught or unused:
        log.warning(
            "train.teacher: %s teaches %d of %d classes by name; not taught: %s; of no use here: %s",
            source,
            len(classes) - len(untaught),
            len(classes),
            _listed(untaught),
            _listed(unused),
        )
    model = found.model.to(device)
    return Teacher(model, columns, softmax=found.softmax, least_score=least_score, digest=found.digest)


def _from_bundle(source: str) -> _Detector:
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    names = [item.name for item in manifest.classes]
    model = bundle_detector(bundle)
    softmax = manifest.output.activation == "softmax"
    return _Detector(model, names, softmax, manifest.files[WEIGHTS.file].sha256)


def _published(source: str, accepted: Iterable[str]) -> _Detector:
    """A detector of the table of published ones, whose size a shipped recipe has."""
    row = None if os.path.exists(source) else known(source)
    if row is None:
        raise ModelError(
            f"train.teacher is {source!r}, which is no bundle and no published detector{nearest(source)}; expected the "
            f"folder of a bundle (edgedetr train, edgedetr import), or a name of: {LISTED}"
        )
    row.require_accepted(accepted)
    if not row.recipe:
        raise ModelError(
            f"train.teacher is {source!r}, a size that no shipped recipe has; import it, and name the bundle: "
            f"edgedetr import {row.where} --model {row.member} --out teacher.bundle"
        )
    config, origin = published_config(row), WeightSource(source)
    names = [name for _, name in coco_classes(80 if row.classes == "coco80" else 91) or []]
    model = build(row.member, config, len(names))
    load_detector(model, row.member, origin, config)
    digest = " ".join(sorted(origin.record()["files"].values()))
    return _Detector(model.eval(), names, config.activation == "softmax", digest)


def published_config(row: PublishedDetector) -> Any:
    """The configuration of a published detector, for pixels as it was trained with."""
    mean, std = row.mean_and_std
    return replace(Recipe.load(row.recipe).model.config, backbone_weights="random", mean=mean, std=std)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
