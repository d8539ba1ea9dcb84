"""Where INT8 goes wrong: tensors that a graph's own Q/DQ pairs damage, and nodes that a backend computes wrongly.

A pair is judged by itself: it is given the values of the float graph, so its loss has nothing to do with what was lost
before it, nor with queries that changed their order. A backend is compared with the reference run of the same graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto

from edgedetr.artifacts import GRAPHS, ONNX, RANGES, verified_pairs
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.errors import EdgedetrError
from edgedetr.evaluation.artifacts_run import SIMULATED_FP16, candidates, load_split, without_saturating_int8
from edgedetr.evaluation.first_divergence import find_sharp_divergence
from edgedetr.onnx_graph.index import GraphIndex, int_attribute
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.progress import Progress
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.patterns import Measured, Pattern, matching, surroundings
from edgedetr.quantization.quantized_pairs import QuantizedPair, pairs_of
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.smoothing import smoothed
from edgedetr.runtime.backends import base
from edgedetr.runtime.cure_record import about_cures, cures_in
from edgedetr.runtime.onnx_bytes import metadata, read
from edgedetr.runtime.preprocess import prepare
from edgedetr.runtime.sqnr import sqnr_db

IMAGES = 2  # of the verify split; one is enough for a backend, two keep a pair from being judged by one odd image
# dB. With ranges that fit, rounding to 8 bits leaves 28 to 46 (rt_detr on rendered scenes, the worst branch of a Concat
# 28.6); a tensor below the floor has lost what its consumers read.
PAIR_FLOOR = 20.0
TENSORS = 24  # of the float graph, read in one run: bounds the memory
MOST_FINDINGS = 10


@dataclass(frozen=True)
class KnownCase:
    """A known pattern around a finding; `command` applies its cure, "" where export cannot."""

    name: str
    evidence: str
    cure: str
    command: str = ""


@dataclass(frozen=True)
class Finding:
    """One node at which INT8 goes wrong.

    artifact    the graph's id
    backend     the library that departs from the reference run of the graph; "" where the graph itself loses too much
    node        its name, with `operator`, and `tensor`, its output
    around      the operators around it: "Resize, Conv -> Concat -> Q -> DQ -> Conv"
    before_db   SQNR of its inputs, the worst of them; infinite where they are the float graph's own
    after_db    SQNR of its output; of a Concat the worst branch
    saturated   share of the values outside of the range, 0..1
    known       known patterns that are here, the most special one first
    cured       cures of known patterns that export applied to this node: "openvino-concat by another order"
    """

    artifact: str
    backend: str
    node: str
    operator: str
    tensor: str
    around: str
    before_db: float
    after_db: float
    saturated: float = 0.0
    known: tuple[KnownCase, ...] = ()
    cured: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.artifact} on {self.backend}" if self.backend else f"{self.artifact}, on every backend"
        cut = f", {100 * self.saturated:.1f} % of its values outside of the range" if self.saturated else ""
        lines = [
            f"{where}: {self.operator} {self.node!r}: {_db(self.before_db)} before, {_db(self.after_db)} after{cut}"
        ]
        lines.append(f"  {self.around}")
        for case in self.known:
            lines.append(f"  known as {case.name}: {case.evidence}")
            lines.append(f"  cure: {case.cure}{f'; run: {case.command}' if case.command else ''}")
        lines += [f"  cured already of {cure}" for cure in self.cured]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Numbers that are infinite are null."""
        numbers = {key: value if np.isfinite(value) else None for key, value in self._ratios().items()}
        return {**asdict(self), **numbers, "known": [asdict(case) for case in self.known]}

    def _ratios(self) -> dict[str, float]:
        return {"before_db": self.before_db, "after_db": self.after_db}


@dataclass(frozen=True)
class Localization:
    """findings  of the graphs first, then of the backends; checked: what was looked at, one line each"""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {"findings": [finding.to_json() for finding in self.findings], "checked": list(self.checked)}


