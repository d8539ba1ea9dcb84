"""Verdicts and searches of several bundles as Markdown tables: for READMEs, with other quantizers beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path

from edgedetr.artifacts import GRAPHS, ONNX, ORT, VERDICT
from edgedetr.bundle import Bundle
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict, read_verdict
from edgedetr.printable import printable
from edgedetr.quantization.search.search_report import SearchReport
from edgedetr.reporting.quantization_results import read_search

HEAD = (
    "bundle",
    "model, images",
    "artifact",
    "backend",
    "AP",
    "drop (upper 95 %)",
    "ms",
    "of float32",
    "MB",
    "beside ours",
)
SEARCH_HEAD = (
    "bundle",
    "target",
    "budget",
    "placement",
    "INT8 groups",
    "AP lost (bound)",
    "verify images",
    "ms",
    "of float",
    "smallest certified budget",
)
NOTHING_ACCEPTED = {"none": "none is certified", "float": "none is faster", "open": "not ended"}  # by outcome
# Milliseconds of one inference, by (artifact, backend).
Timings = Mapping[tuple[str, str], float]


def markdown_table(bundles: Iterable[str | Path | Bundle], timings: Sequence[Timings] = ()) -> str:
    """The stored verdicts of the bundles, one row for each artifact on each backend.

    timings   for each bundle milliseconds that were measured apart; none = those of the verdicts

    The column "of float32" is the time divided by that of model.onnx on the same backend; where a verdict has none, on
    ONNX Runtime, which is then said. Errors: BundleError for a bundle without an up-to-date verdict.
    """
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for number, one in enumerate(bundles):
        bundle = Bundle.open(one)
        verdict = read_verdict(bundle.require(VERDICT.file), bundle.path)
        measured = timings[number] if timings else _timings(verdict)
        lines += [_line(row) for row in _rows(bundle, verdict, measured)]
    return "\n".join(lines) + "\n"


def search_table(bundles: Iterable[str | Path | Bundle]) -> str:
    """The last search under a budget of each bundle that has one, one row each; "" where none has.

    Errors: BundleError where one is damaged, or of another model.onnx.
    """
    found = [(bundle, read_search(bundle)) for bundle in map(Bundle.open, bundles)]
    rows = [_search_row(bundle, search) for bundle, search in found if search is not None]
    return "\n".join(map(_line, (SEARCH_HEAD, ["---"] * len(SEARCH_HEAD), *rows))) + "\n" if rows else ""


def _search_row(bundle: Bundle, search: SearchReport) -> list[str]:
    name, certified = bundle.path.name.removesuffix(".bundle"), search.smallest_budget
    head = [name, search.target, f"{search.budget:g}"]
    last = "" if certified is None else f"{certified:g}"
    chosen = search.accepted_candidate
    if chosen is None:
        return [*head, NOTHING_ACCEPTED[search.outcome], *[""] * 5, last]
    look = search.last_look(chosen)
    lost = f"{look.drop + 0.0:.2f} ({look.upper + 0.0:.2f})"
    if chosen.float_ms:
        times = [f"{chosen.int8_ms:.2f}", f"{chosen.int8_ms / chosen.float_ms:.2f}"]
    else:  # costs by a model are in no unit of time
        times = ["", f"{1 + chosen.predicted_ms / search.costs.float_ms:.2f} predicted"]
    return [*head, chosen.name, str(len(chosen.placement.int8)), lost, str(look.images), *times, last]


def _timings(verdict: Verdict) -> Timings:
    return {(row.name, row.backend): row.p50_ms for row in verdict.artifacts if row.p50_ms is not None}


def _rows(bundle: Bundle, verdict: Verdict, timings: Timings) -> list[list[str]]:
    manifest = bundle.manifest
    first = [
        bundle.path.name.removesuffix(".bundle"),
        f"{manifest.model}, {manifest.input.width} x {manifest.input.height} px, {verdict.artifacts[0].images} images",
    ]
    rows = []
    for artifact in verdict.artifacts:
        time = timings.get((artifact.name, artifact.backend))
        rows.append(
            [
                *first,
                artifact.name,
                artifact.backend,
                "" if _fails(artifact) else f"{artifact.ap:.1f}",
                ""
                if artifact.is_reference or _fails(artifact)
                else f"{artifact.drop + 0.0:.2f} ({artifact.drop_upper95 + 0.0:.2f})",
                "" if time is None else f"{time:.1f}",
                "" if time is None or artifact.name == ONNX.id else _ratio(time, artifact.backend, timings),
                "" if artifact.size_mb is None else f"{artifact.size_mb:.1f}",
                beside_ours(artifact, verdict.artifacts, timings) if artifact.quantizer else "",
            ]
        )
        first = ["", ""]
    return rows


def _ratio(time: float, backend: str, timings: Timings) -> str:
    for other, words in ((backend, ""), (ORT, " (ONNX Runtime's)")):
        if (whole := timings.get((ONNX.id, other))) is not None:
            return f"{time / whole:.2f}{words}"
    return ""


def beside_ours(peer: ArtifactVerdict, artifacts: Iterable[ArtifactVerdict], timings: Timings) -> str:
    """In what another quantizer's graph is better than our fastest INT8 graph on the same backend, as printed.

    A graph that its backend could not run has no time in the verdict.
    """
    if _fails(peer):
        return "does not run"

    def time(row: ArtifactVerdict) -> float:
        return timings.get((row.name, row.backend)) or float("inf")

    ours = [row for row in artifacts if row.backend == peer.backend and _is_our_int8(row)]
    if not ours:
        return ""
    fastest = min(ours, key=time)
    better = ["drop"] if round(peer.drop, 2) < round(fastest.drop, 2) else []
    if isfinite(time(fastest)) and round(time(peer), 1) < round(time(fastest), 1):
        better.append("time")
    return f"better: {', '.join(better)}" if better else "no better"


def _is_our_int8(row: ArtifactVerdict) -> bool:
    """Whether it is an INT8 graph of ours that its backend is timed with."""
    graph = GRAPHS.get(row.name)
    return graph is not None and not graph.quantizer and graph.precision == "int8" and row.backend in graph.benched


def _fails(artifact: ArtifactVerdict) -> bool:
    """Whether another quantizer's graph could not be run, or gave no numbers: its row has no time."""
    return bool(artifact.quantizer) and artifact.p50_ms is None


def _line(cells: Sequence[str]) -> str:
    escaped = [printable(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
