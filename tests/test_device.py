"""A device runs a bundle without torch, onnx and the like; `make lint` checks which folder imports which."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import edgedetr

PACKAGE = Path(edgedetr.__file__).parent

DEVICE = """
    import sys, time

    class Refuse:
        names = {"torch", "onnx", "click", "pydantic", "matplotlib", "jinja2", "scipy", "pycocotools", "rich"}
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in self.names:
                raise ImportError(f"{name} was imported on the device")

    sys.meta_path.insert(0, Refuse())
    begun = time.perf_counter()
    import numpy as np
    from edgedetr import runtime
    detector = runtime.load(sys.argv[1])
    seconds = time.perf_counter() - begun
    found = detector([np.zeros((40, 60, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    assert len(found) == 2 and all(len(one.xyxy) == len(one.confidence) == len(one.class_id) for one in found)
    print(seconds)
"""


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model.onnx finds one fixed box: input -> mean -> nothing, plus constants."""
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract

    logits = numpy_helper.from_array(np.array([[[2.0, -9.0], [-9.0, -9.0]]], np.float32), "fixed_logits")
    boxes = numpy_helper.from_array(np.array([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]], np.float32), "fixed_boxes")
    nothing = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0, axes=[0, 1, 2, 3]),
        helper.make_node("Mul", ["mean", "zero"], ["none"]),
        helper.make_node("Add", ["fixed_logits", "none"], ["logits"]),
        helper.make_node("Add", ["fixed_boxes", "none"], ["boxes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("images", TensorProto.FLOAT, [1, 3, 32, 32])],
        [value("logits", TensorProto.FLOAT, [1, 2, 2]), value("boxes", TensorProto.FLOAT, [1, 2, 4])],
        [logits, boxes, nothing],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    bundle = Bundle.create(
        tmp_path_factory.mktemp("floors") / "tiny.bundle",
        Manifest("rt_detr", (ClassInfo(0, 1, "a"), ClassInfo(1, 5, "b")), InputContract(32, 32), OutputContract()),
    )
    with bundle.add("model.onnx", stage="export") as path:
        onnx.save(model, str(path))
    return bundle.path


def test_the_device_runs_without_torch_onnx_click_pydantic_and_matplotlib(tiny_bundle):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICE), str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Import and load are to take less than a second; tenfold, because a test machine may be busy with other work.
    assert float(done.stdout) < 10
