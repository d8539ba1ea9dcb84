"""Every shipped recipe loads, has a description, and is the one its results are listed under."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
def test_recipe_builds(path):
    import torch

    recipe = Recipe.load(path)
    with torch.device("meta"):
        model = build(recipe.model.name, recipe.model.config, 3)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_the_nano_recipe_keeps_its_promised_size():
    import torch

    recipe = Recipe.load("rtdetr-nano-bccd")
    with torch.device("meta"):
        model = build(recipe.model.name, recipe.model.config, 3)
    assert sum(p.numel() for p in model.parameters()) <= 4_500_000


def test_policies_are_shipped():
    assert Path(policies_directory() / "default.toml").is_file()
