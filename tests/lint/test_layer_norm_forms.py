"""LayerNormalization is found however it is written; each form is first shown to compute the same in ONNX Runtime."""

# ruff: noqa: E501  (a form is one line, as far as it goes)
from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.lint.lint import lint

SIZES, LAST = (2, 5, 8), 8
RNG = np.random.default_rng(3)
GAIN, SHIFT = RNG.uniform(0.5, 2, LAST).astype(np.float32), RNG.normal(size=LAST).astype(np.float32)
CONSTANTS = {
    "g": GAIN,
    "b": SHIFT,
    "eps": np.float32(1e-5),
    "two": np.float32(2),
    "half": np.float32(0.5),
    "minus_half": np.float32(-0.5),
    "one": np.float32(1),
    "n": np.float32(LAST),
    "last": np.array([-1]),
    "row": np.array([2, 5, 1]),
    "flat": np.array([10, 1, 8]),
    "whole": np.array([2, 5, 8]),
    "zero": np.float32(0),
    "ones1": np.ones(1, np.float32),
    "zeros1": np.zeros(1, np.float32),
    "inv": np.float32(1 / LAST),
}
END = "s = Mul(h, g); y = Add(s, b)"
DEVIATION = "v1 = Add(v, eps); r = Sqrt(v1)"
MEAN = "m = ReduceMean<axes=[-1]>(x); d = Sub(x, m); "
FORMS = {
    "pow": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); {END}",
    "mul": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); {END}",
    "reciprocal": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; i = Reciprocal(r); h = Mul(d, i); {END}",
    "one-over": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; i = Div(one, r); h = Mul(d, i); {END}",
    "power-minus-half": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); v1 = Add(v, eps); i = Pow(v1, minus_half); "
    f"h = Mul(d, i); {END}",
    "power-half": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); v1 = Add(v, eps); r = Pow(v1, half); h = Div(d, r); {END}",
    "eps-first": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); v1 = Add(eps, v); r = Sqrt(v1); h = Div(d, r); {END}",
    "moments": f"m = ReduceMean<axes=[-1]>(x); q = Mul(x, x); q1 = ReduceMean<axes=[-1]>(q); m2 = Mul(m, m); v = Sub(q1, m2); "
    f"{DEVIATION}; d = Sub(x, m); h = Div(d, r); {END}",
    "moments-held": f"m = ReduceMean<axes=[-1]>(x); q = Mul(x, x); q1 = ReduceMean<axes=[-1]>(q); m2 = Pow(m, two); "
    f"v0 = Sub(q1, m2); v = Max(v0, zero); {DEVIATION}; d = Sub(x, m); h = Div(d, r); {END}",
    "no-affine": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; y = Div(d, r)",
    "gain-only": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); y = Mul(h, g)",
    "gain-on-the-root": f"{MEAN}q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; i = Reciprocal(r); k = Mul(i, g); "
    "h = Mul(d, k); y = Add(h, b)",
    "scaled-and-shifted": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; i = Reciprocal(r); k = Mul(i, g); "
    "a = Mul(x, k); c = Mul(m, k); e = Sub(b, c); y = Add(a, e)",
    "reversed-operands": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); s = Mul(g, h); "
    "y = Add(b, s)",
    "sums": "t = ReduceSum(x, last); m = Div(t, n); d = Sub(x, m); q = Mul(d, d); t2 = ReduceSum(q, last); v = Mul(t2, inv); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "two-differences": "m = ReduceMean<axes=[-1]>(x); d = Sub(x, m); d2 = Sub(x, m); q = Mul(d2, d2); v = ReduceMean<axes=[-1]>(q); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "axes-as-input": f"m = ReduceMean(x, last); d = Sub(x, m); q = Mul(d, d); v = ReduceMean(q, last); {DEVIATION}; "
    f"h = Div(d, r); {END}",
    "positive-axis": f"m = ReduceMean<axes=[2]>(x); d = Sub(x, m); q = Mul(d, d); v = ReduceMean<axes=[2]>(q); {DEVIATION}; "
    f"h = Div(d, r); {END}",
    "unsqueeze": "m0 = ReduceMean<axes=[-1], keepdims=0>(x); m = Unsqueeze(m0, last); d = Sub(x, m); q = Mul(d, d); "
    f"v0 = ReduceMean<axes=[-1], keepdims=0>(q); v = Unsqueeze(v0, last); {DEVIATION}; h = Div(d, r); {END}",
    "reshape": "m0 = ReduceMean<axes=[-1], keepdims=0>(x); m = Reshape(m0, row); d = Sub(x, m); q = Mul(d, d); "
    f"v0 = ReduceMean<axes=[-1], keepdims=0>(q); v = Reshape(v0, row); {DEVIATION}; h = Div(d, r); {END}",
    "identity-between": f"m = ReduceMean<axes=[-1]>(x); d0 = Sub(x, m); d = Identity(d0); q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "instance-norm": f"f = Reshape(x, flat); k = InstanceNormalization(f, ones1, zeros1); h = Reshape(k, whole); {END}",
    "casts": "x1 = Cast<to=1>(x); m = ReduceMean<axes=[-1]>(x1); d = Sub(x1, m); q = Pow(d, two); v = ReduceMean<axes=[-1]>(q); "
    f"{DEVIATION}; h = Div(d, r); s = Mul(h, g); y1 = Add(s, b); y = Cast<to=1>(y1)",
}
LOOKALIKES = {
    "rms-norm": f"q = Mul(x, x); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(x, r); {END}",
    "softmax-by-hand": "m = ReduceMax<axes=[-1]>(x); d = Sub(x, m); e = Exp(d); t = ReduceSum(e, last); h = Div(e, t); y = Sqrt(h)",
    "variance-without-root": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); r = Add(v, eps); h = Div(d, r); {END}",
    "another-axis": "m = ReduceMean<axes=[1]>(x); d = Sub(x, m); q = Mul(d, d); v = ReduceMean<axes=[1]>(q); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "mean-over-the-batch": "m = ReduceMean<axes=[0]>(x); d = Sub(x, m); q = Mul(d, d); v = ReduceMean<axes=[0]>(q); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "mean-of-another-axis": "m = ReduceMean<axes=[1]>(x); d = Sub(x, m); q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); "
    f"{DEVIATION}; h = Div(d, r); {END}",
    "deviation-of-another": f"{MEAN}a = Abs(x); q = Mul(a, a); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); {END}",
    "l2-norm": "q = Mul(x, x); v = ReduceSum(q, last); v1 = Add(v, eps); r = Sqrt(v1); y = Div(x, r)",
    "distance": f"{MEAN}q = Mul(d, d); t = ReduceSum(q, last); y = Sqrt(t)",
    "mean-absolute": f"{MEAN}a = Abs(d); v = ReduceMean<axes=[-1]>(a); r = Sqrt(v); h = Div(d, r); {END}",
    "fourth-root": f"{MEAN}q = Mul(d, d); v = ReduceMean<axes=[-1]>(q); {DEVIATION}; r2 = Sqrt(r); h = Div(d, r2); {END}",
}


