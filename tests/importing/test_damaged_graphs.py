"""Graphs that are no detectors, or damaged ones: one ExportError each, with what to do, and no file is left."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from planted_onnx import HEIGHT, WIDTH, convert, planted

from edgedetr.errors import EdgedetrError, ExportError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.onnx_model import import_onnx_model
from edgedetr.runtime.bundle_detector import load

pytest.importorskip("torch")


def refused(model: ModelProto, folder: Path, message: str, **asked) -> None:
    onnx.save(model, folder / "m.onnx")
    with pytest.raises(ExportError, match=message):
        import_onnx_model(folder / "m.onnx", folder / "b", ImportOptions(**asked))
    assert not (folder / "b").exists()


def branches(made, condition: str) -> str:
    """An If over the logits."""
    value = helper.make_tensor_value_info
    graphs = [
        helper.make_graph(
            [helper.make_node(op, ["l"], [f"{name}_r"])], name, [], [value(f"{name}_r", TensorProto.FLOAT, None)]
        )
        for name, op in (("then", "Identity"), ("other", "Neg"))
    ]
    made.nodes.append(
        helper.make_node("If", [condition], ["l2"], "the_if", then_branch=graphs[0], else_branch=graphs[1])
    )
    return "l2"


def test_a_branch_that_the_image_decides_is_refused_by_name(tmp_path):
    made = planted()
    made.add("Greater", "m", made.const("level", np.float32(0.1)), out="c")
    refused(made.model([branches(made, "c"), "b"]), tmp_path, "the_if is If: control flow .*fixed size")


def test_a_branch_that_the_size_decides_is_taken(tmp_path):
    made = planted()
    made.add("Shape", "pixel_values", out="s", start=3)
    made.add("Equal", "s", made.const("w", np.array([WIDTH])), out="c1")
    made.add("Squeeze", "c1", out="c")
    onnx.save(made.model([branches(made, "c"), "b"]), tmp_path / "m.onnx")
    result = import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")
    assert "If" not in {node.op_type for node in onnx.load(result.bundle.require("model.onnx")).graph.node}


def test_a_loop_is_refused_by_name(tmp_path):
    made = planted()
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["acc", "tiny"], ["next"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("acc", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, None)],
    )
    times = made.const("times", np.array(3))
    made.nodes.append(helper.make_node("Loop", [times, "", "l"], ["l2"], "the_loop", body=body))
    refused(made.model(["l2", "b"]), tmp_path, "the_loop is Loop: control flow")


def test_lists_of_tensors_are_refused_by_name(tmp_path):
    made = planted()
    made.add("SequenceConstruct", "l", "b", out="list")
    made.add("SequenceAt", "list", made.const("first", np.array(0)), out="l2")
    refused(made.model(["l2", "b"]), tmp_path, "SequenceConstruct: lists of tensors")


def test_text_is_refused(tmp_path):
    made = planted()
    model = made.model(["l", "b", ("names", TensorProto.STRING)])
    model.graph.initializer.append(helper.make_tensor("n0", TensorProto.STRING, [2], [b"cat", b"dog"]))
    model.graph.node.append(helper.make_node("Identity", ["n0"], ["names"], "text"))
    refused(model, tmp_path, "holds text")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.graph.ClearField("output"), "no outputs"),
        (lambda model: model.graph.ClearField("input"), "not valid ONNX"),
        (lambda model: model.graph.input[0].type.Clear(), "not valid ONNX|is no tensor"),
        (
            lambda model: model.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent(),
            "not valid|no tensor",
        ),
        (lambda model: model.graph.sparse_initializer.add(), "sparse|not valid"),
        (lambda model: model.opset_import[0].__setattr__("version", 400), "opset|ONNX"),
        (lambda model: model.opset_import[0].__setattr__("version", 1), "opset|ONNX"),
        (lambda model: model.graph.initializer[0].dims.append(7), "not valid ONNX|ONNX Runtime|size"),
        (lambda model: model.graph.node[2].__setattr__("op_type", "Addd"), "not valid ONNX"),
        (lambda model: model.graph.node[0].attribute[0].ints.append(9), "not valid ONNX"),
    ],
)
def test_a_damaged_graph_is_one_error(tmp_path, change, message):
    model = planted().model(["l", "b"])
    change(model)
    refused(model, tmp_path, message)


def test_an_input_of_unknown_role_is_named(tmp_path):
    extra = helper.make_tensor_value_info("prompt", TensorProto.FLOAT, [1, 5, 7])
    refused(planted().model(["l", "b"], extra=(extra,)), tmp_path, "input prompt float32 .1, 5, 7. is not known")


def test_a_size_of_the_original_image_as_an_input_becomes_a_constant(tmp_path):
    """RT-DETR's second input; here it scales the boxes of all queries."""
    made = planted()
    made.add("Cast", "orig_target_sizes", out="f", to=TensorProto.FLOAT)
    made.add("Concat", "f", "f", out="ff", axis=1)
    made.add("Mul", convert(made, "xyxy"), "ff", out="boxes")
    sizes = helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, [1, 2])
    onnx.save(made.model(["l", "boxes"], extra=(sizes,)), tmp_path / "m.onnx")
    result = import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")
    model = onnx.load(result.bundle.require("model.onnx"))
    assert [item.name for item in model.graph.input] == ["images"]
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    found = detector([np.zeros((HEIGHT, WIDTH, 3), np.uint8)])[0]
    np.testing.assert_allclose(found.xyxy[0], [0, 0, 0.2 * WIDTH, 0.24 * HEIGHT], atol=0.2)


