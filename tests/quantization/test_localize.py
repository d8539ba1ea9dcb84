"""Faults planted in INT8 graphs are named at the node where they are, with what is known of them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from members import exported, sample_images
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.api import export
from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import ExportError, UsageError
from edgedetr.exporting.settings import with_cures
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.cures import EDITS
from edgedetr.quantization.localize import Finding, damaged_tensors, departure_of
from edgedetr.quantization.patterns import Measured, matching, patterns, surroundings
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.qdq_moves import moved_before
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import TENSORRT
from edgedetr.runtime.backends import onnxruntime, openvino

IMAGES = [image[None] for image in sample_images(2).numpy()]


def amax(model: ModelProto, tensors: list[str]) -> dict[str, float]:
    """Largest magnitudes of tensors of a float graph on the images."""
    session = GraphSession(model, [name for name in tensors if name != "images"])
    runs = [{**session.run({"images": image}), "images": image} for image in IMAGES]
    return {name: max(float(np.abs(run[name]).max()) for run in runs) for name in tensors}


@cache
def healthy(name: str) -> tuple[ModelProto, ModelProto]:
    """A micro member in float, split as export does it, and in INT8 by the default policy; ranges of these images."""
    model = split_concats(onnx.load(exported(name, 1)))
    return model, quantized(model)


def quantized(model: ModelProto) -> ModelProto:
    graph = GraphIndex(model)
    plan = make_plan(graph, load_policy("default"))
    return insert_qdq(graph, plan, amax(model, tensors_to_observe(graph, plan)), TENSORRT)


def copied(model: ModelProto) -> ModelProto:
    return ModelProto.FromString(model.SerializeToString())


def behind(model: ModelProto, node: NodeProto, added: list[NodeProto], output: str) -> None:
    """Put nodes behind `node`; what read its output reads `output` now."""
    for other in model.graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = output
    at = next(number for number, other in enumerate(model.graph.node) if other.name == node.name)
    for number, new in enumerate(added):
        model.graph.node.insert(at + 1 + number, new)


def plant_pair(model: ModelProto, name: str, amax: float) -> None:
    """Quantize the output of a node, with this range."""
    node = next(node for node in model.graph.node if node.name == name)
    constants = {"planted_scale": np.float32(amax / 127), "planted_zero": np.int8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), key) for key, v in constants.items())
    pair = [
        helper.make_node("QuantizeLinear", [node.output[0], *constants], ["planted_q"], "planted/Q"),
        helper.make_node("DequantizeLinear", ["planted_q", *constants], ["planted_dq"], "planted/DQ"),
    ]
    behind(model, node, pair, "planted_dq")


def first(model: ModelProto, operator: str) -> NodeProto:
    computed = {name for node in model.graph.node for name in node.output}
    return next(
        node for node in model.graph.node if node.op_type == operator and all(name in computed for name in node.input)
    )


def names(finding: Finding) -> list[str]:
    return [case.name for case in finding.known]


@pytest.mark.parametrize("name", ["rt_detr", "detr"])
def test_a_healthy_graph_has_no_damaged_tensor(name: str) -> None:
    assert damaged_tensors(*healthy(name), IMAGES) == []


def test_a_concat_whose_branches_have_unequal_ranges_is_named() -> None:
    model = copied(healthy("rt_detr")[0])
    concat = first(model, "Concat")
    # The first branch becomes a fiftieth, in the float graph too: the fault is one scale for both, nothing else.
    small = concat.input[0]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.02), "fiftieth"))
    at = list(model.graph.node).index(concat)
    concat.input[0] = "small"
    model.graph.node.insert(at, helper.make_node("Mul", [small, "fiftieth"], ["small"], "planted/Mul"))
    faulty = quantized(model)
    plant_pair(faulty, concat.name, amax(model, [concat.output[0]])[concat.output[0]])
    (found,) = damaged_tensors(model, faulty, IMAGES)
    assert (found.node, found.operator, found.tensor) == (concat.name, "Concat", concat.output[0])
    assert found.after_db < 20 and found.before_db == float("inf")
    assert names(found) == ["concat-one-scale"]
    assert "-> Concat -> Q -> DQ" in found.around
    assert "Concat" in str(found) and "--cure concat-one-scale" in str(found)
    # The same loss is found where the Concat passes integers.
    (moved,) = damaged_tensors(model, moved_before(faulty, "planted_q"), IMAGES)
    assert (moved.tensor, moved.after_db) == (found.tensor, found.after_db)


def test_a_softmax_that_saturates_is_named() -> None:
    model, int8 = healthy("detr")
    softmax, faulty = first(model, "Softmax"), copied(int8)
    plant_pair(faulty, softmax.name, amax(model, [softmax.output[0]])[softmax.output[0]] / 8)
    (found,) = damaged_tensors(model, faulty, IMAGES)
    assert (found.node, found.operator) == (softmax.name, "Softmax")
    assert found.saturated > 0.01
    assert names(found)[0] == "saturated-softmax"
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["before_db"] is None


def test_a_wrong_zero_point_in_a_copy_of_a_tensor_is_named_and_the_other_copy_is_not() -> None:
    model, int8 = healthy("rt_detr")
    faulty = copied(int8)
    graph = GraphIndex(faulty)
    right = next(
        node
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and len(graph.consumers[node.output[0]]) > 1 and "enc" in node.name
    )
    faulty.graph.initializer.append(numpy_helper.from_array(np.int8(40), "wrong_zero"))
    wrong = helper.make_node("DequantizeLinear", [*right.input[:2], "wrong_zero"], ["copied"], "the/copy")
    consumer = graph.consumers[right.output[0]][0]
    consumer.node.input[consumer.index] = "copied"
    faulty.graph.node.insert(list(faulty.graph.node).index(right) + 1, wrong)
    (found,) = damaged_tensors(model, faulty, IMAGES)
    assert (found.node, found.operator) == ("the/copy", "DequantizeLinear")
    assert names(found) == ["rewritten-pair"]
    assert consumer.node.op_type in found.around


def test_a_backend_that_computes_one_node_wrongly_is_named_with_what_is_around_it(tmp_path: Path, monkeypatch) -> None:
    model = healthy("detr")[1]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    graph = GraphIndex(model)
    victim = [node for node in graph.nodes if node.op_type == "Conv"][9]
    weight = graph.dequantizer(victim, 1)
    assert weight is not None

    def broken(model: bytes, images: np.ndarray, names: list[str], **options: object) -> dict[str, np.ndarray]:
        """The weights of one convolution are negated; everything else is computed as it is written."""
        proto = onnx.load_model_from_string(model)
        for constant in proto.graph.initializer:
            if constant.name == weight.input[0]:
                constant.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(constant), constant.name))
        return onnxruntime.tensors(proto.SerializeToString(), images, names, optimize=False)

    monkeypatch.setattr(openvino, "BACKEND", replace(openvino.BACKEND, tensors=broken))
    found = departure_of(path, "openvino", IMAGES[0])
    assert found is not None
    assert (found.node, found.operator, found.backend) == (victim.name, "Conv", "openvino")
    assert found.after_db < 20 < found.before_db
    assert found.around.startswith("DQ -> Conv")


def test_without_a_fault_no_backend_departs_although_queries_may_change_their_order(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(healthy("deformable_detr")[1].SerializeToString())
    assert departure_of(path, "openvino", IMAGES[0]) is None


def test_a_pair_with_one_scale_per_channel_or_a_computed_scale_is_left_out() -> None:
    model, int8 = healthy("detr")
    for value in (np.full(8, 1e-6, np.float32), None):  # either would be a heavy loss
        changed = copied(int8)
        pair = next(node for node in changed.graph.node if node.op_type == "QuantizeLinear" and "layers.0" in node.name)
        scale = next(item for item in changed.graph.initializer if item.name == pair.input[1])
        if value is None:
            changed.graph.initializer.remove(scale)
        else:
            scale.CopyFrom(numpy_helper.from_array(value, scale.name))
        assert damaged_tensors(model, changed, IMAGES) == []


# ---------------------------------------------------------------------------------------------------- known patterns


def chain(*operators: str, zero: np.generic = np.int8(0)) -> GraphIndex:  # noqa: B008
    pair = {kind: ["scale", "zero"] for kind in ("QuantizeLinear", "DequantizeLinear")}
    nodes = [
        helper.make_node(kind, [f"t{n}", *pair.get(kind, [])], [f"t{n + 1}"], f"{kind}{n}")
        for n, kind in enumerate(operators)
    ]
    inputs = [helper.make_tensor_value_info("t0", TensorProto.FLOAT, [1])]
    outputs = [helper.make_tensor_value_info(f"t{len(operators)}", TensorProto.FLOAT, [1])]
    values = {"scale": np.float32(1), "zero": zero}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    return GraphIndex(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants)))


def test_the_pattern_of_openvinos_fault_is_known_at_the_convolution_and_on_openvino_alone() -> None:
    operators = "Resize", "Concat", "QuantizeLinear", "DequantizeLinear", "Conv", "Relu"
    graph = chain(*operators)
    conv = graph.nodes[4]
    assert [pattern.name for pattern in matching(graph, conv, Measured("openvino"))] == ["openvino-concat"]
    assert matching(graph, graph.nodes[1], Measured("openvino")) == []
    assert matching(graph, conv, Measured("onnxruntime")) == []
    unsigned = chain(*operators, zero=np.uint8(128))  # which OpenVINO computes as it is written
    assert matching(unsigned, unsigned.nodes[4], Measured("openvino")) == []
    assert surroundings(graph, graph.nodes[1]) == "Resize -> Concat -> Q -> DQ -> Conv"


def test_every_pattern_has_a_name_of_its_own_a_place_in_its_chain_and_words() -> None:
    found = patterns()
    assert len({pattern.name for pattern in found}) == len(found)
    for pattern in found:
        assert 0 <= pattern.at < len(pattern.chain)
        assert pattern.kind in ("quantization", "backend") and (pattern.kind == "backend") == bool(pattern.backends)
        assert pattern.evidence and pattern.cure
        assert all(step.edit in EDITS and 0 <= step.node < len(pattern.chain) for step in pattern.steps)


def test_a_cure_keeps_the_layers_of_its_pattern_float() -> None:
    graph = GraphIndex(onnx.load(exported("rt_detr", 1)))  # its 1x1 convolutions are not split, so some read a Concat
    default = load_policy("default")
    cured = load_policy("default+openvino-concat")
    rule = cured.float_rules[-1]
    assert cured == replace(default, name="default+openvino-concat", float_rules=(*default.float_rules, rule))
    others = tuple(known for known in default.float_rules if not known.reads)  # the default has the same rule already
    before, after = (make_plan(graph, replace(default, float_rules=rules)) for rules in (others, (*others, rule)))
    changed = {layer.node for layer in before.layers} - {layer.node for layer in after.layers}
    reads = {graph.producers[graph.node_by_name[node].input[0]].op_type for node in changed}
    assert changed and reads <= {"Concat", "Resize"}


def test_an_unknown_cure_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ExportError, match=r"no cure named 'openvino-concats'; did you mean 'openvino-concat'\?"):
        load_policy("default+openvino-concats")


@pytest.mark.parametrize("options, words", [({}, "add --int8"), ({"int8": True, "max_drop": 0.5}, "give one of them")])
def test_a_cure_that_cannot_be_applied_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    contract, classes = InputContract(96, 128), (ClassInfo(0, 1, "spot"),)
    bundle = Bundle.create(tmp_path / "x.bundle", Manifest("rt_detr", classes, contract, OutputContract()))
    with pytest.raises(UsageError, match=words):
        export(bundle, cures=["openvino-concat"], **options)  # type: ignore[arg-type]
    assert [path.name for path in bundle.path.iterdir()] == ["bundle.json"]


def test_a_cure_is_added_to_the_policy_that_the_bundle_has_once(tmp_path: Path) -> None:
    contract, classes = InputContract(96, 128), (ClassInfo(0, 1, "spot"),)
    bundle = Bundle.create(tmp_path / "x.bundle", Manifest("rt_detr", classes, contract, OutputContract()))
    assert with_cures(bundle, (), ["openvino-concat"]) == "quant.policy=default+openvino-concat"
    named = "quant.policy=default+openvino-concat"
    assert with_cures(bundle, [named], ["openvino-concat", "concat-one-scale"]) == named + "+concat-one-scale"
