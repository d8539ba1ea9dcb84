"""Recipes and published detectors belong together: model, size, pixels, and what a recipe starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_folder import SETS, small_rt_detr_v2, write_hub_folder

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.models import FAMILY, build
from edgedetr.package_data import recipes_directory
from edgedetr.published import published_detectors
from edgedetr.published.published_detectors import LicenseError, find
from edgedetr.recipe import DEFAULT, Recipe
from edgedetr.training.start_weights import load_start

ROWS = published_detectors.published()
STARTED = [path.stem for path in sorted(recipes_directory().glob("*.toml")) if Recipe.load(path.stem).train.start]
CLASSES = (ClassInfo(0, 1, "person"), ClassInfo(1, 2, "bolt"))


@pytest.mark.parametrize("name", [row.name for row in ROWS.values() if row.recipe])
def test_a_recipe_has_the_model_the_size_and_the_pixels_of_its_published_detector(name: str) -> None:
    row = find(name)
    recipe = Recipe.load(row.recipe)
    assert recipe.model.name == row.member
    for ours, theirs in zip((recipe.model.config.mean, recipe.model.config.std), row.mean_and_std):
        assert ours == pytest.approx(theirs, abs=1e-3)
    if row.resize == "stretch":
        assert (recipe.input.height, recipe.input.width) == row.input
    if row.params is not None:
        with torch.device("meta"):
            model = build(row.member, recipe.model.config, row.class_rows)
        ours = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        # Published numbers are rounded to millions, and some count what training alone needs.
        assert ours == pytest.approx(row.params, rel=0.06, abs=0.6)


def test_the_default_starts_from_a_whole_detector_that_everybody_may_use() -> None:
    recipe = Recipe.load(DEFAULT)
    assert DEFAULT in STARTED
    row = find(recipe.train.start)
    assert row.license.permissive and row.recipe == DEFAULT and row.hub


@pytest.mark.parametrize("name", STARTED)
def test_a_recipe_starts_from_its_own_detector_under_a_license_for_everybody(name: str) -> None:
    row = find(Recipe.load(name).train.start)
    assert row.license.permissive and not row.page
    assert row.member == Recipe.load(name).model.name


def test_every_member_of_the_table_is_in_the_family() -> None:
    assert {row.member for row in ROWS.values()} <= set(FAMILY)


def test_the_license_that_was_accepted_goes_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    write_hub_folder(tmp_path / "hub", "someone/small", small_rt_detr_v2())
    bound = replace(ROWS["rtdetrv2-r34"], name="small", hub="someone/small", license=ROWS["rfdetr-xlarge"].license)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": bound})
    sets = [*SETS, "train.start=small"]
    recipe = Recipe.load(sets=sets)
    with torch.device("meta"):
        model = build("rt_detr", recipe.model.config, 2)
    with pytest.raises(LicenseError, match="--accept-license PML-1.0"):
        load_start(model, recipe, ["person", "bolt"])
    accepted = Recipe.load(sets=[*sets, 'train.accept_license=["PML-1.0"]'])
    assert 'accept_license = ["PML-1.0"]' in accepted.to_toml(), "the bundle's recipe has it"
    model = build("rt_detr", accepted.model.config, 2)
    start = load_start(model, accepted, ["person", "bolt"])
    assert start.record["accepted"] == "PML-1.0" and "license PML-1.0" in start.describe()

    bundle = Bundle.create(tmp_path / "a.bundle", Manifest("rt_detr", CLASSES, InputContract(64, 64), OutputContract()))
    with bundle.add("results/start.json", stage="train") as path:
        start.write(path)
    with bundle.add("weights.safetensors", stage="train") as path:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    next_recipe = Recipe.load(sets=[*SETS, f"train.start={tmp_path / 'a.bundle'}"])
    again = load_start(model, next_recipe, ["person", "bolt"])
    assert again.record["license"] == "PML-1.0" and "license PML-1.0" in again.describe()
