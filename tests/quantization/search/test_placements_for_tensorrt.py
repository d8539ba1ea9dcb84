"""TensorRT takes every graph that a search can produce: ten random placements, by lint and by NVIDIA's parser."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from members import exported

from edgedetr.lint.lint import require_no_errors
from edgedetr.lint.rtx import check_all
from edgedetr.onnx_graph.fp16 import convert_to_fp16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import int8_graph
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import TENSORRT

HAS_RTX = any(map(find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings")))


def random_graphs(member: str, count: int) -> list[onnx.ModelProto]:
    """INT8 graphs for TensorRT of random sets of groups, from one group to all of them."""
    rng = np.random.default_rng(0)
    model, policy = split_concats(onnx.load(exported(member))), load_policy("default")
    graph = GraphIndex(model)
    groups = groups_of(graph, policy)
    everything = plan_for(graph, policy, Placement(tuple(group.id for group in groups)))
    amax = dict.fromkeys(tensors_to_observe(graph, everything), 4.0)
    made = []
    for share in np.linspace(0, 1, count):
        chosen = tuple(group.id for group in groups if rng.random() < share) or (groups[0].id,)
        result = int8_graph(graph, plan_for(graph, policy, Placement(chosen)), amax, TENSORRT)
        made.append(convert_to_fp16(result, {}, policy.float32_nodes(result)).model)
    return made


def test_lint_takes_ten_random_placements():
    for number, model in enumerate(random_graphs("rt_detr", 10)):
        require_no_errors(model, f"placement {number}")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RTX, reason="TensorRT-RTX is not installed: extra trt-check")
@pytest.mark.parametrize("member", ["rt_detr", "detr"])
def test_tensorrt_rtx_takes_ten_random_placements(member, tmp_path):
    paths = []
    for number, model in enumerate(random_graphs(member, 10)):
        paths.append(tmp_path / f"{number}.onnx")
        onnx.save(model, paths[-1])
    assert [str(result) for result in check_all(paths) if not result.ok] == []
