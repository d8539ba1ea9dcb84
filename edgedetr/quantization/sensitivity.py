"""Sensitivity: how far each group of layers, alone in INT8, moves the detections of the float graph.

One group at a time is quantized in the float graph, not taken out of a quantized one: that still ranks the groups where
everything in INT8 fails altogether. Distances are means over images that are neither for calibration nor for
verification (matched_distance.py); biases are not corrected. Results are kept in the bundle, so an interrupted
measurement goes on. `sensitivity` is the entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgedetr.artifacts import ONNX, RANGES, SENSITIVITY
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.data.layouts import load, splits
from edgedetr.errors import DataError, EdgedetrError, ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.options import one_of
from edgedetr.progress import Progress
from edgedetr.quantization.calibration import (
    CalibrationSet,
    Ranges,
    candidates,
    check_image_count,
    choose_images,
    observe,
    share_pool_ranges,
    verify_digests,
)
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.distance_meter import DistanceMeter
from edgedetr.quantization.groups import Group, groups_of, part_of
from edgedetr.quantization.placement import Placement, RangesByObserver, plan_for
from edgedetr.quantization.policy import Policy, check_policy, load_policy
from edgedetr.quantization.qdq import TENSORRT, split_concats, tensors_to_observe
from edgedetr.quantization.quantize import read_onnx
from edgedetr.runtime.preprocess import prepare
from edgedetr.storage.digests import digest
from edgedetr.storage.reading import MEBIBYTE, read_json

log = logging.getLogger(__name__)

Level = Literal["layer", "part"]

IMAGES = 64  # to compare on: means of a smooth distance, which needs far fewer images than AP
SCHEMA = 1
LIMIT = 256 * MEBIBYTE  # bytes of results/sensitivity.json; 300 groups on 128 images take about 4 MB
RELIABLE = 0.9  # rank correlation between two halves of the images, below which the order is not to be trusted
# Distance that float rounding alone may cause. Measured: 1e-6 (rt_detr); the least sensitive layer in INT8 has 1e-4.
LARGEST_GAP = 1e-3
GAP_IMAGES = 4
SAVE_EVERY = 20.0  # seconds of work that killing the process can lose
# Signed pairs in float32: what TensorRT and OpenVINO compute, and ONNX Runtime up to the quantization of outputs.
DIALECT = replace(TENSORRT, fp16=False)


@dataclass(frozen=True)
class Sensitive:
    """One row: a group, or all groups of a part.

    name       of the group (its first node), or of the part
    part       of the detector
    kind       of the group, or the kinds of a part
    role       what its layers are for, "" where the member declares nothing
    int8       whether the policy makes it INT8: "yes", "no" or, of a part, "partly"
    macs       multiply-accumulates for one image
    distance   mean over the images
    error      standard error of that mean
    """

    name: str
    part: str
    kind: str
    role: str
    int8: str
    macs: int
    distance: float
    error: float


@dataclass(frozen=True)
class SensitivityResult:
    """rows               the most sensitive first
    level              "layer" (groups) or "part"
    images             how many were compared on
    splits             which splits, or folder, they are from
    rank_correlation   Spearman's, of the rows' distances between two halves of the images; None where undefined
    float_gap          distance that float rounding alone causes
    forwards           runs of the whole graph that this call took, by multiply-accumulates; those before the first
                       quantized layer are shared
    forwards_whole     what it would have taken without sharing
    """

    rows: tuple[Sensitive, ...]
    level: str
    images: int
    splits: tuple[str, ...]
    rank_correlation: float | None
    float_gap: float
    forwards: float
    forwards_whole: float

    @property
    def reliable(self) -> bool:
        return self.rank_correlation is not None and self.rank_correlation >= RELIABLE

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def sensitivity(
    bundle: Bundle | str | Path,
    *,
    images: int = IMAGES,
    level: Level = "layer",
    data: str | Path | None = None,
    config: QuantConfig | None = None,
    progress: Progress | None = None,
) -> SensitivityResult:
    """Measure every group, or every part, of a bundle's model.onnx, and write results/sensitivity.json.

    images   at most so many to compare on
    level    "layer": groups, the smallest sets of nodes that a backend switches together; "part": stages and blocks
    data     images to compare on; None = those of the bundle's data that are neither for calibration nor verification
    config   observer and policy; None = the defaults

    Errors: BundleError, ExportError, DataError, UsageError.
    """
    one_of("level", level, ("layer", "part"))
    bundle, config = Bundle.open(bundle), config or QuantConfig()
    model = split_concats(read_onnx(bundle.require(ONNX.file)))
    policy = load_policy(config.policy)
    check_policy(model, policy)
    graph = GraphIndex(model)
    units = _units(groups_of(graph, policy), level)
    calibration = _calibration_images(bundle, config)
    chosen = probe_images(bundle, images, calibration, None if data is None else Path(data))
    state = State.open(bundle, policy, config, calibration)
    everything = Placement(tuple(group.id for group in groups_of(graph, policy)))
    tensors = tensors_to_observe(graph, plan_for(graph, policy, everything))
    label = config.observer_label
    if set(state.ranges) != set(tensors):
        check_image_count(calibration)
        found = observe(model, tensors, calibration.paths, bundle.manifest.input, progress)
        state.ranges = {name: h.amax(config.observer, config.observer_option) for name, h in found.items()}
        state.save()
    ranges = RangesByObserver(label, {label: share_pool_ranges(model, state.ranges)})
    meter = DistanceMeter(graph, policy, ranges, DIALECT, bundle.manifest.output.activation)
    gap = meter.float_gap([_batch(bundle, path) for path in chosen.paths[:GAP_IMAGES]])
    if gap > LARGEST_GAP:
        raise ExportError(
            f"{bundle.path}: the float graph, optimized by ONNX Runtime, departs from its own run without "
            f"optimizations by {gap:.2g}; expected at most {LARGEST_GAP:g}, so that a distance means quantization; "
            f"look at it first: edgedetr verify {bundle.path}"
        )
    placements = [Placement(tuple(group.id for group in unit)) for unit in units.values()]
    distances = _measure(bundle, meter, placements, chosen, state, progress)
    rows = [_row(name, unit, level, distances[i]) for i, (name, unit) in enumerate(units.items())]
    rows.sort(key=lambda row: -row.distance)
    correlation = split_half_correlation(distances)
    result = SensitivityResult(
        tuple(rows),
        level,
        len(chosen.paths),
        chosen.splits,
        correlation,
        gap,
        round(meter.cost.forwards, 2),
        meter.cost.whole,
    )
    state.result = result.to_json()
    state.save()
    return result


def _measure(
    bundle: Bundle,
    meter: DistanceMeter,
    placements: Sequence[Placement],
    chosen: ProbeImages,
    state: State,
    progress: Progress | None,
) -> np.ndarray:
    """[placements, images] distances; what the bundle has already is not measured again."""
    keys = [placement.sha256() for placement in placements]

    def known(placement: int, image: int) -> bool:
        return chosen.digests[image] in state.distances.get(keys[placement], {})

    def report(placement: int, image: int, distance: float) -> None:
        state.distances.setdefault(keys[placement], {})[chosen.digests[image]] = distance
        state.save(at_most_every=SAVE_EVERY)

    def batch(image: int) -> np.ndarray:
        return _batch(bundle, chosen.paths[image])

    try:
        meter.measure(placements, len(chosen.paths), batch, known=known, report=report, progress=progress)
    finally:  # an interrupt keeps what was measured
        state.save()
    return np.array([[state.distances[key][image] for image in chosen.digests] for key in keys])


def _units(groups: Sequence[Group], level: str) -> dict[str, list[Group]]:
    """What is quantized at a time: {name: groups}."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.id if level == "layer" else part_of(group), []).append(group)
    return found


