"""The verdict on engines, on the device that runs them: without torch, against reference.npz and ground truth.

Besides what every stage must show, an engine must give equal results for equal images of a full batch, run in the
precision that its name says, and INT8 is recommended only where it is faster than FP16.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgedetr.artifacts import REFERENCE
from edgedetr.bundle import Bundle
from edgedetr.errors import EngineError
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.evaluation.artifacts_run import ArtifactRun
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict
from edgedetr.runtime import jetson
from edgedetr.runtime.backends import base
from edgedetr.runtime.tensorrt import cudart, select
from edgedetr.runtime.tensorrt.select import Engine, Measured

log = logging.getLogger(__name__)

# Share of the convolutions and matrix products that must run in an engine's precision. The decoder of an INT8 graph
# stays FP16 by policy, so half of its layers may; an engine that ignored the graph's types has next to none.
LEAST_SHARE = {"int8": 0.25, "fp16": 0.5}
# Share of objects that equal images in one batch must have in common: kernels may order sums differently per row,
# which moves an object across the threshold once in a while; TensorRT issue 4813 shows none of them again.
ROWS_MATCHED = 0.99


@dataclass(frozen=True)
class EngineVerdict(ArtifactVerdict):
    """ArtifactVerdict of one engine.

    engine      the plan's file name
    batch       images per run that were timed
    share       of the layers with weights that run in its precision, 0..1; None where that cannot be told
    reformats   layers that only change layout or type
    rows        share of objects that equal images of a full batch have in common; None for single images
    """

    engine: str = ""
    batch: int = 1
    share: float | None = None
    reformats: int = 0
    rows: float | None = None


@dataclass(frozen=True)
class DeviceVerdict(Verdict):
    """Verdict on the engines of this device.

    device, tensorrt   e.g. "Orin (sm_87)", "10.3.0"
    conditions         power mode and clocks; empty where this is no Jetson
    recommended        the engine to use: of those that passed the fastest per image; empty where none passed
    """

    device: str = ""
    tensorrt: str = ""
    conditions: str = ""
    recommended: str = ""


def fitting(bundle: Bundle, stages: Collection[str] | None, backends: Collection[str] | None) -> tuple[Engine, ...]:
    """The engines to verify: those that fit here, unless other backends are asked for."""
    if backends and not any(base.get(name).runs_engines for name in backends):
        return ()
    found = select.survey(bundle)
    for reason in found.refused:
        log.warning("%s", reason)
    chosen = tuple(engine for engine in found.fitting if not stages or engine.stage in stages)
    if backends and not chosen:
        raise EngineError(
            f"{bundle.path}: no engine that fits here{''.join(f'; {why}' for why in found.refused)}; "
            f"run: edgedetr build {bundle.path}"
        )
    return chosen


def judge_engine(run: ArtifactRun, engine: Engine, verdict: ArtifactVerdict) -> EngineVerdict:
    """Adds what only an engine must show to what every stage must."""
    told = engine.told
    share, rows = told.layers.share(told.arguments.precision), _rows(run)
    problems, notes = [verdict.note] * bool(verdict.note), []
    if share is None:
        notes.append("the inspector names no layer with weights, so its precision cannot be told")
    elif share < LEAST_SHARE.get(told.arguments.precision, 0):
        problems.append(
            f"{told.arguments.precision.upper()} in name only: {100 * share:.0f} % of the layers with "
            f"weights run in it, the others in {_others(engine)}"
        )
    if rows is not None and rows < ROWS_MATCHED:
        problems.append(
            f"equal images in a batch of {run.full_batch} give different objects: {100 * rows:.0f} % in "
            f"common (TensorRT issue 4813); use batch 1, or export with --sampling gather and build again"
        )
    return EngineVerdict(
        **{name: getattr(verdict, name) for name in ArtifactVerdict.__dataclass_fields__}
        | {
            "passed": verdict.passed and not problems,
            "size_mb": told.plan_bytes / 1e6,
            "note": "; ".join([*problems, *notes]),
            "name": engine.stage_name,
        },
        engine=engine.path.name,
        batch=engine.batch or 1,
        share=share,
        reformats=told.layers.reformats,
        rows=rows,
    )


def conclude(
    bundle: Bundle, config: VerifyConfig, verdicts: Sequence[ArtifactVerdict], runs: Sequence[ArtifactRun]
) -> DeviceVerdict:
    """INT8 beside FP16, and which engine to use; `verdicts` begin with torch's."""
    judged = _beside_fp16(bundle, verdicts)
    used = [run.engine for run in runs if run.engine is not None]
    passed = [v for v in judged if isinstance(v, EngineVerdict) and v.passed and v.p50_ms is not None]
    best = min(passed, key=lambda v: (v.p50_ms or 0.0) / v.batch, default=None)
    told = used[0].told
    return DeviceVerdict(
        all(v.passed for v in judged),
        config.budget,
        max(v.drop_upper95 for v in judged),
        tuple(judged),
        f"{told.device} (sm_{told.sm})",
        told.tensorrt,
        jetson.read().conditions(),
        best.engine if best else "",
    )


