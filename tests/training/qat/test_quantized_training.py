"""From a bundle to one that was trained for INT8: weights and ranges come back, and its graph is what was trained."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_fixtures import SMALL, write_bundle
from fake_quantization import largest_differences
from safetensors.torch import load_file

from edgedetr import api
from edgedetr.bundle import Bundle
from edgedetr.cli import app
from edgedetr.data.layouts import load
from edgedetr.errors import ExportError, TrainingError, UsageError
from edgedetr.models.deploy import DeployGraph, bundle_detector, fuse
from edgedetr.models.records import Outputs
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.quantize import read_onnx
from edgedetr.quantization.quantized_tensors import quantized_tensors
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.target import TENSORRT
from edgedetr.recipe import Recipe
from edgedetr.training.config import LossConfig
from edgedetr.training.output import CHECKPOINT, FOLDER
from edgedetr.training.qat.distill import Selection, paired_distillation
from edgedetr.training.qat.quantized_training import PlannedGraph, quantized_recipe
from edgedetr.training.qat.student import make_student

pytest.importorskip("modelopt")

TRAIN = {"epochs": 20, "batch": 5, "lr": 1e-2, "threads": 1, "workers": 0, "checkpoint_every": 1}
DEVICE = "cpu"


def start_bundle(path: Path, member: str, data: Path) -> Bundle:
    bundle = write_bundle(path, member, data)
    bundle.update(classes=load(data, "train").classes)  # as a training leaves it: in the order of the data set
    sections = {
        "model": {"name": member, "backbone_weights": "random", **SMALL[member]},
        "input": {"height": 64, "width": 64},
        "train": TRAIN,
        "quant": {"images": 8},
    }
    Recipe.from_dict(sections, where="test").to_bundle(bundle, stage="train")
    weights = (bundle.path / "weights.safetensors").read_bytes()
    with bundle.add("weights.safetensors", stage="train", made_from=["recipe.toml"]) as temporary:
        temporary.write_bytes(weights)
    return bundle


@pytest.fixture(scope="module", params=sorted(SMALL))
def bundles(request, tmp_path_factory, dataset, one_thread) -> tuple[Bundle, Bundle]:
    """A bundle with weights alone, and what two epochs of quantization-aware training made of it; read only."""
    root = tmp_path_factory.mktemp("qat")
    start = start_bundle(root / "a.bundle", request.param, dataset)
    return start, api.export(api.train_qat(start, root / "b.bundle", device=DEVICE), int8=True).bundle


def trained_student(start: Bundle, result: Bundle):
    """The moving average as the checkpoint has it, with the planned graph of the result."""
    recipe = Recipe.from_bundle(result)
    planned = PlannedGraph.of(start, recipe.quant)
    amax = planned.amax(start, replace(recipe.quant, observer="mse"))
    student = make_student(bundle_detector(start), planned.graph, planned.plan, amax, size=(64, 64))
    stored = load_file(result.path / FOLDER / CHECKPOINT)
    student.load_state_dict({k.removeprefix("ema."): v for k, v in stored.items() if k.startswith("ema.")})
    return student, PlannedGraph.of(result, recipe.quant)


def test_the_trained_model_equals_the_exported_int8_graph(bundles):
    start, result = bundles
    student, planned = trained_student(start, result)
    amax = Ranges.load(result.require("ranges.json")).amax
    images = np.random.default_rng(3).integers(0, 256, (1, 3, 64, 64)).astype(np.float32)
    differences = largest_differences(student, planned.graph, planned.plan, amax, images)
    assert max(differences.values()) < 1e-5, max(differences, key=differences.get)


def test_training_changed_weights_and_ranges_and_both_are_in_the_bundle(bundles):
    start, result = bundles
    student, _ = trained_student(start, result)
    found = DeployGraph(bundle_detector(result), 64, 64).detector.state_dict()
    before = bundle_detector(start)
    fuse(before)
    trained = student.state_dict()
    changed = [key for key, value in before.state_dict().items() if not torch.equal(value, trained[key])]
    assert {"backbone", "encoder", "decoder"} <= {key.partition(".")[0] for key in changed}
    assert all(torch.equal(trained[key], found[key]) for key in changed if key in found)
    ranges = Ranges.load(result.require("ranges.json"))
    learned = json.loads((result.path / FOLDER / "ranges.json").read_text())
    assert ranges.observer == "qat"
    assert {name: ranges.amax[name] for name in learned} == learned
    assert any(one.amax != one.start for one in student.ranges)


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_export_takes_the_learned_ranges_and_corrects_no_bias(bundles):
    _, result = bundles
    assert Recipe.from_bundle(result).quant == QuantConfig(images=8, observer="qat", bias_correction=False)
    assert result.has("model.int8.onnx") and result.has("model.int8-cpu.onnx")


def test_the_drop_is_measured_from_the_float_detector_that_was_trained_on(bundles):
    start, result = bundles
    assert result.require("reference.npz").read_bytes() == start.require("reference.npz").read_bytes()


@pytest.mark.parametrize("bundles", ["rt_detr"], indirect=True)
def test_a_training_that_is_done_and_resumed_gives_the_same_files(bundles, tmp_path):
    start, result = bundles
    again = shutil.copytree(result.path, tmp_path / "again.bundle")
    (again / "ranges.json").unlink()
    resumed = api.train_qat(start, again, device=DEVICE, resume=True)
    for name in ("weights.safetensors", "ranges.json", "model.onnx"):
        assert resumed.require(name).read_bytes() == result.require(name).read_bytes(), name


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_without_learned_ranges_an_export_says_so(bundles, tmp_path):
    _, result = bundles
    again = Bundle.open(shutil.copytree(result.path, tmp_path / "again.bundle"))
    with pytest.raises(ExportError, match="no range was learned for this graph.*train --qat"):
        api.export(again, int8=True, sets=["quant.images=9"])


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_a_placement_decides_what_is_rounded_and_goes_along(bundles, tmp_path):
    start, _ = bundles
    copy = Bundle.open(shutil.copytree(start.path, tmp_path / "a.bundle"))
    graph = GraphIndex(split_concats(read_onnx(copy.require("model.onnx"))))
    default = [group.id for group in groups_of(graph, load_policy("default")) if group.default]
    with copy.add("placement.json", stage="search", made_from=["model.onnx"]) as temporary:
        Placement(tuple(default[:6]), {default[0]: "minmax"}).save(temporary)
    result = api.export(api.train_qat(copy, tmp_path / "b.bundle", device=DEVICE), int8=True).bundle
    learned = json.loads((result.path / FOLDER / "ranges.json").read_text())
    plan = plan_for(graph, load_policy("default"), Placement(tuple(default[:6])))
    assert set(learned) == set(quantized_tensors(graph, plan, TENSORRT))
    assert Placement.load(result.require("placement.json")) == Placement(tuple(sorted(default[:6])))
    properties = {item.key: item.value for item in read_onnx(result.require("model.int8.onnx")).metadata_props}
    assert json.loads(properties["edgedetr.quantisation"])["layers_int8"] == len(plan.layers)


# ----------------------------------------------------------------------------------------------------- what it takes


def test_it_trains_a_tenth_of_the_epochs_at_a_small_rate_without_strong_augmentation():
    recipe = Recipe.from_dict({"train": {"epochs": 72, "lr": 1e-4, "batch": 16}}, where="test")
    found = quantized_recipe(recipe, 5000)
    assert (found.train.epochs, found.train.lr, found.train.denoising) == (7, pytest.approx(5e-6), 0)
    assert not any(found.augment.is_strong(epoch, 7) or found.augment.mixes(epoch, 7) for epoch in range(7))
    assert quantized_recipe(recipe, 5000, ["train.epochs=3"]).train.epochs == 3


def test_an_observer_is_refused_because_ranges_are_learned():
    with pytest.raises(UsageError, match="learns the ranges"):
        quantized_recipe(Recipe.from_dict({}, where="test"), 100, ["quant.observer=mse"])


@pytest.mark.parametrize(
    "given",
    [
        "train.start=B",
        "train.teacher=T",
        "train.denoising=100",
        "train.lora_rank=4",
        "model.queries=50",
        "input.width=320",
    ],
)
def test_what_the_training_does_not_read_is_refused(given):
    section, key = given.partition("=")[0].split(".")
    key = f"train.{key}" if section == "train" else f"[{section}]"
    with pytest.raises(UsageError, match=re.escape(f"--set {key} beside --qat")):
        quantized_recipe(Recipe.from_dict({}, where="test"), 100, [given])


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_without_modelopt_the_package_to_install_is_named(bundles, tmp_path, monkeypatch):
    start, _ = bundles
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(TrainingError, match="pip install nvidia-modelopt requests"):
        api.train_qat(start, tmp_path / "b.bundle")


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_a_bundle_without_data_and_an_imported_graph_are_refused(bundles, tmp_path):
    start, _ = bundles
    other = Bundle.open(shutil.copytree(start.path, tmp_path / "other.bundle"))
    other.update(data=None)
    with pytest.raises(TrainingError, match="does not record a data set.*--data DIR"):
        api.train_qat(other, tmp_path / "b.bundle")
    with other.add("model.onnx", stage="import") as temporary:
        temporary.write_bytes(start.require("model.onnx").read_bytes())
    with pytest.raises(TrainingError, match="imported graph, whose weights cannot be trained"):
        api.train_qat(other, tmp_path / "b.bundle")
    assert not (tmp_path / "b.bundle").exists()


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_data_with_other_classes_are_refused_by_name(bundles, tmp_path):
    start, _ = bundles
    data = shutil.copytree(start.manifest.data.path, tmp_path / "data")
    for path in (data / "annotations").iterdir():
        path.write_text(path.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(TrainingError, match="knows dog, cat, and the data set has dog, cow"):
        api.train_qat(start, tmp_path / "b.bundle", data=data, device=DEVICE)


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
def test_a_bundle_is_not_trained_onto_itself(bundles):
    with pytest.raises(UsageError, match="is the bundle that is trained"):
        api.train_qat(bundles[0], bundles[0].path)


# ------------------------------------------------------------------------------------------------------- distillation


def test_equal_outputs_have_no_distance_and_a_worse_box_or_class_has_one():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 1, 4, 3, generator=generator), torch.rand(2, 1, 4, 4, generator=generator)
    same = Outputs(logits, boxes)
    for softmax in (True, False):
        assert paired_distillation(same, same, LossConfig(), softmax).item() == pytest.approx(0, abs=1e-5)
        for other in (Outputs(logits + 0.5 * logits.sign(), boxes), Outputs(logits, boxes * 0.9)):
            assert paired_distillation(other, same, LossConfig(), softmax).item() > 1e-3


def test_the_distance_of_one_query_worked_out_by_hand():
    """p = 1/2 against q = sigmoid(1): KL = -1/2 ln(4 q (1 - q)); L1 = 0.1 with weight 5, score 1/2 of 1."""
    q = 1 / (1 + np.exp(-1))
    divergence = 0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1 - q))
    ours = Outputs(torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.6, 0.5, 0.2, 0.2]]]]))
    teacher = Outputs(torch.tensor([[[[0.0]]]]), torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]]))
    giou = 1 - (0.1 * 0.2) / (0.3 * 0.2)  # half of each box overlaps; the hull is the union
    wanted = divergence + 0.5 * (5 * 0.1 + 2 * giou)  # the sum of scores, 1/2, counts as 1
    assert paired_distillation(ours, teacher, LossConfig(), softmax=False).item() == pytest.approx(wanted, rel=1e-5)


def test_the_cells_of_the_first_selection_are_selected_again():
    first, second = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[0.9, 0.2, 0.1]])
    selection = Selection()
    with selection:
        chosen = first.topk(2, dim=1).indices
    with selection:
        again = second.topk(2, dim=1)
    assert chosen.tolist() == again.indices.tolist() == [[1, 2]]
    assert again.values.tolist() == [[pytest.approx(0.2), pytest.approx(0.1)]]


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("bundles", ["detr"], indirect=True)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "detr"], "--model beside --qat"),
        (["--start", "random", "--preset", "strong"], "leave --preset and --start out"),
        (["--teacher", "other.bundle"], "--teacher beside --qat.*its float detector as teacher"),
        (["--set", "quant.observer=mse"], "learns the ranges"),
        (["--set", "train.epohcs=3"], "epohcs"),
    ],
)
def test_what_the_bundle_has_chosen_cannot_be_chosen_again(bundles, words, message, capsys, tmp_path):
    words = ["train", "--qat", str(bundles[0].path), "--out", str(tmp_path / "b.bundle"), *words]
    assert app.run(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "b.bundle").exists()


def test_a_training_needs_a_data_set_or_a_bundle(capsys):
    assert app.run(["train"]) == 2
    assert "--data DIR" in (error := capsys.readouterr().err) and "--qat BUNDLE" in error


def test_a_bundle_that_is_not_there_is_one_clear_error(tmp_path, capsys):
    assert app.run(["train", "--qat", str(tmp_path / "nowhere.bundle")]) == 1
    assert "nowhere.bundle" in (error := capsys.readouterr().err) and "Traceback" not in error
