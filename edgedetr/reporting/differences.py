"""The images on which two artifacts differ most: which detections match, which only one has, drawn for the page."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedetr.boxes import clip
from edgedetr.data.images import decode
from edgedetr.errors import DataError
from edgedetr.evaluation.agreement import matched_pairs
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.runtime.postprocess import Detections
from edgedetr.storage.reading import MEBIBYTE, read_bytes

CONFIDENCE = 0.3  # detections below it are not shown to a user
OVERLAP = 0.5  # COCO's loosest IoU
LONGEST = 720  # pixels of the longer side of a drawn image; keeps the page near 1 MB
LARGEST_FILE = 256 * MEBIBYTE  # bytes of an image file


@dataclass(frozen=True)
class Difference:
    """One image. `pairs` [n, 2] are indices of the same object in both; the others are indices on one side only.

    score   sum of the confidences of what only one side has, and of the changes of confidence of what both have
    """

    image_id: int
    reference: Detections
    other: Detections
    pairs: np.ndarray
    only_reference: np.ndarray
    only_other: np.ndarray
    score: float


@dataclass(frozen=True)
class DrawnBox:
    """One box, pixels of the drawn image. kind: both, reference or other."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class DrawnImage:
    """One image of the page; `data` is a data: URL of a JPEG, or "" with the reason in `trouble`."""

    name: str
    width: int
    height: int
    data: str
    trouble: str
    boxes: tuple[DrawnBox, ...]
    score: float
    only_reference: int
    only_other: int


def difference(image_id: int, reference: Detections, other: Detections) -> Difference:
    """Match detections of one class from the largest IoU down, and sum up what is left.

    A box below CONFIDENCE on one side only serves as a counterpart, so that crossing the threshold is a small change.
    """
    first, second = matched_pairs(reference, other, OVERLAP)
    pairs = list(zip(first.tolist(), second.tolist()))
    shown = [(r, o) for r, o in pairs if max(reference.confidence[r], other.confidence[o]) >= CONFIDENCE]
    only_reference = _unmatched(reference, {r for r, _ in pairs})
    only_other = _unmatched(other, {o for _, o in pairs})
    score = float(reference.confidence[only_reference].sum() + other.confidence[only_other].sum())
    score += float(sum(abs(float(reference.confidence[r]) - float(other.confidence[o])) for r, o in shown))
    return Difference(
        image_id, reference, other, np.array(shown, np.int64).reshape(-1, 2), only_reference, only_other, score
    )


def most_different(
    reference: Mapping[int, Detections], other: Mapping[int, Detections], count: int
) -> list[Difference]:
    """The `count` images with the highest score, the highest first, without images on which both are equal."""
    found = [difference(image_id, reference[image_id], other[image_id]) for image_id in reference if image_id in other]
    found = [d for d in found if d.score > 0]
    return sorted(found, key=lambda d: (-d.score, d.image_id))[:count]


def draw(shown: Difference, truth: GroundTruth, root: Path | None) -> DrawnImage:
    """The image as a JPEG of at most LONGEST pixels, and the boxes in its pixels.

    root   folder of the images; the file must be inside of it and have the digest that `truth` records
    """
    index = int(np.flatnonzero(truth.image_ids == shown.image_id)[0])
    name, size = str(truth.names[index]), (int(truth.sizes[index, 0]), int(truth.sizes[index, 1]))
    scale = min(1.0, LONGEST / max(size))
    height, width = (max(1, round(pixels * scale)) for pixels in size)
    data, trouble = jpeg_data_url(root, name, str(truth.digests[index]), height, width)
    reference, other = shown.reference, shown.other
    boxes = []
    for r, o in shown.pairs:
        label = f"{_class_name(reference, r)} {reference.confidence[r]:.2f} → {other.confidence[o]:.2f}"
        boxes.append(_box("both", reference.xyxy[r], scale, size, label))
    one_sided = (("reference", reference, shown.only_reference), ("other", other, shown.only_other))
    for kind, detections, indices in one_sided:
        for n in indices:
            label = f"{_class_name(detections, n)} {detections.confidence[n]:.2f}"
            boxes.append(_box(kind, detections.xyxy[n], scale, size, label))
    only_reference, only_other = len(shown.only_reference), len(shown.only_other)
    return DrawnImage(name, width, height, data, trouble, tuple(boxes), shown.score, only_reference, only_other)


def jpeg_data_url(root: Path | None, name: str, sha256: str, height: int, width: int) -> tuple[str, str]:
    """The image as a data: URL, or "" and the reason why it is not shown."""
    from PIL import Image

    if root is None:
        return "", f"{name}: the bundle does not record where its images are; give their folder with --data"
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            return "", f"{name} leads out of {root}, so it is not shown"
        if not path.is_file():
            return "", f"{name} is not in {root}; give its folder with --data"
        content = read_bytes(path, DataError, limit=LARGEST_FILE)
        if hashlib.sha256(content).hexdigest() != sha256:
            return "", f"{name} in {root} is not the image that was verified"
        pixels = decode(content)
    except (DataError, OSError, ValueError, RuntimeError) as error:  # a name with NUL, a long name, a loop of links
        return "", f"{name}: {error}"
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), ""


def _unmatched(detections: Detections, matched: set[int]) -> np.ndarray:
    indices = range(len(detections))
    return np.array([n for n in indices if n not in matched and detections.confidence[n] >= CONFIDENCE], np.int64)


def _box(kind: str, xyxy: np.ndarray, scale: float, size: tuple[int, int], label: str) -> DrawnBox:
    x0, y0, x1, y1 = (float(v) * scale for v in clip(xyxy, *size))
    return DrawnBox(kind, round(x0, 1), round(y0, 1), round(x1 - x0, 1), round(y1 - y0, 1), label)


def _class_name(detections: Detections, index: int) -> str:
    return str(detections.data["class_name"][index])
