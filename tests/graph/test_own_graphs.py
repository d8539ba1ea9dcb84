"""Lint is silent on what we write: every member of the family, float32, FP16, and INT8 with FP16."""

from __future__ import annotations

import onnx
import pytest

from edgedetr.graph.lint import lint

pytest.importorskip("torch")
members = pytest.importorskip("members")


@pytest.fixture(scope="module", params=sorted(members.SMALL))
def exported(request) -> onnx.ModelProto:
    """The member's float graph as it is delivered: one batch size, gathered samples."""
    return onnx.load(members.exported(request.param))


def test_the_float_graph_of_every_member_is_clean(exported):
    assert [str(finding) for finding in lint(exported)] == []


def magnitudes(model: onnx.ModelProto) -> dict[str, float]:
    """Any number that FP16 can hold, for every tensor."""
    return dict.fromkeys([name for node in model.graph.node for name in node.output] + ["images"], 1.0)


def test_the_fp16_graph_of_every_member_is_clean(exported):
    from edgedetr.quantization.half import halve
    from edgedetr.quantization.policy import load

    graph = halve(exported, magnitudes(exported), load("default").float32)
    assert any(item.data_type == onnx.TensorProto.FLOAT16 for item in graph.graph.initializer)
    assert [str(finding) for finding in lint(graph)] == []


def test_the_int8_graph_of_every_member_is_clean(exported):
    from edgedetr.quantization.dialect import TENSORRT, tensors
    from edgedetr.quantization.half import halve
    from edgedetr.quantization.policy import load, plan
    from edgedetr.quantization.qdq import insert
    from edgedetr.quantization.rewrite import split_concats

    model = split_concats(exported)
    chosen = plan(model, load("default"))
    # Any range will do: what a rule sees is where the pairs stand and what they are.
    graph = insert(model, chosen, dict.fromkeys(tensors(model, chosen), 1.0), TENSORRT)
    graph = halve(graph, magnitudes(graph), load("default").float32)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.graph.node) >= 20
    assert [str(finding) for finding in lint(graph)] == []