def _beside_fp16(bundle: Bundle, verdicts: Sequence[ArtifactVerdict]) -> list[ArtifactVerdict]:
    """INT8 engines with a word about the FP16 engine of the same batch."""
    halves = {v.batch: v for v in verdicts if isinstance(v, EngineVerdict) and v.name.startswith("fp16")}
    judged: list[ArtifactVerdict] = []
    for verdict in verdicts:
        word = ""
        if isinstance(verdict, EngineVerdict) and verdict.name.startswith("int8"):
            half = halves.get(verdict.batch)
            if half is None:
                word = (
                    f"no FP16 engine of this batch to compare with; run: edgedetr build {bundle.path} --precision fp16"
                )
            elif verdict.p50_ms is not None and half.p50_ms is not None and verdict.p50_ms >= half.p50_ms:
                word = f"not faster than FP16 on this device ({verdict.p50_ms:.2f} against {half.p50_ms:.2f} ms)" + (
                    "; FP16 is recommended" if half.passed else ""
                )
        judged.append(replace(verdict, note="; ".join(filter(None, [verdict.note, word]))))
    return judged


def record(bundle: Bundle, verdict: DeviceVerdict, runs: Sequence[ArtifactRun]) -> None:
    """Keep the verdict in the bundle, and beside the engines what decides which of them is loaded."""
    by_name = {v.engine: v for v in verdict.stages if isinstance(v, EngineVerdict)}
    folders: dict[Path, dict[str, Measured]] = {}
    sources = [REFERENCE.file] if REFERENCE.file in bundle.manifest.files else []
    here = select.surroundings(cudart.probe()) if any(run.engine is not None for run in runs) else ""
    for run in runs:
        if run.engine is not None:
            found = by_name[run.engine.path.name]
            folders.setdefault(run.engine.path.parent, {})[run.engine.told.plan_sha256] = Measured(
                found.passed, found.p50_ms, here
            )
            sources.append(run.engine.told.onnx)
    for folder, measured in folders.items():
        select.record(folder, measured)
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{verdict.device} trt{verdict.tensorrt}".lower()).strip("-")
    try:
        with bundle.add(f"results/verify-{slug}.json", stage="verify", made_from=list(dict.fromkeys(sources))) as path:
            path.write_text(json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        log.warning("%s: the verdict could not be recorded (%s)", bundle.path, error)


def _rows(run: ArtifactRun) -> float | None:
    """The worst share of objects in common of row 0 and another row, over all images that were tried."""
    worst = None
    for number in range(1, run.full_batch):
        for a, b in ((0, number), (number, 0)):
            matched = compare_detections(
                {i: rows[a] for i, rows in run.rows.items()}, {i: rows[b] for i, rows in run.rows.items()}
            ).matched
            if matched is not None:
                worst = matched if worst is None else min(worst, matched)
    return worst


def _others(engine: Engine) -> str:
    weighted = engine.told.layers.weighted
    others = {name: count for name, count in weighted.items() if name != engine.told.arguments.precision}
    return ", ".join(f"{name} ({count})" for name, count in sorted(others.items(), key=lambda item: -item[1]))
