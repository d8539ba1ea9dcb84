"""The reader without the onnx package agrees with the onnx package, and damaged files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgedetr.errors import EngineError
from edgedetr.runtime import onnx_bytes

value = helper.make_tensor_value_info


def model(opset: int = 19) -> onnx.ModelProto:
    """Two domains, a subgraph with a constant, an open size, a scalar, weights of a few types."""
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "w")
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    inner = helper.make_graph(
        [constant, helper.make_node("Exp", ["c"], ["e"])], "inner", [], [value("e", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("MatMul", ["images", "w"], ["m"]),
        helper.make_node("If", ["cond"], ["x"], then_branch=inner, else_branch=inner),
        helper.make_node("Own", ["m"], ["logits"], domain="edge"),
        helper.make_node("Sigmoid", ["m"], ["boxes"]),
    ]
    inputs = [value("images", TensorProto.FLOAT, ["batch", 2]), value("cond", TensorProto.BOOL, [])]
    outputs = [value("logits", TensorProto.FLOAT, [1, 3]), value("boxes", TensorProto.FLOAT, [None, 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight, numpy_helper.from_array(np.int64(-5), "n")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("edge", 3), helper.make_opsetid("", opset)])


def test_the_facts_are_those_of_the_onnx_package():
    made = model()
    found = onnx_bytes.facts(made.SerializeToString())
    assert found.opset == 19
    assert found.inputs == {"images": ("batch", 2), "cond": ()}
    assert found.outputs == {"logits": (1, 3), "boxes": ("?", 3)}
    assert found.operators == {"MatMul", "If", "Own", "Sigmoid", "Constant", "Exp"}
    assert found.external == ()


def test_the_standard_domain_may_be_written_out():
    made = model()
    made.opset_import[1].domain = "ai.onnx"
    assert onnx_bytes.facts(made.SerializeToString()).opset == 19


@pytest.mark.parametrize("holder", ["initializer", "attribute", "subgraph", "sparse"])
@pytest.mark.parametrize("location", ["weights.bin", "../../etc/passwd", "/etc/passwd", ""])
def test_weights_in_another_file_are_found_wherever_they_hide(tmp_path, holder, location):
    made = model()
    if holder == "initializer":
        tensor = made.graph.initializer[0]
    elif holder == "sparse":
        sparse = made.graph.sparse_initializer.add()
        tensor = sparse.values
        sparse.indices.CopyFrom(numpy_helper.from_array(np.int64([0]), ""))
    elif holder == "attribute":
        made.graph.node.append(helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.zeros(2), "")))
        tensor = made.graph.node[-1].attribute[0].t
    else:
        tensor = made.graph.node[1].attribute[1].g.node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    if location:
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="offset", value="0")
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(EngineError, match=f"keeps weights in another file .'{location}'"):
        onnx_bytes.read(path, EngineError)


def test_external_data_without_the_flag_is_external_too():
    made = model()
    made.graph.initializer[0].external_data.add(key="location", value="elsewhere")
    assert onnx_bytes.facts(made.SerializeToString()).external == ("elsewhere",)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path, other: path.symlink_to(other), "symbolic link"),
        (lambda path, other: os.link(other, path), "2 names"),
        (lambda path, other: path.mkdir(), "not a plain file"),
    ],
)
def test_links_and_other_files_are_refused(tmp_path, harm, words):
    other, path = tmp_path / "other.onnx", tmp_path / "m.onnx"
    other.write_bytes(model().SerializeToString())
    harm(path, other)
    with pytest.raises(EngineError, match=words):
        onnx_bytes.read(path, EngineError)


def test_an_oversized_file_is_not_read(tmp_path):
    path = tmp_path / "m.onnx"
    with open(path, "wb") as stream:
        stream.truncate(onnx_bytes.LARGEST + 1)  # sparse: it takes no space
    with pytest.raises(EngineError, match="more than the 2147483647"):
        onnx_bytes.read(path, EngineError)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not onnx at all", b"\x89PNG\r\n\x1a\n" * 9, b"\x08\x09", b"\x3a\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_onnx_file_is_one_error(data):
    with pytest.raises(EngineError, match="not an ONNX file|no ONNX graph"):
        onnx_bytes.facts(data)


def test_graphs_nested_without_end_are_refused():
    node = b""
    for _ in range(40):  # attribute.g { node { attribute { g { ...
        graph = b"\x0a" + _length(node) + node
        attribute = b"\x32" + _length(graph) + graph
        node = b"\x2a" + _length(attribute) + attribute
    graph = b"\x0a" + _length(node) + node
    with pytest.raises(EngineError, match="nested more than 32 deep"):
        onnx_bytes.facts(b"\x3a" + _length(graph) + graph)


def _length(data: bytes) -> bytes:
    number, out = len(data), bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 400), flips=st.lists(st.integers(0, 8 * 400), max_size=3))
def test_damage_gives_facts_or_one_error(cut, flips):
    data = bytearray(model().SerializeToString())
    del data[len(data) - cut :]
    for bit in flips:
        if bit // 8 < len(data):
            data[bit // 8] ^= 1 << bit % 8
    try:
        said = f"{onnx_bytes.facts(bytes(data))}"
    except EngineError as error:
        said = str(error)
    assert "OnnxFacts(" in said or onnx_bytes.EXPECTED in said


@pytest.mark.parametrize("seed", range(3))
def test_the_graph_of_a_bundle_reads_like_the_onnx_package(make_bundle, seed):
    batch: int | str = [1, 4, "B"][seed]
    path = make_bundle("model.onnx", batch=batch).path / "model.onnx"
    data, found = onnx_bytes.read(path, EngineError)
    loaded = onnx.load(Path(path))
    assert found.operators == {node.op_type for node in loaded.graph.node} and data == path.read_bytes()
    assert found.inputs == {"images": (batch, 3, 32, 48)}
