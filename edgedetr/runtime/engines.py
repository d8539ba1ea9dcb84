"""Which engines a bundle has for this device, which of them is the best, and why the others are not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.bundle import Bundle, atomic_write
from edgedetr.errors import DeviceError, EngineError, MissingDependency
from edgedetr.runtime import cudart, guards, nvidia, sidecar
from edgedetr.runtime import engine_store as store
from edgedetr.runtime.cudart import Device
from edgedetr.runtime.sidecar import Sidecar

log = logging.getLogger(__name__)

PRECISIONS = ("int8", "fp16", "fp32")       # best guess first: INT8 until a measurement says otherwise
# Stage of the bundle -> the graph that engines for batches of pictures are built from.
FILES = {"int8": "model.int8.onnx", "fp16": "model.fp16.onnx", "onnx": "model.onnx"}
MEASURED = "verified.json"      # beside the engines: what edgedetr verify found on this device


@dataclass(frozen=True)
class Measured:
    """What `edgedetr verify` found of one engine: whether it passed, and its milliseconds (median of one run)."""

    passed: bool
    p50_ms: float | None


@dataclass(frozen=True)
class Engine:
    """An engine that fits. batch: the only size it takes, or None; measured: None until `edgedetr verify` has run."""

    path: Path
    told: Sidecar
    stage: str
    batch: int | None
    measured: Measured | None

    @property
    def stage_name(self) -> str:
        """The stage, with the batch where it is not single pictures: "int8", "int8 batch 4"."""
        return self.stage if self.batch == 1 else f"{self.stage} batch {self.told.arguments.batch_name}"

    @property
    def rank(self) -> tuple[int, float, int, int]:
        """Smaller is better: verified, then fast, then INT8 before FP16 before float32; single pictures first."""
        trusted = 1 if self.measured is None else 0 if self.measured.passed else 2
        speed = self.measured.p50_ms if self.measured and self.measured.p50_ms else 0.0
        guess = PRECISIONS.index(self.told.arguments.precision)
        return trusted, speed / (self.batch or 1), guess, self.batch or 1 << 30


@dataclass(frozen=True)
class Survey:
    """`fitting` engines, the best first; `refused`: a sentence about each other one, or about all of them."""

    fitting: tuple[Engine, ...] = ()
    refused: tuple[str, ...] = ()


def survey(bundle: Bundle, files: Mapping[str, str] = FILES, *, trust: bool = False) -> Survey:
    """Look at every plan that may be this bundle's; opens none. Costs nothing where there are none.

    files   stage -> name of the graph: engines of other graphs are passed over in silence
    trust   take engines that were built on another machine of the same kind
    """
    plans = store.plans(bundle)
    if not plans:
        return Survey()
    try:
        device = cudart.probe()
        version = nvidia.tensorrt().__version__
    except (DeviceError, MissingDependency) as reason:
        ours = sum(plan.is_relative_to(bundle.path) for plan in plans)      # the user's cache holds other bundles' too
        return Survey(refused=(f"{ours} engine{'s' * (ours > 1)} not used: {reason}",) if ours else ())
    fitting, refused = [], []
    for plan in plans:
        found = _look(bundle, plan, files, device, version, trust)
        if isinstance(found, Engine):
            fitting.append(found)
        elif found:
            refused.append(f"{plan.name} not used: {found}")
    return Survey(tuple(sorted(fitting, key=lambda engine: engine.rank)), tuple(refused))


def _look(bundle: Bundle, plan: Path, files: Mapping[str, str], device: Device, version: str,
          trust: bool) -> Engine | str:
    """The engine, or why it is not one for this place; an empty reason for engines of other graphs or bundles."""
    try:
        told = sidecar.read(plan)
    except EngineError as error:
        return str(error)
    if told is None:
        return f"no {sidecar.beside(plan).name} beside it; run: edgedetr build {bundle.path}"
    stage = next((stage for stage, name in files.items() if name == told.onnx), None)
    entry = bundle.manifest.files.get(told.onnx)
    ours = plan.is_relative_to(bundle.path)
    if entry is None:
        return f"built from {told.onnx}, which is not in this bundle" if ours else ""
    if stage is None:
        return ""               # of another kind: for whole camera frames, or for batches of pictures
    if entry.sha256 != told.onnx_sha256 and not ours:
        return ""               # the user's cache holds the engines of all read-only bundles
    reason = ("" if trust else guards.foreign(told)) or guards.mismatch(told, device, version, entry.sha256)
    if reason:
        return reason
    batch = told.arguments.batch
    measured = _measurements(plan.parent).get(told.plan_sha256)
    return Engine(plan, told, stage, batch[0] if len(set(batch)) == 1 else None, measured)


def pick(engines: Sequence[Engine], *, stage: str | None = None, batch: int | None = None) -> Engine | None:
    """The best of them for a stage and a batch size; without a size, one for single pictures if there is one."""
    fitting = [e for e in engines if stage in (None, e.stage) and (batch is None or e.batch in (None, batch))]
    singles = [e for e in fitting if e.batch in (None, 1)] if batch is None else fitting
    return next(iter(singles or fitting), None)


def why(engine: Engine) -> str:
    """Why this one, in words."""
    if engine.measured is None:
        return "fits this device; not verified here yet"
    speed = f", {engine.measured.p50_ms:.2f} ms" if engine.measured.p50_ms else ""
    return ("verified on this device" if engine.measured.passed else "did not pass edgedetr verify here") + speed


def record(folder: Path, found: Mapping[str, Measured]) -> None:
    """Keep what was measured beside the engines, by digest of the plan; on read-only storage it is only not kept."""
    known = {**_measurements(folder), **found}
    try:
        with atomic_write(folder / MEASURED) as temporary:
            temporary.write_text(json.dumps({name: asdict(value) for name, value in known.items()}, indent=1) + "\n",
                                 encoding="utf-8")
    except OSError as error:
        log.warning("%s: what was measured could not be recorded (%s)", folder / MEASURED, error)


def _measurements(folder: Path) -> dict[str, Measured]:
    """By digest of the plan; a damaged record counts as none, for the next verify writes it again."""
    try:
        raw = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
        return {str(name): Measured(bool(value["passed"]), None if value["p50_ms"] is None else float(value["p50_ms"]))
                for name, value in raw.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: damaged (%s); run: edgedetr verify BUNDLE", folder / MEASURED, error)
        return {}
