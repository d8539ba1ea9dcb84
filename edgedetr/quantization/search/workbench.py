"""What a search works with: the float graph and its groups, ranges for all of them, and the graphs of placements.

A placement's graph is built as `edgedetr export --int8` builds it: the same plan, ranges, corrected biases and target.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from onnx import ModelProto

from edgedetr.artifacts import INT8, INT8_CPU, INT8_PROFILED, ONNX, OPENVINO, ORT, TENSORRT, Artifact
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.evaluation.artifacts_run import SIMULATED_FP16
from edgedetr.onnx_graph.fp16 import activation_absmax, convert_to_fp16
from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.package_data import patterns_file
from edgedetr.progress import Progress
from edgedetr.quantization import target as dialects
from edgedetr.quantization.bias_correction import IMAGES, BiasCorrection
from edgedetr.quantization.calibration import observe
from edgedetr.quantization.calibration_set import evenly_spaced
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.cures import concerns, cured_plan
from edgedetr.quantization.distance_meter import DistanceMeter
from edgedetr.quantization.groups import Group, groups_of
from edgedetr.quantization.matched_distance import distances
from edgedetr.quantization.observers import observer_of
from edgedetr.quantization.placement import Placement, RangesByObserver, alphas_of, observers_of, plan_for
from edgedetr.quantization.policy import check_policy, load_policy
from edgedetr.quantization.quantize import ABSMAX_IMAGES, int8_graph, read_onnx
from edgedetr.quantization.quantized_tensors import quantized_tensors, tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.search.image_sets import ImageSets
from edgedetr.quantization.search.search_state import SearchState
from edgedetr.quantization.sensitivity import DIALECT
from edgedetr.quantization.smoothing import Fold, Smoothing, checked_smoothing, folds_of, smoothed, smoothings
from edgedetr.quantization.target import Target, weight_bits
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.base import RawOutputs, Runner
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.postprocess import decode as decode_outputs
from edgedetr.runtime.preprocess import prepare
from edgedetr.storage.digests import digest

ALPHA = 0.5  # of SmoothQuant, where the search tries it (Xiao et al. 2023, section 5.1)
OBSERVERS_TRIED = ("percentile 99.99", "mse")  # the two that lose least on published INT8 detectors


@dataclass(frozen=True)
class SearchTarget:
    """What a search minimizes the latency of.

    name       as the user writes it
    artifact   the INT8 file of the bundle that it runs
    backend    which runs candidates here; TensorRT is simulated in ONNX Runtime
    here       whether the latency can be measured on this machine
    """

    name: str
    artifact: Artifact
    backend: str
    here: bool


TARGETS = {
    target.name: target
    for target in (
        SearchTarget(ORT, INT8_CPU, ORT, here=True),
        SearchTarget(OPENVINO, INT8_CPU, OPENVINO, here=True),
        SearchTarget(TENSORRT, INT8, ORT, here=False),
    )
}


class Workbench:
    """One bundle, one target, and what is computed once for all placements."""

    def __init__(
        self,
        bundle: Bundle,
        target: SearchTarget,
        config: QuantConfig,
        sets: ImageSets,
        state: SearchState,
        *,
        cure_for: Sequence[str] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """cure_for: backends whose known faults are cured; None = those on which verify judges the target's file"""
        self.bundle, self.target, self.config, self.sets, self.state = bundle, target, config, sets, state
        self.threads, self.progress = threads, progress
        model = split_concats(read_onnx(bundle.require(ONNX.file)))
        self.policy = load_policy(config.policy)
        check_policy(model, self.policy)
        self.graph = GraphIndex(model)
        self.groups: tuple[Group, ...] = groups_of(self.graph, self.policy)
        cpu = replace(dialects.CPU, weight_bits=weight_bits(config.cpu_weights))
        self.dialect: Target = cpu if target.artifact is INT8_CPU else dialects.TENSORRT
        self.everything = Placement(tuple(group.id for group in self.groups))
        chosen = target.artifact.verified if cure_for is None else cure_for
        self.cure_for = tuple(backend for backend in chosen if concerns(self.dialect, backend))

    @cached_property
    def meter(self) -> DistanceMeter:
        """Distances of placements with uncorrected biases, in the arithmetic of the pairs: one for all targets."""
        activation = self.bundle.manifest.output.activation
        return DistanceMeter(self.graph, self.policy, self.ranges, DIALECT, activation)

    # ------------------------------------------------------------------------------------------------------- graphs

    @cached_property
    def ranges(self) -> RangesByObserver:
        """Ranges of every tensor that any placement quantizes, observed on the calibration images."""
        tensors = tensors_to_observe(self.graph, plan_for(self.graph, self.policy, self.everything))

        labels = self.config.observer_label, self.other_observer

        def make() -> dict[str, dict[str, float]]:
            paths = self.sets.calibration.paths
            found = observe(self.graph.model, tensors, paths, self.bundle.manifest.input, self.progress)
            return {label: {n: h.amax(*observer_of(label)) for n, h in found.items()} for label in labels}

        return RangesByObserver(labels[0], self.state.value(["ranges", *labels, *tensors], make))

    # ---------------------------------------------------------------------------------------------------- SmoothQuant

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Every tensor that can be smoothed."""
        everywhere = {name: ALPHA for group in self.groups for name in group.nodes}
        return folds_of(self.graph, plan_for(self.graph, self.policy, self.everything), everywhere).possible

    @property
    def smoothable(self) -> set[str]:
        """Groups whose input can be smoothed."""
        readers = {layer.node for fold in self.folds for layer in fold.readers}
        return {group.id for group in self.groups if readers.intersection(group.nodes)}

    @cached_property
    def _factors(self) -> dict[str, Smoothing]:
        def make() -> dict[str, object]:
            found = smoothings(self.graph, self.folds, self._batches(self.sets.calibration.paths))
            return {name: {"alpha": one.alpha, "factors": [*one.factors]} for name, one in found.items()}

        stored = self.state.value(["smooth", ALPHA, *(fold.tensor for fold in self.folds)], make)
        return {name: checked_smoothing(name, value) for name, value in stored.items()}

    @cached_property
    def _smoothed_graph(self) -> GraphIndex:
        return GraphIndex(smoothed(self.graph, self._factors))

    @cached_property
    def _smoothed_ranges(self) -> RangesByObserver:
        """As `ranges`, of the graph in which everything is smoothed that can be; only these tensors have others."""
        labels, tensors = list(self.ranges.amax), list(self._factors)

        def make() -> dict[str, dict[str, float]]:
            paths, contract = self.sets.calibration.paths, self.bundle.manifest.input
            found = observe(self._smoothed_graph.model, tensors, paths, contract, self.progress)
            return {label: {n: h.amax(*observer_of(label)) for n, h in found.items()} for label in labels}

        other = self.state.value(["smoothed ranges", ALPHA, *labels, *tensors], make)
        merged = {label: {**self.ranges.amax[label], **other[label]} for label in labels}
        return RangesByObserver(self.ranges.default, merged)

    @cached_property
    def smoothed_meter(self) -> DistanceMeter:
        """As `meter`, where everything is smoothed that can be: for a group that is INT8 alone, only its own is."""
        activation = self.bundle.manifest.output.activation
        return DistanceMeter(self._smoothed_graph, self.policy, self._smoothed_ranges, DIALECT, activation)

    # ---------------------------------------------------------------------------------------------------------------

    @property
    def other_observer(self) -> str:
        """Label of the observer that sensitive groups may take instead: it clips more, or less, than quant.observer."""
        return next(label for label in OBSERVERS_TRIED if label != self.config.observer_label)

    def model(self, placement: Placement, *, corrected: bool = True) -> ModelProto:
        """The graph of a placement for the target. corrected: with corrected biases, as export writes it."""
        if not placement.int8:
            return self.graph.model
        plan = plan_for(self.graph, self.policy, placement)
        observers = observers_of(self.graph, self.policy, placement, plan)
        amax, graph, absmax = self.ranges.resolved(observers), self.graph, lambda: self._absmax
        correction = self._correction if corrected and self.config.bias_correction else None
        if placement.smooth:
            chosen = folds_of(graph, plan, alphas_of(graph, self.policy, placement, 0.0)).possible
            factors = {fold.tensor: self._factors[fold.tensor] for fold in chosen}
            amax |= {
                name: value for name, value in self._smoothed_ranges.resolved(observers).items() if name in factors
            }
            graph = GraphIndex(smoothed(graph, factors))
            absmax = partial(self._absmax_of, graph)
            correction = correction and BiasCorrection(graph, plan.layers, self._bias_batches)
        amax = share_pool_ranges(graph.model, amax)
        plan = cured_plan(graph, plan, amax, self.dialect, self.cure_for).plan
        result = int8_graph(graph, plan, amax, self.dialect, correction, self.cure_for)
        if self.dialect.fp16:
            result = convert_to_fp16(result, absmax(), self.policy.float32_nodes(result)).model
        return result

    @cached_property
    def _absmax(self) -> Mapping[str, float]:
        return self._absmax_of(self.graph)

    def _absmax_of(self, graph: GraphIndex) -> Mapping[str, float]:
        paths = evenly_spaced(self.sets.calibration.paths, ABSMAX_IMAGES)
        return activation_absmax(graph, self._batches(paths))

    @cached_property
    def _correction(self) -> BiasCorrection:
        """For all placements without smoothing: the float graph runs once."""
        plan = plan_for(self.graph, self.policy, self.everything)
        return BiasCorrection(self.graph, plan.layers, self._bias_batches)

    def _bias_batches(self) -> Iterator[np.ndarray]:
        return self._batches(evenly_spaced(self.sets.calibration.paths, IMAGES))

    def _batches(self, paths: Iterable[Path]) -> Iterator[np.ndarray]:
        for path in paths:
            yield prepare([decode(path)], self.bundle.manifest.input)[0]

    def quantized_readers(self) -> dict[str, list[str]]:
        """{tensor that is quantized where every group is INT8: nodes that read it dequantized}."""
        plan = plan_for(self.graph, self.policy, self.everything)
        found = {}
        for name, tensor in quantized_tensors(self.graph, plan, self.dialect).items():
            readers = tensor.consumers
            nodes = [consumer.node.name for consumer in self.graph.consumers[name]]
            found[name] = nodes if readers is None else sorted({node for node, _ in readers})
        return found

    def write_profiled_graph(self) -> None:
        """The graph with every group in INT8, for `edgedetr build --profile`; one of the same model.onnx is kept.

        Times do not depend on ranges and biases, so a profile outlives another calibration.
        """
        if not self.bundle.has(INT8_PROFILED.file):
            model = self.model(self.everything, corrected=False)
            with self.bundle.add(
                INT8_PROFILED.file, stage=INT8_PROFILED.step, made_from=INT8_PROFILED.made_from
            ) as path:
                path.write_bytes(model.SerializeToString(deterministic=True))

    def candidate_graph(self, placement: Placement) -> Path:
        """The graph of a placement as export writes it, built once."""
        about = ["graph", self.key(placement)]
        return self.state.file(about, "onnx", lambda: self.model(placement).SerializeToString(deterministic=True))

    def key(self, placement: Placement) -> str:
        """A short name of a placement's graph, equal for equal graphs: it changes with what is known of faults too."""
        cures = [*self.cure_for, digest(patterns_file())] if self.cure_for else []
        return hashlib.sha256(" ".join([self.target.name, placement.sha256(), *cures]).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------------ running

    def open(self, model: ModelProto) -> Runner:
        """A graph on the target's backend, as `edgedetr verify` runs it; FP16 is simulated where a CPU runs it."""
        with tempfile.TemporaryDirectory(prefix="edgedetr-") as folder:
            path = Path(folder) / ONNX.file
            path.write_bytes(model.SerializeToString())
            return self.open_file(path)

    def open_file(self, path: Path) -> Runner:
        simulated = self.target.artifact.id in SIMULATED_FP16 and base.get(self.target.backend).is_reference
        if simulated:
            return OrtRunner(simulate_fp16(path), threads=self.threads, optimize=False)
        return base.get(self.target.backend).open(path, threads=self.threads)

    @cached_property
    def search_batches(self) -> list[np.ndarray]:
        """The search images as the graph takes them, [1, 3, H, W] each."""
        return list(self._batches(sample.path for sample in self.sets.search.dataset.samples))

    @cached_property
    def float_outputs(self) -> list[RawOutputs]:
        """What the float graph gives on the search images."""
        runner = self.open(self.graph.model)
        return [runner.run(batch) for batch in self.search_batches]

    def outputs(self, placement: Placement, what: str) -> list[RawOutputs]:
        """What the graph of a placement, as export writes it, gives on the search images. what: for the progress."""
        runner = self.open_file(self.candidate_graph(placement))
        found = []
        for number, batch in enumerate(self.search_batches):
            found.append(runner.run(batch))
            if self.progress:
                self.progress(what, number + 1, len(self.search_batches))
        return found

    def distances(self, outputs: Sequence[RawOutputs]) -> list[float]:
        """[I] distance of outputs on the search images from the float graph's (quantization/matched_distance.py)."""
        activation = self.bundle.manifest.output.activation
        pairs = zip(self.float_outputs, outputs)
        return [float(distances(a, b, activation, by_identity=self.meter.by_identity)[0]) for a, b in pairs]

    def search_detections(self, outputs: Sequence[RawOutputs]) -> dict[int, Detections]:
        """Detections on the search images, by image id."""
        found = {}
        for sample, raw in zip(self.sets.search.dataset.samples, outputs):
            found[sample.image_id] = self._decode(raw, sample.path)
        return found

    def detect(self, runner: Runner, path: Path) -> Detections:
        batch, geometry = prepare([decode(path)], self.bundle.manifest.input)
        manifest = self.bundle.manifest
        return decode_outputs(runner.run(batch), geometry, manifest.classes, manifest.output)[0]

    def _decode(self, raw: RawOutputs, path: Path) -> Detections:
        manifest = self.bundle.manifest
        geometry = prepare([decode(path)], manifest.input)[1]
        return decode_outputs(raw, geometry, manifest.classes, manifest.output)[0]
