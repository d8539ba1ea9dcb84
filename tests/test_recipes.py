"""Every shipped recipe loads, has a description, and is the one its results are listed under."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgedetr import recipe_list
from edgedetr.cli import app
from edgedetr.models import FAMILY, build
from edgedetr.package_data import policies_directory, recipes_directory
from edgedetr.recipe import DEFAULT, Recipe

RECIPES = sorted(recipes_directory().glob("*.toml"))


def test_the_default_and_the_demonstration_are_shipped():
    assert {DEFAULT, "demo"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_by_name_and_survives_being_written(path, tmp_path):
    recipe = Recipe.load(path.stem)
    assert recipe.model.name in FAMILY
    (tmp_path / "again.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_what_it_is_and_the_command(path):
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"edgedetr (train|demo)", head)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_and_is_recorded_in_the_list(path):
    recorded = json.loads(recipe_list.RECORDED.read_text(encoding="utf-8"))
    assert recorded.get(path.stem) == recipe_list.summarize(path.stem, path).to_record(), "run: make docs"
    assert set(recorded) <= {recipe.stem for recipe in RECIPES}


def test_the_list_is_printed_without_building_a_model():
    """Within a second: torch alone takes longer to import."""
    code = "import sys; from edgedetr.cli import app; app.run(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_nano_recipe_keeps_its_promised_size():
    import torch

    recipe = Recipe.load("rtdetr-nano-bccd")
    with torch.device("meta"):
        model = build(recipe.model.name, recipe.model.config, 3)
    assert sum(p.numel() for p in model.parameters()) <= 4_500_000


def test_the_list_has_every_recipe_with_the_facts_of_its_file(capsys):
    assert app.run(["recipes", "--json"]) == 0
    captured = capsys.readouterr()
    found = {one["name"]: one for one in json.loads(captured.out)}
    assert set(found) == {path.stem for path in RECIPES}
    for path in RECIPES:
        one, written = found[path.stem], path.read_text(encoding="utf-8")
        assert f'name = "{one["model"]}"' in written
        assert written.startswith(f"# {one['about']}\n")
        height = re.search(r"^height = (\d+)", written, re.M)
        assert one["height"] == (int(height[1]) if height else 640)
        assert f"\n{path.stem} " in f"\n{captured.err}"
    assert found["rtdetr-r18"]["parameters"] == 20_174_608  # 20 M as published, for 80 classes
    assert (found["demo"]["start"], found["detr-r50"]["start"]) == ("random", "backbone")
    assert (found["demo"]["model_start"], found["dfine-s"]["model_start"]) == ("random", "dfine-s")


def test_one_recipe_is_printed_as_it_is_written(capsys):
    assert app.run(["recipes", "demo"]) == 0
    written = next(path for path in RECIPES if path.stem == "demo").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written
    assert app.run(["recipes", "rtdter-r18"]) == 2
    assert "did you mean 'rtdetr-r18'?" in capsys.readouterr().err


def test_policies_are_shipped():
    assert Path(policies_directory() / "default.toml").is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_gives_the_epochs_gives_what_depends_on_their_number(path):
    """Otherwise published epochs would come with a warm-up or a schedule for small sets."""
    config = Recipe.load(path.stem).train
    if config.epochs != "auto":
        keys = ("lr", "warmup_steps", "schedule", "ema_decay")
        automatic = [key for key in keys if getattr(config, key) == "auto"]
        assert not automatic, f"{path.stem} leaves {automatic} at 'auto'"
