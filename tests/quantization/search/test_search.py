"""The whole search on a tiny network whose own detections are the truth: outcomes, resuming, refusals, files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_fixtures import CLASSES, write_bundle
from inspected_engine import inspected
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file

import edgedetr
from edgedetr.bundle import Bundle, DataRecord
from edgedetr.cli import app
from edgedetr.errors import DataError, ExportError, UsageError
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.lint.lint import require_no_errors
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.distance_meter import DistanceMeter
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.quantize import export_fp16, quantize
from edgedetr.quantization.search import costs as costing
from edgedetr.quantization.search import search as searching
from edgedetr.quantization.search.decisions import predicted_latency
from edgedetr.quantization.search.image_sets import image_sets, require_disjoint
from edgedetr.quantization.search.search_state import SearchState
from edgedetr.quantization.search.verify_split import CHUNK
from edgedetr.quantization.search.workbench import TARGETS, Workbench
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.tensorrt.layer_profile import EngineTimes, LayerProfile, layer_times

SPLITS = {"train": 24, "val": 70}  # val is the verify split
SETS = ("quant.images=8",)
KEPT = ("train", "export")


def write_images(root: Path) -> None:
    rng = np.random.default_rng(5)
    for split, count in SPLITS.items():
        (root / "images" / split).mkdir(parents=True)
        for number in range(count):
            spots = rng.integers(0, 256, (5, 8, 3), dtype=np.uint8)
            Image.fromarray(spots).resize((80, 50), Image.Resampling.BILINEAR).save(
                root / "images" / split / f"{split}{number}.png"
            )


def write_annotations(root: Path, bundle: Bundle) -> None:
    """The truth: what the float graph itself detects with the highest scores, two objects in each image."""
    detector = edgedetr.load(bundle, stage="onnx", backend="onnxruntime", threads=1)
    (root / "annotations").mkdir()
    for split, count in SPLITS.items():
        images, objects = [], []
        for number in range(count):
            name = f"{split}{number}.png"
            found = detector([np.asarray(Image.open(root / "images" / split / name))])[0]
            images.append({"id": number, "file_name": name, "height": 50, "width": 80})
            for box, label in zip(found.xyxy[:2], found.class_id[:2]):
                x0, y0, x1, y1 = (float(v) for v in np.clip(box, 0, (80, 50, 80, 50)))
                objects.append(
                    {
                        "id": len(objects),
                        "image_id": number,
                        "category_id": CLASSES[label].category_id,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": item.category_id, "name": item.name} for item in CLASSES]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def make_certain(bundle: Bundle) -> None:
    """Heads start with every class rare; here detections are to be seen."""
    weights = load_file(bundle.path / "weights.safetensors")
    for name, value in weights.items():
        if "score" in name and name.endswith("bias"):
            value.clamp_(min=-1)
    with bundle.add("weights.safetensors", stage="train") as temporary:
        save_file(weights, temporary)


@pytest.fixture(scope="module")
def original(tmp_path_factory, one_thread) -> Path:
    """A bundle with model.onnx and a data set on which its float graph is right."""
    root = tmp_path_factory.mktemp("search")
    write_images(root / "data")
    bundle = write_bundle(root / "a.bundle", "rt_detr", None)
    make_certain(bundle)
    edgedetr.export(bundle)
    write_annotations(root / "data", bundle)
    bundle.update(data=DataRecord(str(root / "data"), "val", "train"))
    edgedetr.export(bundle)
    return bundle.path


@pytest.fixture
def bundle(original, tmp_path) -> Bundle:
    shutil.copytree(original, tmp_path / "a.bundle")
    return Bundle.open(tmp_path / "a.bundle")


def costs(graph, groups, *others, **options):
    """Costs by multiply-accumulates of the five largest groups; the others are slower in INT8."""
    found = costing.modelled_costs(graph, groups, {}, "onnxruntime")
    large = sorted(found.groups, key=lambda name: -found.groups[name].float_ms)[:5]
    changed = {
        name: replace(cost, int8_ms=2 * cost.float_ms, sigma_ms=0.0)
        if name not in large
        else replace(cost, sigma_ms=0.05 * cost.float_ms)
        for name, cost in found.groups.items()
    }
    return replace(found, groups=changed)


def latency(self, candidate):
    """0.1 ms less for every group in INT8."""
    return {"float_ms": 10.0, "int8_ms": 10 - 0.1 * len(candidate.placement.int8), "error_ms": 0.0}


@pytest.fixture(autouse=True)
def without_a_clock(monkeypatch):
    monkeypatch.setattr(costing, "measured_costs", costs)
    monkeypatch.setattr(searching._Search, "_latency", latency)
    monkeypatch.setattr(searching, "RANDOM", 1)


def search(path: Path | Bundle, **options):
    return edgedetr.export(path, int8=True, threads=1, **{"max_drop": 60, "search_images": 8, "sets": SETS, **options})


@pytest.fixture(scope="module")
def searched(original, tmp_path_factory) -> Path:
    """A bundle after a search that accepted a placement."""
    path = tmp_path_factory.mktemp("searched") / "a.bundle"
    shutil.copytree(original, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costing, "measured_costs", costs)
        patch.setattr(searching._Search, "_latency", latency)
        patch.setattr(searching, "RANDOM", 1)
        found = search(path).search
    assert found.outcome == "accepted" and len(found.candidates) > 2
    return path


@pytest.fixture
def again(searched, tmp_path) -> Bundle:
    """Its measurements without what followed from them."""
    shutil.copytree(searched, tmp_path / "again.bundle")
    bundle = Bundle.open(tmp_path / "again.bundle")
    bundle.update(files={name: entry for name, entry in bundle.manifest.files.items() if entry.stage in KEPT})
    for name in ("placement.json", "model.int8.onnx", "model.int8-cpu.onnx", "ranges.json", "results/search.json"):
        (bundle.path / name).unlink()
    return bundle


@pytest.fixture
def distances(monkeypatch) -> list[int]:
    """Grows by one with every placement that is measured on an image."""
    seen: list[int] = []
    measure = DistanceMeter._distance

    def counted(self, teacher, student):
        seen.append(1)
        return measure(self, teacher, student)

    monkeypatch.setattr(DistanceMeter, "_distance", counted)
    return seen


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Grows by one with every image that a graph runs on."""
    seen: list[int] = []
    run = OrtRunner.run

    def counted(self, images):
        seen.append(1)
        return run(self, images)

    monkeypatch.setattr(OrtRunner, "run", counted)
    return seen


