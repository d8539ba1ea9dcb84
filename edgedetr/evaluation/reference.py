"""reference.npz and stored detections: ground truth, image digests and detections in plain numpy files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.bundle import ClassInfo
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import BundleError
from edgedetr.evaluation import npz_reading as npz
from edgedetr.evaluation.npz_reading import Column
from edgedetr.runtime.postprocess import Detections, named
from edgedetr.storage.digests import digest

SCHEMA = 1
MOST_NAMES = 1 << 30  # bytes of the class names of all detections, one each
FOUND = {
    "found_image": Column("i", (-1,)),
    "found_boxes": Column("f", (-1, 4)),
    "found_confidence": Column("f", (-1,)),
    "found_class": Column("i", (-1,)),
}
DETECTIONS = {"schema": Column("i", ()), "image_id": Column("i", (-1,)), **FOUND}
REFERENCE = {
    **DETECTIONS,
    "split": Column("U", ()),
    "model": Column("U", ()),
    "class_category_id": Column("i", (-1,)),
    "class_name": Column("U", (-1,)),
    "image_name": Column("U", (-1,)),
    "image_sha256": Column("U", (-1,)),
    "image_size": Column("i", (-1, 2)),
    "truth_image": Column("i", (-1,)),
    "truth_boxes": Column("f", (-1, 4)),
    "truth_labels": Column("i", (-1,)),
    "truth_crowd": Column("b", (-1,)),
    "truth_areas": Column("f", (-1,)),
}


@dataclass(frozen=True)
class GroundTruth:
    """The annotations of one split: I images, T objects.

    classes    index, original category id and name
    image_ids  [I]     int64, unique
    names      [I]     str, path of each image relative to the set's folder
    digests    [I]     str, sha256 of each file's bytes, or "" where not computed
    sizes      [I, 2]  int64, height and width, upright pixels
    image      [T]     int64, 0..I-1: the image of each object
    boxes      [T, 4]  float64, x0, y0, x1, y1, pixels
    labels     [T]     int64, class index
    crowd      [T]     bool
    areas      [T]     float64, pixels^2
    """

    classes: tuple[ClassInfo, ...]
    image_ids: np.ndarray
    names: np.ndarray
    digests: np.ndarray
    sizes: np.ndarray
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, dataset: DetectionSet, *, digests: bool = False) -> GroundTruth:
        """The ground truth of a split; `digests` reads every file once."""
        samples = dataset.samples

        def column(name: str, width: tuple[int, ...], kind: type) -> np.ndarray:
            parts = [np.asarray(getattr(s, name)).reshape((-1, *width)) for s in samples]
            return np.concatenate([np.zeros((0, *width)), *parts]).astype(kind)

        return cls(
            classes=dataset.classes,
            image_ids=np.array([s.image_id for s in samples], np.int64),
            names=np.array([_relative(s.path, dataset.root) for s in samples], dtype=str),
            digests=np.array([digest(s.path) if digests else "" for s in samples], dtype=str),
            sizes=np.array([(s.height, s.width) for s in samples], np.int64).reshape(-1, 2),
            image=np.repeat(np.arange(len(samples), dtype=np.int64), [len(s.labels) for s in samples]),
            boxes=column("boxes", (4,), np.float64),
            labels=column("labels", (), np.int64),
            crowd=column("crowd", (), np.bool_),
            areas=column("areas", (), np.float64),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def subset(self, image_ids: Collection[int]) -> GroundTruth:
        """Only these images, in the same order."""
        keep = np.isin(self.image_ids, list(image_ids))
        objects = keep[self.image]
        new_index = np.cumsum(keep) - 1
        return replace(
            self,
            image_ids=self.image_ids[keep],
            names=self.names[keep],
            digests=self.digests[keep],
            sizes=self.sizes[keep],
            image=new_index[self.image[objects]].astype(np.int64),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            crowd=self.crowd[objects],
            areas=self.areas[objects],
        )


@dataclass(frozen=True)
class Reference:
    """reference.npz: the detections of the PyTorch model on the verify split, so that `verify` needs no torch."""

    truth: GroundTruth
    detections: Mapping[int, Detections]  # by image id
    split: str
    model: str = ""  # sha256 of the weights

    @classmethod
    def of(cls, dataset: DetectionSet, detections: Mapping[int, Detections], *, model: str = "") -> Reference:
        """The reference of a split, with digests of its images. Every image must have an entry, which may be empty."""
        truth = GroundTruth.of(dataset, digests=True)
        missing = [int(i) for i in truth.image_ids if int(i) not in detections]
        if missing:
            raise BundleError(
                f"{dataset.root}: no detections for image id {missing[0]} ({len(missing)} of "
                f"{len(truth)} missing); expected an entry for every image of {dataset.name}"
            )
        return cls(truth, detections, dataset.name, model)

    def save(self, path: str | Path) -> None:
        """Write plain arrays (no pickles); equal content gives equal bytes."""
        t = self.truth
        arrays: dict[str, Any] = {
            "schema": np.array(SCHEMA),
            "split": np.array(self.split),
            "model": np.array(self.model),
            "class_category_id": np.array([c.category_id for c in t.classes], np.int64),
            "class_name": np.array([c.name for c in t.classes], dtype=str),
            "image_id": t.image_ids,
            "image_name": t.names,
            "image_sha256": t.digests,
            "image_size": t.sizes,
            "truth_image": t.image,
            "truth_boxes": t.boxes,
            "truth_labels": t.labels,
            "truth_crowd": t.crowd,
            "truth_areas": t.areas,
            **_columns(self.detections, t.image_ids),
        }
        with open(path, "wb") as stream:
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read and check. Errors: BundleError for a file that is missing, truncated or of another kind."""
        fix = "edgedetr export BUNDLE"
        arrays = npz.read(path, REFERENCE, fix=fix)
        try:
            return cls._of_arrays(arrays)
        except (ValueError, OverflowError) as error:
            raise _damaged(path, error, fix) from error

    @classmethod
    def _of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Reference:
        _require_schema(arrays)
        classes = tuple(
            ClassInfo(index, int(number), str(name))
            for index, (number, name) in enumerate(zip(arrays["class_category_id"], arrays["class_name"], strict=True))
        )
        images, objects = len(arrays["image_id"]), len(arrays["truth_image"])
        truth = GroundTruth(
            classes=classes,
            image_ids=_array(arrays, "image_id", (images,)),
            names=_array(arrays, "image_name", (images,)),
            digests=_array(arrays, "image_sha256", (images,)),
            sizes=_array(arrays, "image_size", (images, 2)),
            image=_array(arrays, "truth_image", (objects,), below=images),
            boxes=_array(arrays, "truth_boxes", (objects, 4)),
            labels=_array(arrays, "truth_labels", (objects,), below=len(classes)),
            crowd=_array(arrays, "truth_crowd", (objects,)),
            areas=_array(arrays, "truth_areas", (objects,)),
        )
        if len(set(truth.image_ids.tolist())) != images:
            raise ValueError("image_id is not unique")
        if (truth.sizes < 1).any():
            raise ValueError("image_size has an image without pixels")
        found = _detections(arrays, truth.image_ids, classes)
        return cls(truth, found, str(arrays["split"]), str(arrays["model"]))


