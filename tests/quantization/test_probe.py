"""Histograms that are filled while the graph runs equal those of the whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_order import KernelOrder
from onnx import TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.observers import Histogram
from edgedetr.quantization.probe import Probe

TENSORS = ["large", "small", "one", "read twice"]


def graph():
    """A tensor of 270,000 values, of which every seventh is counted, a few small ones, and one that has two readers."""
    make = helper.make_node
    nodes = [
        make("Neg", ["images"], ["read twice"]),
        make("Sin", ["read twice"], ["large"]),
        make("ReduceMax", ["large"], ["small"], axes=[3], keepdims=0),
        make("ReduceMean", ["small"], ["one"], keepdims=0),
        make("Reciprocal", ["one"], ["last"]),
        make("Add", ["read twice", "large"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("logits", TensorProto.FLOAT, None), value("last", TensorProto.FLOAT, None)]
    body = helper.make_graph(nodes, "g", [value("images", TensorProto.FLOAT, [1, 3, 300, 300])], outputs)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_histogram_of_a_running_graph_is_that_of_the_whole_tensors(rng):
    model = graph()
    probe, whole = Probe(model, TENSORS), GraphSession(model, TENSORS)
    found, expected = ({name: Histogram(name) for name in TENSORS} for _ in range(2))
    for scale in (1, 0, 300):
        images = (scale * rng.normal(0, 1, (1, 3, 300, 300))).astype(np.float32)
        probe.observe(images, found, "an image")
        for name, values in whole.run({"images": images}).items():
            expected[name].observe(values)
    assert found["large"].counts.sum() == 3 * 38_572  # every 7th: 5 and 6 have factors of 270,000
    for name in TENSORS:
        one, other = found[name], expected[name]
        assert np.array_equal(one.counts, other.counts) and np.array_equal(one.odd_counts, other.odd_counts)
        assert (one.zeros, one.limit, one.largest, one.image_absmax) == (
            other.zeros,
            other.limit,
            other.largest,
            other.image_absmax,
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found_though_no_sample_has_it(rng, bad):
    probe = Probe(graph(), ["read twice"])
    histograms = {"read twice": Histogram("read twice")}
    images = rng.normal(0, 1, (1, 3, 300, 300)).astype(np.float32)
    probe.observe(images, histograms, "good.png")
    images[0, 1, 7, 8] = bad
    with pytest.raises(ExportError, match=r"'read twice' holds NaN or infinity on bad.png"):
        probe.observe(images, histograms, "bad.png")


def test_each_tensor_is_read_before_the_next_one_is_computed(rng, monkeypatch, tmp_path):
    """With convolutions in a layout of ONNX Runtime's own, whose results it changes back for the probes."""
    order, value, count = KernelOrder(monkeypatch, tmp_path), helper.make_tensor_value_info, 4
    nodes, weights = [], []
    for i in range(count):
        size = (16, 16 if i else 3, 3, 3)
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, size).astype(np.float32), f"w{i}"))
        source = f"r{i - 1}" if i else "images"
        nodes.append(helper.make_node("Conv", [source, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
    images = value("images", TensorProto.FLOAT, [1, 3, 8, 8])
    body = helper.make_graph(nodes, "g", [images], [value(f"r{count - 1}", TensorProto.FLOAT, None)], weights)
    probe = Probe(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        [f"r{i}" for i in range(count)],
    )
    probe.observe(np.ones((1, 3, 8, 8), np.float32), {f"r{i}": Histogram(f"r{i}") for i in range(count)}, "an image")
    ran = [operator for operator, _ in order.of(0, {"Conv", "FusedConv", "ReduceMax"})]
    runs = 2  # the first finds the sizes
    assert len(ran) == 2 * count * runs and ran[1::2] == ["ReduceMax"] * count * runs