def test_the_written_graph_is_the_one_that_was_certified(searched):
    bundle = Bundle.open(searched)
    text = json.loads(bundle.require("results/search.json").read_text())
    accepted = next(one for one in text["candidates"] if one["name"] == text["accepted"])
    placement = Placement.load(bundle.require("placement.json"))
    assert set(placement.int8) == set(accepted["placement"]["int8"])
    assert placement.observers == accepted["placement"]["observers"]
    certified = [onnx.load(path).graph.SerializeToString() for path in (searched / "search").glob("graph-*.onnx")]
    written = onnx.load(bundle.require("model.int8-cpu.onnx")).graph.SerializeToString()
    assert len(certified) == len(text["candidates"]) == len(set(certified))
    assert written in certified


def test_the_accepted_placement_is_the_last_whose_look_was_within_the_budget(searched):
    text = json.loads((searched / "results/search.json").read_text())
    names = [text["order"][look["candidate"]] for look in text["looks"] if look["outcome"] == "accepted"]
    assert text["accepted"] == names[-1]
    assert all(look["upper"] <= text["budget"] for look in text["looks"] if look["outcome"] == "accepted")


def test_a_search_that_was_interrupted_repeats_no_evaluation(original, searched, tmp_path, runs, distances):
    path = tmp_path / "a.bundle"
    shutil.copytree(original, path)

    def interrupting(after):
        def progress(what, done, total):
            if len(runs) + len(distances) >= after:
                raise KeyboardInterrupt

        return progress

    for after in (10, 40, 90):
        with pytest.raises(KeyboardInterrupt):
            search(path, progress=interrupting(after))
        assert not (path / "placement.json").exists() and not (path / "model.int8.onnx").exists()
    found = search(path).search
    whole = json.loads((searched / "results/search.json").read_text())
    assert json.loads(json.dumps(found.to_json())) == whole
    # The float graph and each candidate on 8 search images; those that were looked at on the verify images.
    verified = {look["candidate"]: look["images"] for look in whole["looks"]}
    at_least = 8 * (1 + len(whole["candidates"])) + sum(verified.values())
    # An interruption repeats at most the float outputs, one candidate on the search images, and one chunk of others.
    assert at_least <= len(runs) <= at_least + 3 * (8 + 8 + CHUNK)
    # Each group and random placement is measured once on each search image, but for those that were interrupted.
    singles = 8 * (2 * len(whole["distances"]) + searching.RANDOM)  # with either observer
    assert singles <= len(distances) <= singles + 3 * 8
    before = len(runs)
    search(path)
    assert len(runs) - before == 0  # a search that is complete runs nothing


