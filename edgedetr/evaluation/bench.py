"""Latency of the artifacts of a bundle, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgedetr.artifacts import GRAPHS, TENSORRT, benched_pairs
from edgedetr.bundle import Bundle
from edgedetr.evaluation.artifacts_run import candidates
from edgedetr.evaluation.engine_verdict import fitting_engines
from edgedetr.evaluation.realized_precision import RealizedPrecision, realized_precision
from edgedetr.progress import Progress
from edgedetr.runtime import preprocess
from edgedetr.runtime.backends import base
from edgedetr.runtime.bundle_detector import Detector, load, load_engine, warn_of_threads
from edgedetr.runtime.latency import measure


@dataclass(frozen=True)
class ArtifactTiming:
    """Milliseconds of one inference of one batch (one image, but for engines of a larger batch), and the file's MB.

    integers   which quantized layers really ran in integers; None where nothing is quantized, or nothing is known
    """

    name: str
    backend: str
    p50_ms: float
    p99_ms: float
    size_mb: float
    integers: RealizedPrecision | None = None

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "integers": self.integers.to_json() if self.integers else None}


def bench(
    bundle: str | Path | Bundle,
    *,
    artifacts: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    rounds: int = 50,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[ArtifactTiming]:
    """Time artifacts in alternating order; OpenVINO computes its float32 model in float32.

    artifacts  ids such as "int8-cpu"; None = all that exist
    backends   None = the engines that fit this device; without engines the CPU libraries
    rounds     timed inferences of each artifact
    """
    bundle = Bundle.open(bundle)
    engines = fitting_engines(bundle, artifacts, backends)
    on_cpu = [name for name in backends or () if not base.get(name).runs_engines]
    pairs = candidates(bundle, benched_pairs(), artifacts, on_cpu or None) if on_cpu or not engines else []
    if engines and not pairs:
        warn_of_threads(bundle, threads)
    detectors = {pair: load(bundle, stage=pair[0], backend=pair[1], threads=threads) for pair in pairs}
    detectors |= {(engine.stage_name, TENSORRT): load_engine(bundle, engine) for engine in engines}
    sizes = {pair: bundle.manifest.files[GRAPHS[pair[0]].file].size / 1e6 for pair in pairs}
    sizes |= {(engine.stage_name, TENSORRT): engine.metadata.plan_bytes / 1e6 for engine in engines}
    contract = bundle.manifest.input
    noise = np.random.default_rng(0).integers(0, 256, (contract.height, contract.width, 3), dtype=np.uint8)
    batch, _ = preprocess.prepare([noise], contract)

    def inference(detector: Detector) -> Callable[[], object]:
        return lambda: detector.run_raw(batch)

    latencies = measure(
        {" ".join(pair): inference(detector) for pair, detector in detectors.items()}, rounds=rounds, progress=progress
    )
    timings = []
    for pair in detectors:
        latency = latencies[" ".join(pair)]
        integers = None
        if pair in pairs:
            integers = realized_precision(bundle.require(GRAPHS[pair[0]].file), pair[1], threads=threads)
        timings.append(ArtifactTiming(*pair, latency.p50_ms, latency.p99_ms, sizes[pair], integers))
    return timings