def save_detections(path: str | Path, detections: Mapping[int, Detections]) -> None:
    """Detections by image id as plain arrays."""
    ids = np.array(sorted(detections), np.int64)
    with open(path, "wb") as stream:
        arrays: dict[str, Any] = {"schema": np.array(SCHEMA), "image_id": ids, **_columns(detections, ids)}
        np.savez_compressed(stream, **arrays)


def load_detections(path: str | Path, classes: Sequence[ClassInfo]) -> dict[int, Detections]:
    """Read the file of `save_detections`. Errors: BundleError where it is missing, truncated or of another kind."""
    fix = "edgedetr verify BUNDLE"
    arrays = npz.read(path, DETECTIONS, fix=fix)
    try:
        _require_schema(arrays)
        return _detections(arrays, _array(arrays, "image_id", (len(arrays["image_id"]),)), classes)
    except (ValueError, OverflowError) as error:
        raise _damaged(path, error, fix) from error


def _damaged(path: str | Path, error: Exception, fix: str) -> BundleError:
    return BundleError(f"{path}: damaged or of another kind ({error}); expected arrays written by edgedetr; run: {fix}")


def _require_schema(arrays: Mapping[str, np.ndarray]) -> None:
    if int(arrays["schema"]) != SCHEMA:
        raise ValueError(f"schema {arrays['schema']}, this version reads {SCHEMA}")


def _columns(detections: Mapping[int, Detections], ids: np.ndarray) -> dict[str, np.ndarray]:
    rows = [detections[int(i)] for i in ids]
    return {
        "found_image": np.repeat(np.arange(len(rows), dtype=np.int64), [len(d) for d in rows]),
        "found_boxes": np.concatenate([np.zeros((0, 4), np.float32), *(d.xyxy for d in rows)]),
        "found_confidence": np.concatenate([np.zeros(0, np.float32), *(d.confidence for d in rows)]),
        "found_class": np.concatenate([np.zeros(0, np.int64), *(d.class_id for d in rows)]),
    }


def _detections(
    arrays: Mapping[str, np.ndarray], ids: np.ndarray, classes: Sequence[ClassInfo]
) -> dict[int, Detections]:
    n = len(arrays["found_image"])
    image = _array(arrays, "found_image", (n,), below=len(ids))
    boxes, confidence = _array(arrays, "found_boxes", (n, 4)), _array(arrays, "found_confidence", (n,))
    class_id = _array(arrays, "found_class", (n,), below=len(classes))
    if 4 * n * max((len(c.name) for c in classes), default=0) > MOST_NAMES:
        raise ValueError(f"{n} detections with class names of up to {max(len(c.name) for c in classes)} characters")
    if (np.diff(image) < 0).any():
        raise ValueError("found_image is not in order")
    ends = np.searchsorted(image, np.arange(len(ids) + 1))
    return {int(i): named(boxes[a:b], confidence[a:b], class_id[a:b], classes) for i, a, b in zip(ids, ends, ends[1:])}


def _array(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], below: int | None = None) -> np.ndarray:
    """The array `name`, whose type is checked already; checks its shape, finite values, and 0 <= values < below."""
    value = arrays[name]
    if value.shape != shape:
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, expected {list(shape)}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{name} has NaN or infinity")
    if below is not None and value.size and not (0 <= value.min() and value.max() < below):
        raise ValueError(f"{name} runs from {value.min()} to {value.max()}, expected 0..{below - 1}")
    return value


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
