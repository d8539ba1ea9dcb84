"""A graph that somebody else made, or damaged, is linted and inspected to an end: findings or one error, no traceback."""

# ruff: noqa: E501  (a graph is one line, as far as it goes)
from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper

pytest.importorskip("onnx", minversion="1.21")  # the graphs are written in the newest operators

import rtx_cases_quantized  # noqa: F401  (adds its own to the cases)
from rtx_cases import CASES

from edgedetr.errors import EdgedetrError
from edgedetr.lint.lint import lint
from edgedetr.onnx_graph.summary import inspect_onnx

BASES = list(CASES.values())
SIZES = [0, 1, -1, 2, 7, -(2**31), 2**31, 2**40, 2**62, -(2**63)]
WORDS = ["", "x", "y", "q", "w", "nowhere"]
VALUES = [1, -1, 2.5, "x", [1, 2], [1.5], ["a"], helper.make_tensor("t", TensorProto.FLOAT, [2], [1, 2]), 2**40]


def damage(model: ModelProto, rng: random.Random) -> None:
    """One change that no exporter makes, where there is what it changes."""
    graph, kind = model.graph, rng.randrange(14)
    node = rng.choice(graph.node) if graph.node else onnx.NodeProto()
    tensor = rng.choice(graph.initializer) if graph.initializer else TensorProto()
    given_ = rng.choice(graph.input) if graph.input else onnx.ValueInfoProto()
    names = node.input if rng.random() < 0.5 else node.output
    if kind == 0 and names:
        names.pop(rng.randrange(len(names)))
    elif kind == 1:
        node.input.append(rng.choice(WORDS))
    elif kind == 2:
        node.op_type = rng.choice(rng.choice(BASES).graph.node).op_type
    elif kind == 3 and node.attribute:
        node.attribute.pop(rng.randrange(len(node.attribute)))
    elif kind == 4 and node.attribute:
        changed = rng.choice(node.attribute)
        changed.CopyFrom(helper.make_attribute(changed.name, rng.choice(VALUES)))
    elif kind == 5:
        tensor.dims[:] = [rng.choice(SIZES) for _ in range(rng.randint(0, 4))]
    elif kind == 6:
        tensor.data_type = rng.randrange(26)
    elif kind == 7:
        tensor.raw_data = rng.randbytes(rng.randint(0, 20))
    elif kind == 8:
        given_.type.tensor_type.elem_type = rng.randrange(26)
    elif kind == 9:
        for size in given_.type.tensor_type.shape.dim:
            size.dim_value = rng.choice(SIZES)
    elif kind == 10 and model.opset_import:
        model.opset_import[0].version = rng.choice([0, 1, 5, 11, 13, 17, 22, 99, -1, 2**40])
    elif kind == 11:
        node.domain = rng.choice(["", "ai.onnx", "com.microsoft", "ai.onnx.ml"])
    elif kind == 12 and node.output:
        node.output[0] = rng.choice(WORDS)
    elif kind == 13:
        other = rng.choice(BASES)
        graph.node.extend(other.graph.node)
        graph.initializer.extend(other.graph.initializer)


def both_end(model: ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())
    begun = time.process_time()
    for finding in lint(model):
        assert finding.reason and finding.fix and finding.source and str(finding)
    with suppress(EdgedetrError):
        assert inspect_onnx(path).rows()
    assert time.process_time() - begun < 5


