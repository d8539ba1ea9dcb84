"""Lint: every rule finds its planted fault and nothing in the good twin; our own graphs are clean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr import cli
from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import ExportError, UsageError
from edgedetr.graph.finding import TARGETS
from edgedetr.graph.lint import lint, lint_file
from edgedetr.graph.rules import RULES

ALL = dict.fromkeys(TARGETS, "error")
WARN = dict.fromkeys(TARGETS, "warning")
F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
ZERO, STEP = np.int8(0), np.float32(0.1)
NOT_11 = {"jetpack-6": "error", "jetpack-7.2": "error", "trt-11": "warning"}
FROM_10_14 = {"jetpack-7.2": "warning", "trt-11": "warning"}
RNG = np.random.default_rng(0)


def graph_of(nodes: Sequence[NodeProto], inputs: dict[str, tuple], constants: dict[str, np.ndarray] | None = None, *,
             opset: int = 19, domains: Sequence[str] = ()) -> ModelProto:
    """inputs {name: (element type, shape)}; the last node's first output is the graph's."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    result = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    graph = helper.make_graph(list(nodes), "g", values, [result], stored)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    try:
        return onnx.shape_inference.infer_shapes(model)         # the outputs get their types, as in an exporter's file
    except onnx.shape_inference.InferenceError:
        return model


def node(kind: str, inputs: str, output: str, **attributes) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], f"the_{kind}", **attributes)


def one(kind: str, *, shape=(1, 4, 8, 8), opset: int = 19, **attributes) -> ModelProto:
    """A graph of one node that reads x."""
    return graph_of([node(kind, "x", "y", **attributes)], {"x": (F32, shape)}, opset=opset)


def quantised_conv(*, zero=ZERO, scale=STEP, axis=0, channels=32, out=32, weight_scale=None,
                   kind=np.float32, data=True, weight=True, relu_between=False, opset: int = 19,
                   missing_zero: bool = False) -> ModelProto:
    """x -> Q -> DQ -> Conv <- DQ <- integer weight; each part as asked for."""
    element = F16 if kind is np.float16 else F32
    scale = np.asarray(scale)
    constants = {"s": scale, "z": np.asarray(zero), "w": RNG.integers(-9, 9, (out, channels, 1, 1), dtype=np.int8),
                 "ws": np.full((out, channels)[axis], 0.1, kind) if weight_scale is None else weight_scale}
    constants["wz"] = np.zeros(constants["ws"].shape, np.int8)
    constants["f"] = np.ones((out, channels, 1, 1), kind)
    third = "" if missing_zero else " z"
    nodes = [node("QuantizeLinear", f"x s{third}", "q"), node("DequantizeLinear", f"q s{third}", "d"),
             node("DequantizeLinear", "w ws wz", "wd", axis=axis),
             node("Conv", f"{'d' if data else 'x'} {'wd' if weight else 'f'}", "c")]
    if relu_between:
        constants.update({"cs": np.asarray(0.2, kind), "cz": np.int8(0)})
        nodes += [node("QuantizeLinear", "c cs cz", "cq"), node("DequantizeLinear", "cq cs cz", "cd")]
    nodes.append(node("Relu", "cd" if relu_between else "c", "y"))
    if not data:
        nodes = nodes[2:]
    if not weight:
        nodes = [item for item in nodes if item.output[0] != "wd"]
    used = {name for item in nodes for name in item.input}
    return graph_of(nodes, {"x": (element, (1, channels, 8, 8))},
                    {name: value for name, value in constants.items() if name in used}, opset=opset)


def quantised_product(inputs: int, outputs: int, *, kind: str = "MatMul", axis: int | None = None,
                      transposed: bool = False, through: bool = False) -> ModelProto:
    """x [1, 40, inputs] (or [40, inputs]) times an integer weight, both through Q/DQ."""
    shape = (outputs, inputs) if transposed else (inputs, outputs)
    axis = (0 if transposed else 1) if axis is None else axis
    constants = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones(shape, np.int8),
                 "ws": np.full(shape[axis], 0.1, np.float32), "wz": np.zeros(shape[axis], np.int8)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
             node("DequantizeLinear", "w ws wz", "wd", axis=axis)]
    if through:
        nodes.append(node("Transpose", "wd", "wt", perm=[1, 0]))
    attributes = {"transB": 1} if kind == "Gemm" and transposed else {}
    nodes.append(node(kind, f"d {'wt' if through else 'wd'}", "y", **attributes))
    return graph_of(nodes, {"x": (F32, (40, inputs) if kind == "Gemm" else (1, 40, inputs))}, constants)


