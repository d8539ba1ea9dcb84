"""Judge TensorRT engines on the device that runs them, without torch.

An engine must satisfy what every artifact must (judge.py), give equal results for equal images of a full batch, and run
in the precision that it is named after. INT8 is recommended only where it is faster than FP16.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

from edgedetr.artifacts import REFERENCE
from edgedetr.bundle import Bundle
from edgedetr.errors import EngineError
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.evaluation.artifacts_run import ArtifactRun
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.verdict import ArtifactVerdict, DeviceVerdict, EngineVerdict, write_verdict
from edgedetr.runtime import jetson
from edgedetr.runtime.backends import base
from edgedetr.runtime.tensorrt import gpu, select
from edgedetr.runtime.tensorrt.select import Engine, Measurement

log = logging.getLogger(__name__)

# Fraction of the convolutions and matrix products that must run in the engine's precision. The decoder of an INT8 graph
# stays FP16 by policy, which is up to half of its layers; an engine that ignores the graph's types has next to none.
LEAST_FRACTION = {"int8": 0.25, "fp16": 0.5}
# Fraction of objects that equal images of one batch must have in common. Kernels may order sums differently per row,
# which rarely moves an object across the threshold; with the defect of TensorRT issue 4813 no object is in common.
LEAST_ROWS_MATCHED = 0.99


def fitting_engines(
    bundle: Bundle, artifacts: Collection[str] | None, backends: Collection[str] | None
) -> tuple[Engine, ...]:
    """The engines that fit this device; none where only other backends are requested.

    Errors: EngineError where TensorRT is requested and no engine fits.
    """
    if backends and not any(base.get(name).runs_engines for name in backends):
        return ()
    found = select.find_engines(bundle)
    for reason in found.refused:
        log.warning("%s", reason)
    chosen = tuple(engine for engine in found.fitting if not artifacts or engine.stage in artifacts)
    if backends and not chosen:
        raise EngineError(
            f"{bundle.path}: no engine that fits here{''.join(f'; {why}' for why in found.refused)}; "
            f"run: edgedetr build {bundle.path}"
        )
    return chosen


def judge_engine(run: ArtifactRun, engine: Engine, verdict: ArtifactVerdict) -> EngineVerdict:
    """Add to the verdict on an artifact the checks that apply to engines only."""
    metadata = engine.metadata
    precision = metadata.arguments.precision
    fraction, rows_matched = metadata.layers.fraction(precision), _rows_matched(run)
    problems, notes = [verdict.note] * bool(verdict.note), []
    if fraction is None:
        notes.append("the inspector lists no layer with weights, so the precision of the engine is unknown")
    elif fraction < LEAST_FRACTION.get(precision, 0):
        problems.append(
            f"{precision.upper()} in name only: {100 * fraction:.0f} % of the layers with "
            f"weights run in it, the others in {_other_precisions(engine)}"
        )
    if rows_matched is not None and rows_matched < LEAST_ROWS_MATCHED:
        problems.append(
            f"equal images in a batch of {run.full_batch} give different objects: {100 * rows_matched:.0f} % in "
            f"common (TensorRT issue 4813); use batch 1, or export with --sampling gather and build again"
        )
    common = {field.name: getattr(verdict, field.name) for field in fields(ArtifactVerdict)}
    common |= {
        "name": engine.stage_name,
        "passed": verdict.passed and not problems,
        "size_mb": metadata.plan_bytes / 1e6,
        "note": "; ".join([*problems, *notes]),
    }
    return EngineVerdict(
        **common,
        engine=engine.path.name,
        batch=engine.batch or 1,
        precision_fraction=fraction,
        reformats=metadata.layers.reformats,
        rows_matched=rows_matched,
    )


def conclude(
    bundle: Bundle, config: VerifyConfig, verdicts: Sequence[ArtifactVerdict], runs: Sequence[ArtifactRun]
) -> DeviceVerdict:
    """Compare INT8 with FP16 and recommend an engine; the first of `verdicts` is the reference's."""
    judged = _compared_with_fp16(bundle, verdicts)
    passed = [v for v in judged if isinstance(v, EngineVerdict) and v.passed and v.p50_ms is not None]
    fastest = min(passed, key=lambda v: (v.p50_ms or 0.0) / v.batch, default=None)
    metadata = next(run.engine.metadata for run in runs if run.engine is not None)
    return DeviceVerdict(
        all(v.passed for v in judged),
        config.budget,
        max(v.drop_upper95 for v in judged),
        tuple(judged),
        device=f"{metadata.device} (sm_{metadata.sm})",
        tensorrt=metadata.tensorrt,
        environment=jetson.read().conditions(),
        recommended=fastest.engine if fastest else "",
    )


