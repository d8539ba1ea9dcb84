"""Surgery on external graphs keeps their results."""

from __future__ import annotations

import numpy as np
import pytest
from external_models import open_session
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.importing.surgery import annotate_nodes, fold_scales, name_nodes
from edgedetr.onnx_graph.fold import fold, fold_at_fixed_size
from edgedetr.onnx_graph.grid_sample import replace_grid_samples
from edgedetr.onnx_graph.opset import convert_opset
from edgedetr.quantization.policy import get_role

torch = pytest.importorskip("torch")


def run(model: ModelProto, **feed) -> list[np.ndarray]:
    return open_session(model.SerializeToString()).run(None, feed)


def graph_of(nodes, constants, shape=(1, 4, 6, 6), opset=17, name="x") -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["batch-norm", "mul-add", "scalar", "flat"])
def test_scales_are_folded_into_the_convolution(form, biased, rng):
    constants = {"w": rng.normal(size=(5, 4, 3, 3)), **({"wb": rng.normal(size=5)} if biased else {})}
    nodes = [helper.make_node("Conv", ["x", "w", *(["wb"] if biased else [])], ["c"], "conv")]
    if form == "batch-norm":
        constants |= {
            "g": rng.normal(size=5),
            "s": rng.normal(size=5),
            "m": rng.normal(size=5),
            "v": rng.uniform(0.1, 2, 5),
        }
        nodes.append(helper.make_node("BatchNormalization", ["c", "g", "s", "m", "v"], ["n"], "norm", epsilon=1e-3))
    else:
        shape = {"mul-add": (1, 5, 1, 1), "scalar": (), "flat": (5, 1, 1)}[form]
        constants |= {"g": rng.normal(size=shape), "s": rng.normal(size=shape)}
        nodes += [helper.make_node("Mul", ["g", "c"], ["k"], "mul"), helper.make_node("Add", ["k", "s"], ["n"], "add")]
    model = graph_of([*nodes, helper.make_node("Relu", ["n"], ["y"], "relu")], constants)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    before = run(model, x=image)[0]
    assert fold_scales(model) == len(nodes) - 1
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    # float32 rounding of weights that were folded in float64; values are around 10
    np.testing.assert_allclose(run(model, x=image)[0], before, atol=1e-4)


def test_what_is_read_twice_or_is_no_scale_stays(rng):
    shared = graph_of(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("Mul", ["c", "g"], ["k"], "m"),
            helper.make_node("Add", ["k", "c"], ["y"], "a"),
        ],
        {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 5, 1, 1))},
    )
    assert fold_scales(shared) == 0
    along_width = graph_of(
        [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), helper.make_node("Mul", ["c", "g"], ["y"], "m")],
        {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 1, 1, 4))},
    )
    assert fold_scales(along_width) == 0


@pytest.mark.parametrize("mode, older", [("linear", b"bilinear"), ("cubic", b"bicubic"), ("nearest", b"nearest")])
def test_the_modes_of_grid_sample_are_renamed_on_the_way_down(mode, older, rng):
    grid = rng.uniform(-1.1, 1.1, (1, 3, 5, 2))
    model = graph_of([helper.make_node("GridSample", ["x", "g"], ["y"], "s", mode=mode)], {"g": grid}, opset=20)
    model.ir_version = 9
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    expected = run(model, x=image)[0]
    lower = convert_opset(model, 19)
    assert lower.graph.node[0].attribute[0].s == older
    assert (lower.ir_version, lower.opset_import[0].version) == (9, 19)
    np.testing.assert_array_equal(run(lower, x=image)[0], expected)