def activation(scale, zero) -> ModelProto:
    return graph_of([node("QuantizeLinear", "x s z", "q", axis=1), node("DequantizeLinear", "q s z", "y", axis=1)],
                    {"x": (F32, (1, 32, 8, 8))}, {"s": scale, "z": zero})


def concat(first: float, second: float) -> ModelProto:
    zero = {"z": np.int8(0), "a": np.float32(first), "b": np.float32(second)}
    nodes = []
    for name, scale in (("x", "a"), ("x2", "b")):
        nodes += [node("QuantizeLinear", f"{name} {scale} z", f"{name}q"),
                  node("DequantizeLinear", f"{name}q {scale} z", f"{name}d")]
    nodes += [node("Concat", "xd x2d", "c", axis=1), node("QuantizeLinear", "c a z", "q"),
              node("DequantizeLinear", "q a z", "y")]
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8)), "x2": (F32, (1, 32, 8, 8))}, zero)


def transposed_conv(scales: int) -> ModelProto:
    constants = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((32, 16, 2, 2), np.int8),
                 "ws": np.full(scales, 0.1, np.float32) if scales > 1 else np.float32(0.1),
                 "wz": np.zeros(scales, np.int8) if scales > 1 else np.int8(0)}
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"),
             node("DequantizeLinear", "w ws wz", "wd", axis=1), node("ConvTranspose", "d wd", "y")]
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8))}, constants)


def top_k(k: int | None) -> ModelProto:
    nodes = [helper.make_node("TopK", ["x", "k"], ["y", "i"], "the_TopK")]
    if k is None:
        nodes.insert(0, node("ReduceMax", "n", "k", keepdims=1))
        return graph_of(nodes, {"x": (F32, (1, 9000)), "n": (TensorProto.INT64, (3,))})
    return graph_of(nodes, {"x": (F32, (1, 9000))}, {"k": np.array([k], np.int64)})


def grid_sample(*, mode: str, rank: int = 4, opset: int = 19) -> ModelProto:
    space = (8,) * (rank - 2)
    return graph_of([node("GridSample", "x g", "y", mode=mode)],
                    {"x": (F32, (1, 4, *space)), "g": (F32, (1, *space, rank - 2))}, opset=opset)


def untyped() -> ModelProto:
    model = one("Relu")
    model.graph.output[0].type.Clear()
    return model


def control_flow() -> ModelProto:
    def branch(kind: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(kind, ["x"], ["b"], f"inner_{kind}")], kind, [],
                                 [helper.make_empty_tensor_value_info("b")])
    return graph_of([node("If", "c", "y", then_branch=branch("Relu"), else_branch=branch("NonZero"))],
                    {"x": (F32, (1, 4)), "c": (TensorProto.BOOL, ())})


def scatter(reduction: str) -> ModelProto:
    return graph_of([node("ScatterND", "x i u", "y", reduction=reduction)],
                    {"x": (F32, (4, 4)), "u": (F32, (1, 4))}, {"i": np.array([[1]], np.int64)})


def conv_then(*, batch_norm: bool = False, scaled: tuple[int, ...] | None = None) -> ModelProto:
    constants = {"w": np.ones((32, 32, 1, 1), np.float32)}
    nodes = [node("Conv", "x w", "c")]
    if batch_norm:
        constants.update({name: np.ones(32, np.float32) for name in ("g", "b", "m", "v")})
        nodes.append(node("BatchNormalization", "c g b m v", "y"))
    elif scaled is not None:
        constants["g"] = np.ones(scaled, np.float32)
        nodes.append(node("Mul", "c g", "y"))
    return graph_of(nodes, {"x": (F32, (1, 32, 8, 8))}, constants)


