"""GridSample written as gathers gives the same numbers as the operator and as PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph_of, run_model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.fold import fold_at_fixed_size
from edgedetr.onnx_graph.grid_sample import replace_grid_samples

torch = pytest.importorskip("torch")


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
    expected = run_model(model, x=values)[0]
    assert replace_grid_samples(model) == 1
    assert "GridSample" not in {item.op_type for item in model.graph.node}
    # float32: locations are scaled in another order; measured 2e-6 on values around 1
    np.testing.assert_allclose(run_model(model, x=values)[0], expected, atol=2e-5)
    torch_grid, torch_values = (torch.from_numpy(value.astype(np.float32)) for value in (grid, values))
    reference = torch.nn.functional.grid_sample(torch_values, torch_grid, mode, padding, align_corners=bool(align))
    np.testing.assert_allclose(run_model(model, x=values)[0], reference.numpy(), atol=2e-5)


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


def test_a_sampling_whose_sizes_cannot_be_inferred_is_rewritten(rng):
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
    expected = run_model(model, x=image)[0]
    assert expected.shape == (1, 4, 2, 3)
    unfolded = ModelProto.FromString(model.SerializeToString())
    assert replace_grid_samples(unfolded) == 1
    np.testing.assert_allclose(run_model(unfolded, x=image)[0], expected, atol=2e-5)
    folded = fold_at_fixed_size(model)
    assert {node.op_type for node in folded.graph.node} == {"GridSample"}
