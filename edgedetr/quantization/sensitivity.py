"""Sensitivity: how far each group of layers, alone in INT8, moves the detections of the float graph.

One group at a time is quantized in the float graph, not taken out of a quantized one: that still ranks the groups where
everything in INT8 fails altogether. Distances are means over images that are neither for calibration nor for
verification (matched_distance.py); biases are not corrected. Results are kept in the bundle, so an interrupted
measurement goes on. `sensitivity` is the entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgedetr.artifacts import ONNX
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.errors import ExportError, UsageError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.options import one_of
from edgedetr.progress import Progress
from edgedetr.quantization.calibration import observe
from edgedetr.quantization.calibration_set import check_image_count
from edgedetr.quantization.comparison_images import ComparisonImages, calibration_images, comparison_images
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.distance_meter import DistanceMeter
from edgedetr.quantization.groups import Group, groups_of, part_of
from edgedetr.quantization.placement import Placement, RangesByObserver, plan_for
from edgedetr.quantization.policy import check_policy, load_policy
from edgedetr.quantization.quantize import read_onnx
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.rank_correlation import split_half_correlation
from edgedetr.quantization.sensitivity_state import SensitivityState
from edgedetr.quantization.target import TENSORRT
from edgedetr.runtime.preprocess import prepare

Level = Literal["layer", "part"]

IMAGES = 64  # to compare on: means of a smooth distance, which needs far fewer images than AP
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
    if config.smooth:
        raise UsageError(
            f"quant.smooth is {config.smooth:g}: sensitivity measures layers without SmoothQuant; add: "
            "--set quant.smooth=0"
        )
    model = split_concats(read_onnx(bundle.require(ONNX.file)))
    policy = load_policy(config.policy)
    check_policy(model, policy)
    graph = GraphIndex(model)
    units = _units(groups_of(graph, policy), level)
    calibration = calibration_images(bundle, config)
    chosen = comparison_images(bundle, images, calibration, None if data is None else Path(data))
    state = SensitivityState.open(bundle, policy, config, calibration)
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
    chosen: ComparisonImages,
    state: SensitivityState,
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