def layer_norm(native: bool) -> ModelProto:
    if native:
        return graph_of([node("LayerNormalization", "x g", "y")], {"x": (F32, (1, 4, 8))},
                        {"g": np.ones(8, np.float32)})
    nodes = [node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"), node("Mul", "d d", "s"),
             node("ReduceMean", "s", "v", axes=[-1]), node("Add", "v e", "p"), node("Sqrt", "p", "r"),
             node("Div", "d r", "y")]
    return graph_of(nodes, {"x": (F32, (1, 4, 8))}, {"e": np.float32(1e-5)}, opset=17)


def binary(kind: str, second: int, constant=None) -> ModelProto:
    if constant is not None:
        return graph_of([node(kind, "x c", "y")], {"x": (F32, (1, 4))}, {"c": constant})
    return graph_of([node(kind, "x x2", "y")], {"x": (F32, (1, 4)), "x2": (second, (1, 4))})


def where(third: int) -> ModelProto:
    return graph_of([node("Where", "c x x2", "y")],
                    {"c": (TensorProto.BOOL, (1, 4)), "x": (F32, (1, 4)), "x2": (third, (1, 4))})


def named_size(first: int | str, height: int | str) -> ModelProto:
    return graph_of([node("Relu", "x", "y")], {"x": (F32, (first, 3, height, 8))})


def shapes_left(fixed: bool) -> ModelProto:
    return graph_of([node("Shape", "x", "s"), node("Reshape", "x s", "y")],
                    {"x": (F32, (1 if fixed else "batch", 4))})


def custom(domain: str, kind: str) -> ModelProto:
    return graph_of([node(kind, "x", "y", domain=domain)], {"x": (F32, (1, 4))}, domains=[domain] if domain else ())


def not_imported() -> ModelProto:
    """A node of a domain that the file does not import: inference gives up."""
    return graph_of([node("Relu", "x", "y", domain="org.example")], {"x": (F32, (1, 4))})


@dataclass(frozen=True)
class Case:
    """A planted fault, its repaired twin, and what each target is told."""

    rule: str
    bad: ModelProto
    good: ModelProto
    severity: dict[str, str]


