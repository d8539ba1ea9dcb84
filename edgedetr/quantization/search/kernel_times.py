"""Times of the kernels of a graph on a backend, several graphs in turns, each kernel with the names that it stands for.

ONNX Runtime writes a profile of every run; OpenVINO tells the times of the last run. Times are of the whole process's
threads, so the machine should be idle; graphs that are compared must be profiled in one call.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import ORT
from edgedetr.runtime.backends import openvino
from edgedetr.runtime.backends.onnxruntime import plain_session

WARM_UP = 2  # runs that are not counted: memory is planned, weights are packed
_SUFFIX = re.compile(r"(_nchwc)?(_token_\d+)?(_nchwc)?(_kernel_time)?$")
_OPENVINO_SUFFIX = re.compile(r"/(WithoutBiases|DequantizationMultiply|DequantizationSubtract|fq_\w+)$")


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a graph.

    operator   the library's name for it
    names      nodes and tensors of the graph that it stands for, the most specific first
    seconds    [R] of each run
    """

    operator: str
    names: tuple[str, ...]
    seconds: np.ndarray


def kernel_times(
    models: Mapping[str, bytes], backend: str, images: np.ndarray, rounds: int, *, threads: int | None = None
) -> dict[str, list[KernelTime]]:
    """{model: its kernels}, from `rounds` runs of each in turns on one batch [1, 3, H, W]; ONNX Runtime or OpenVINO."""
    make: type[_OrtProfile] | type[_OpenVinoProfile] = _OrtProfile if backend == ORT else _OpenVinoProfile
    with tempfile.TemporaryDirectory(prefix="edgedetr-") as folder:
        profiles = {name: make(model, Path(folder) / f"{n}", threads) for n, (name, model) in enumerate(models.items())}
        for _ in range(WARM_UP + rounds):
            for profile in profiles.values():
                profile.run(images)
        return {name: profile.kernels(rounds) for name, profile in profiles.items()}


class _OrtProfile:
    def __init__(self, model: bytes, prefix: Path, threads: int | None) -> None:
        self._session = plain_session(model, optimize=True, threads=threads, profile=prefix)

    def run(self, images: np.ndarray) -> None:
        self._session.run(["logits", "boxes"], {"images": images})

    def kernels(self, rounds: int) -> list[KernelTime]:
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        found: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = event["args"].get("op_name", ""), _SUFFIX.sub("", event["name"])
                found.setdefault(key, []).append(event["dur"] * 1e-6)
        return [KernelTime(op, (name,), _by_run(times, rounds)) for (op, name), times in found.items()]


class _OpenVinoProfile:
    def __init__(self, model: bytes, prefix: Path, threads: int | None) -> None:
        compiled = openvino.compile_profiled(model, threads)
        self._request: Any = compiled.create_infer_request()
        self._names: dict[str, tuple[str, ...]] = {}
        for node in compiled.get_runtime_model().get_ops():
            about = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
            names = [_OPENVINO_SUFFIX.sub("", name) for name in about.get("originalLayersNames", "").split(",")]
            self._names[node.get_friendly_name()] = tuple(dict.fromkeys(filter(None, names)))
        self._times: dict[tuple[str, str], list[float]] = {}

    def run(self, images: np.ndarray) -> None:
        self._request.infer({"images": images})
        for info in self._request.get_profiling_info():
            key = info.node_type, info.node_name
            self._times.setdefault(key, []).append(info.real_time.total_seconds())

    def kernels(self, rounds: int) -> list[KernelTime]:
        return [
            KernelTime(op, self._names.get(name) or (name,), _by_run(times, rounds))
            for (op, name), times in self._times.items()
        ]


def _by_run(times: Sequence[float], rounds: int) -> np.ndarray:
    """[R] seconds of each counted run; kernels of one name add up."""
    per_run = max(1, len(times) // (WARM_UP + rounds))
    return np.asarray(times[: per_run * (WARM_UP + rounds)]).reshape(-1, per_run).sum(axis=1)[WARM_UP:]
