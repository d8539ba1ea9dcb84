"""Realized precision is counted from the inspector's text, in the form of TensorRT 10 and of 11."""

from __future__ import annotations

import json

import pytest

from edgedetr.errors import EngineError
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary, summarize_layers

# (layer type, name, datatype of the first input as 10.x words it, as 11.x words it)
LAYERS = [
    ("CaskConvolution", "/backbone/conv1", "Thirty-two wide channel vectorized row major Int8 format", "Int8"),
    ("CaskGemmConvolution", "/encoder/fc", "Channel major FP16 format where channel % 8 == 0", "Half"),
    ("CaskConvolution", "/head", "Row major linear FP32", "Float"),
    ("Reformat", "Reformatting CopyNode for Input", "Row major linear FP32", "Float"),
    ("Reformat", "Reformatting CopyNode for Output", "Row major linear FP16 format", "Half"),
    ("ForeignNode", "{ForeignNode[/decoder/MatMul.../decoder/Add]}", "Row major linear FP16 format", "Half"),
    ("ForeignNode", "{ForeignNode[/post/Sigmoid.../post/Mul]}", "Row major linear FP16 format", "Half"),
    ("PointWise", "/neck/Add", "Row major linear FP16 format", "BF16"),
    ("TopK", "/select/TopK", "Row major Int32 format", "Int32"),
    ("Gather", "/select/Gather", "Row major linear INT8 format", "Int64"),  # how TensorRT 10 words INT64
    ("gemm", "/encoder/layers_0/ff/MatMul_myl0_7", "Half", "Half"),  # inside Myelin
    ("kgen", "__myl_MeanSubMul /convolutional/attention/LayerNormalization", "Half", "Half"),
    ("fusion", "__myl_Fc_myl0_69 [ONNX Layer: /layers.9/dense/MatMul][ONNX Layer: /layers.9/Erf]", "Int8", "Int8"),
    ("CaskConvActPool", "conv0 + relu0 + pool0", "Row major Int8 format", "Int8"),
    ("NoOp", "/reshape", "Row major linear FP32", "Float"),
    ("Constant", "/anchors", "Row major linear FP32", "Float"),
]
EXPECTED = LayerSummary(
    precision={"int8": 3, "fp16": 6, "fp32": 1, "other": 2}, weighted={"int8": 3, "fp16": 3, "fp32": 1}, reformats=2
)


def in_words_of(version: int) -> str:
    def tensor(old: str, new: str) -> dict[str, object]:
        base = {"Name": "t", "Location": "Device", "Dimensions": [1, 8, 4, 4]}
        return {**base, "Format/Datatype": old} if version == 10 else {**base, "Format": "Row major", "Datatype": new}

    layers = [
        {
            "Name": name,
            "LayerType": kind,
            "Inputs": [tensor(old, new)],
            "Outputs": [tensor(old, new)],
            "TacticName": "sm80_xmma_int8_float",
        }
        for kind, name, old, new in LAYERS
    ]
    return json.dumps({"Layers": layers, "Bindings" if version == 10 else "I/O Tensors": ["images"]})


@pytest.mark.parametrize("version", [10, 11])
def test_both_forms_of_the_inspector_give_the_same_counts(version):
    found = summarize_layers(in_words_of(version))
    assert found == EXPECTED
    assert found.layers == 12 and found.fraction("int8") == 3 / 7 and found.fraction("fp8") == 0


@pytest.mark.parametrize(
    "weights, inputs, expected",
    [
        ("Int8", ["Int8", "Half"], "int8"),  # the residual comes in as FP16
        ("Half", ["Half", "Int8"], "fp16"),
        ("Float", ["Float"], "fp32"),
        (None, ["Half", "Int8"], "int8"),
    ],
)
def test_the_type_of_the_weights_decides_where_the_inspector_gives_it(weights, inputs, expected):
    layer = {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": text} for text in inputs], "Outputs": []}
    if weights:
        layer["Weights"] = {"Type": weights, "Count": 864}
    assert summarize_layers(json.dumps({"Layers": [layer]})).weighted == {expected: 1}


def test_a_layer_without_inputs_counts_by_its_outputs_and_names_alone_are_unknown():
    fill = {"LayerType": "Fill", "Inputs": [], "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}
    found = summarize_layers(json.dumps({"Layers": [fill, "only a name"]}))
    assert found.precision == {"fp32": 1, "unknown": 1} and found.fraction("int8") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}', "not json", "null"])
def test_an_answer_without_layers_is_one_error(text):
    with pytest.raises(EngineError, match="inspector answered something unreadable"):
        summarize_layers(text)