HALF = quantised_conv(kind=np.float16, scale=np.float16(0.1), weight_scale=np.full(32, 0.1, np.float16))
CASES = [
    Case("opset", one("Relu", opset=17), one("Relu"), WARN),
    Case("opset", one("Relu", opset=21), one("Relu"), NOT_11),
    Case("opset", one("Relu", opset=8), one("Relu"), ALL),
    Case("quantised-opset", quantised_conv(kind=np.float16, scale=np.float16(0.1), opset=17,
                                           weight_scale=np.full(32, 0.1, np.float16)), HALF, ALL),
    Case("quantised-opset", quantised_conv(opset=12), quantised_conv(), ALL),
    Case("open-input", named_size("batch", 8), named_size(1, 8), WARN),
    Case("open-input", named_size(1, "height"), named_size(1, 8), ALL),
    Case("untyped-output", untyped(), one("Relu"), ALL),
    Case("shape-arithmetic", shapes_left(True), shapes_left(False), WARN),
    Case("foreign-domain", custom("com.microsoft", "FusedConv"), custom("", "Relu"), ALL),
    Case("foreign-domain", custom("trt.plugins", "MultiscaleDeformableAttnPlugin_TRT"), custom("", "Relu"), WARN),
    Case("data-dependent", one("NonZero"), one("Relu"), ALL),
    Case("data-dependent", control_flow(), one("Relu"), ALL),
    Case("control-flow", control_flow(), one("Relu"), ALL),
    Case("integer-operator", graph_of([node("MatMulInteger", "x w", "y")], {"x": (TensorProto.UINT8, (4, 32))},
                                      {"w": np.ones((32, 32), np.int8)}), one("Relu"), ALL),
    Case("integer-operator", one("DynamicQuantizeLinear"), one("Relu"), ALL),
    Case("too-new", graph_of([node("Attention", "x x x", "y")], {"x": (F32, (1, 2, 4, 8))}, opset=23), one("Relu"),
         {"jetpack-6": "error"}),
    Case("scatter-reduction", scatter("add"), scatter("none"), ALL),
    Case("topk-bound", top_k(3841), top_k(3840), ALL),
    Case("topk-bound", top_k(None), top_k(300), WARN),
    Case("grid-sample-mode", grid_sample(mode="linear", opset=20), grid_sample(mode="bilinear"),
         NOT_11),
    Case("grid-sample-mode", grid_sample(mode="cubic", opset=20), grid_sample(mode="nearest", opset=20),
         NOT_11),
    Case("grid-sample-rank", grid_sample(mode="linear", rank=5, opset=20), grid_sample(mode="bilinear"),
         NOT_11),
    Case("grid-sample-wrong", grid_sample(mode="bilinear"), one("Relu"), FROM_10_14),
    Case("batch-norm", conv_then(batch_norm=True), conv_then(), WARN),
    Case("batch-norm", conv_then(scaled=(1, 32, 1, 1)), conv_then(scaled=(1,)), WARN),
    Case("batch-norm", conv_then(scaled=(32, 1, 1)), conv_then(scaled=()), WARN),
    Case("layer-norm", layer_norm(False), layer_norm(True), WARN),
    Case("zero-point", quantised_conv(zero=np.int8(3)), quantised_conv(), ALL),
    Case("zero-point", quantised_conv(zero=np.uint8(0)), quantised_conv(), ALL),
    Case("zero-point", quantised_conv(missing_zero=True), quantised_conv(), ALL),
    Case("zero-point", activation(np.float32(0.1), np.zeros(2, np.int8)), activation(np.float32(0.1), np.int8(0)), ALL),
    Case("scale-value", quantised_conv(scale=np.float32(0)), quantised_conv(), ALL),
    Case("scale-value", quantised_conv(scale=np.float32(-0.1)), quantised_conv(), ALL),
    Case("scale-value", quantised_conv(scale=np.float32("inf")), quantised_conv(), ALL),
    # 6.0e-5 is subnormal in FP16, 6.2e-5 is not; as float32 the smaller one is fine.
    Case("scale-value", quantised_conv(kind=np.float16, scale=np.float16(6.0e-5),
                                       weight_scale=np.full(32, 0.1, np.float16)),
         quantised_conv(kind=np.float16, scale=np.float16(6.2e-5), weight_scale=np.full(32, 0.1, np.float16)), ALL),
    Case("scale-value", quantised_conv(kind=np.float16, scale=np.float16(6.0e-5),
                                       weight_scale=np.full(32, 0.1, np.float16)),
         quantised_conv(scale=np.float32(6.0e-5)), ALL),
    Case("scale-type", quantised_conv(kind=np.float16, scale=np.float32(0.1),
                                      weight_scale=np.full(32, 0.1, np.float16)), HALF,
         NOT_11),
    Case("scale-type", quantised_conv(scale=np.float16(0.1)), quantised_conv(), ALL),
    Case("per-channel-activation", activation(np.full(32, 0.1, np.float32), np.zeros(32, np.int8)),
         activation(np.float32(0.1), np.int8(0)), ALL),
    Case("weight-axis", quantised_conv(axis=1), quantised_conv(), ALL),
    Case("weight-axis", quantised_conv(weight_scale=np.full(31, 0.1, np.float32)), quantised_conv(), ALL),
    Case("weight-axis", quantised_product(32, 48, axis=0), quantised_product(32, 48), ALL),
    Case("weight-axis", quantised_product(32, 48, transposed=True, through=True, axis=1),
         quantised_product(32, 48, transposed=True, through=True), ALL),
    Case("weight-axis", quantised_product(32, 48, kind="Gemm", transposed=True, axis=1),
         quantised_product(32, 48, kind="Gemm", transposed=True), ALL),
    Case("weight-axis", quantised_product(32, 48, kind="Gemm", axis=0), quantised_product(32, 48, kind="Gemm"), ALL),
    Case("one-side-quantised", quantised_conv(weight=False), quantised_conv(), WARN),
    Case("one-side-quantised", quantised_conv(data=False), quantised_conv(), WARN),
    Case("small-product", quantised_product(32, 4), quantised_product(32, 16), WARN),
    Case("small-product", quantised_product(4, 32), quantised_product(16, 32), WARN),
    Case("before-relu", quantised_conv(relu_between=True), quantised_conv(), WARN),
    Case("concat-scales", concat(0.1, 0.2), concat(0.1, 0.1), WARN),
    Case("transposed-convolution", transposed_conv(16), transposed_conv(1), WARN),
    *(Case("equal-types", binary(kind, F16), binary(kind, F32), ALL)
      for kind in ("Add", "Mul", "Sub", "Div", "Min", "Pow")),
    Case("equal-types", where(F16), where(F32), ALL),
    Case("equal-types", binary("Greater", 0, np.float16(1)), binary("Greater", 0, np.float32(1)), ALL),
    Case("float64", one("Cast", to=TensorProto.DOUBLE), one("Cast", to=TensorProto.FLOAT16), WARN),
    Case("not-a-number", binary("Add", 0, np.float32("nan")), binary("Add", 0, np.float32("-inf")), ALL),
    Case("not-a-number", graph_of([node("Add", "x c", "y")], {"x": (F16, (1,))}, {"c": np.float16("inf")}),
         graph_of([node("Add", "x c", "y")], {"x": (F16, (1,))}, {"c": np.float16(65504)}), WARN),
    Case("inference", not_imported(), one("Relu"), ALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_planted_fault_is_found_and_its_repaired_twin_is_not(case):
    found = [finding for finding in lint(case.bad) if finding.rule == case.rule]
    assert {name: kind for finding in found for name, kind in finding.severity.items()} == case.severity
    assert all(finding.node and finding.reason and finding.fix and finding.source for finding in found)
    assert [finding for finding in lint(case.good) if finding.rule == case.rule] == []


def test_every_rule_has_a_planted_fault():
    elsewhere = {"external-data", "open-channels"}      # below: they need a file, and an unusual graph
    assert {case.rule for case in CASES} | elsewhere == {rule.id for rule in RULES}


@pytest.mark.parametrize("good", [quantised_conv(), HALF, quantised_product(32, 48), layer_norm(True), top_k(300),
                                  concat(0.1, 0.1)], ids=["int8", "int8-fp16", "matmul", "norm", "topk", "concat"])
def test_a_good_graph_is_silent(good):
    assert lint(good) == ()
    onnx.checker.check_model(good, full_check=True)     # the independent word on it


def test_int8_channels_that_are_open_are_an_error():
    nodes = quantised_conv().graph
    model = graph_of([node("Reshape", "v t", "x"), *nodes.node],
                     {"v": (F32, (2048,)), "t": (TensorProto.INT64, (4,))},
                     {item.name: numpy_helper.to_array(item) for item in nodes.initializer})
    assert "open-channels" in {finding.rule for finding in lint(model)}
    assert "open-channels" not in {finding.rule for finding in lint(quantised_conv())}


def test_a_finding_names_node_reason_fix_and_source():
    found = next(finding for finding in lint(top_k(4000)))
    assert (found.rule, found.node) == ("topk-bound", "the_TopK")
    assert "4000" in found.reason
    assert "3840" in found.fix


def test_one_target_alone_is_asked():
    assert lint(grid_sample(mode="bilinear"), ["jetpack-6"]) == ()
    assert [finding.rule for finding in lint(grid_sample(mode="bilinear"), ["trt-11"])] == ["grid-sample-wrong"]
    with pytest.raises(UsageError, match="target is 'jetpack-5'; expected one of .* did you mean 'jetpack-6'"):
        lint(one("Relu"), ["jetpack-5"])


def test_a_node_without_a_name_is_called_by_what_it_makes():
    model = top_k(4000)
    model.graph.node[0].name = ""
    assert lint(model)[0].node == "TopK -> y"


# ---- files


def with_external_data(folder, location: str = "weights.bin", **entries) -> str:
    model = conv_then()
    tensor = model.graph.initializer[0]
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    told = {"location": location, "length": str(len(tensor.raw_data)), **entries}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in told.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_weights_in_a_file_beside_it_are_read(tmp_path):
    assert lint_file(with_external_data(tmp_path / "a")).findings == ()
    assert lint_file(with_external_data(tmp_path / "b", length=None)).findings == ()


@pytest.mark.parametrize("location, entries, message", [
    ("../weights.bin", {}, "outside the folder"),
    ("/etc/hostname", {}, "outside the folder"),
    ("sub/../../weights.bin", {}, "outside the folder"),
    ("none.bin", {}, "not there"),
    ("", {}, "without saying where"),
    ("link.bin", {}, "symbolic link"),
    ("folder/weights.bin", {}, "symbolic link"),
    ("twin.bin", {}, "hard link"),
    ("pipe", {}, "no plain file"),
    ("large.bin", {}, "at most"),
    ("weights.bin", {"offset": "4000"}, "which has 4096"),
    ("weights.bin", {"offset": "-8"}, "which has 4096"),
    ("weights.bin", {"length": "99999999999"}, "which has 4096"),
])
def test_weights_elsewhere_are_refused_unread(tmp_path, location, entries, message):
    import os

    folder = tmp_path / "model"
    path = with_external_data(folder, location, **entries)
    (tmp_path / "weights.bin").write_bytes(b"x" * 4096)
    (folder / "link.bin").symlink_to(folder / "weights.bin")
    (folder / "folder").symlink_to(tmp_path)
    (tmp_path / "far.bin").write_bytes(b"x" * 4096)
    os.link(tmp_path / "far.bin", folder / "twin.bin")
    os.mkfifo(folder / "pipe")
    with open(folder / "large.bin", "wb") as stream:
        stream.truncate(2**31)
    report = lint_file(path)
    first = report.findings[0]
    assert (first.rule, first.severity) == ("external-data", ALL)
    assert message in first.reason
    assert report.errors == 1


def test_a_tensor_that_is_named_often_does_not_fill_the_memory(tmp_path):
    model = conv_then()
    del model.graph.initializer[:]
    with open(tmp_path / "w.bin", "wb") as stream:
        stream.truncate(2**29)
    for number in range(5):
        tensor = model.graph.initializer.add(name=f"t{number}", data_type=F32, dims=[2**27])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "GB of weights" in lint_file(tmp_path / "m.onnx").findings[0].reason


@pytest.mark.parametrize("content, message", [(b"", "no graph in it"), (b"not onnx at all", "readable|no graph"),
                                              (one("Relu").SerializeToString()[:-9], "readable|no graph")])
def test_what_is_no_onnx_file_is_said(tmp_path, content, message):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        lint_file(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="no such file"):
        lint_file(tmp_path / "none.onnx")


# ---- the command


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


def test_a_real_parser_is_asked_on_demand(tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx_bindings")
    onnx.save(top_k(300), tmp_path / "good.onnx")
    assert cli.run(["lint", str(tmp_path / "good.onnx"), "--parse", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["parse"]["built"] is True
    assert "says nothing about speed or numerics on a Jetson" in captured.err


def test_of_a_bundle_the_graphs_for_tensorrt_are_linted(tmp_path, capsys):
    manifest = Manifest("detr", (ClassInfo(0, 1, "a"),), InputContract(8, 8), OutputContract())
    bundle = Bundle.create(tmp_path / "b", manifest)
    for name, model in (("model.onnx", one("Relu")), ("model.int8.onnx", quantised_conv()),
                        ("model.int8-cpu.onnx", quantised_conv(zero=np.uint8(128)))):
        with bundle.add(name, stage="export") as path:
            path.write_bytes(model.SerializeToString())
    assert cli.run(["lint", str(bundle.path), "--json"]) == 0
    paths = [report["path"] for report in json.loads(capsys.readouterr().out)]
    assert [path.rsplit("/", 1)[1] for path in paths] == ["model.onnx", "model.int8.onnx"]
    assert cli.run(["lint", str(bundle.path / "model.int8-cpu.onnx")]) == 3