def written(body: str, kind: str = "float", opset: int = 17) -> ModelProto:
    nodes = "\n".join(line.strip() for line in body.split(";"))
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]> g ({kind}[2,5,8] x) => (float[2,5,8] y) {{ {nodes} }}'
    )
    read = {name for node in model.graph.node for name in node.input}
    constants = {**CONSTANTS, "g5": np.ones(5, np.float32)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read
    )
    return model


def found(model: ModelProto) -> int:
    return sum(finding.rule == "layer-norm" for finding in lint(model, ["jetpack-6"]))


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def reference(x: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """ONNX's own operator in ONNX Runtime."""
    model = written("y = LayerNormalization(x, g, b)")
    for tensor, value in zip(model.graph.initializer, (gain, shift)):
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return run(model, x)


def opset_of(name: str) -> int:
    return 18 if name == "axes-as-input" else 17


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_computes_layer_normalization_is_found_once(name):
    model = written(FORMS[name], opset=opset_of(name))
    x = RNG.normal(1, 3, SIZES).astype(np.float32)
    gain = GAIN if any(node.input[-1] == "g" or "g" in node.input for node in model.graph.node) else np.ones_like(GAIN)
    shift = SHIFT if any("b" in node.input for node in model.graph.node) else np.zeros_like(SHIFT)
    np.testing.assert_allclose(run(model, x), reference(x, gain, shift), atol=2e-5)  # float32 sums of 8 numbers
    assert found(model) == 1


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_computes_something_else_is_not_taken_for_it(name):
    model = written(LOOKALIKES[name])
    x = RNG.normal(1, 3, SIZES).astype(np.float32)
    got = run(model, x)
    normal = reference(x, np.ones_like(GAIN), np.zeros_like(SHIFT))
    # Not even a line of it, one for each of the last axis's elements: that would be its gain and shift.
    left = (
        [np.polyfit(normal[..., c].ravel(), got[..., c].ravel(), 1, full=True)[1] for c in range(got.shape[-1])]
        if got.shape == normal.shape
        else [np.ones(1)]
    )
    assert max(float(one.max(initial=0)) for one in left) > 1e-3
    assert found(model) == 0


def test_half_precision_with_casts_around_is_found_and_the_operator_itself_is_not():
    model = written(FORMS["casts"])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.node[-1].attribute[0].i = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert found(model) == 1


def test_one_operator_is_not_written_out():
    assert found(written("y = LayerNormalization(x, g, b)")) == 0
    assert found(written("k = InstanceNormalization(x, g5, g5); y = Mul(k, g)")) == 0


def test_an_open_batch_and_a_residual_before_it_change_nothing():
    model = written(
        "x0 = Mul(x, x); x1 = Add(x0, x); m = ReduceMean<axes=[-1]>(x1); d = Sub(x1, m); q = Mul(d, d); "
        f"v = ReduceMean<axes=[-1]>(q); {DEVIATION}; h = Div(d, r); s = Mul(h, g); y0 = Add(s, b); y = Relu(y0)"
    )
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert found(model) == 1
    two = helper.make_node("Identity", ["y"], ["z"])
    model.graph.node.append(two)
    assert found(model) == 1
