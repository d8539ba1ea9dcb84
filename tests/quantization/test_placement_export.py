"""Export follows the bundle's placement.json, says so, and writes the same files again only where something changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import onnx
import pytest

import edgedetr
from edgedetr.artifacts import ONNX, PLACEMENT
from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization import cures, patterns
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.patterns import Pattern
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.policy import PolicyRule, load_policy
from edgedetr.quantization.quantize import quantize
from edgedetr.quantization.ranges import Ranges
from edgedetr.runtime.backends.base import MADE_BY

SETS = ("quant.images=8",)


@pytest.fixture(scope="module")
def float_bundle(float_detr, tmp_path_factory):
    """A detr with model.onnx and a placement of its first convolution and one Linear of the decoder, by "minmax"."""
    path = tmp_path_factory.mktemp("placed") / "detr.bundle"
    shutil.copytree(float_detr.path, path)
    bundle = Bundle.open(path)
    model = split_concats(onnx.load(bundle.require(ONNX.file)))
    groups = groups_of(GraphIndex(model), load_policy("default"))
    linear = next(group for group in groups if group.role == "decoder" and group.kind == "linear")
    chosen = Placement((groups[0].id, linear.id), {linear.id: "minmax"})
    with bundle.add(PLACEMENT.file, stage=PLACEMENT.step, made_from=PLACEMENT.made_from) as path:
        chosen.save(path)
    return bundle, groups[0].id, linear.id


@pytest.fixture
def copy(float_bundle, tmp_path):
    bundle, first, linear = float_bundle
    shutil.copytree(bundle.path, tmp_path / "b")
    return Bundle.open(tmp_path / "b"), first, linear


def quantized_layers(bundle: Bundle, name: str = "model.int8-cpu.onnx") -> set[str]:
    graph = GraphIndex(onnx.load(bundle.require(name)))
    return {
        node.name for node in graph.nodes if node.op_type in ("Conv", "MatMul", "Gemm") and graph.dequantizer(node, 1)
    }


def test_the_placement_of_a_bundle_decides_and_fresh_files_are_kept(copy):
    bundle, first, linear = copy
    result = edgedetr.export(bundle, int8=True, sets=SETS)
    assert result.notes == ("placement.json decides which layers are INT8: 2 groups",)
    assert quantized_layers(bundle) == quantized_layers(bundle, "model.int8.onnx") == {first, linear}
    read = GraphIndex(onnx.load(bundle.require(ONNX.file))).node_by_name[linear].input[0]
    assert Ranges.load(bundle.require("ranges.json")).observers == {read: "minmax"}
    metadata = {item.key: item.value for item in onnx.load(bundle.require("model.int8.onnx")).metadata_props}
    about = json.loads(metadata[MADE_BY])
    assert about["layers_int8"] == 2 and len(about["placement"]) == 64
    before = dict(bundle.manifest.files)
    assert edgedetr.export(bundle, int8=True, sets=SETS).bundle.manifest.files == before
    # Another placement makes both graphs out of date, at once.
    with bundle.add(PLACEMENT.file, stage=PLACEMENT.step, made_from=PLACEMENT.made_from) as path:
        Placement((first,)).save(path)
    assert not bundle.has("model.int8.onnx") and not bundle.has("model.int8-cpu.onnx")
    edgedetr.export(bundle, int8=True, sets=SETS)
    assert quantized_layers(bundle) == {first}


def test_a_policy_that_is_given_leaves_the_placement_aside_and_says_so(copy):
    bundle, _, linear = copy
    result = edgedetr.export(bundle, int8=True, sets=(*SETS, 'quant.policy="default"'))
    assert result.notes == ("placement.json is left aside: quant.policy was given",)
    assert linear not in quantized_layers(bundle) and len(quantized_layers(bundle)) > 10


def test_a_placement_of_another_model_is_left_aside_and_that_is_said(copy):
    bundle, _, linear = copy
    with bundle.add(ONNX.file, stage=ONNX.step, made_from=ONNX.made_from) as path:
        model = onnx.load(bundle.inside(ONNX.file))
        model.doc_string = "another"
        path.write_bytes(model.SerializeToString())
    result = edgedetr.export(bundle, int8=True, sets=SETS)
    assert "made for another model.onnx" in result.notes[0]
    assert linear not in quantized_layers(bundle)


def test_a_placement_given_in_python_needs_no_file(copy):
    bundle, first, _ = copy
    bundle.inside(PLACEMENT.file).unlink()
    plan = quantize(bundle, config=QuantConfig(images=8), placement=Placement((first,)))
    assert [layer.node for layer in plan.layers] == [first]
    assert bundle.has("model.int8.onnx")


def test_a_placement_without_a_group_is_refused_before_anything_is_written(copy):
    bundle, _, _ = copy
    with pytest.raises(ExportError, match=r"nothing to quantize; use FP16: edgedetr export .* --fp16"):
        quantize(bundle, config=QuantConfig(images=8), placement=Placement(()))
    assert not bundle.has("ranges.json") and not bundle.has("model.int8.onnx")


def test_export_cures_a_known_pattern_for_the_target_and_says_so(copy, monkeypatch):
    bundle, first, linear = copy
    sets = (*SETS, "quant.bias_correction=false")
    # The first convolution of a signed graph, which only a float fallback cures: openvino is planted as its backend.
    planted = Pattern(
        "planted", "backend", ("QuantizeLinear", "DequantizeLinear", "Conv"), 2, "e", "c", ("openvino",), signed=True
    )
    planted = replace(planted, rules=(PolicyRule("it computes this wrongly"),))
    for module in (patterns, cures):
        monkeypatch.setattr(module, "patterns", lambda: (planted,))
    sentence = f"planted, a known fault of openvino, is cured by a float fallback at {first}"
    result = edgedetr.export(bundle, int8=True, sets=sets)
    assert result.notes[1:] == (f"model.int8.onnx: {sentence}",)
    assert quantized_layers(bundle, "model.int8.onnx") == {linear}
    assert quantized_layers(bundle) == {first, linear}  # unsigned: not concerned
    metadata = {item.key: item.value for item in onnx.load(bundle.require("model.int8.onnx")).metadata_props}
    assert json.loads(metadata[MADE_BY])["cures"] == [["openvino", "planted", "a float fallback", first]]
    assert "known cure is to stay float" in metadata["edgedetr.float_layers"]
    before = dict(bundle.manifest.files)
    assert edgedetr.export(bundle, int8=True, target="openvino", sets=sets).bundle.manifest.files == before
    # Not for another target, and not where it is turned off: one and the same file.
    result = edgedetr.export(bundle, int8=True, target="tensorrt", sets=sets)
    assert len(result.notes) == 1 and quantized_layers(bundle, "model.int8.onnx") == {first, linear}
    before = dict(bundle.manifest.files)
    assert edgedetr.export(bundle, int8=True, known_cures=False, sets=sets).bundle.manifest.files == before


def test_export_smooths_what_it_can_and_keeps_the_files(copy, caplog):
    bundle, _, _ = copy
    sets = (*SETS, "quant.bias_correction=false", "quant.smooth=0.5", 'quant.policy="default"')
    edgedetr.export(bundle, int8=True, sets=sets)
    assert "the others stay as they are" in caplog.text
    ranges, before = Ranges.load(bundle.require("ranges.json")), dict(bundle.manifest.files)
    assert ranges.smooth and {one.alpha for one in ranges.smooth.values()} == {0.5}
    assert edgedetr.export(bundle, int8=True, sets=sets).bundle.manifest.files == before
    edgedetr.export(bundle, int8=True, sets=(*sets, "quant.smooth=0"))
    plain = Ranges.load(bundle.require("ranges.json"))
    assert not plain.smooth and all(plain.amax[name] != ranges.amax[name] for name in ranges.smooth)
