"""From a bundle's model.onnx to its FP16 and INT8 graphs. `quantize` and `export_fp16` are the entries."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from edgedetr import artifacts
from edgedetr.artifacts import FP16, ONNX, PLACEMENT, Artifact
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.errors import DataError, ExportError
from edgedetr.lint.lint import require_no_errors
from edgedetr.onnx_graph.fp16 import activation_absmax, convert_to_fp16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.progress import Progress
from edgedetr.quantization.bias_correction import IMAGES, PARTS, BiasCorrection
from edgedetr.quantization.calibration import ranges_of
from edgedetr.quantization.calibration_set import choose_images, evenly_spaced
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.cures import cured, cured_plan, faults
from edgedetr.quantization.placement import Placement, alphas_of, observers_of, plan_for
from edgedetr.quantization.policy import Policy, QuantizationPlan, check_policy, load_policy, without_cures
from edgedetr.quantization.qdq import insert_qdq, runnable
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.smoothing import Folds, folds_of, smoothed
from edgedetr.quantization.target import CPU, TENSORRT, Target, weight_bits
from edgedetr.runtime.backends.base import MADE_BY
from edgedetr.runtime.cure_record import recorded
from edgedetr.runtime.preprocess import prepare

log = logging.getLogger(__name__)

FLOAT_LAYERS = "edgedetr.float_layers"  # metadata: layers that are not INT8, JSON {reason: [node names]}
FLOAT32_NODES = "edgedetr.float32_nodes"  # metadata of a graph with FP16: nodes in float32, JSON {reason: [node names]}
PRODUCTS = "products"  # in MADE_BY: how the graph for a CPU writes matrix products; up to 0.2 it did not say so
SMOOTH = "smooth"  # in MADE_BY: how many tensors are smoothed; absent where none is
NOT_CORRECTED = "biases are not corrected"
ABSMAX_IMAGES = 8  # on these the magnitudes for FP16 are observed; fp16.MAX_ABSMAX leaves a factor of 2 for the others


@dataclass(frozen=True)
class _Job:
    """What one export of FP16 or INT8 graphs reads.

    graph    the float graph
    calib    where the calibration images are; None = the calibration split of the bundle's data
    placement  which groups are INT8; None = as the policy chooses
    cure_for   the backends whose known patterns are cured; None = those on which verify judges the file
    """

    bundle: Bundle
    graph: GraphIndex
    policy: Policy
    config: QuantConfig
    calib: Path | None
    progress: Progress | None
    placement: Placement | None = None
    cure_for: Sequence[str] | None = None


def quantize(
    bundle: Bundle,
    *,
    config: QuantConfig | None = None,
    calib: Path | None = None,
    placement: Placement | None = None,
    cure_for: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> QuantizationPlan:
    """Write ranges.json, model.int8.onnx and model.int8-cpu.onnx; files made with the same settings are kept.

    calib       where the calibration images are; None = the present ranges of these settings, or the calibration split
                of the bundle's data
    placement   which groups are INT8, and by which observers; None = as the policy chooses
    cure_for    the backends whose known patterns are cured where a graph has them (calib/patterns/known.toml); None =
                those on which verify judges the file

    Errors: ExportError, DataError; also where the graph for TensorRT does not pass lint.
    """
    config = config or QuantConfig()
    model = split_concats(read_onnx(bundle.require(ONNX.file)))
    policy = load_policy(config.policy)
    check_policy(model, policy)
    graph = GraphIndex(model)
    plan = plan_for(graph, policy, placement)
    if not (plan.layers or plan.products):
        raise ExportError(
            f"{bundle.path}: the placement has no group in INT8, so there is nothing to quantize; use FP16: edgedetr "
            f"export {bundle.path} --fp16, or remove {PLACEMENT.file}"
        )
    base = load_policy(without_cures(config.policy))
    if base.name != policy.name and len(plan_for(graph, base, placement).layers) == len(plan.layers):
        log.warning("policy %s: the cure changes nothing in this graph, which has no such layer in INT8", policy.name)
    tensors = tensors_to_observe(graph, plan)
    observers = observers_of(graph, policy, placement, plan)
    folds = folds_of(graph, plan, alphas_of(graph, policy, placement, config.smooth))
    if folds.left or folds.possible:
        _say_what_is_smoothed(folds)
    ranges = ranges_of(
        bundle,
        model,
        tensors,
        config,
        policy.name,
        observers=observers,
        folds=folds.possible,
        calib=calib,
        progress=progress,
    )
    if folds.possible:
        graph = GraphIndex(smoothed(graph, ranges.smooth))
    job = _Job(bundle, graph, policy, config, calib, progress, placement, cure_for)
    corrections = _Corrections(job, plan)
    for target in (TENSORRT, replace(CPU, weight_bits=weight_bits(config.cpu_weights))):
        _write_int8(job, plan, ranges, target, corrections)
    log.info("%d layers INT8, %d float", len(plan.layers), len(plan.float_layers))
    return plan


def _say_what_is_smoothed(folds: Folds) -> None:
    reasons = Counter(folds.left.values())
    why = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    total = len(folds.possible) + len(folds.left)
    text = "SmoothQuant: the inputs of %d of %d INT8 products are smoothed%s"
    log.warning(text, len(folds.possible), total, f", the others stay as they are ({why})" if why else "")


def export_fp16(
    bundle: Bundle, *, config: QuantConfig | None = None, calib: Path | None = None, progress: Progress | None = None
) -> None:
    """Write model.fp16.onnx, unless the bundle has it from the same graph and policy.

    calib   images to observe magnitudes on; None = the calibration split of the bundle's data
    """
    config = config or QuantConfig()
    policy = load_policy(config.policy)
    made_by = json.dumps(
        {
            "dialect": FP16.id,
            "policy": policy.name,
            "policy_sha256": policy.sha256(),
            "calib": "" if calib is None else str(calib),
        }
    )
    if _is_made_by(bundle, FP16.file, made_by):
        return
    model = read_onnx(bundle.require(ONNX.file))
    check_policy(model, policy)
    job = _Job(bundle, GraphIndex(model), policy, config, calib, progress)
    result, float32_nodes = _convert_to_fp16(job, model)
    metadata = {**_metadata(model), MADE_BY: made_by, FLOAT32_NODES: float32_nodes}
    _add_graph(bundle, FP16, result, metadata)


def read_onnx(path: Path) -> ModelProto:
    """A valid ONNX file. Errors: ExportError."""
    model: ModelProto = read_bundle_graph(path, ExportError)
    try:
        onnx.checker.check_model(model)  # the following steps rely on each node's inputs and attributes
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ExportError(f"{path}: not valid ONNX ({reason}); run: edgedetr export {path.parent}") from error
    return model


def _write_int8(job: _Job, plan: QuantizationPlan, ranges: Ranges, target: Target, corrections: _Corrections) -> None:
    """The INT8 graph for one target, unless the bundle has it already."""
    cure_for = target.artifact.verified if job.cure_for is None else job.cure_for
    chosen = cured_plan(job.graph, plan, ranges.amax, target, cure_for)
    plan = chosen.plan
    about: dict[str, object] = {
        "dialect": target.name,
        "weight_bits": target.weight_bits,
        "observer": ranges.observer,
        "policy": job.policy.name,
        "policy_sha256": job.policy.sha256(),
        **({"half": True} if target.fp16 else {}),
        **({PRODUCTS: "integer"} if target.integer_products else {}),
        "image_list": ranges.image_list,
        "layers_int8": len(plan.layers),
        "layers_float": len(plan.float_layers),
        **({"placement": job.placement.sha256()} if job.placement else {}),
        **({SMOOTH: len(ranges.smooth), "alpha": job.config.smooth} if ranges.smooth else {}),
        **recorded(chosen.cures),
    }
    made_by = json.dumps({**about, "bias_correction": [IMAGES, PARTS]} if job.config.bias_correction else about)
    if _is_made_by(job.bundle, target.artifact.file, made_by):
        return
    correction = None
    if job.config.bias_correction:
        old = _is_made_by(job.bundle, target.artifact.file, _without_products(made_by))
        otherwise = f"{target.artifact.file} is kept, with its matrix products in float" if old else NOT_CORRECTED
        paths = _images_of(job.bundle, ranges, otherwise)
        if paths:
            correction = corrections.on(paths, f"bias {target.name}")
        elif old:
            return
        else:
            made_by = json.dumps(about)
    result = int8_graph(job.graph, plan, ranges.amax, target, correction, cure_for if chosen.cures else ())
    _warn_of_faults(job, result, target)
    metadata = {**_metadata(result), MADE_BY: made_by, FLOAT_LAYERS: _by_reason(plan.float_layers)}
    if target.fp16:
        result, metadata[FLOAT32_NODES] = _convert_to_fp16(job, result)
    _add_graph(job.bundle, target.artifact, result, metadata, _placement_file(job))


def int8_graph(
    graph: GraphIndex,
    plan: QuantizationPlan,
    amax: Mapping[str, float],
    target: Target,
    correction: BiasCorrection | None = None,
    cure_for: Sequence[str] = (),
) -> ModelProto:
    """The graph in INT8 for one target, float32 elsewhere, with corrected biases.

    amax        {tensor: largest magnitude that INT8 represents}
    correction  of biases, on the float graph; None = they stay as they are
    cure_for    the backends whose known patterns are cured; the plan is that of `cures.cured_plan`
    """
    result = insert_qdq(graph, plan, amax, target)
    if correction is not None:
        result = insert_qdq(graph, plan, amax, target, correction.shifts(result, plan))
    return runnable(cured(result, cure_for).model if cure_for else result, target)


def _warn_of_faults(job: _Job, model: ModelProto, target: Target) -> None:
    """Name the known patterns at which a backend that verify judges departs from a graph that is not cured of them."""
    for backend in target.artifact.verified:
        found = [layer for layer, _ in faults(model, backend)]
        if found:
            log.warning(
                "%s: %s is known to compute %s wrongly, and %d more layers; for %s run: edgedetr export %s --int8",
                *(target.artifact.file, backend, found[0], len(found) - 1, backend, job.bundle.path),
            )


def _placement_file(job: _Job) -> tuple[str, ...]:
    """The name of the bundle's placement.json, where the job follows it: the graph is out of date when it changes."""
    if job.placement is None or not job.bundle.has(PLACEMENT.file):
        return ()
    same = Placement.load(job.bundle.require(PLACEMENT.file)).sha256() == job.placement.sha256()
    return (PLACEMENT.file,) if same else ()