def stop(what, done, total):
    if what == "calibrate":
        raise KeyboardInterrupt


def test_a_search_with_other_settings_is_begun_anew_and_said(again, caplog):
    with pytest.raises(KeyboardInterrupt):
        search(again, sets=(*SETS, "quant.observer=minmax"), progress=stop)
    assert "holds a search with another settings" in caplog.text


def test_what_the_images_cannot_certify_exits_with_3_and_names_the_smallest_budget(again, capsys):
    arguments = [str(again.path), "--int8", "--max-drop", "0.001", "--search-images", "8", "--threads", "1"]
    assert app.run(["export", *arguments, "--set", SETS[0]]) == 3
    said = capsys.readouterr().err
    assert "the smallest budget that these images certify is" in said
    assert "--max-drop" in said and "edgedetr train --qat" in said
    assert not again.has("placement.json") and not (again.path / "model.int8.onnx").exists()
    assert json.loads((again.path / "results/search.json").read_text())["outcome"] == "none"


def reopened(bundle: Bundle, target: str) -> searching._Search:
    """A search for a target up to its costs, on what the search for ONNX Runtime has kept."""
    config = QuantConfig(images=8)
    sets = image_sets(bundle, config, None, 8, 0)
    identity = json.loads((bundle.path / "search/identity.json").read_text())
    identity.pop("schema")
    bench = Workbench(bundle, TARGETS[target], config, sets, SearchState(bundle, identity), threads=1)
    return searching._Search(bench, 60, VerifyConfig())


def test_smoothing_is_tried_where_it_is_possible_and_kept_where_it_is_better(again):
    search = reopened(again, "onnxruntime")
    bench, convolution = search.bench, search.bench.groups[0].id
    name = min(bench.smoothable)
    assert convolution not in bench.smoothable
    placement = Placement((name,), smooth={name: 0.5})
    value = search._distances([placement])[0]
    distances = {name: 10 * value, convolution: 20 * value}
    assert search._better_smoothed(distances, {}) == {name: 0.5}
    assert distances == {name: value, convolution: 20 * value}
    assert search._better_smoothed(distances, {}) == {}  # it is no better than that
    # Its graph is the one that export writes.
    quantize(again, config=QuantConfig(images=8), placement=placement)
    written = onnx.load(again.path / "model.int8-cpu.onnx").graph
    found = {item.name: numpy_helper.to_array(item) for item in bench.model(placement).graph.initializer}
    assert found.keys() == {item.name for item in written.initializer}
    for item in written.initializer:
        stored = numpy_helper.to_array(item)
        if stored.dtype.kind in "iu":  # ranges of both are equal to about 1e-7, so a bias may fall on the next level
            assert np.abs(found[item.name].astype(int) - stored).max(initial=0) <= 1
        else:
            np.testing.assert_allclose(found[item.name], stored, rtol=1e-5, atol=1e-6)


def test_a_search_for_tensorrt_takes_its_costs_from_a_profile_of_these_graphs(again, caplog):
    export_fp16(again, config=QuantConfig(images=8))
    search = reopened(again, "tensorrt")
    modelled = search._costs()
    command = f"edgedetr build {again.path} --profile"
    assert not modelled.measured and "to the device" in caplog.text and command in caplog.text
    assert again.has("model.int8-profiled.onnx")
    require_no_errors(onnx.load(again.path / "model.int8-profiled.onnx"), "every group in INT8")
    # What the device would answer: every layer takes a millisecond in FP16 and half of one in INT8.
    engines = {}
    for name, file, ms in (("float", "model.fp16.onnx", 1.0), ("int8", "model.int8-profiled.onnx", 0.5)):
        text, times = inspected(onnx.load(again.path / file), lambda node, ms=ms: ms)
        digest = again.manifest.files[file].sha256
        engines[name] = EngineTimes(file, digest, "strong", layer_times(text, [times]))
    profile = LayerProfile("Orin", 87, "10.3.0", "12.6", "", 1, **engines)
    profile.save(again.path / "results/profile.json")
    costs = search._costs()
    assert costs.measured and costs.float_ms == len(engines["float"].layers)
    placement = Placement.of_policy(search.bench.groups)
    change = costs.change(placement.int8)
    latency = predicted_latency(placement, costs)
    assert change.ms < 0 and latency["float_ms"] == costs.float_ms
    assert latency["int8_ms"] == costs.float_ms + change.ms
    other = replace(profile, int8=replace(profile.int8, onnx_sha256="0" * 64))
    other.save(again.path / "results/profile.json")
    with pytest.raises(ExportError, match=rf"measured on Orin with TensorRT 10.3.0.* 00000000; .*{re.escape(command)}"):
        search._costs()