def test_an_older_file_is_converted_upwards(rng):
    model = graph_of([helper.make_node("ReduceMean", ["x"], ["y"], "mean", axes=[2, 3])], {}, opset=13)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    lifted = convert_opset(model, 19)
    assert lifted.opset_import[0].version == 19
    np.testing.assert_array_equal(run(lifted, x=image)[0], run(model, x=image)[0])


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize(
    "mode, padding", [("bilinear", "zeros"), ("bilinear", "border"), ("nearest", "zeros"), ("nearest", "border")]
)
@pytest.mark.parametrize("shape, points", [((1, 4, 6, 6), (3, 5)), ((1, 3, 1, 7), (4, 1)), ((2, 2, 5, 1), (1, 6))])
def test_gathers_give_the_numbers_of_grid_sample(shape, points, mode, padding, align, rng):
    grid = rng.uniform(-1.4, 1.4, (shape[0], *points, 2))
    grid.reshape(-1)[:6] = [-1, 1, 0, 0, 1, -1]  # the borders and the middle exactly
    node = helper.make_node("GridSample", ["x", "g"], ["y"], "s", mode=mode, padding_mode=padding, align_corners=align)
    model = graph_of([node], {"g": grid}, shape=shape, opset=19)
    values = rng.normal(size=shape).astype(np.float32)
    expected = run(model, x=values)[0]
    assert replace_grid_samples(model) == 1
    assert "GridSample" not in {item.op_type for item in model.graph.node}
    # float32: places are scaled in another order; measured 2e-6 on values around 1
    np.testing.assert_allclose(run(model, x=values)[0], expected, atol=2e-5)
    torch_grid, torch_values = (torch.from_numpy(value.astype(np.float32)) for value in (grid, values))
    oracle = torch.nn.functional.grid_sample(torch_values, torch_grid, mode, padding, align_corners=bool(align))
    np.testing.assert_allclose(run(model, x=values)[0], oracle.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    "attributes, shape, message",
    [
        ({"mode": "bicubic"}, (1, 4, 6, 6), "GridSample the_sample has mode 'bicubic'"),
        ({"padding_mode": "reflection"}, (1, 4, 6, 6), "GridSample the_sample has padding_mode 'reflection'"),
        ({}, (1, 4, 5, 6, 6), "GridSample the_sample takes \\[1, 4, 5, 6, 6\\]"),
    ],
)
def test_a_sampling_that_cannot_be_written_as_gathers_is_named(attributes, shape, message, rng):
    node = helper.make_node("GridSample", ["x", "g"], ["y"], "the_sample", **attributes)
    sides = len(shape) - 2
    grid = rng.uniform(-1, 1, (1, *[2] * sides, sides))
    model = graph_of([node], {"g": grid}, shape=shape, opset=20 if sides == 3 else 19)
    with pytest.raises(ExportError, match=message):
        replace_grid_samples(model)