def localize(
    bundle: Bundle,
    *,
    data: str | Path | None = None,
    backends: Collection[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Localization:
    """Look at every INT8 graph of a bundle, and at every graph on every backend that can be read inside.

    data      the data set's folder; None = the one that the bundle records. Its first verify images are used
    backends  None = all that run here
    Errors: BundleError, DataError, UsageError.
    """
    on_cpu = [name for name in backends or () if not base.get(name).runs_engines]
    pairs = candidates(bundle, verified_pairs(), None, on_cpu or None)
    pairs = [pair for pair in (pairs if backends else without_saturating_int8(pairs)) if not _is_reference(pair)]
    samples = load_split(bundle, data).samples[:IMAGES]
    images = [prepare([decode(sample.path)], bundle.manifest.input)[0] for sample in samples]
    graphs = [graph for graph in GRAPHS.values() if graph.precision == "int8" and graph.file in bundle.manifest.files]
    findings: list[Finding] = []
    checked: list[str] = []
    tasks = len(graphs) + len(pairs)
    for number, graph in enumerate(graphs, 1):
        # Other quantizers take the float graph as it is; ours are made of its split form, which has other tensors.
        whole = read_bundle_graph(bundle.require(ONNX.file))
        plain = whole if graph.quantizer else _as_quantized(bundle, split_concats(whole))
        found = damaged_tensors(plain, read_bundle_graph(bundle.require(graph.file)), images)
        findings += [replace(finding, artifact=graph.id, known=_for(bundle, finding)) for finding in found]
        checked.append(f"{graph.id}: {len(found)} tensors damaged by their own Q/DQ pair")
        checked += [f"{graph.id}: {line}" for line in about_cures(bundle, graph.file)]
        if progress:
            progress("localize", number, tasks)
    for number, (artifact, backend) in enumerate(pairs, len(graphs) + 1):
        path = bundle.require(GRAPHS[artifact].file)
        try:
            departure = departure_of(path, backend, images[0], threads=threads)
        except EdgedetrError as error:
            checked.append(f"{artifact} on {backend}: not searched ({error})")
        else:
            if departure is not None:
                findings.append(replace(departure, artifact=artifact, known=_for(bundle, departure)))
            checked.append(f"{artifact} on {backend}: {'departs from' if departure else 'as'} the reference run")
        if progress:
            progress("localize", number, tasks)
    return Localization(tuple(_with_cures(bundle, finding) for finding in findings), tuple(checked))


def _with_cures(bundle: Bundle, finding: Finding) -> Finding:
    """A finding with the cures that were applied to its node when the graph was written."""
    properties = metadata(read(bundle.require(GRAPHS[finding.artifact].file))[0])
    found = [cure for cure in cures_in(properties) if cure.layer == finding.node]
    return replace(finding, cured=tuple(f"{cure.pattern} by {cure.how}" for cure in found))


def _is_reference(pair: tuple[str, str]) -> bool:
    """Whether a pair is scored as a simulation, which is the reference run itself."""
    return pair[0] in SIMULATED_FP16 and base.get(pair[1]).is_reference


def _for(bundle: Bundle, finding: Finding) -> tuple[KnownCase, ...]:
    """The known cases of a finding, with the bundle's path in their commands."""
    return tuple(replace(case, command=case.command.format(path=bundle.path)) for case in finding.known)


def departure_of(path: Path, backend: str, images: np.ndarray, *, threads: int | None = None) -> Finding | None:
    """The first node at which a backend departs from the reference run of a graph, before the selection of queries."""
    found = find_sharp_divergence(path, backend, images, threads=threads)
    if found is None:
        return None
    graph = GraphIndex(read_bundle_graph(path))
    node = graph.node_by_name.get(found.node)
    return Finding(
        "",
        backend,
        found.node,
        found.operator,
        found.tensor,
        surroundings(graph, node) if node is not None else found.operator,
        found.inputs_db,
        found.sqnr_db,
        known=_known(graph, node, Measured(backend)) if node is not None else (),
    )


def damaged_tensors(
    float_model: ModelProto, model: ModelProto, images: Sequence[np.ndarray], *, floor: float = PAIR_FLOOR
) -> list[Finding]:
    """The tensors of an INT8 graph whose own Q/DQ pair loses more than rounding does, in the order of the graph.

    float_model   the graph that was quantized; its tensors have the same names
    images        [1, 3, H, W] float32 each
    """
    plain, graph = GraphIndex(float_model), GraphIndex(model)
    by_tensor: dict[str, list[QuantizedPair]] = {}
    for pair in pairs_of(graph, plain):
        by_tensor.setdefault(pair.tensor, []).append(pair)
    findings: dict[str, Finding] = {}
    for tensor, values in _values(plain, list(by_tensor), images):
        for pair in by_tensor[tensor]:
            finding = _judged(pair, values, plain, graph)
            if finding.after_db < floor:
                findings.setdefault(finding.node, finding)
    order = {node.name: number for number, node in enumerate(graph.nodes)}
    return sorted(findings.values(), key=lambda finding: order.get(finding.node, 0))[:MOST_FINDINGS]


def _as_quantized(bundle: Bundle, plain: ModelProto) -> ModelProto:
    """The float graph that our INT8 graphs were made of: SmoothQuant divides some of its tensors."""
    smooth = Ranges.load(bundle.require(RANGES.file)).smooth if bundle.has(RANGES.file) else {}
    return smoothed(GraphIndex(plain), smooth) if smooth else plain


def _values(
    plain: GraphIndex, tensors: Sequence[str], images: Sequence[np.ndarray]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """(tensor, its value on each image), from the float graph."""
    feed = next(iter(plain.inputs - set(plain.initializers)))
    inner = [name for name in tensors if name != feed]
    if feed in tensors:
        yield feed, list(images)
    for start in range(0, len(inner), TENSORS):
        part = inner[start : start + TENSORS]
        session = GraphSession(plain.model, part)
        runs = [session.run({feed: image}) for image in images]
        for name in part:
            yield name, [run[name] for run in runs]


def _judged(pair: QuantizedPair, values: Sequence[np.ndarray], plain: GraphIndex, graph: GraphIndex) -> Finding:
    """What the pair makes of the values, of which there may be no more than the images."""
    there, back = _parameters(pair.quantize, graph), _parameters(pair.dequantize, graph)
    rewritten = there != back
    limits = np.iinfo(there.integer)
    saturated = total = 0
    restored = []
    for value in values:
        steps = np.rint(value.astype(np.float64) / there.scale) + there.zero_point
        saturated += int(((steps < limits.min) | (steps > limits.max)).sum())
        total += steps.size
        restored.append((np.clip(steps, limits.min, limits.max) - back.zero_point) * back.scale)
    producer = plain.producers.get(pair.tensor)
    branches = _branches(producer, plain, values)
    ratio, worst = 1.0, _ratio(values, restored)
    if branches and producer is not None:
        axis = int_attribute(producer, "axis", 0)
        slices = list(_slices(branches, axis, values[0].ndim))
        largest = [max(float(np.abs(value[part]).max()) for value in values) for part in slices]
        ratio = max(largest) / max(min(largest), 1e-12)
        worst = min(_ratio([v[part] for v in values], [r[part] for r in restored]) for part in slices)
    node = pair.dequantize if rewritten or producer is None else graph.node_by_name.get(producer.name, pair.dequantize)
    share = saturated / max(total, 1)
    measured = Measured("", ratio, share, rewritten)
    return Finding(
        "",
        "",
        node.name,
        node.op_type,
        pair.tensor,
        surroundings(graph, node),
        float("inf"),
        worst,
        share,
        _known(graph, node, measured),
    )


@dataclass(frozen=True)
class _Parameters:
    """Scale and zero point of a whole tensor."""

    scale: float
    zero_point: int
    integer: str


def _parameters(node: NodeProto, graph: GraphIndex) -> _Parameters:
    scale = graph.value(node.input[1])
    zero = graph.value(node.input[2]) if len(node.input) > 2 else np.uint8(0)
    assert scale is not None and zero is not None  # both are constants, in graphs that passed lint
    return _Parameters(float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]), zero.dtype.name)


def _branches(producer: NodeProto | None, plain: GraphIndex, values: Sequence[np.ndarray]) -> list[int]:
    """Sizes of a Concat's inputs along its axis; none for another node, or where a size is not known."""
    if producer is None or producer.op_type != "Concat":
        return []
    axis = int_attribute(producer, "axis", 0)
    sizes = []
    for name in producer.input:
        shape = plain.shape(name)
        size = shape[axis] if shape is not None else None
        if size is None:
            return []
        sizes.append(size)
    return sizes if sum(sizes) == values[0].shape[axis] else []


def _slices(sizes: Sequence[int], axis: int, rank: int) -> Iterator[tuple[slice, ...]]:
    start = 0
    for size in sizes:
        index = [slice(None)] * rank
        index[axis] = slice(start, start + size)
        start += size
        yield tuple(index)


def _ratio(values: Sequence[np.ndarray], restored: Sequence[np.ndarray]) -> float:
    """SQNR over all images, dB."""
    flat, back = (np.concatenate([array.reshape(-1) for array in arrays]) for arrays in (values, restored))
    return sqnr_db(flat, back) if np.any(flat) else float("inf")


def _known(graph: GraphIndex, node: NodeProto, measured: Measured) -> tuple[KnownCase, ...]:
    return tuple(_case(pattern) for pattern in matching(graph, node, measured))


def _case(pattern: Pattern) -> KnownCase:
    """Export cures by itself what an edit of the graph can; a float fallback of a policy's layers is asked for."""
    command = ""
    if pattern.steps:
        command = f"edgedetr export {{path}} --int8 --target {pattern.backends[0]}"
    elif pattern.rules:
        command = f"edgedetr export {{path}} --int8 --cure {pattern.name}"
    return KnownCase(pattern.name, pattern.evidence, pattern.cure, command)


def _db(ratio: float) -> str:
    return "exact" if ratio == float("inf") else f"{ratio:.1f} dB"
