"""From weights to INT8 in a bundle: what is made, when it is made again, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image

from edgedetr.bundle import Bundle, DataRecord
from edgedetr.errors import BundleError, DataError, ExportError
from edgedetr.evaluation.reference import Reference
from edgedetr.exporting.config import ExportConfig
from edgedetr.exporting.export import export, undone
from edgedetr.lint.lint import lint
from edgedetr.models.deploy import load_bundle_model
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.bias_correction import PARTS
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.target import weight_bits
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.storage.digests import digest

MADE = ["reference.npz", "model.onnx", "ranges.json", "model.int8.onnx", "model.int8-cpu.onnx"]
QUANT = QuantConfig(images=8)


def other_bits() -> str:
    """Weights of the graph for CPUs that `auto` does not choose here."""
    return "8bit" if weight_bits("auto") == 7 else "7bit"


def times(bundle: Bundle) -> dict[str, int]:
    return {name: os.stat(bundle.path / name).st_mtime_ns for name in MADE}


def verify_images(bundle: Bundle, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    size = bundle.manifest.input
    return rng.integers(0, 256, (count, 3, size.height, size.width)).astype(np.float32)


def test_all_files_are_listed_with_what_they_were_made_from(exported):
    files = exported.manifest.files
    assert list(files)[1:] == MADE
    assert all(exported.has(name) for name in MADE)
    assert files["model.int8.onnx"].made_from == {name: files[name].sha256 for name in ("model.onnx", "ranges.json")}


def test_int8_files_are_smaller_and_stay_near_the_float_model(exported):
    files = exported.manifest.files
    images = verify_images(exported, 1)
    reference = OrtRunner(exported.require("model.onnx"), threads=1).run(images)
    for name in ("model.int8.onnx", "model.int8-cpu.onnx"):
        assert files[name].size < 0.7 * files["model.onnx"].size
        found = OrtRunner(exported.require(name), threads=1).run(images)
        # Random weights: boxes of a shared set of queries move little; a broken graph gives noise of the same spread.
        assert np.corrcoef(found.logits.ravel(), reference.logits.ravel())[0, 1] > 0.5


def test_tensorrt_graph_of_each_member_is_legal(exported):
    assert lint(onnx.load(exported.require("model.int8.onnx"))) == ()


def test_a_graph_with_an_error_never_enters_the_bundle(fresh, tmp_path, monkeypatch):
    """A zero point that is none, as a defect in the quantizer would write it."""
    from edgedetr.quantization import quantize as module

    def broken(*arguments):
        graph = insert_qdq(*arguments)
        zero = next(item for item in graph.graph.initializer if item.name.endswith("_output_0_zero_point"))
        zero.CopyFrom(onnx.numpy_helper.from_array(np.int8(5), zero.name))
        return graph

    insert_qdq = module.insert_qdq
    monkeypatch.setattr(module, "insert_qdq", broken)
    bundle = fresh("detr", tmp_path / "b")
    with pytest.raises(ExportError, match="model.int8.onnx has .* lint errors? for TensorRT: .*zero point is 5"):
        export(bundle, int8=True, config=ExportConfig(), quant=QUANT)
    assert not Bundle.open(bundle.path).has("model.int8.onnx")
    assert not list(bundle.path.glob("**/*.tmp"))


def test_policy_keeps_decoder_heads_and_selection_float_and_quantizes_the_rest(exported):
    plan = make_plan(GraphIndex(split_concats(onnx.load(exported.require("model.onnx")))), load_policy("default"))
    quantized = [layer.node for layer in plan.layers]
    assert [name for name in quantized if "/decoder/" in name and "/cross_attention/" not in name] == []
    assert [name for name in quantized if "/selector/" in name and "/selector/project/" not in name] == []
    memory = [name for name in quantized if "/decoder/" in name]
    assert len(memory) == (2 if exported.manifest.model == "rt_detr" else 4)  # value, or k and v, of two layers
    convolutions = [name for name in plan.float_layers if name.endswith("/Conv")]
    assert convolutions == []
    assert sum("/backbone/" in name for name in quantized) >= 20


def test_reference_holds_the_verify_split_with_digests(exported, dataset):
    reference = Reference.load(exported.require("reference.npz"))
    paths = [dataset / "images" / "val" / f"val{i}.png" for i in range(3)]
    assert sorted(reference.truth.digests) == sorted(digest(path) for path in paths)
    assert all(len(found) for found in reference.detections.values())
    assert reference.model == exported.manifest.files["weights.safetensors"].sha256


def test_ranges_name_train_images_only(exported, dataset):
    ranges = Ranges.load(exported.require("ranges.json"))
    train = {digest(path) for path in (dataset / "images" / "train").iterdir()}
    assert len(ranges.images) == 8
    assert {image.sha256 for image in ranges.images} <= train


def test_a_second_export_does_nothing(exported):
    before = times(exported)
    export(exported.path, int8=True, config=ExportConfig(), quant=QUANT)
    assert times(exported) == before


def test_progress_reports_each_kind_of_work_to_its_end(fresh, tmp_path):
    metadata = {}
    export(
        fresh("detr", tmp_path / "b"),
        int8=True,
        config=ExportConfig(),
        quant=QUANT,
        progress=lambda what, done, total: metadata.__setitem__(what, (done, total)),
    )
    assert metadata == {
        "reference": (3, 3),
        "onnx": (1, 1),
        "calibrate": (8, 8),
        "fp16": (8, 8),
        "bias float": (8, 8),
        "bias tensorrt": (8 * PARTS, 8 * PARTS),
        "bias cpu": (8 * PARTS, 8 * PARTS),
    }


@pytest.fixture(scope="module")
def detr(fresh, tmp_path_factory) -> Bundle:
    bundle = fresh("detr", tmp_path_factory.mktemp("detr") / "detr.bundle")
    return export(bundle, int8=True, config=ExportConfig(), quant=QUANT)


@pytest.fixture
def copy(detr, tmp_path) -> Bundle:
    shutil.copytree(detr.path, tmp_path / "copy.bundle")
    return Bundle.open(tmp_path / "copy.bundle")


@pytest.mark.parametrize(
    "change, remade",
    [
        ({"observer": "minmax"}, {"ranges.json", "model.int8.onnx", "model.int8-cpu.onnx"}),
        ({"images": 9}, {"ranges.json", "model.int8.onnx", "model.int8-cpu.onnx"}),
        ({"cpu_weights": other_bits()}, {"model.int8-cpu.onnx"}),
        ({"bias_correction": False}, {"model.int8.onnx", "model.int8-cpu.onnx"}),
    ],
)
def test_changed_settings_remake_what_depends_on_them(copy, change, remade):
    before = times(copy)
    export(copy, int8=True, config=ExportConfig(), quant=replace(QUANT, **change))
    after = times(copy)
    assert {name for name in MADE if after[name] != before[name]} == remade


INT8 = ("model.int8.onnx", "model.int8-cpu.onnx")


def made_by(bundle: Bundle, name: str) -> dict:
    model = onnx.load(bundle.require(name))
    return json.loads(next(item.value for item in model.metadata_props if item.key == "edgedetr.quantisation"))


def biases(bundle: Bundle, name: str) -> dict[str, bytes]:
    return {
        item.name: item.SerializeToString()
        for item in onnx.load(bundle.require(name)).graph.initializer
        if "bias" in item.name
    }


def test_without_correction_the_graphs_say_and_hold_what_they_did_before_there_was_one(copy):
    corrected = {name: (copy.path / name).read_bytes() for name in INT8}
    export(copy, int8=True, config=ExportConfig(), quant=replace(QUANT, bias_correction=False))
    model = split_concats(onnx.load(copy.require("model.onnx")))
    floats = {item.name: item for item in model.graph.initializer}
    for name in INT8:
        assert set(made_by(copy, name)) - {"half", "products"} == {
            "dialect",
            "weight_bits",
            "observer",
            "policy",
            "policy_sha256",
            "image_list",
            "layers_int8",
            "layers_float",
        }
    plain = [item for item in onnx.load(copy.require("model.int8.onnx")).graph.initializer if ".bias" in item.name]
    assert plain and all(item.name.removesuffix("_half") in floats for item in plain)
    export(copy, int8=True, config=ExportConfig(), quant=QUANT)
    assert {name: (copy.path / name).read_bytes() for name in INT8} == corrected


def test_where_the_images_have_gone_a_graph_is_written_without_correction_and_with_it_when_they_are_back(
    copy, dataset, caplog
):
    record = copy.manifest.data
    before = (copy.path / "model.int8.onnx").read_bytes()
    copy.update(data=replace(record, path=str(dataset / "gone")))
    with caplog.at_level(logging.WARNING):
        export(copy, int8=True, config=ExportConfig(), quant=replace(QUANT, cpu_weights=other_bits()))
    assert "biases are not corrected: the calibration images are not here" in caplog.text
    assert (copy.path / "model.int8.onnx").read_bytes() == before
    assert "bias_correction" not in made_by(copy, "model.int8-cpu.onnx")
    plain = biases(copy, "model.int8-cpu.onnx")
    copy.update(data=record)
    export(copy, int8=True, config=ExportConfig(), quant=replace(QUANT, cpu_weights=other_bits()))
    assert "bias_correction" in made_by(copy, "model.int8-cpu.onnx")
    assert biases(copy, "model.int8-cpu.onnx") != plain


def test_where_the_images_have_gone_a_corrected_graph_of_0_2_is_kept_and_elsewhere_written_again(copy, dataset, caplog):
    path, record = copy.path / "model.int8-cpu.onnx", copy.manifest.data
    new, model = path.read_bytes(), onnx.load(path)
    item = next(item for item in model.metadata_props if item.key == "edgedetr.quantisation")
    item.value = json.dumps({key: value for key, value in json.loads(item.value).items() if key != "products"})
    with copy.add(path.name, stage="int8", made_from=["model.onnx", "ranges.json"]) as temporary:
        onnx.save(model, temporary)
    old = path.read_bytes()
    copy.update(data=replace(record, path=str(dataset / "gone")))
    with caplog.at_level(logging.WARNING):
        export(copy, int8=True, config=ExportConfig(), quant=QUANT)
    assert path.read_bytes() == old != new
    assert "model.int8-cpu.onnx is kept, with its matrix products in float: the calibration images" in caplog.text
    copy.update(data=record)
    export(copy, int8=True, config=ExportConfig(), quant=QUANT)
    assert path.read_bytes() == new


def test_a_damaged_file_is_made_again(copy):
    before = times(copy)
    (copy.path / "model.int8.onnx").write_bytes(b"no graph")
    export(copy, int8=True, config=ExportConfig(), quant=QUANT)
    assert copy.has("model.int8.onnx")
    after = times(copy)
    assert {name for name in MADE if after[name] != before[name]} == {"model.int8.onnx"}


def test_new_weights_make_everything_again(copy, tmp_path):
    weights = (copy.path / "weights.safetensors").read_bytes()
    with copy.add("weights.safetensors", stage="train") as temporary:
        temporary.write_bytes(weights[:-4] + b"\0\0\0\0")
    assert not copy.has("model.onnx")
    with pytest.raises(BundleError, match="model.onnx was made from weights.safetensors"):
        copy.require("model.onnx")
    export(copy, int8=True, config=ExportConfig(), quant=QUANT)
    assert all(copy.has(name) for name in MADE)


def test_a_calibration_image_of_the_verify_split_is_refused_by_its_bytes(copy, dataset, tmp_path):
    folder = tmp_path / "calib"
    folder.mkdir()
    shutil.copy(dataset / "images" / "train" / "train0.png", folder / "a.png")
    shutil.copy(dataset / "images" / "val" / "val1.png", folder / "renamed.png")
    before = times(copy)
    with pytest.raises(ExportError, match=r"renamed\.png: this calibration image is also in the verify split"):
        export(copy, int8=True, calib=folder, config=ExportConfig(), quant=QUANT)
    assert times(copy) == before


def test_calibration_images_saved_again_from_the_verify_split_are_named(copy, dataset, tmp_path, caplog):
    data, folder = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "calib"
    shutil.copytree(dataset / "images" / "train", folder)
    y, x = np.mgrid[:50, :80]
    scene = Image.fromarray(np.stack([y * 5, x * 3, (x * y) % 256], axis=-1).astype(np.uint8))
    scene.save(data / "images" / "val" / "val1.png")
    scene.resize((100, 60)).save(folder / "again.jpg", quality=60)
    copy.update(data=replace(copy.manifest.data, path=str(data)))
    with caplog.at_level(logging.WARNING):
        export(copy, int8=True, calib=folder, config=ExportConfig(), quant=QuantConfig(images=50))
    assert "1 of 11 calibration images nearly copy images of the verify split" in caplog.text
    assert "again.jpg = images/val/val1.png" in caplog.text


def test_a_plain_folder_of_images_calibrates(copy, dataset, tmp_path, caplog):
    folder = tmp_path / "calib"
    shutil.copytree(dataset / "images" / "train", folder)
    with caplog.at_level(logging.WARNING):
        export(copy, int8=True, calib=folder, config=ExportConfig(), quant=QuantConfig(images=50))
    ranges = Ranges.load(copy.require("ranges.json"))
    assert len(ranges.images) == 10
    assert ranges.source == str(folder)
    assert "10 calibration images, 50 were asked for" in caplog.text


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda path: None, DataError, "no such directory"),
        (lambda path: path.mkdir(), (DataError, ExportError), "no images to calibrate on"),
        (
            lambda path: (path.mkdir(), [(path / f"x{i}.jpg").write_bytes(b"not a jpeg") for i in range(8)]),
            DataError,
            "x0.jpg",
        ),
    ],
    ids=["missing", "empty", "unreadable"],
)
def test_unusable_calibration_images_are_one_clear_error(copy, tmp_path, make, error, message):
    make(tmp_path / "calib")
    with pytest.raises(error, match=message):
        export(copy, int8=True, calib=tmp_path / "calib", config=ExportConfig(), quant=QuantConfig(images=8))


def test_without_recorded_data_quantizing_asks_for_images(fresh, tmp_path, dataset):
    bundle = fresh("detr", tmp_path / "b")
    bundle.update(data=None)
    with pytest.raises(ExportError, match="does not record where its data are.*--calib DIR"):
        export(bundle, int8=True, config=ExportConfig(), quant=QUANT)
    assert bundle.has("model.onnx")
    assert not bundle.has("reference.npz")
    export(bundle, int8=True, calib=dataset, config=ExportConfig(), quant=QUANT)
    assert bundle.has("model.int8.onnx")


def test_nan_weights_are_refused_before_anything_is_listed(fresh, tmp_path):
    from safetensors.torch import load_file, save_file

    bundle = fresh("detr", tmp_path / "b")
    bundle.update(data=None)
    weights = load_file(bundle.path / "weights.safetensors")
    name = next(name for name in weights if name.endswith("weight") and "decoder" in name)
    weights[name][0] = float("nan")
    with bundle.add("weights.safetensors", stage="train") as temporary:
        save_file(weights, temporary)
    with pytest.raises(ExportError, match=f"weight {name} holds NaN or infinity"):
        export(bundle, config=ExportConfig())
    assert not (bundle.path / "model.onnx").exists()
    assert [path.name for path in bundle.path.iterdir() if path.name.endswith(".tmp")] == []


def test_settings_come_from_the_recipe_in_the_bundle(copy):
    with copy.add("recipe.toml", stage="train") as temporary:
        temporary.write_text('[quant]\nimages = 9\nobserver = "minmax"\n')
    export(copy, int8=True)
    ranges = Ranges.load(copy.require("ranges.json"))
    assert (len(ranges.images), ranges.observer) == (9, "minmax")


def test_an_int8_graph_says_why_each_float_layer_is_float(exported):
    metadata = {item.key: item.value for item in onnx.load(exported.require("model.int8.onnx")).metadata_props}
    layers = json.loads(metadata["edgedetr.float_layers"])
    assert any("decoder" in reason for reason in layers)
    counted = json.loads(metadata["edgedetr.quantisation"])
    assert sum(map(len, layers.values())) == counted["layers_float"] > 0


def test_one_file_on_disk_describes_itself(exported):
    metadata = {item.key: item.value for item in onnx.load(exported.require("model.onnx")).metadata_props}
    assert [item["name"] for item in json.loads(metadata["edgedetr.classes"])] == ["cat", "dog"]
    assert json.loads(metadata["edgedetr.input"]) == {"height": 64, "width": 64, "resize": "stretch"}
    assert metadata["edgedetr.weights_sha256"] == exported.manifest.files["weights.safetensors"].sha256


def test_data_may_be_missing_once_everything_is_made(detr, tmp_path):
    shutil.copytree(detr.path, tmp_path / "device.bundle")
    bundle = Bundle.open(tmp_path / "device.bundle")
    bundle.update(data=DataRecord("/nowhere", "val", "train"))
    export(bundle, int8=True, config=ExportConfig(), quant=QUANT)
    assert all(bundle.has(name) for name in MADE)


def test_pytorch_and_onnx_agree_on_an_image(exported):
    _, graph = load_bundle_model(exported)
    import torch

    images = verify_images(exported, 1)
    with torch.no_grad():
        logits, boxes = graph(torch.from_numpy(images))
    found = OrtRunner(exported.require("model.onnx"), threads=1).run(images)
    np.testing.assert_allclose(found.logits, logits.numpy(), atol=1e-3)  # float32, some 60 layers; measured 2e-5
    np.testing.assert_allclose(found.boxes, boxes.numpy(), atol=1e-4)


def test_a_large_image_set_is_sampled_evenly(dataset, tmp_path, copy):
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    export(copy, int8=True, calib=folder, config=ExportConfig(), quant=QuantConfig(images=8))
    names = [image.name for image in Ranges.load(copy.require("ranges.json")).images]
    assert names == ["00.png", "03.png", "05.png", "08.png", "11.png", "14.png", "16.png", "19.png"]


def test_an_option_of_an_earlier_export_that_is_taken_back_is_said():
    made_by = json.dumps({"sampling": "grid_sample", "opset": 19, "dynamic_batch": True, "decoder_layers": 0})
    said = undone(made_by, ExportConfig(), ["sampling"])
    assert len(said) == 1 and "dynamic_batch was true and is false now" in said[0]
    assert "--set export.dynamic_batch=true" in said[0]
    assert len(undone(made_by, ExportConfig(), [])) == 2
    assert undone(made_by, ExportConfig(sampling="grid_sample", dynamic_batch=True), []) == []
    assert undone("", ExportConfig(), []) == []