def test_sizes_that_no_inference_tells_do_not_keep_a_sampling(rng):
    """The grid's size is computed from the image's through Shape with start and end, which data propagation loses."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"], "shape", start=2, end=4),
        helper.make_node("Cast", ["sides"], ["real"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "third"], ["less"], "mul"),
        helper.make_node("Cast", ["less"], ["whole"], "back", to=TensorProto.INT64),
        helper.make_node("Concat", ["one", "whole", "two"], ["size"], "concat", axis=0),
        helper.make_node("Expand", ["g", "size"], ["grid"], "expand"),
        helper.make_node("GridSample", ["x", "grid"], ["y"], "s", align_corners=0),
    ]
    model = graph_of(nodes, {"g": rng.uniform(-1, 1, (1, 1, 1, 2)), "third": [1 / 3, 0.5]}, opset=19)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([1]), "one"), numpy_helper.from_array(np.array([2]), "two")]
    )
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    expected = run(model, x=image)[0]
    assert expected.shape == (1, 4, 2, 3)
    unfolded = ModelProto.FromString(model.SerializeToString())
    assert replace_grid_samples(unfolded) == 1
    np.testing.assert_allclose(run(unfolded, x=image)[0], expected, atol=2e-5)
    folded = fold_at_fixed_size(model)
    assert {node.op_type for node in folded.graph.node} == {"GridSample"}


@pytest.mark.parametrize("part", [{}, {"start": 1}, {"start": -2}, {"end": -1}, {"start": 1, "end": 3}, {"start": 9}])
def test_a_part_of_a_shape_is_folded(part):
    model = graph_of(
        [
            helper.make_node("Shape", ["x"], ["s"], "shape", **part),
            helper.make_node("Cast", ["s"], ["f"], "cast", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["f"], ["t"], "sum", keepdims=0),
            helper.make_node("Add", ["x", "t"], ["y"], "add"),
        ],
        {},
        shape=(1, 4, 6, 5),
        opset=19,
    )
    image = np.zeros((1, 4, 6, 5), np.float32)
    folded = fold(model)
    assert [node.op_type for node in folded.graph.node] == ["Add"]
    np.testing.assert_array_equal(run(folded, x=image)[0], run(model, x=image)[0])
    assert run(model, x=image)[0].flat[0] == sum((1, 4, 6, 5)[part.get("start") : part.get("end")])


@pytest.mark.parametrize("shape, doubled", [((1, 1, 3), False), ((1, 2, 3), True)])
def test_a_branch_that_the_size_decides_is_taken(shape, doubled):
    """TorchScript writes squeeze of an open size as If; it reads tensors from outside, and its names are used twice."""
    x = helper.make_tensor_value_info
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["x", "k"], ["inner"]), helper.make_node("Identity", ["inner"], ["r"])],
            name,
            [],
            [x("r", TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Add"), ("else", "Mul"))
    ]
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape", start=1, end=2),
        helper.make_node("Equal", ["s", "one"], ["c"], "equal"),
        helper.make_node("Squeeze", ["c"], ["b"], "squeeze"),
        helper.make_node("Add", ["two", "half"], ["k"], "constant"),
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = graph_of(nodes, {"two": 2, "half": 0.5}, shape=shape, opset=19)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    image = np.ones(shape, np.float32)
    folded = fold(model)
    assert folded.graph.node[0].op_type == ("Mul" if doubled else "Add")
    assert "If" not in {node.op_type for node in folded.graph.node}
    np.testing.assert_array_equal(run(folded, x=image)[0], np.full(shape, 2.5 if doubled else 3.5))


def test_a_branch_that_the_image_decides_keeps_what_it_reads():
    x = helper.make_tensor_value_info
    results = [x("r", TensorProto.FLOAT, None)]
    branches = [
        helper.make_graph([helper.make_node(op, ["alias", "k"], ["r"])], name, [], results)
        for name, op in (("then", "Add"), ("else", "Mul"))
    ]
    nodes = [
        helper.make_node("Identity", ["x"], ["alias"], "alias"),
        helper.make_node("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        helper.make_node("Greater", ["m", "half"], ["b"], "greater"),
        helper.make_node("Add", ["two", "half"], ["k"], "constant"),
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = graph_of(nodes, {"two": 2, "half": 0.5}, opset=19)
    folded = fold(model)
    for value in (0.0, 1.0):
        image = np.full((1, 4, 6, 6), value, np.float32)
        np.testing.assert_array_equal(run(folded, x=image)[0], run(model, x=image)[0])


def test_every_node_gets_a_name_of_its_own():
    model = graph_of(
        [
            helper.make_node("Relu", ["x"], ["a"], "same"),
            helper.make_node("Relu", ["a"], ["b"], "same"),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        {},
    )
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[0] == "same"
    assert len(set(names)) == 3
    assert all(names)


def test_roles_follow_from_rows_and_paths_and_from_names_of_our_own_exports():
    """Five tokens of four channels; the two with the best scores become queries."""
    nodes = [
        helper.make_node("Relu", ["x"], ["tokens"], "backbone"),
        helper.make_node("MatMul", ["tokens", "w1"], ["projected"], "/selector/project/MatMul"),
        helper.make_node("MatMul", ["projected", "w1"], ["scores"], "score_head"),
        helper.make_node("ReduceMax", ["scores"], ["best"], "best", axes=[2], keepdims=0),
        helper.make_node("TopK", ["best", "k"], ["top", "index"], "top_k"),
        helper.make_node("Gather", ["projected", "index"], ["picked"], "pick", axis=1),
        helper.make_node("Squeeze", ["picked", "one"], ["queries"], "squeeze"),
        helper.make_node("MatMul", ["queries", "w1"], ["hidden"], "layer"),
        helper.make_node("MatMul", ["tokens", "w1"], ["values"], "memory"),
        helper.make_node("ReduceMean", ["values"], ["mean"], "pool", axes=[1], keepdims=1),
        helper.make_node("Add", ["hidden", "mean"], ["y"], "add"),
    ]
    constants = {
        "w1": numpy_helper.from_array(np.eye(4, dtype=np.float32), "w1"),
        "k": numpy_helper.from_array(np.array([2]), "k"),
        "one": numpy_helper.from_array(np.array([0]), "one"),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    annotate_nodes(model, 2)
    assert {node.name: get_role(node) for node in model.graph.node} == {
        "backbone": "",
        "/selector/project/MatMul": "memory_projection",
        "score_head": "query_selection",
        "best": "query_selection",
        "top_k": "query_selection",
        "pick": "query_selection",
        "squeeze": "decoder",
        "layer": "decoder",
        "memory": "",
        "pool": "",
        "add": "decoder",
    }