def _row(name: str, groups: Sequence[Group], level: str, distances: np.ndarray) -> Sensitive:
    default = {group.default for group in groups}
    error = float(distances.std(ddof=1) / np.sqrt(len(distances))) if len(distances) > 1 else 0.0
    return Sensitive(
        name,
        part_of(groups[0]),
        ", ".join(sorted({group.kind for group in groups})),
        ", ".join(sorted({group.role for group in groups} - {""})),
        "partly" if len(default) > 1 else "yes" if default == {True} else "no",
        sum(group.macs for group in groups),
        float(distances.mean()),
        error,
    )


def _batch(bundle: Bundle, path: Path) -> np.ndarray:
    return prepare([decode(path)], bundle.manifest.input)[0]


# ---------------------------------------------------------------------------------------------------------- statistics


def split_half_correlation(distances: np.ndarray) -> float | None:
    """Spearman's rank correlation between the groups' means on two halves of the images, every second one.

    distances   [groups, images]
    return      None for fewer than 3 groups or 2 images, and where a half has no order
    """
    if distances.shape[0] < 3 or distances.shape[1] < 2:
        return None
    first, second = (_ranks(distances[:, start::2].mean(axis=1)) for start in (0, 1))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    unique, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - counts + ends - 1) / 2)[inverse.reshape(-1)] if len(unique) else values


# -------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ProbeImages:
    """Images to compare on: files, the sha256 of each, and the splits (or the folder) that they are from."""

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    splits: tuple[str, ...]


