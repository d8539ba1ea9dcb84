"""COCO metrics by pycocotools, in points (0..100), and the per-image matches that the bootstrap resamples.

Lin et al. 2014; the twelve numbers as defined at cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedetr.data.detection_set import DetectionSet, display_names
from edgedetr.errors import DataError, MissingDependency
from edgedetr.evaluation.duplicate_detections import duplicate_percentage
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.packages import missing
from edgedetr.runtime.postprocess import Detections

MAX_DETECTIONS = 100  # per image and class, pycocotools' own


@dataclass(frozen=True)
class ClassMatches:
    """One class over all images, COCO area range "all"; D detections in order of falling score, 10 IoU thresholds.

    image        [D]      int64, 0..I-1
    hit          [10, D]  bool, true positive: matched to an object that counts
    ignored      [10, D]  bool, neither a true nor a false positive (crowd regions)
    objects      [I]      int64, objects that count, per image
    """

    image: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class DetectionMatches:
    """The matches of every class, from which AP over any resample of the images is computed."""

    classes: tuple[ClassMatches, ...]
    images: int


@dataclass(frozen=True)
class Metrics:
    """COCO numbers in points, 0..100; None where there is no ground truth to measure on.

    duplicates   see edgedetr.evaluation.duplicate_detections
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar100: float | None
    per_class: dict[str, float | None]  # class name (with its id, where two are equal) -> AP
    duplicates: float | None  # percentage of the shown detections that are duplicates
    matches: DetectionMatches

    def to_json(self) -> dict[str, object]:
        """All but the matches; the key of `duplicates` is "doubled", as in earlier versions."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "matches"}
        return {"doubled" if name == "duplicates" else name: value for name, value in values.items()}


def evaluate(
    truth: DetectionSet | GroundTruth, detections: Mapping[int, Detections], *, by_size: bool = True
) -> Metrics:
    """Metrics of detections (by image id; an image without an entry has none) against the ground truth.

    by_size   False leaves out AP of small, medium and large objects (None), and takes less than half the time
    """
    truth = truth if isinstance(truth, GroundTruth) else GroundTruth.of(truth)
    unknown = set(detections) - set(truth.image_ids.tolist())
    if unknown:
        raise DataError(
            f"detections for image id {min(unknown)}, which the ground truth does not have "
            f"({len(unknown)} such); expected detections of the same split"
        )
    if not len(truth):
        raise DataError("the ground truth has no images; expected at least one; run: edgedetr data check DIR")
    judge = _run(truth, detections, by_size)
    return _metrics(truth, judge, duplicate_percentage(detections))


def _run(truth: GroundTruth, detections: Mapping[int, Detections], by_size: bool) -> Any:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependency(missing("pycocotools", error)) from error
    images = [{"id": int(i), "height": int(h), "width": int(w)} for i, (h, w) in zip(truth.image_ids, truth.sizes)]
    categories = [{"id": c.index, "name": c.name} for c in truth.classes]
    objects_of = zip(
        truth.image_ids[truth.image].tolist(),
        truth.labels.tolist(),
        _xywh(truth.boxes),
        truth.areas.tolist(),
        truth.crowd.tolist(),
    )
    # pycocotools marks "matched" by the annotation's id, so no id may be 0.
    annotations = [
        {"id": n, "image_id": i, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for n, (i, label, box, area, crowd) in enumerate(objects_of, start=1)
    ]
    results: list[dict[str, object]] = []
    for i in truth.image_ids.tolist():
        found = detections.get(i)
        if found is None:
            continue
        results += [
            {
                "id": n,
                "image_id": i,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
            for n, (box, score, label) in enumerate(
                zip(_xywh(found.xyxy), found.confidence.tolist(), found.class_id.tolist()), start=len(results) + 1
            )
        ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        objects, found_set = COCO(), COCO()
        objects.dataset = {"images": images, "categories": categories, "annotations": annotations}
        found_set.dataset = {"images": images, "categories": categories, "annotations": results}
        objects.createIndex()
        found_set.createIndex()
        judge = COCOeval(objects, found_set, "bbox")
        judge.params.imgIds = truth.image_ids.tolist()
        if not by_size:
            judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], judge.params.areaRngLbl[:1]
        judge.evaluate()
        judge.accumulate()
    return judge


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    """xyxy [n, 4] -> n lists of x, y, width, height, float64."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def _metrics(truth: GroundTruth, judge: Any, duplicates: float | None) -> Metrics:
    precision, recall = judge.eval["precision"], judge.eval["recall"]  # [10, 101, K, 4, 3], [10, K, 4, 3]

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean() * 100) if values.size else None

    full = precision[..., -1]  # 100 detections
    small, medium, large = (mean(full[..., n]) for n in (1, 2, 3)) if full.shape[3] == 4 else (None, None, None)
    per_class = {name: mean(full[:, :, c.index, 0]) for name, c in zip(display_names(truth.classes), truth.classes)}
    return Metrics(
        ap=mean(full[..., 0]),
        ap50=mean(full[0, ..., 0]),
        ap75=mean(full[5, ..., 0]),
        ap_small=small,
        ap_medium=medium,
        ap_large=large,
        ar100=mean(recall[:, :, 0, -1]),
        per_class=per_class,
        duplicates=duplicates,
        matches=_matches(truth, judge),
    )


def _matches(truth: GroundTruth, judge: Any) -> DetectionMatches:
    """Collect the per-image matches of area range "all" from pycocotools, sorted as in its accumulate()."""
    order = [int(i) for i in judge.params.imgIds]  # sorted by pycocotools
    index = {int(i): n for n, i in enumerate(truth.image_ids)}
    position = np.array([index[i] for i in order], np.int64)
    areas, images = len(judge.params.areaRng), len(order)
    classes = []
    for k in range(len(truth.classes)):
        start = k * areas * images
        kept = [(n, e) for n, e in enumerate(judge.evalImgs[start : start + images]) if e is not None]
        thresholds = len(judge.params.iouThrs)
        scores = np.concatenate([np.zeros(0), *(e["dtScores"][:MAX_DETECTIONS] for _, e in kept)])
        image = np.repeat(
            [position[n] for n, _ in kept] or np.zeros(0, np.int64),
            [len(e["dtScores"][:MAX_DETECTIONS]) for _, e in kept] or np.zeros(0, np.int64),
        )
        none = np.zeros((thresholds, 0))
        matched = np.concatenate([none, *(e["dtMatches"][:, :MAX_DETECTIONS] for _, e in kept)], axis=1) != 0
        ignored = np.concatenate([none, *(e["dtIgnore"][:, :MAX_DETECTIONS] for _, e in kept)], axis=1) != 0
        objects = np.zeros(images, np.int64)
        for n, e in kept:
            objects[position[n]] = int(np.count_nonzero(np.asarray(e["gtIgnore"]) == 0))
        by_score = np.argsort(-scores, kind="mergesort")
        classes.append(
            ClassMatches(
                image[by_score].astype(np.int64), (matched & ~ignored)[:, by_score], ignored[:, by_score], objects
            )
        )
    return DetectionMatches(tuple(classes), images)