def _add_graph(
    bundle: Bundle, artifact: Artifact, model: ModelProto, metadata: dict[str, str], made_from: tuple[str, ...] = ()
) -> None:
    """Check a graph and add it to the bundle. Errors: ExportError where lint finds an error for TensorRT."""
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    if artifacts.TENSORRT in artifact.backends:
        require_no_errors(model, artifact.file)
    with bundle.add(artifact.file, stage=artifact.step, made_from=(*artifact.made_from, *made_from)) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _convert_to_fp16(job: _Job, model: ModelProto) -> tuple[ModelProto, str]:
    """The float graph of the job, or its quantized form, with FP16 inside; and FLOAT32_NODES of it."""
    absmax = activation_absmax(job.graph, _absmax_batches(job))
    found = convert_to_fp16(model, absmax, job.policy.float32_nodes(model))
    return found.model, _by_reason(found.fp32_nodes)


def _absmax_batches(job: _Job) -> Iterator[np.ndarray]:
    """A few calibration images as the graph takes them, [1, 3, H, W]; noise where the images are not available."""
    contract = job.bundle.manifest.input
    try:
        paths = choose_images(job.bundle, job.calib, ABSMAX_IMAGES).paths
    except (DataError, ExportError, OSError) as error:
        if job.calib is not None:
            raise
        log.warning("FP16: no calibration images here (%s), so magnitudes are observed on noise alone", error)
        paths = ()
        noise = np.random.default_rng(0).integers(0, 256, (1, 3, contract.height, contract.width))
        yield noise.astype(np.float32)
    for number, batch in enumerate(_batches(job.bundle, paths)):
        if job.progress:
            job.progress(FP16.id, number, len(paths))
        yield batch
    if job.progress and paths:
        job.progress(FP16.id, len(paths), len(paths))


