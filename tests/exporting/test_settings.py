"""`edgedetr export --set`: what it changes, where that is kept, and what it refuses."""

from __future__ import annotations

import hashlib
import json

import pytest

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.quantization.ranges import Ranges
from edgedetr.recipe import Recipe


@pytest.fixture
def bundle(fresh, tmp_path) -> Bundle:
    """As training leaves it: a recipe, and weights that were made from it."""
    made = fresh("detr", tmp_path / "b")
    config = {name: value for name, value in made.manifest.config.items() if value is not None}
    size = {"height": made.manifest.input.height, "width": made.manifest.input.width}
    sections = {"model": {"name": "detr", **config}, "input": size, "train": {"epochs": 3}, "quant": {"images": 8}}
    with made.add("recipe.toml", stage="train") as path:
        path.write_text(Recipe.from_dict(sections, where="test").to_toml())
    weights = (made.path / "weights.safetensors").read_bytes()
    with made.add("weights.safetensors", stage="train", made_from=["recipe.toml"]) as path:
        path.write_bytes(weights)
    return made


def everything(bundle: Bundle) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}


def check_digests(bundle: Bundle) -> None:
    """By hand, from bundle.json: every file has its digest, and every source the one that was read."""
    files = json.loads((bundle.path / "bundle.json").read_text())["files"]
    for name, entry in files.items():
        assert hashlib.sha256((bundle.path / name).read_bytes()).hexdigest() == entry["sha256"], name
        assert entry["size"] == (bundle.path / name).stat().st_size
        assert all(files[source]["sha256"] == old for source, old in entry["made_from"].items()), name


def test_settings_are_used_and_kept_in_the_recipe_so_that_the_next_export_makes_the_same(bundle, capsys):
    words = ["--set", "quant.observer=percentile", "--set", "quant.percentile=99.999", "--set", "quant.images=9"]
    before = Recipe.from_bundle(bundle)
    weights = (bundle.path / "weights.safetensors").read_bytes()
    assert cli.run(["export", str(bundle.path), "--int8"]) == 0
    assert cli.run(["export", str(bundle.path), "--int8", *words]) == 0
    ranges = Ranges.load(bundle.path / "ranges.json")
    assert (ranges.observer, len(ranges.images)) == ("percentile 99.999", 9)
    after = Recipe.from_bundle(Bundle.open(bundle.path))
    assert (after.quant.observer, after.quant.percentile, after.quant.images) == ("percentile", 99.999, 9)
    assert (after.model, after.input, after.train) == (before.model, before.input, before.train)
    assert (bundle.path / "weights.safetensors").read_bytes() == weights
    check_digests(bundle)
    assert all(Bundle.open(bundle.path).has(name) for name in Bundle.open(bundle.path).manifest.files)
    seen = everything(bundle)
    assert cli.run(["export", str(bundle.path), "--int8"]) == 0
    assert everything(bundle) == seen


def test_a_setting_of_the_float_graph_makes_it_again(bundle):
    assert cli.run(["export", str(bundle.path), "--set", "export.decoder_layers=1"]) == 0
    assert Recipe.from_bundle(Bundle.open(bundle.path)).export.decoder_layers == 1
    check_digests(bundle)


@pytest.mark.parametrize(
    "word, message",
    [
        ("quant.observr=mse", "unknown key 'observr'; did you mean 'observer'"),
        ("qant.images=3", "unknown section 'qant'; did you mean 'quant'"),
        ("quant.images=many", r"images = 'many'"),
        ("quant.percentile=20", "expected 50 to 100"),
        ("train.lr=1e-3", "an export cannot change [train]; expected keys of quant and export; train again: edgedetr"),
        ("model.heads=2", "an export cannot change [model]"),
        ("verify.budget=2.0", "an export cannot change [verify]"),
        ("quant", "expected section.key=value"),
    ],
)
def test_wrong_words_are_usage_errors_and_change_nothing(bundle, word, message, capsys):
    before = everything(bundle)
    assert cli.run(["export", str(bundle.path), "--set", word]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert everything(bundle) == before


def test_an_export_that_fails_leaves_the_recipe_as_it_was(bundle, capsys):
    recipe = (bundle.path / "recipe.toml").read_bytes()
    assert cli.run(["export", str(bundle.path), "--int8", "--set", "quant.policy=none"]) == 1
    assert "no policy named 'none'" in capsys.readouterr().err
    assert (bundle.path / "recipe.toml").read_bytes() == recipe
    check_digests(bundle)


def test_an_imported_graph_gets_a_recipe_of_these_sections_alone(fresh, tmp_path, capsys):
    made = fresh("detr", tmp_path / "b")
    assert cli.run(["export", str(made.path)]) == 0
    bundle = Bundle.open(made.path)
    graph = bundle.require("model.onnx").read_bytes()
    with bundle.add("model.onnx", stage="import") as path:
        path.write_bytes(graph)
    assert cli.run(["export", str(bundle.path), "--set", "export.sampling=grid_sample"]) == 2
    assert "an imported graph, whose form is fixed" in " ".join(capsys.readouterr().err.split())
    words = ["--set", "quant.images=9", "--set", "quant.observer=minmax"]
    assert cli.run(["export", str(bundle.path), "--int8", *words]) == 0
    text = (bundle.path / "recipe.toml").read_text()
    assert [line for line in text.splitlines() if line.startswith("[")] == ["[export]", "[quant]"]
    seen = everything(bundle)
    assert cli.run(["export", str(bundle.path), "--int8"]) == 0
    assert everything(bundle) == seen
    assert Ranges.load(bundle.path / "ranges.json").observer == "minmax"