def test_local_functions_are_written_into_the_graph(tmp_path):
    made = planted()
    made.nodes.append(helper.make_node("Squash", ["l"], ["p"], "call", domain="mine"))
    model = made.model(["p", "b"])
    model.functions.append(
        helper.make_function(
            "mine", "Squash", ["x"], ["y"], [helper.make_node("Sigmoid", ["x"], ["y"])], [helper.make_opsetid("", 17)]
        )
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(model, tmp_path / "m.onnx")
    result = import_onnx_model(tmp_path / "m.onnx", tmp_path / "b")
    assert result.activation == "sigmoid"
    assert not onnx.load(result.bundle.require("model.onnx")).functions


def mutated(raw: bytes, dice: random.Random) -> bytes:
    """Bytes changed, cut or repeated; or the message changed in its fields, which stays readable."""
    if dice.random() < 0.15:
        changed = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            offset = dice.randrange(len(changed))
            changed[offset : offset + dice.choice((0, 1, 1, 9))] = dice.choice((b"", b"\0", b"\xff" * 5, b"\x12\x34"))
        return bytes(changed)[: dice.choice((len(changed), len(changed), dice.randrange(len(changed))))]
    model = ModelProto.FromString(raw)
    graph = model.graph
    for _ in range(dice.randint(1, 2)):
        node = dice.choice(graph.node) if graph.node else None
        if node is None:
            break
        kind = dice.randrange(12)
        if kind == 0:
            node.op_type = dice.choice(
                (
                    "Shape",
                    "If",
                    "Loop",
                    "Reshape",
                    "TopK",
                    "Split",
                    "Constant",
                    "Gather",
                    "Cast",
                    "GridSample",
                    "Resize",
                    "NonZero",
                    "Concat",
                    "Attention",
                    "Sigmoid",
                    "",
                    "Ł",
                )
            )
        elif kind == 1 and node.input:
            node.input[dice.randrange(len(node.input))] = dice.choice(
                ("", "x", *(one.output[0] for one in graph.node if one.output))
            )
        elif kind == 2:
            node.ClearField(dice.choice(("attribute", "input", "output", "op_type", "name")))
        elif kind == 3 and node.attribute:
            item = dice.choice(node.attribute)
            item.type = dice.randrange(15)
        elif kind == 4 and node.attribute:
            item = dice.choice(node.attribute)
            item.i = dice.choice((-1, 7, 1 << 62))
            item.ints.append(dice.choice((-9, 0, 5)))
        elif kind == 5:
            graph.node.remove(node)
        elif kind == 6 and graph.initializer:
            tensor = dice.choice(graph.initializer)
            tensor.data_type = dice.randrange(25)
        elif kind == 7 and graph.initializer:
            tensor = dice.choice(graph.initializer)
            del tensor.dims[:]
            tensor.dims.extend(dice.choice(([], [0], [3], [-1], [1, 30, 4], [1 << 40, 1 << 40])))
        elif kind == 8 and graph.initializer:
            tensor = dice.choice(graph.initializer)
            shape = [min(max(size, 0), 50) for size in tensor.dims]
            value = np.full(shape, dice.choice((np.nan, np.inf, 0, -1)), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        elif kind == 9:
            dims = dice.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim
            if dims:
                dice.choice(dims).dim_value = dice.choice((-1, 0, 1, 5, 1 << 50))
        elif kind == 10:
            item = dice.choice([*graph.input, *graph.output])
            item.type.tensor_type.elem_type = dice.randrange(25)
        elif graph.output:
            dice.choice(graph.output).name = dice.choice(("", "b", "l", "pixel_values", "z"))
    return model.SerializeToString()


def sources() -> list[bytes]:
    plain = planted()
    probable = planted(softmax=True)
    probable.add("Softmax", "l", out="p")
    joined = planted()
    joined.add("Sigmoid", "l", out="p")
    joined.add("Concat", convert(joined, "xyxy", pixels=True), "p", out="o", axis=2)
    sampled = planted()
    sampled.add("GridSample", "pixel_values", sampled.const("g", np.zeros((1, 2, 2, 2), np.float32)), out="v")
    sampled.add("ReduceMean", "v", out="mm", keepdims=0)
    sampled.add("Shape", "l", out="s")
    sampled.add("Reshape", "l", "s", out="l1")
    sampled.add("Add", "l1", "mm", out="l2")
    return [
        model.SerializeToString()
        for model in (
            plain.model(["l", "b"]),
            probable.model(["p", "b"]),
            joined.model(["o"]),
            sampled.model(["l2", "b"], opset=20, ir=9),
        )
    ]


def fuzz(folder: Path, count: int, seed: int) -> int:
    """How many of the damaged files were imported after all; every other must be an EdgedetrError."""
    dice, raws, passed = random.Random(seed), sources(), 0
    for number in range(count):
        content = mutated(dice.choice(raws), dice)
        (folder / "m.onnx").write_bytes(content)
        try:
            import_onnx_model(
                folder / "m.onnx", folder / f"b{number}", ImportOptions(activation="sigmoid" if number % 2 else None)
            )
            passed += 1
        except EdgedetrError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {number}: {type(error).__name__}") from error
    return passed


def test_damaged_files_end_in_one_error_of_ours(tmp_path):
    assert fuzz(tmp_path, 60, seed=1) < 60


@pytest.mark.slow
def test_many_damaged_files_end_in_one_error_of_ours(tmp_path):
    assert fuzz(tmp_path, 5000, seed=2) < 5000


def test_nodes_may_be_in_any_order_but_not_in_a_cycle(tmp_path):
    """Converters to float16 append their casts behind the nodes that read them; ONNX Runtime takes that."""
    made = planted()
    made.add("Sigmoid", "l", out="p")
    model = made.model(["p", "b"])
    backwards = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    onnx.save(model, tmp_path / "m.onnx")
    assert import_onnx_model(tmp_path / "m.onnx", tmp_path / "good").activation == "sigmoid"
    next(node for node in model.graph.node if node.op_type == "Mul").input[0] = "p"
    refused(model, tmp_path, "not valid ONNX .*topologically")