def _compared_with_fp16(bundle: Bundle, verdicts: Sequence[ArtifactVerdict]) -> list[ArtifactVerdict]:
    """The verdicts, where INT8 engines have a note on the FP16 engine of the same batch."""
    fp16 = {v.batch: v for v in verdicts if isinstance(v, EngineVerdict) and v.name.startswith("fp16")}
    judged: list[ArtifactVerdict] = []
    for verdict in verdicts:
        note = ""
        if isinstance(verdict, EngineVerdict) and verdict.name.startswith("int8"):
            note = _note_on_fp16(bundle, verdict, fp16.get(verdict.batch))
        judged.append(replace(verdict, note="; ".join(filter(None, [verdict.note, note]))))
    return judged


def _note_on_fp16(bundle: Bundle, int8: EngineVerdict, fp16: EngineVerdict | None) -> str:
    if fp16 is None:
        return f"no FP16 engine of this batch to compare with; run: edgedetr build {bundle.path} --precision fp16"
    if int8.p50_ms is None or fp16.p50_ms is None or int8.p50_ms < fp16.p50_ms:
        return ""
    recommendation = "; FP16 is recommended" if fp16.passed else ""
    return f"not faster than FP16 on this device ({int8.p50_ms:.2f} against {fp16.p50_ms:.2f} ms){recommendation}"


def record(bundle: Bundle, verdict: DeviceVerdict, runs: Sequence[ArtifactRun]) -> None:
    """Store the verdict in the bundle, and next to the engines the measurements by which `load` selects one."""
    by_name = {engine.engine: engine for engine in verdict.engines}
    folders: dict[Path, dict[str, Measurement]] = {}
    sources = [REFERENCE.file] if REFERENCE.file in bundle.manifest.files else []
    environment = select.environment(gpu.probe())
    for run in runs:
        if run.engine is not None:
            judged, metadata = by_name[run.engine.path.name], run.engine.metadata
            measured = Measurement(judged.passed, judged.p50_ms, environment)
            folders.setdefault(run.engine.path.parent, {})[metadata.plan_sha256] = measured
            sources.append(metadata.onnx)
    for folder, by_digest in folders.items():
        select.record_measurements(folder, by_digest)
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{verdict.device} trt{verdict.tensorrt}".lower()).strip("-")
    try:
        write_verdict(bundle, f"results/verify-{slug}.json", verdict, made_from=list(dict.fromkeys(sources)))
    except OSError as error:
        log.warning("%s: the verdict could not be stored (%s)", bundle.path, error)


def _rows_matched(run: ArtifactRun) -> float | None:
    """The smallest fraction of objects that row 0 and another row have in common, over all images; None for batch 1."""
    smallest = None
    for row in range(1, run.full_batch):
        for a, b in ((0, row), (row, 0)):
            first, second = ({i: rows[index] for i, rows in run.rows.items()} for index in (a, b))
            matched = compare_detections(first, second).matched
            if matched is not None:
                smallest = matched if smallest is None else min(smallest, matched)
    return smallest


def _other_precisions(engine: Engine) -> str:
    weighted = engine.metadata.layers.weighted
    others = {name: count for name, count in weighted.items() if name != engine.metadata.arguments.precision}
    return ", ".join(f"{name} ({count})" for name, count in sorted(others.items(), key=lambda item: -item[1]))