def probe_images(bundle: Bundle, count: int, calibration: CalibrationSet, data: Path | None = None) -> ProbeImages:
    """At most `count` images, evenly spaced, that are neither calibration nor verify images, by digest.

    data   a data set or a folder of images; None = the splits of the bundle's data other than the verify split

    Errors: ExportError where none is left.
    """
    if count < 1:
        raise ExportError(f"{count} images to compare on; expected at least 1")
    taken = {image.sha256 for image in calibration.images} | set(verify_digests(bundle))
    listed = _listed(bundle, data)
    chosen: dict[str, tuple[Path, str]] = {}
    for path, split in _spread(listed, count):
        sha256 = digest(path)
        if sha256 not in taken:
            chosen.setdefault(sha256, (path, split))
        if len(chosen) == count:
            break
    if not chosen:
        names = ", ".join(dict.fromkeys(split for _, split in listed)) or "no split"
        raise ExportError(
            f"{bundle.path}: no image is left to compare on: all {len(listed)} of {names} are for calibration or for "
            f"verification; add images, calibrate on fewer (quant.images), or name others: edgedetr sensitivity "
            f"{bundle.path} --data DIR"
        )
    where = dict.fromkeys(split for _, split in chosen.values())
    return ProbeImages(tuple(path for path, _ in chosen.values()), tuple(chosen), tuple(where))


def _listed(bundle: Bundle, data: Path | None) -> list[tuple[Path, str]]:
    """(file, split) of all images that could be compared on."""
    if data is not None:
        paths, root = candidates(bundle, data)
        return [(path, str(root)) for path in paths]
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        where = "records no data set" if record is None else f"records its data at {record.path}, which is not here"
        raise ExportError(
            f"{bundle.path} {where}; expected images to compare on; run: edgedetr sensitivity {bundle.path} --data DIR"
        )
    names = [name for name in splits(record.path) if name != record.verify_split]
    return [(sample.path, name) for name in names for sample in load(record.path, name).samples]


def _spread(items: Sequence[tuple[Path, str]], count: int) -> Iterator[tuple[Path, str]]:
    """All items, each once, in rounds that go evenly over the whole list."""
    step = max(1, len(items) // max(1, count))
    for start in range(step):
        yield from items[start::step]


def _calibration_images(bundle: Bundle, config: QuantConfig) -> CalibrationSet:
    """The images of the bundle's ranges.json, where they are here; otherwise those that an export would choose.

    Errors: ExportError, DataError where there are none.
    """
    if bundle.has(RANGES.file):
        present = Ranges.load(bundle.require(RANGES.file))
        try:
            found = choose_images(bundle, Path(present.source) if present.source else None, present.requested)
        except (DataError, ExportError, OSError) as error:
            log.warning("the calibration images of %s are not here (%s); others are chosen", RANGES.file, error)
        else:
            if found.images == present.images:
                return found
    return choose_images(bundle, None, config.images)


# --------------------------------------------------------------------------------------------------------------- state


@dataclass
class State:
    """results/sensitivity.json: everything measured so far with one model, policy, observer and calibration.

    key         digest of those
    ranges      {tensor: largest magnitude}
    distances   {digest of a placement: {sha256 of an image: distance}}
    result      of the last call that ended, for the report
    """

    bundle: Bundle
    key: str
    ranges: dict[str, float] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    result: Mapping[str, object] | None = None
    saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, bundle: Bundle, policy: Policy, config: QuantConfig, calibration: CalibrationSet) -> State:
        """What the bundle has, where it was measured with the same things; otherwise nothing."""
        parts = [
            bundle.manifest.files[ONNX.file].sha256,
            policy.sha256(),
            repr((config.observer, config.observer_option)),
            *(image.sha256 for image in calibration.images),
        ]
        state = cls(bundle, hashlib.sha256("\n".join(parts).encode()).hexdigest())
        if not bundle.has(SENSITIVITY.file):
            return state
        try:
            raw = read_json(bundle.require(SENSITIVITY.file), ExportError, limit=LIMIT, fix="it is measured anew")
            found = _checked(raw)
        except (EdgedetrError, ValueError) as error:
            log.warning("%s cannot be read (%s); it is measured anew", SENSITIVITY.file, error)
            return state
        if found["key"] != state.key:
            log.warning(
                "%s was measured with another model, policy, observer or other calibration images; it is measured anew",
                SENSITIVITY.file,
            )
            return state
        state.ranges, state.distances = found["ranges"], found["distances"]
        return state

    def save(self, at_most_every: float = 0.0) -> None:
        if time.monotonic() - self.saved < at_most_every:
            return
        raw = {
            "schema": SCHEMA,
            "key": self.key,
            "result": self.result,
            "ranges": self.ranges,
            "distances": self.distances,
        }
        artifact = SENSITIVITY
        with self.bundle.add(artifact.file, stage=artifact.step, made_from=artifact.made_from) as temporary:
            temporary.write_text(json.dumps(raw, allow_nan=False) + "\n", encoding="utf-8")
        self.saved = time.monotonic()


def _checked(raw: Any) -> dict[str, Any]:
    """Errors: ValueError for what `State.save` does not write."""
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or not isinstance(raw.get("key"), str):
        raise ValueError(f"expected schema {SCHEMA} and a key")
    tables = [raw.get("ranges"), *_values(raw.get("distances"))]
    for table in tables:
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in _values(table)):
            raise ValueError("expected finite numbers")
    return raw


def _values(table: Any) -> list[Any]:
    if not isinstance(table, dict):
        raise ValueError("expected an object")
    return list(table.values())
