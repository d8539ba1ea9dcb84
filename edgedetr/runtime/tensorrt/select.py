"""Find the engines of a bundle that fit this device, select the best, and give the reasons against the others."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.artifacts import ENGINE_GRAPHS
from edgedetr.bundle import Bundle
from edgedetr.errors import DeviceError, EngineError, MissingDependency
from edgedetr.runtime import jetson
from edgedetr.runtime.tensorrt import engine_cache, engine_metadata, engine_validation, gpu
from edgedetr.runtime.tensorrt.engine_metadata import EngineMetadata
from edgedetr.runtime.tensorrt.gpu import Device
from edgedetr.storage.atomic import atomic_write
from edgedetr.storage.locks import locked
from edgedetr.storage.reading import read_json

log = logging.getLogger(__name__)

# Artifact -> the graph that engines for batches of images are built from.
FILES = {graph.id: graph.file for graph in ENGINE_GRAPHS.values()}
MEASURED = "verified.json"  # next to the engines: results of edgedetr verify on this device


@dataclass(frozen=True)
class Measurement:
    """The result of `edgedetr verify` for one engine: whether it passed, and its latency (median of one run, ms).

    under   driver and Jetson Linux of that run (see `environment`); empty in older records
    """

    passed: bool
    p50_ms: float | None
    under: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine that fits this device.

    batch      its fixed batch size, or None
    measured   None until `edgedetr verify` has run with the present driver
    drift      what has changed on the device since it was built; it still loads
    """

    path: Path
    metadata: EngineMetadata
    stage: str
    batch: int | None
    measured: Measurement | None
    drift: str = ""

    @property
    def stage_name(self) -> str:
        """The artifact that it was built from, and the batch size unless it is 1: "int8", "int8 batch 4"."""
        return self.stage if self.batch == 1 else f"{self.stage} batch {self.metadata.arguments.batch_name}"

    @property
    def rank(self) -> tuple[int, float, int, int]:
        """Smaller is better: verified, then fast, then INT8 before FP16 before float32; single images first."""
        trusted = 1 if self.measured is None else 0 if self.measured.passed else 2
        speed = self.measured.p50_ms if self.measured and self.measured.p50_ms else 0.0
        guess = list(ENGINE_GRAPHS).index(self.metadata.arguments.precision)
        return trusted, speed / (self.batch or 1), guess, self.batch or 1 << 30


@dataclass(frozen=True)
class EngineSearch:
    """`fitting` engines, the best first; `refused`: the reason against each other engine, or against all of them."""

    fitting: tuple[Engine, ...] = ()
    refused: tuple[str, ...] = ()


def find_engines(bundle: Bundle, files: Mapping[str, str] = FILES, *, trust: bool = False) -> EngineSearch:
    """Check every plan that may belong to this bundle, without opening it. The GPU is probed only if there are plans.

    files   stage -> name of the graph: engines of other graphs are left out without a reason
    trust   accept engines that were built on another machine of the same kind
    """
    plans = engine_cache.plans(bundle)
    if not plans:
        return EngineSearch()
    try:
        device = gpu.probe()
        version = gpu.tensorrt().__version__
    except (DeviceError, MissingDependency) as reason:
        # The user's cache also has engines of other bundles.
        ours = sum(plan.is_relative_to(bundle.path) for plan in plans)
        return EngineSearch(refused=(f"{ours} engine{'s' * (ours > 1)} not used: {reason}",) if ours else ())
    fitting, refused = [], []
    for plan in plans:
        found = _examine(bundle, plan, files, device, version, trust)
        if isinstance(found, Engine):
            fitting.append(found)
        elif found:
            refused.append(f"{plan.name} not used: {found}")
    return EngineSearch(tuple(sorted(fitting, key=lambda engine: engine.rank)), tuple(refused))


