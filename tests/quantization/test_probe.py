"""Histograms that are filled while the graph runs equal those of the whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

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