def test_predicted_times_are_those_of_the_costs(searched):
    text = json.loads((searched / "results/search.json").read_text())
    groups = text["costs"]["groups"]
    for one in text["candidates"]:
        saved = sum(groups[name]["int8_ms"] - groups[name]["float_ms"] for name in one["placement"]["int8"])
        assert one["predicted_ms"] == pytest.approx(saved) and any(groups[name]["sigma_ms"] for name in groups)


def test_where_no_placement_is_faster_the_float_graph_is_named_with_the_figures(again, monkeypatch):
    for path in (again.path / "search").glob("latency-*"):
        path.unlink()
    slow = {"float_ms": 10.0, "int8_ms": 9.99, "error_ms": 0.02}
    monkeypatch.setattr(searching._Search, "_latency", lambda self, candidate: slow)
    result = search(again)
    assert result.search.outcome == "float"
    assert "ship float32" in result.notes[0] and "9.99 ms (+- 0.02) for 10.00 ms" in result.notes[0]
    assert not again.has("placement.json") and again.has("model.int8-cpu.onnx")


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"max_drop": 0.5}, UsageError, "add --int8"),
        ({"target": "openvino"}, UsageError, "add --int8"),
        ({"known_cures": False}, UsageError, "add --int8"),
        ({"int8": True, "search_images": 8}, UsageError, "add --max-drop"),
        (
            {"int8": True, "max_drop": 0.5, "target": "onnx"},
            UsageError,
            "expected one of onnxruntime, openvino, tensorrt",
        ),
        ({"int8": True, "max_drop": 0.0}, UsageError, "more than 0"),
        ({"int8": True, "max_drop": 99.0, "sets": SETS}, ExportError, "so a budget of 99 proves nothing"),
        ({"int8": True, "max_drop": 0.5, "sets": ("quant.images=24",)}, ExportError, "neither for calibration nor"),
    ],
)
def test_a_search_that_cannot_be_is_refused(bundle, options, error, text):
    with pytest.raises(error, match=text):
        edgedetr.export(bundle, **options)
    assert not bundle.has("placement.json") and not (bundle.path / "model.int8.onnx").exists()


def test_a_bundle_without_data_cannot_be_searched(bundle):
    bundle.update(data=None)
    with pytest.raises(ExportError, match="records no data set"):
        edgedetr.export(bundle, int8=True, max_drop=0.5)


def test_a_policy_that_names_nothing_is_refused_before_anything_is_measured(bundle, tmp_path):
    policy = tmp_path / "mine.toml"
    policy.write_text('[[float]]\nreason = "a part that is not there"\nmatch = ["*/bakcbone/*"]\n')
    with pytest.raises(ExportError, match="no node of this graph fits"):
        edgedetr.export(bundle, int8=True, max_drop=0.5, search_images=8, sets=(*SETS, f"quant.policy={policy}"))


def test_an_image_in_two_sets_is_refused():
    with pytest.raises(ExportError, match="is in the search set and in the verify set"):
        require_disjoint({"calibration": ["a"], "search": ["b", "c"], "verify": ["d", "c"]})
    require_disjoint({"calibration": ["a", "a"], "search": ["b"]})  # one image twice in one set proves no less


def test_the_three_sets_share_no_image(bundle):
    sets = image_sets(bundle, QuantConfig(images=8), None, 12)
    digests = [
        {image.sha256 for image in sets.calibration.images},
        set(sets.search.digests),
        set(sets.reference.truth.digests.tolist()),
    ]
    assert [len(one) for one in digests] == [8, 12, 70]
    assert len(set.union(*digests)) == 90


def test_damaged_data_are_reported_as_such(bundle):
    bundle.update(data=DataRecord(str(bundle.path.parent / "gone"), "val", "train"))
    with pytest.raises((ExportError, DataError)):
        edgedetr.export(bundle, int8=True, max_drop=0.5)