def _examine(
    bundle: Bundle, plan: Path, files: Mapping[str, str], device: Device, version: str, trust: bool
) -> Engine | str:
    """The engine, or the reason why it does not fit; an empty reason for engines of other graphs or bundles."""
    try:
        metadata = engine_metadata.read(plan)
    except EngineError as error:
        return str(error)
    if metadata is None:
        return f"there is no {engine_metadata.metadata_path(plan).name} next to it; run: edgedetr build {bundle.path}"
    stage = next((stage for stage, name in files.items() if name == metadata.onnx), None)
    entry = bundle.manifest.files.get(metadata.onnx)
    ours = plan.is_relative_to(bundle.path)
    if entry is None:
        return f"built from {metadata.onnx}, which is not in this bundle" if ours else ""
    if stage is None:
        return ""  # for whole camera frames where batches are wanted, or the other way round
    if entry.sha256 != metadata.onnx_sha256 and not ours:
        return ""  # the user's cache has the engines of all read-only bundles
    reason = ("" if trust else engine_validation.untrusted(metadata)) or engine_validation.mismatch(
        metadata, device, version, entry.sha256
    )
    if reason:
        return reason
    batch = metadata.arguments.batch
    drift = engine_validation.drift(metadata, device)
    measured = _measurements(plan.parent).get(metadata.plan_sha256)
    if measured is not None and (drift if not measured.under else measured.under != environment(device)):
        measured = None  # measured with another driver: it may be faster, slower or wrong now
    return Engine(plan, metadata, stage, batch[0] if len(set(batch)) == 1 else None, measured, drift)


def environment(device: Device) -> str:
    """Driver and Jetson Linux, on which a measurement depends: "driver 12.6, R36.4.3"."""
    return ", ".join(filter(None, [f"driver {device.driver}", jetson.linux_release()]))


def pick(engines: Sequence[Engine], *, stage: str | None = None, batch: int | None = None) -> Engine | None:
    """The best engine for an artifact and a batch size; without a size, one for single images if there is one."""
    fitting = [e for e in engines if stage in (None, e.stage) and (batch is None or e.batch in (None, batch))]
    singles = [e for e in fitting if e.batch in (None, 1)] if batch is None else fitting
    return next(iter(singles or fitting), None)


def reason_for(engine: Engine) -> str:
    """Why this engine was selected, as text."""
    if engine.measured is None:
        changed = f"; {engine.drift}: verify it, or build it again with --force" if engine.drift else ""
        return f"fits this device; not verified here yet{changed}"
    speed = f", {engine.measured.p50_ms:.2f} ms" if engine.measured.p50_ms else ""
    return ("verified on this device" if engine.measured.passed else "did not pass edgedetr verify here") + speed


def record_measurements(folder: Path, found: Mapping[str, Measurement]) -> None:
    """Store measurements next to the engines, by digest of the plan; on read-only storage, only warn."""
    try:
        with locked(folder / f".{MEASURED}.lock", wait=60, busy=_busy):  # two verify side by side, of other engines
            known = {**_measurements(folder), **found}
            with atomic_write(folder / MEASURED) as temporary:
                temporary.write_text(
                    json.dumps({name: asdict(value) for name, value in known.items()}, indent=1) + "\n",
                    encoding="utf-8",
                )
    except OSError as error:
        log.warning("%s: the measurements could not be stored (%s)", folder / MEASURED, error)


def _busy(owner: str) -> EngineError:
    return EngineError(f"{owner} has been writing {MEASURED} for a minute; end it, then run: edgedetr verify BUNDLE")


def _measurements(folder: Path) -> dict[str, Measurement]:
    """Measurements by digest of the plan; a damaged file counts as none, and the next verify writes it again."""
    if not os.path.lexists(folder / MEASURED):
        return {}
    try:
        raw = read_json(folder / MEASURED, EngineError, limit=engine_metadata.LARGEST)
        return {str(name): _measured(value) for name, value in raw.items()}
    except (EngineError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: damaged (%s); run: edgedetr verify BUNDLE", folder / MEASURED, error)
        return {}


def _measured(value: dict[str, object]) -> Measurement:
    passed, speed, under = value["passed"], value["p50_ms"], value.get("under", "")
    if not isinstance(passed, bool) or not isinstance(under, str):
        raise TypeError("passed is no truth value, or under no text")
    if speed is not None and (
        isinstance(speed, bool) or not isinstance(speed, (int, float)) or not math.isfinite(speed) or speed < 0
    ):
        raise TypeError("p50_ms is no number of milliseconds")
    return Measurement(passed, None if speed is None else float(speed), under)