def _images_of(bundle: Bundle, ranges: Ranges, otherwise: str) -> list[Path]:
    """Some of the images that the ranges were observed on, evenly spaced; none, with a warning, where they are missing.

    otherwise   what happens without them, for the warning

    Present ranges need no images, so a device can write the graph of its own target. It is written without bias
    correction, and written again with it where the images are. A graph that 0.2 wrote with correction is kept.
    """
    try:
        found = choose_images(bundle, Path(ranges.source) if ranges.source else None, ranges.requested)
        reason = "they have changed since" if found.images != ranges.images else ""
    except (DataError, ExportError, OSError) as error:
        reason = str(error)
    if reason:
        log.warning("INT8: %s: the calibration images are not here (%s)", otherwise, reason)
        return []
    return evenly_spaced(found.paths, IMAGES)


class _Corrections:
    """One bias correction for the graphs of all targets, with the float graph's pass and each target's as tasks."""

    def __init__(self, job: _Job, plan: QuantizationPlan) -> None:
        self._job, self._plan = job, plan
        self._made: BiasCorrection | None = None
        self._name, self._passes = "", 0

    def on(self, paths: Sequence[Path], name: str) -> BiasCorrection:
        """name: of the target's task"""
        self._name, self._passes = name, 0
        if self._made is None:
            self._passes = -1  # the float graph's comes first
            self._made = BiasCorrection(self._job.graph, self._plan.layers, lambda: self._one_pass(paths))
        return self._made

    def _one_pass(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        before = self._passes * len(paths)
        self._passes += 1
        for number, batch in enumerate(_batches(self._job.bundle, paths)):
            yield batch
            if self._job.progress and before < 0:
                self._job.progress("bias float", number + 1, len(paths))
            elif self._job.progress:
                self._job.progress(self._name, before + number + 1, PARTS * len(paths))


def _batches(bundle: Bundle, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Images as the graph takes them, [1, 3, H, W], one after the other."""
    for path in paths:
        yield prepare([decode(path)], bundle.manifest.input)[0]


def _is_made_by(bundle: Bundle, name: str, made_by: str) -> bool:
    """Whether the bundle has an undamaged, fresh graph that was made with these settings."""
    return bundle.has(name) and _metadata(read_onnx(bundle.require(name))).get(MADE_BY) == made_by


def _without_products(made_by: str) -> str:
    """What a graph of version 0.2 with these settings says it was made by."""
    return json.dumps({key: value for key, value in json.loads(made_by).items() if key != PRODUCTS})


def _metadata(model: ModelProto) -> dict[str, str]:
    return {item.key: item.value for item in model.metadata_props}


def _by_reason(nodes: dict[str, str]) -> str:
    """{node: reason} as JSON {reason: [nodes]}."""
    found: dict[str, list[str]] = {}
    for name, reason in nodes.items():
        found.setdefault(reason, []).append(name)
    return json.dumps(found, ensure_ascii=False)
