"""`edgedetr build --profile`: the time of every layer of the FP16 engine and of one with every group in INT8.

Both run in turns on this device. Only `_reporter` and Session.report speak to TensorRT's profiler; what follows from
the times is in layer_profile.py. The INT8 engine is loaded, timed and not kept: it is never delivered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import INT8_PROFILED, PROFILE
from edgedetr.bundle import Bundle
from edgedetr.errors import EngineError
from edgedetr.progress import Progress
from edgedetr.runtime import jetson, onnx_bytes
from edgedetr.runtime.latency import WARM_UP, rotated
from edgedetr.runtime.tensorrt import build, gpu
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.layer_profile import FIX, EngineTimes, LayerProfile, layer_times
from edgedetr.runtime.tensorrt.trt_runner import Session, open_engine
from edgedetr.storage.reading import read_text

ROUNDS = 100  # runs of each engine; the error of a median over 100 runs is an eighth of their spread


def profile(
    bundle: Bundle | str | Path,
    *,
    workspace_mb: int | None = None,
    optimization_level: int = 3,
    typing: str = "auto",
    force: bool = False,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> LayerProfile:
    """Build both engines, time their layers, and write results/profile.json into the bundle.

    workspace_mb, optimization_level, typing, force   as for build.build; an FP16 engine that fits is kept
    rounds   runs of each engine, one image each

    Errors: MissingDependency where TensorRT is not installed; BundleError with the command to run where a graph is
    missing or stale; EngineError, DeviceError.
    """
    bundle = Bundle.open(bundle)
    trt = build.tensorrt_for(bundle, "--profile")
    device = gpu.probe()
    model, _ = onnx_bytes.read(bundle.require(INT8_PROFILED.file), EngineError)  # before minutes of building
    made = build.build(
        bundle,
        "fp16",
        workspace_mb=workspace_mb,
        optimization_level=optimization_level,
        typing=typing,
        force=force,
        progress=progress,
    )
    arguments, what = replace(made.metadata.arguments, precision="int8"), str(bundle.path / INT8_PROFILED.file)
    serialized = build.build_serialized(model, arguments, device, what=what, progress=progress)
    kept = open_engine(made.path, use_graph=False, onnx_sha256=made.metadata.onnx_sha256)
    with kept as half, Session(serialized.data, cuda=Cuda(device), use_graph=False, what=what) as eight:
        times = _timed(trt, {"float": half, "int8": eight}, rounds, progress)
    inspected = read_text(made.path.with_suffix(".layers.json"), EngineError, fix=f"{FIX} --force")
    layers = {"float": layer_times(inspected, times["float"]), "int8": layer_times(serialized.layers, times["int8"])}
    digest = hashlib.sha256(model).hexdigest()
    found = LayerProfile(
        device=device.name,
        sm=device.sm,
        tensorrt=trt.__version__,
        cuda=device.runtime,
        conditions=jetson.read().conditions(),
        runs=rounds,
        float=EngineTimes(made.metadata.onnx, made.metadata.onnx_sha256, made.metadata.typing, layers["float"]),
        int8=EngineTimes(INT8_PROFILED.file, digest, serialized.typing, layers["int8"]),
    )
    with bundle.add(PROFILE.file, stage=PROFILE.step, made_from=PROFILE.made_from) as temporary:
        found.save(temporary)
    return found


def _timed(
    trt: Any, sessions: Mapping[str, Session], rounds: int, progress: Progress | None
) -> dict[str, list[dict[str, float]]]:
    """{engine: {layer: milliseconds} of each run}, the engines in turns on noise; a detector's time is the same."""
    feeds, reporters = {}, {}
    for name, session in sessions.items():
        tensor = session.tensors["images"]
        shape = tuple(size if size > 0 else 1 for size in tensor.shape)
        feeds[name] = {"images": np.random.default_rng(0).uniform(0, 255, shape).astype(tensor.dtype)}
        for _ in range(WARM_UP):  # before the profiler: memory is planned, clocks settle
            session.run(feeds[name])
        reporters[name] = _reporter(trt)
        session.report(reporters[name])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sessions}
    for number in range(rounds):
        for name in rotated(list(sessions), number):
            sessions[name].run(feeds[name])
            runs[name].append(reporters[name].take())
        if progress:
            progress("profile", number + 1, rounds)
    return runs


def _reporter(trt: Any) -> Any:
    """A profiler that adds up the milliseconds of each layer until `take`."""

    class Reporter(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.found: dict[str, float] = {}

        def take(self) -> dict[str, float]:
            """The times since the last call, which are then removed."""
            times, self.found = self.found, {}
            return times

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.found[layer_name] = self.found.get(layer_name, 0.0) + ms

    return Reporter()