def damaged_graph(seed: int, path: Path) -> None:
    rng, model = random.Random(seed), ModelProto()
    model.CopyFrom(rng.choice(BASES))
    for _ in range(rng.randint(1, 4)):
        damage(model, rng)
    both_end(model, path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_damaged_graph_is_linted_and_inspected_to_an_end(seed, tmp_path):
    damaged_graph(seed, tmp_path / "m.onnx")


@pytest.mark.slow
@settings(
    max_examples=10_000,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_ten_thousand_damaged_graphs_are(seed, tmp_path):
    damaged_graph(seed, tmp_path / "m.onnx")


def row(name: str, *sizes: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes or (4,))


def model_of(
    nodes: list[onnx.NodeProto],
    output: str = "y",
    weights: list[TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
) -> ModelProto:
    graph = helper.make_graph(nodes, "g", inputs or [row("x")], [row(output)], weights or [])
    return helper.make_model(
        graph,
        functions=functions or [],
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("d", 1)],
    )


def nested(depth: int) -> ModelProto:
    def leaf(kind: str) -> GraphProto:
        return helper.make_graph([helper.make_node(kind, ["x"], ["r"])], kind, [], [row("r")])

    inner = leaf("Relu")
    for number in range(depth):
        node = helper.make_node("If", ["c"], [f"o{number}"], then_branch=inner, else_branch=leaf("Neg"))
        inner = helper.make_graph([node], "g", [], [row(f"o{number}")])
    inner.input.extend([row("x"), helper.make_tensor_value_info("c", TensorProto.BOOL, [])])
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 19)])


def function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [
        helper.make_node(
            call,
            ["a" if at == 0 else f"t{at - 1}"],
            [f"t{at}" if at < len(calls) - 1 else "b"],
            domain="d" if call.startswith("F") else "",
        )
        for at, call in enumerate(calls)
    ]
    return helper.make_function(
        "d", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 19), helper.make_opsetid("d", 1)]
    )


def call(name: str) -> onnx.NodeProto:
    return helper.make_node(name, ["x"], ["y"], domain="d")


INT64 = TensorProto.INT64
HOSTILE = {
    "deep": (nested(30), "inference"),
    "a-function-that-calls-itself": (model_of([call("F")], functions=[function("F", "F")]), "inference"),
    "functions-that-double-each-other": (
        model_of(
            [call("F29")],
            functions=[
                function("F0", "Relu"),
                *(function(f"F{at}", f"F{at - 1}", f"F{at - 1}") for at in range(1, 30)),
            ],
        ),
        "inference",
    ),
    "a-circle": (
        model_of([helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]),
        "names",
    ),
    "a-constant-of-nothing": (
        model_of([helper.make_node("Constant", [], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]),
        "inference",
    ),
    "a-constant-of-another-type": (
        model_of([helper.make_node("Constant", [], ["c"], value=3), helper.make_node("Add", ["x", "c"], ["y"])]),
        None,
    ),
    "topk-of-nothing": (model_of([helper.make_node("TopK", [], ["y"])]), "inference"),
    "topk-of-an-empty-k": (
        model_of([helper.make_node("TopK", ["x", "k"], ["y", "i"])], weights=[helper.make_tensor("k", INT64, [0], [])]),
        None,
    ),
    "dequantize-of-one-input": (model_of([helper.make_node("DequantizeLinear", ["x"], ["y"])]), "inference"),
    "an-opset-of-none": (ModelProto(graph=model_of([helper.make_node("Relu", ["x"], ["y"])]).graph), "inference"),
    "tera-elements": (
        model_of(
            [helper.make_node("Expand", ["x", "s"], ["y"])], weights=[helper.make_tensor("s", INT64, [2], [2**40, 4])]
        ),
        None,
    ),
    "negative-sizes": (
        model_of(
            [helper.make_node("GatherND", ["x", "i"], ["y"])],
            weights=[TensorProto(name="i", data_type=INT64, dims=[-(2**31), 0, -(2**31)])],
        ),
        "damaged-weights",
    ),
    "a-thousand-dimensions": (
        model_of([helper.make_node("Relu", ["x"], ["y"])], inputs=[row("x", *[1] * 1000)]),
        "dimensions",
    ),
    "an-unknown-element-type": (
        model_of([helper.make_node("Relu", ["x"], ["y"])], inputs=[helper.make_tensor_value_info("x", 77, [4])]),
        "element-type",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_ends_with_what_is_wrong_with_it(name, tmp_path):
    model, rule = HOSTILE[name]
    both_end(model, tmp_path / "m.onnx")
    assert rule is None or rule in {finding.rule for finding in lint(model) if finding.worst == "error"}


def test_an_unknown_type_of_an_input_is_shown_by_its_number(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(HOSTILE["an-unknown-element-type"][0].SerializeToString())
    assert inspect_onnx(path).inputs == ("x type 77 [4]",)
