"""The first node at which a backend differs from the reference run, with backends broken on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgedetr.errors import MissingDependency, UsageError
from edgedetr.evaluation import first_divergence
from edgedetr.evaluation.first_divergence import find_first_divergence, search
from edgedetr.runtime.backends import onnxruntime

DEPTH = 40


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """Two branches of 40 quantized 1x1 convolutions each, joined by a Concat, then two heads."""
    rng = np.random.default_rng(0)
    nodes, constants = [], {"scale": np.float32(0.02), "zero": np.int8(0), "shape": np.array([1, -1, 4])}
    ends = []
    for branch in ("left", "right"):
        value = "images"
        for layer in range(DEPTH):
            name = f"{branch}/{layer}"
            width = 3 if layer == 0 else 4
            # near-orthogonal weights keep the size of the values over 40 layers
            weight = np.linalg.qr(rng.normal(size=(4, 4)))[0][:, :width] / (100 if layer == 0 else 1)
            constants[f"{name}.weight"] = weight.astype(np.float32).reshape(4, width, 1, 1)
            if layer % 10 == 5:
                pair = ("QuantizeLinear", value, f"{name}.q"), ("DequantizeLinear", f"{name}.q", f"{name}.dq")
                nodes += [
                    helper.make_node(kind, [source, "scale", "zero"], [end], name=end) for kind, source, end in pair
                ]
                value = f"{name}.dq"
            nodes.append(helper.make_node("Conv", [value, f"{name}.weight"], [f"{name}.out"], name=name))
            value = f"{name}.out"
        ends.append(value)
    nodes += [
        helper.make_node("Concat", ends, ["joined"], axis=1, name="concat"),
        helper.make_node("Reshape", ["joined", "shape"], ["logits"], name="flat"),
        helper.make_node("Sigmoid", ["logits"], ["boxes"], name="boxes"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "two",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 4, 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32, 4]) for name in ("logits", "boxes")],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )
    path = tmp_path_factory.mktemp("divergence") / "two.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture
def images(rng) -> np.ndarray:
    return rng.uniform(0, 255, (1, 3, 4, 4)).astype(np.float32)


def broken_at(weight: str):
    """A backend that computes one convolution with other weights."""

    def run(model: bytes, images: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        proto = onnx.load_model_from_string(model)
        for constant in proto.graph.initializer:
            if constant.name == weight:
                constant.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(constant), constant.name))
        return onnxruntime.tensors(proto.SerializeToString(), images, names, optimize=False)

    return run


@pytest.mark.parametrize("node", ["left/0", "left/5", "left/23", "right/0", "right/38", "right/39"])
def test_the_broken_node_is_named_wherever_it_is(graph, images, node):
    found = search(graph, broken_at(f"{node}.weight"), images)
    assert (found.node, found.operator, found.tensor) == (node, "Conv", f"{node}.out")
    assert found.sqnr_db < 0
    assert found.inputs_db == float("inf")
    assert node in str(found)
    assert "Conv" in str(found)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_correct_backend_diverges_nowhere(graph, images, backend):
    # Rounding at a tie may flip between libraries, so the floor is 20 dB and not equality.
    assert find_first_divergence(graph, backend, images) is None


def test_few_groups_are_enough(graph, images, monkeypatch):
    sizes = []
    measure = first_divergence._Graph.measure

    def counted(self, names):
        sizes.append(len(names))
        measure(self, names)

    monkeypatch.setattr(first_divergence._Graph, "measure", counted)
    search(graph, broken_at("right/17.weight"), images)
    assert max(sizes) <= first_divergence.GROUP
    assert len(sizes) <= 6  # 80 tensors before the heads, a twelfth left after each step


def test_unknown_backends_and_a_missing_onnx_say_so(graph, images, monkeypatch):
    with pytest.raises(
        UsageError, match="'tensorrt', which cannot read tensors inside a graph; expected one of onnxruntime, openvino"
    ):
        find_first_divergence(graph, "tensorrt", images)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependency, match="run: pip install onnx"):
        find_first_divergence(graph, "onnxruntime", images)
