"""Lint: every rule finds its planted fault and nothing in the repaired graph; our own graphs are clean."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from planted import (
    F16,
    F32,
    activation,
    attention,
    binary,
    concat,
    control_flow,
    conv_then,
    custom,
    damaged,
    graph_of,
    grid_sample,
    layer_norm,
    named_size,
    node,
    not_imported,
    one,
    quantized_conv,
    quantized_product,
    scatter,
    shapes_left,
    top_k,
    transposed_conv,
    untyped,
    where,
)

from edgedetr import cli
from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.cli import lint_command
from edgedetr.errors import UsageError
from edgedetr.lint.lint import lint, lint_file
from edgedetr.lint.lint_targets import TARGETS
from edgedetr.lint.rules import RULES

ALL = dict.fromkeys(TARGETS, "error")
WARN = dict.fromkeys(TARGETS, "warning")
NOT_11 = {**ALL, "trt-11": "warning"}
BEFORE_7_2 = dict.fromkeys(("jetpack-6", "jetpack-7.0", "jetpack-7.1"), "error")
FROM_10_14 = {"jetpack-7.2": "warning", "trt-11": "warning"}


@dataclass(frozen=True)
class Case:
    """A planted fault, its repaired form, and the severity that each target gets."""

    rule: str
    bad: ModelProto
    good: ModelProto
    severity: dict[str, str]


HALF = quantized_conv(kind=np.float16, scale=np.float16(0.1), weight_scale=np.full(32, 0.1, np.float16))
CASES = [
    Case("opset", one("Relu", opset=17), one("Relu"), WARN),
    Case("opset", one("Relu", opset=21), one("Relu"), WARN),
    Case("opset", one("Relu", opset=8), one("Relu"), WARN),
    Case(
        "quantized-opset",
        quantized_conv(kind=np.float16, scale=np.float16(0.1), opset=17, weight_scale=np.full(32, 0.1, np.float16)),
        HALF,
        WARN,
    ),
    Case("quantized-opset", quantized_conv(opset=12), quantized_conv(), WARN),
    Case("open-input", named_size("batch", 8), named_size(1, 8), WARN),
    Case("open-input", named_size(1, "height"), named_size(1, 8), WARN),
    Case("untyped-output", untyped(), one("Relu"), ALL),
    Case("shape-arithmetic", shapes_left(True), shapes_left(False), WARN),
    Case("foreign-domain", custom("com.microsoft", "FusedConv"), custom("", "Relu"), ALL),
    Case("foreign-domain", custom("trt.plugins", "MultiscaleDeformableAttnPlugin_TRT"), custom("", "Relu"), ALL),
    Case("foreign-domain", custom("org.example", "Relu"), custom("", "Relu"), WARN),
    Case("data-dependent", one("NonZero"), one("Relu"), ALL),
    Case("data-dependent", control_flow(), one("Relu"), ALL),
    Case("control-flow", control_flow("Neg"), one("Relu"), WARN),
    Case("control-flow", control_flow(), one("Relu"), ALL),
    Case(
        "integer-operator",
        graph_of(
            [node("MatMulInteger", "x w", "y")], {"x": (TensorProto.UINT8, (4, 32))}, {"w": np.ones((32, 32), np.int8)}
        ),
        one("Relu"),
        ALL,
    ),
    Case("integer-operator", one("DynamicQuantizeLinear"), one("Relu"), ALL),
    Case(
        "too-new",
        graph_of([node("Attention", "x x x", "y")], {"x": (F32, (1, 2, 4, 8))}, opset=23),
        one("Relu"),
        BEFORE_7_2,
    ),
    Case("operator-limit", scatter("add"), scatter(), ALL),
    Case("operator-limit", scatter("none"), scatter(), {"jetpack-6": "warning"}),
    Case("topk-bound", top_k(3841), top_k(3840), ALL),
    Case("topk-bound", top_k(None), top_k(300), WARN),
    Case("grid-sample-mode", grid_sample(mode="linear", opset=20), grid_sample(mode="bilinear"), NOT_11),
    Case("grid-sample-mode", grid_sample(mode="cubic", opset=20), grid_sample(mode="nearest", opset=20), NOT_11),
    Case("grid-sample-rank", grid_sample(mode="linear", rank=5, opset=20), grid_sample(mode="bilinear"), NOT_11),
    Case("grid-sample-wrong", grid_sample(mode="bilinear"), one("Relu"), FROM_10_14),
    Case("batch-norm", conv_then(batch_norm=True), conv_then(), WARN),
    Case("batch-norm", conv_then(scaled=(1, 32, 1, 1)), conv_then(scaled=(1,)), WARN),
    Case("batch-norm", conv_then(scaled=(32, 1, 1)), conv_then(scaled=()), WARN),
    Case("layer-norm", layer_norm(False), layer_norm(True), WARN),
    Case("zero-point", quantized_conv(zero=np.int8(3)), quantized_conv(), ALL),
    Case("zero-point", quantized_conv(zero=np.uint8(0)), quantized_conv(), ALL),
    Case("zero-point", quantized_conv(missing_zero=True), quantized_conv(), ALL),
    Case("zero-point", activation(np.float32(0.1), np.zeros(2, np.int8)), activation(np.float32(0.1), np.int8(0)), ALL),
    Case("scale-value", quantized_conv(scale=np.float32(0)), quantized_conv(), ALL),
    Case("scale-value", quantized_conv(scale=np.float32(-0.1)), quantized_conv(), ALL),
    Case("scale-value", quantized_conv(scale=np.float32("inf")), quantized_conv(), ALL),
    # 6.0e-5 is subnormal in FP16, 6.2e-5 is not; as float32 the smaller one is fine.
    Case(
        "scale-value",
        quantized_conv(kind=np.float16, scale=np.float16(6.0e-5), weight_scale=np.full(32, 0.1, np.float16)),
        quantized_conv(kind=np.float16, scale=np.float16(6.2e-5), weight_scale=np.full(32, 0.1, np.float16)),
        ALL,
    ),
    Case(
        "scale-value",
        quantized_conv(kind=np.float16, scale=np.float16(6.0e-5), weight_scale=np.full(32, 0.1, np.float16)),
        quantized_conv(scale=np.float32(6.0e-5)),
        ALL,
    ),
    Case(
        "scale-type",
        quantized_conv(kind=np.float16, scale=np.float32(0.1), weight_scale=np.full(32, 0.1, np.float16)),
        HALF,
        NOT_11,
    ),
    Case("scale-type", quantized_conv(scale=np.float16(0.1)), quantized_conv(), NOT_11),
    Case(
        "per-channel-activation",
        activation(np.full(32, 0.1, np.float32), np.zeros(32, np.int8)),
        activation(np.float32(0.1), np.int8(0)),
        ALL,
    ),
    Case("weight-axis", quantized_conv(axis=1), quantized_conv(), NOT_11),
    Case("scale-axis", quantized_conv(weight_scale=np.full(31, 0.1, np.float32)), quantized_conv(), ALL),
    Case("weight-axis", quantized_product(32, 48, axis=0), quantized_product(32, 48), NOT_11),
    Case(
        "weight-axis",
        quantized_product(32, 48, transposed=True, through=True, axis=1),
        quantized_product(32, 48, transposed=True, through=True),
        NOT_11,
    ),
    Case(
        "weight-axis",
        quantized_product(32, 48, kind="Gemm", transposed=True, axis=1),
        quantized_product(32, 48, kind="Gemm", transposed=True),
        NOT_11,
    ),
    Case("weight-axis", quantized_product(32, 48, kind="Gemm", axis=0), quantized_product(32, 48, kind="Gemm"), NOT_11),
    Case("one-side-quantized", quantized_conv(weight=False), quantized_conv(), WARN),
    Case("one-side-quantized", quantized_conv(data=False), quantized_conv(), WARN),
    Case("small-product", quantized_product(32, 4), quantized_product(32, 16), WARN),
    Case("small-product", quantized_product(4, 32), quantized_product(16, 32), WARN),
    Case("half-quantized-attention", attention(scores=True, sums=False), attention(scores=True, sums=True), WARN),
    Case("half-quantized-attention", attention(scores=False, sums=True), attention(scores=False, sums=False), WARN),
    Case("narrow-convolution", quantized_conv(channels=4), quantized_conv(channels=8), WARN),
    Case("narrow-convolution", quantized_conv(channels=2), quantized_conv(channels=3), WARN),  # 3: an image's
    Case("narrow-convolution", quantized_conv(out=1), quantized_conv(out=8), WARN),
    Case("grouped-convolution", quantized_conv(groups=32), quantized_conv(data=False, weight=False, groups=32), WARN),
    Case("before-relu", quantized_conv(relu_between=True), quantized_conv(), WARN),
    Case("concat-scales", concat(0.1, 0.2), concat(0.1, 0.1), WARN),
    Case("transposed-convolution", transposed_conv(16), transposed_conv(1), WARN),
    *(Case("equal-types", binary(kind, F16), binary(kind, F32), ALL) for kind in ("Add", "Mul", "Sub", "Div", "Min")),
    Case("equal-types", where(F16), where(F32), ALL),
    Case("equal-types", binary("Greater", 0, np.float16(1)), binary("Greater", 0, np.float32(1)), ALL),
    Case("float64", one("Cast", to=TensorProto.DOUBLE), one("Cast", to=TensorProto.FLOAT16), WARN),
    Case("not-a-number", binary("Add", 0, np.float32("nan")), binary("Add", 0, np.float32("-inf")), ALL),
    Case(
        "not-a-number",
        graph_of([node("Add", "x c", "y")], {"x": (F16, (1,))}, {"c": np.float16("inf")}),
        graph_of([node("Add", "x c", "y")], {"x": (F16, (1,))}, {"c": np.float16(65504)}),
        WARN,
    ),
    Case("equal-types", binary("Pow", F16), binary("Pow", F32), {"jetpack-6": "error"}),
    Case("names", graph_of([node("Add", "x nowhere", "y")], {"x": (F32, (4,))}), one("Relu"), ALL),
    Case("names", graph_of([node("Add", "x y", "a"), node("Relu", "a", "y")], {"x": (F32, (4,))}), one("Relu"), ALL),
    Case("names", graph_of([node("Relu", "x", "y"), node("Neg", "x", "y")], {"x": (F32, (4,))}), one("Relu"), ALL),
    Case("damaged-weights", damaged(), conv_then(), ALL),
    Case("schema", one("Cast"), one("Cast", to=F16), ALL),
    Case(
        "schema",
        graph_of([node("Gather", "x i", "y")], {"x": (F32, (4, 4))}, {"i": np.float32([0])}),
        graph_of([node("Gather", "x i", "y")], {"x": (F32, (4, 4))}, {"i": np.int64([0])}),
        ALL,
    ),
    Case("element-type", graph_of([node("Identity", "x", "y")], {"x": (TensorProto.STRING, (4,))}), one("Relu"), ALL),
    Case("element-type", one("Cast", to=TensorProto.INT16), one("Cast", to=TensorProto.INT32), ALL),
    Case(
        "inner-type",
        graph_of([node("Cast", "x", "b", to=2), node("Cast", "b", "y", to=1)], {"x": (F32, (4,))}),
        one("Cast", to=TensorProto.UINT8),
        ALL,
    ),
    Case("dimensions", one("Relu", shape=(1,) * 9), one("Relu", shape=(1,) * 8), ALL),
    Case(
        "sizes",
        graph_of([node("Conv", "x w", "y")], {"x": (F32, (1, 4, 8, 8))}, {"w": np.ones((4, 3, 1, 1), np.float32)}),
        conv_then(),
        ALL,
    ),
    Case(
        "combination",
        graph_of([node("Mod", "x x", "y")], {"x": (F32, (4,))}),
        graph_of([node("Mod", "x x", "y", fmod=1)], {"x": (F32, (4,))}),
        ALL,
    ),
    Case(
        "parameters",
        graph_of([node("LayerNormalization", "x g", "y")], {"x": (F32, (1, 4, 8))}, {"g": np.ones(7, np.float32)}),
        layer_norm(True),
        ALL,
    ),
    Case("parameters", one("MaxPool", kernel_shape=[9, 9]), one("MaxPool", kernel_shape=[8, 8]), ALL),
    Case("unknown-operator", one("Det"), one("Relu"), ALL),
    Case("unknown-operator", custom("", "NotAnOperator"), one("Relu"), ALL),
    Case(
        "operator-type",
        graph_of([node("MatMul", "x x", "y")], {"x": (TensorProto.INT32, (4, 4))}),
        graph_of([node("MatMul", "x x", "y")], {"x": (F32, (4, 4))}),
        ALL,
    ),
    Case(
        "operator-limit",
        graph_of([helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])], {"x": (F32, (1, 4, 8, 8))}),
        one("MaxPool", kernel_shape=[2, 2]),
        ALL,
    ),
    Case("operator-limit", one("RoiAlign"), one("Relu"), ALL),
    Case(
        "operator-input",
        graph_of([node("ReduceSum", "x a", "y")], {"x": (F32, (4, 4)), "a": (TensorProto.INT64, (1,))}),
        graph_of([node("ReduceSum", "x a", "y")], {"x": (F32, (4, 4))}, {"a": np.int64([0])}),
        ALL,
    ),
    Case("inference", not_imported(), one("Relu"), ALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_planted_fault_is_found_and_its_repaired_form_is_not(case):
    found = [finding for finding in lint(case.bad) if finding.rule == case.rule]
    assert {name: kind for finding in found for name, kind in finding.severity.items()} == case.severity
    assert all(finding.node and finding.reason and finding.fix and finding.source for finding in found)
    assert [finding for finding in lint(case.good) if finding.rule == case.rule] == []


def test_every_rule_has_a_planted_fault():
    elsewhere = {"external-data", "open-channels"}  # below: they need a file, and an unusual graph
    assert {case.rule for case in CASES} | elsewhere == {rule.id for rule in RULES}


@pytest.mark.parametrize(
    "good",
    [quantized_conv(), HALF, quantized_product(32, 48), layer_norm(True), top_k(300), concat(0.1, 0.1)],
    ids=["int8", "int8-fp16", "matmul", "norm", "topk", "concat"],
)
def test_a_good_graph_is_silent(good):
    assert lint(good) == ()
    onnx.checker.check_model(good, full_check=True)  # the independent word on it


def test_int8_channels_that_are_open_are_an_error():
    nodes = quantized_conv().graph
    model = graph_of(
        [node("Reshape", "v t", "x"), *nodes.node],
        {"v": (F32, (2048,)), "t": (TensorProto.INT64, (4,))},
        {item.name: numpy_helper.to_array(item) for item in nodes.initializer},
    )
    assert "open-channels" in {finding.rule for finding in lint(model)}
    assert "open-channels" not in {finding.rule for finding in lint(quantized_conv())}


def test_a_finding_names_node_reason_fix_and_source():
    found = next(finding for finding in lint(top_k(4000)))
    assert (found.rule, found.node) == ("topk-bound", "the_TopK")
    assert "4000" in found.reason
    assert "3840" in found.fix


def test_the_command_offers_the_targets_that_lint_knows():
    from click.testing import CliRunner

    assert f"[{'|'.join(TARGETS)}]" in "".join(CliRunner().invoke(lint_command.lint, ["--help"]).output.split())
    refused = CliRunner().invoke(lint_command.lint, ["--target", "jetpack-5"])
    assert refused.exit_code == 2 and "'jetpack-5' is not one of 'jetpack-6'" in refused.output
    assert {name: TARGETS[name].tensorrt for name in TARGETS} == {
        "jetpack-6": (10, 3),
        "jetpack-7.0": (10, 13),
        "jetpack-7.1": (10, 13),
        "jetpack-7.2": (10, 16),
        "trt-11": (11, 0),
    }


def test_the_table_follows_the_releases_and_names_its_source():
    """Swish came with 11.0, Attention with 10.14; RMSNormalization with 10.15; Det has not come."""
    reads = {
        name: [
            kind for kind in ("Relu", "Attention", "RMSNormalization", "Swish", "Det") if kind in target.table.operators
        ]
        for name, target in TARGETS.items()
    }
    assert reads == {
        "jetpack-6": ["Relu"],
        "jetpack-7.0": ["Relu"],
        "jetpack-7.1": ["Relu"],
        "jetpack-7.2": ["Relu", "Attention", "RMSNormalization"],
        "trt-11": ["Relu", "Attention", "RMSNormalization", "Swish"],
    }
    assert [target.table.opsets for target in TARGETS.values()] == [(9, 20), (9, 22), (9, 22), (9, 24), (9, 24)]
    assert all(operator.source for target in TARGETS.values() for operator in target.table.operators.values())
    found = next(finding for finding in lint(one("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])))
    assert found.source.startswith("https://github.com/onnx/onnx-tensorrt/blob/release/10.1-GA/")


def test_one_target_can_be_chosen():
    assert lint(grid_sample(mode="bilinear"), ["jetpack-6"]) == ()
    assert [finding.rule for finding in lint(grid_sample(mode="bilinear"), ["trt-11"])] == ["grid-sample-wrong"]
    with pytest.raises(UsageError, match="target is 'jetpack-5'; expected one of .* did you mean 'jetpack-6'"):
        lint(one("Relu"), ["jetpack-5"])


def test_a_node_without_a_name_is_called_by_its_output():
    model = top_k(4000)
    model.graph.node[0].name = ""
    assert lint(model)[0].node == "TopK -> y"


def test_the_command_exits_with_3_on_errors_and_prints_what_it_found(tmp_path, capsys):
    onnx.save(top_k(4000), tmp_path / "bad.onnx")
    assert cli.run(["lint", str(tmp_path / "bad.onnx"), "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)[0]
    assert (found["errors"], found["warnings"]) == (1, 0)
    assert found["findings"][0]["rule"] == "topk-bound"
    assert found["findings"][0]["severity"] == ALL
    assert "the_TopK" in captured.err


def test_the_command_exits_with_0_on_warnings(tmp_path, capsys):
    onnx.save(grid_sample(mode="bilinear"), tmp_path / "m.onnx")
    assert cli.run(["lint", str(tmp_path / "m.onnx")]) == 0
    assert "grid-sample-wrong" in capsys.readouterr().err
    assert cli.run(["lint", str(tmp_path / "m.onnx"), "--target", "jetpack-6"]) == 0
    assert "grid-sample-wrong" not in capsys.readouterr().err
    assert cli.run(["lint", str(tmp_path / "m.onnx"), "--target", "jetpack-5"]) == 2


def test_findings_of_one_reason_are_one_line(tmp_path, capsys):
    nodes = [node("GridSample", "x g", f"y{i}", mode="linear") for i in range(9)]
    model = graph_of(nodes, {"x": (F32, (1, 4, 8, 8)), "g": (F32, (1, 8, 8, 2))}, opset=20)
    for number, item in enumerate(model.graph.node):
        item.name = f"sample{number}"
    onnx.save(model, tmp_path / "m.onnx")
    report = lint_file(tmp_path / "m.onnx", ["jetpack-6"])
    assert len([f for f in report.findings if f.rule == "grid-sample-mode"]) == 9
    rows = [row for row in report.rows() if row[1] == "grid-sample-mode"]
    assert [row[3] for row in rows] == ["sample0 (and 8 more)"]
    assert "renames it" in report.fixes()["grid-sample-mode"]


def test_of_many_reasons_of_one_rule_the_table_names_three(tmp_path):
    nodes = [helper.make_node("TopK", ["x", f"k{i}"], [f"y{i}", f"i{i}"], f"best{i}") for i in range(5)]
    model = graph_of(nodes, {"x": (F32, (1, 9000))}, {f"k{i}": np.array([4000 + i], np.int64) for i in range(5)})
    onnx.save(model, tmp_path / "m.onnx")
    rows = lint_file(tmp_path / "m.onnx").rows()
    assert [row[3] for row in rows] == ["best0", "best1", "best2", "(2 other reasons of this rule)"]


def test_a_real_parser_runs_on_demand(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx_bindings")
    onnx.save(top_k(300), tmp_path / "good.onnx")
    assert cli.run(["lint", str(tmp_path / "good.onnx"), "--parse", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["parse"]["built"] is True
    assert "says nothing about speed or numerics on a Jetson" in captured.err


def test_of_a_bundle_the_graphs_for_tensorrt_are_linted(tmp_path, capsys):
    manifest = Manifest("detr", (ClassInfo(0, 1, "a"),), InputContract(8, 8), OutputContract())
    bundle = Bundle.create(tmp_path / "b", manifest)
    for name, model in (
        ("model.onnx", one("Relu")),
        ("model.int8.onnx", quantized_conv()),
        ("model.int8-cpu.onnx", quantized_conv(zero=np.uint8(128))),
    ):
        with bundle.add(name, stage="export") as path:
            path.write_bytes(model.SerializeToString())
    assert cli.run(["lint", str(bundle.path), "--json"]) == 0
    paths = [report["path"] for report in json.loads(capsys.readouterr().out)]
    assert [path.rsplit("/", 1)[1] for path in paths] == ["model.onnx", "model.int8.onnx"]
    assert cli.run(["lint", str(bundle.path / "model.int8-cpu.onnx")]) == 3
