"""A bundle of one tiny graph; two of its classes have ids and names unlike their indices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from engine_build import install
from tensorrt_spec.fake import FakeTensorRT

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract

CLASSES = (ClassInfo(0, 7, "red cell"), ClassInfo(1, 3, "platelet"))


@pytest.fixture(scope="session")
def tiny_graph() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_graph", Path(__file__).with_name("tiny_graph.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_bundle(tmp_path: Path, tiny_graph: ModuleType) -> Callable[..., Bundle]:
    """Bundle with the named graphs; class 0 likes red, class 1 likes blue, query 0 more than query 1 than query 2."""

    def make(*names: str, batch: int | str = 1, activation: str = "sigmoid", resize: str = "stretch") -> Bundle:
        bundle = Bundle.create(
            tmp_path / "tiny.bundle",
            Manifest("tiny", CLASSES, InputContract(32, 48, resize), OutputContract(activation, 100)),
        )
        columns = 2 + (activation == "softmax")
        weight = np.zeros((3, 3, columns))
        weight[0, :, 0] = [6, 4, 2]
        weight[2, :, 1] = [6, 4, 2]
        for name in names or ("model.onnx",):
            with bundle.add(name, stage="export") as path:
                tiny_graph.write(path, weight.reshape(3, -1), np.full((3, columns), -3.0), batch=batch)
        return bundle

    return make


def solid(color: tuple[int, int, int], height: int = 64, width: int = 96) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


@pytest.fixture
def red() -> np.ndarray:
    return solid((255, 0, 0))


@pytest.fixture
def blue() -> np.ndarray:
    return solid((0, 0, 255), 50, 200)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgedetr"


@pytest.fixture
def fake(trt: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A device with one version of TensorRT; every test runs on all versions."""
    return install(trt, monkeypatch)


@pytest.fixture
def old(bindings: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """JetPack 6."""
    return install(bindings.module("10.3.0"), monkeypatch)


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle("model.onnx", "model.fp16.onnx", "model.int8.onnx")


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def behavior(monkeypatch, trt, cuda):
    """A fake TensorRT of each version in turn."""
    return fake_tensorrt.install(monkeypatch, trt, cuda)


@pytest.fixture
def latest(monkeypatch, bindings, cuda):
    """A fake TensorRT of one version, for what does not depend on names."""
    return fake_tensorrt.install(monkeypatch, bindings.module("10.3.0"), cuda)


@pytest.fixture
def graph(tmp_path, tiny_graph):
    def write(batch=1):
        path, weights = tmp_path / f"model-{batch}.onnx", np.random.default_rng(7)
        tiny_graph.write(path, weights.standard_normal((3, 6)), weights.standard_normal((3, 2)), batch=batch)
        return path

    return write


@pytest.fixture
def plan(graph, cuda):
    """A plan with the metadata that `edgedetr build` writes; batch 1, 4 or "n"."""

    def write(batch=1):
        return fake_tensorrt.write_plan(graph(batch), batch=(1, 2, 4) if batch == "n" else batch)

    return write
