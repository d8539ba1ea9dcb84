"""The ONNX file: opset, batch, determinism, parity with PyTorch, and the folding of constants."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.exporting.to_onnx import compare_with_pytorch, write_onnx
from edgedetr.models.deploy import DeployGraph, load_bundle_model
from edgedetr.models.selection import OtherSelections, Selection
from edgedetr.onnx_graph.bundle_graph import check_graph
from edgedetr.onnx_graph.fold import fold
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.runtime.backends.onnxruntime import OrtRunner


@pytest.fixture(scope="module", params=["detr", "rt_detr"])
def case(request, fresh, tmp_path_factory):
    bundle = fresh(request.param, tmp_path_factory.mktemp("onnx") / "b.bundle")
    return bundle, *load_bundle_model(bundle)


@pytest.fixture(scope="module")
def static(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "model.onnx"
    write_onnx(case[2], path, metadata={"note": "ü"})
    return path


def noise_images(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, 3, 64, 64)).astype(np.float32)


def test_opset_is_19_names_are_ours_and_nothing_is_left_to_compute_from_shapes(static):
    model = onnx.load(static)
    check_graph(model)
    kinds = {node.op_type for node in model.graph.node}
    assert kinds & {"Shape", "Constant", "Identity", "ConstantOfShape", "Range", "BatchNormalization"} == set()
    assert model.ir_version <= 10  # what ONNX Runtime 1.20 reads
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 64]
    assert {item.key: item.value for item in model.metadata_props} == {"edgedetr.note": "ü"}
    assert all(node.name.startswith("/detector/") for node in model.graph.node if node.op_type in ("Conv", "MatMul"))


def test_the_same_weights_give_the_same_bytes(case, static, tmp_path):
    write_onnx(case[2], tmp_path / "again.onnx", metadata={"note": "ü"})
    assert (tmp_path / "again.onnx").read_bytes() == static.read_bytes()


def test_parity_holds_for_the_graph_and_fails_for_another(case, static, tmp_path):
    _, detector, graph = case
    found = compare_with_pytorch(graph, static, noise_images(3))
    assert found.logits < 1e-3
    assert found.boxes < 1e-4
    other = DeployGraph(detector, 64, 64)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if "decoder" in name:
                value.mul_(1.1)
    with pytest.raises(ExportError, match="differs from PyTorch by up to"):
        compare_with_pytorch(other, static, noise_images(3))


def test_cells_of_nearly_equal_scores_may_be_selected_in_another_order(fresh, tmp_path):
    """As after a few steps from random weights; the graph is the same detector all the same."""
    _, graph = load_bundle_model(fresh("rt_detr", tmp_path / "b"))
    with torch.no_grad():
        graph.detector.selector.score.weight.mul_(1e-5)
    write_onnx(graph, tmp_path / "model.onnx")
    images = noise_images(3)
    found = compare_with_pytorch(graph, tmp_path / "model.onnx", images)
    assert found.logits < 1e-3 and found.boxes < 1e-4 and found.selection < 1e-4
    apart = 0.0
    with torch.no_grad():
        for image in images:
            alone = OrtRunner(tmp_path / "model.onnx", threads=1).run(image[None])
            apart = max(apart, float(np.abs(graph(torch.from_numpy(image[None]))[1].numpy() - alone.boxes).max()))
    assert apart > 0.01, "the order is the same here; the test needs scores that are closer to each other"


def test_a_graph_that_selects_other_cells_is_refused(fresh, tmp_path):
    _, graph = load_bundle_model(fresh("rt_detr", tmp_path / "b"))
    write_onnx(graph, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    (node,) = (node for node in model.graph.node if node.op_type == "TopK")
    (largest,) = (attribute for attribute in node.attribute if attribute.name == "largest")
    largest.i = 0
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="in the score of a selected cell"):
        compare_with_pytorch(graph, tmp_path / "model.onnx", noise_images(1))


def test_a_graph_with_one_selection_more_than_pytorch_is_refused(fresh, tmp_path):
    _, graph = load_bundle_model(fresh("rt_detr", tmp_path / "b"))
    write_onnx(graph, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    (node,) = (node for node in model.graph.node if node.op_type == "TopK")
    again = model.graph.node.add()
    again.CopyFrom(node)
    again.name, again.output[:] = "again", ["values again", "cells again"]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="selects cells 2 times, and PyTorch otherwise"):
        compare_with_pytorch(graph, tmp_path / "model.onnx", noise_images(1))


@pytest.mark.parametrize("calls", [1, 3])
def test_fewer_and_more_selections_than_were_given_are_an_error(calls):
    selection = Selection([torch.tensor([[0]]), torch.tensor([[1]])])
    with pytest.raises(OtherSelections, match="expected"):
        with selection:
            for _ in range(calls):
                torch.tensor([[1.0, 2.0]]).topk(1, dim=1)


def test_a_nan_among_the_scores_is_not_taken_for_equal():
    selection = Selection([torch.tensor([[0, 1]])])
    with selection:
        torch.tensor([[float("nan"), 1.0, 0.5]]).topk(2, dim=1)
    assert np.isnan(selection.gap)


@pytest.mark.parametrize("member", ["rt_detr", "detr"])
def test_open_batch_gives_identical_images_identical_rows_and_equals_batch_one(member, fresh, tmp_path):
    _, graph = load_bundle_model(fresh(member, tmp_path / "b"))
    static, path = tmp_path / "static.onnx", tmp_path / "open.onnx"
    write_onnx(graph, static)
    write_onnx(graph, path, batch=None)
    runner = OrtRunner(path, threads=1)
    assert runner.batch is None
    model = onnx.load(path)
    check_graph(model)
    plan, fixed = (make_plan(GraphIndex(split_concats(m)), load_policy("default")) for m in (model, onnx.load(static)))
    assert len(plan.layers) == len(fixed.layers), "the policy must know the nodes by name here too"
    one, other = noise_images(2)
    found = runner.run(np.stack([one, one, other, one]))
    for values in (found.logits, found.boxes):
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0], values[3])
    alone = OrtRunner(static, threads=1).run(other[None])
    # Another batch size may take another kernel: float32 order of summation.
    np.testing.assert_allclose(found.logits[2:3], alone.logits, atol=1e-3)
    np.testing.assert_allclose(found.boxes[2:3], alone.boxes, atol=1e-4)


class TwoRows(torch.nn.Module):
    """Answers for two images, however many are asked about, as a tracer leaves it that took its example for all."""

    height = width = 64

    def __init__(self, graph: DeployGraph) -> None:
        super().__init__()
        self.graph = graph

    @property
    def detector(self):
        return self.graph.detector

    def forward(self, images):
        logits, boxes = self.graph(images[:1])
        return logits.repeat(2, 1, 1), boxes.repeat(2, 1, 1)


def test_an_open_batch_that_the_tracer_fixed_is_not_taken_for_equal(fresh, tmp_path):
    bundle = fresh("detr", tmp_path / "b")
    _, graph = load_bundle_model(bundle)
    write_onnx(graph, tmp_path / "open.onnx", batch=None)
    found = compare_with_pytorch(graph, tmp_path / "open.onnx", noise_images(1))
    assert found.logits < 1e-3 and found.boxes < 1e-4 and found.selection == 0
    write_onnx(TwoRows(graph), tmp_path / "fixed.onnx", batch=None)
    with pytest.raises(ExportError, match="2 results for 1 images"):
        compare_with_pytorch(graph, tmp_path / "fixed.onnx", noise_images(1))


def test_both_ways_of_sampling_give_the_same_detector(fresh, tmp_path):
    bundle = fresh("rt_detr", tmp_path / "b")
    detector, graph = load_bundle_model(bundle)
    write_onnx(DeployGraph(detector, 64, 64, "grid_sample"), tmp_path / "grid.onnx")
    nodes = onnx.load(tmp_path / "grid.onnx").graph.node
    modes = [item.s for node in nodes if node.op_type == "GridSample" for item in node.attribute if item.name == "mode"]
    assert len(modes) >= 2
    assert set(modes) == {b"bilinear"}
    compare_with_pytorch(graph, tmp_path / "grid.onnx", noise_images(2))


def test_a_wrong_opset_or_sampling_mode_is_refused(static):
    model = onnx.load(static)
    model.graph.node.append(helper.make_node("GridSample", ["images", "boxes"], ["x"], "sample", mode="linear"))
    with pytest.raises(ExportError, match="mode 'linear'; expected 'bilinear'"):
        check_graph(model)
    model.opset_import[0].version = 20
    with pytest.raises(ExportError, match="expected 19"):
        check_graph(model)


def model_of(nodes, constants, shape):
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def evaluate(model, x):
    for item in model.graph.output:
        item.type.tensor_type.ClearField("shape")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


RESHAPE = [
    helper.make_node("Shape", ["x"], ["s"]),
    helper.make_node("Gather", ["s", "i2"], ["h"]),
    helper.make_node("Gather", ["s", "i3"], ["w"]),
    helper.make_node("Mul", ["h", "w"], ["hw"]),
    helper.make_node("Unsqueeze", ["hw", "zero"], ["hw1"]),
    helper.make_node("Gather", ["s", "i0"], ["b"]),
    helper.make_node("Unsqueeze", ["b", "zero"], ["b1"]),
    helper.make_node("Concat", ["b1", "minus", "hw1"], ["to"], axis=0),
    helper.make_node("Reshape", ["x", "to"], ["r"]),
    helper.make_node("Identity", ["r"], ["q"]),
    helper.make_node("Exp", ["c"], ["ec"]),
    helper.make_node("Add", ["q", "ec"], ["y"]),
]
SHAPES = {
    "i0": np.int64(0),
    "i2": np.int64(2),
    "i3": np.int64(3),
    "zero": np.array([0]),
    "minus": np.array([-1]),
    "c": np.float32(0.5),
}


def test_shape_arithmetic_and_constants_fold_away_at_a_fixed_size(rng):
    model = model_of(RESHAPE, SHAPES, [2, 3, 4, 5])
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    folded = fold(model)
    assert [node.op_type for node in folded.graph.node] == ["Reshape", "Add"]
    np.testing.assert_allclose(evaluate(folded, x), x.reshape(2, 3, 20) + np.exp(0.5), atol=1e-6)  # float32


def test_an_open_batch_stays_open_and_the_rest_folds(rng):
    folded = fold(model_of(RESHAPE, SHAPES, ["batch", 3, 4, 5]))
    assert [node.op_type for node in folded.graph.node] == ["Reshape", "Add"]
    for batch in (1, 3):
        x = rng.normal(size=(batch, 3, 4, 5)).astype(np.float32)
        np.testing.assert_allclose(evaluate(folded, x), x.reshape(batch, 3, 20) + np.exp(0.5), atol=1e-6)


# As the exporter writes w.expand(x.shape[0], -1, -1).reshape(x.shape[0], 6): 1 is what Expand takes for "as it is".
EXPAND = [
    helper.make_node("Shape", ["x"], ["s"]),
    helper.make_node("Gather", ["s", "i0"], ["b"]),
    helper.make_node("Unsqueeze", ["b", "zero"], ["b1"]),
    helper.make_node("Concat", ["b1", "minus", "minus"], ["sizes"], axis=0),
    helper.make_node("Reshape", ["sizes", "minus"], ["row"]),
    helper.make_node("Equal", ["row", "all"], ["is_minus"]),
    helper.make_node("Where", ["is_minus", "ones", "row"], ["to"]),
    helper.make_node("Expand", ["w", "to"], ["e"]),
    helper.make_node("Concat", ["b1", "minus"], ["flat"], axis=0),
    helper.make_node("Reshape", ["e", "flat"], ["r"]),
    helper.make_node("ReduceSum", ["x", "one"], ["m"], keepdims=1),
    helper.make_node("Add", ["r", "m"], ["y"]),
]


@pytest.mark.parametrize(
    "batch, kinds",
    [
        (2, ["ReduceSum", "Add"]),
        ("batch", ["Shape", "Gather", "Unsqueeze", "Concat", "Expand", "Reshape", "ReduceSum", "Add"]),
    ],
)
def test_an_expand_to_the_batch_keeps_nothing_but_the_batch(rng, batch, kinds):
    weight = rng.normal(size=(1, 2, 3)).astype(np.float32)
    constants = {**SHAPES, "all": np.full(3, -1), "ones": np.ones(3, np.int64), "one": np.array([1]), "w": weight}
    folded = fold(model_of(EXPAND, constants, [batch, 4]))
    assert [node.op_type for node in folded.graph.node] == kinds
    for count in (2,) if batch == 2 else (1, 2, 5):
        x = rng.normal(size=(count, 4)).astype(np.float32)
        expected = np.tile(weight.reshape(1, 6), (count, 1)) + x.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(evaluate(folded, x), expected, atol=1e-6)


def test_random_numbers_are_not_folded():
    nodes = [helper.make_node("RandomNormal", [], ["n"], shape=[2, 2]), helper.make_node("Add", ["x", "n"], ["y"])]
    assert [node.op_type for node in fold(model_of(nodes, {}, [2, 2])).graph.node] == ["RandomNormal", "Add"]
