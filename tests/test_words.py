"""The options of `edgedetr train` that name recipe keys: what they set and refuse, and the devices they choose."""

from __future__ import annotations

import pytest

import edgedetr
from edgedetr.api import TrainingChoice, choose_training
from edgedetr.api import train as api_train
from edgedetr.cli import _words, app
from edgedetr.errors import DeviceError, RecipeError, UsageError
from edgedetr.published.published_detectors import published
from edgedetr.recipe import Recipe, find, recipe_of

KEYS = [(word.option, key) for word in _words.WORDS for key in word.keys]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Runs `edgedetr train` with words, without training; returns what the API was called with, and the recipe."""

    def run(*words: str) -> tuple[int, dict, Recipe | None]:
        seen: dict = {}

        def train(data, out, **options):
            seen.update(options, data=data, out=out)
            return edgedetr.Bundle  # only its `path` is printed

        monkeypatch.setattr(edgedetr.Bundle, "path", "made", raising=False)
        monkeypatch.setattr(edgedetr, "train", train, raising=False)
        (tmp_path / "cells").mkdir(exist_ok=True)
        code = app.run(["train", "--data", str(tmp_path / "cells"), *words])
        words_of_it = {key: seen[key] for key in ("model", "recipe", "start", "preset")} if seen else {}
        recipe = Recipe.load(choose_training(**words_of_it).recipe, seen["sets"]) if seen else None
        return code, seen, recipe

    return run


@pytest.mark.parametrize("option, key", KEYS)
def test_every_word_sets_its_key_and_the_same_with_set_is_refused(option, key, asked, capsys):
    value = {"--lr": "0.5", "--imgsz": "96x128"}.get(option, "3")
    section, _, name = key.partition(".")
    code, _, recipe = asked(option, value)
    assert code == 0
    expected = {"lr": 0.5, "height": 96, "width": 128, "teacher": "3"}.get(name, 3)
    assert getattr(getattr(recipe, section), name) == expected
    assert asked(option, value, "--set", f"{key}=3")[:2] == (2, {})
    assert f"{option} and --set {key} both set {key}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--batch", "--lr", "--patience", "--workers"])
def test_what_the_training_can_choose_may_be_auto(option, asked):
    assert getattr(asked(option, "auto")[2].train, option.removeprefix("--")) == "auto"


def test_one_number_of_pixels_is_height_and_width(asked):
    recipe = asked("--imgsz", "320")[2]
    assert (recipe.input.height, recipe.input.width) == (320, 320)


@pytest.mark.parametrize(
    "words",
    [
        ("--imgsz", "0"),
        ("--imgsz", "640x"),
        ("--imgsz", "-3"),
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--batch", "all"),
        ("--batch", "0"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "1e999"),
        ("--epochs", "9" * 5000),
        ("--workers", "-1"),
        ("--device", "tpu"),
        ("--device", "0,0,"),
    ],
)
def test_a_value_that_no_key_takes_exits_with_2_and_names_the_option(words, tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    assert app.run(["train", "--data", str(tmp_path / "cells"), *words]) == 2
    assert words[0].strip("-") in capsys.readouterr().err


def test_weights_and_start_are_one_option(asked, capsys):
    assert asked("--weights", "some/id")[1]["start"] == "some/id"
    assert asked("--start", "some/id")[1]["start"] == "some/id"
    assert asked("--start", "a/b", "--weights", "c/d")[:2] == (2, {})
    assert "--weights and --start are one option" in capsys.readouterr().err
    assert asked("--weights", "a/b", "--set", 'train.start="c/d"')[0] == 2


def test_a_model_beside_a_recipe_is_refused(asked, capsys):
    assert asked("--recipe", "detr-r50")[2].model.name == "detr"
    assert asked("--model", "detr-r50")[2].model.name == "detr"
    assert asked("--model", "detr", "--recipe", "detr-r50")[:2] == (2, {})
    assert "a model (detr) and a recipe (detr-r50); name one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, recipe",
    [
        ("rtdetr", "rtdetr-r18"),
        ("RT-DETR", "rtdetr-r18"),
        ("rt_detr", "rtdetr-r18"),
        ("RTDETR_R18", "rtdetr-r18"),
        ("detr", "detr-r50"),
        ("deformable_detr", "deformable-r50"),  # not refined, not two-stage: as its configuration starts
        ("sparse-rcnn", "sparse-rcnn-r50"),
        ("demo", "demo"),
    ],
)
def test_a_model_or_recipe_is_found_as_people_type_it(typed, recipe, asked, capsys):
    assert find(typed).stem == recipe
    assert asked("--model", typed)[0] == 0
    said = capsys.readouterr().err
    assert (f"recipe: {recipe} (of {typed})" in said) is (typed != recipe)


def test_a_published_detector_as_model_is_its_recipe_and_its_start(asked, capsys):
    whole = TrainingChoice("rtdetr-r18", "", "rtdetrv2-r18", implied=True)
    assert choose_training(model="rtdetrv2-r18") == choose_training(recipe="rtdetrv2-r18") == whole
    assert choose_training(start="rtdetrv2-r18") == whole
    assert choose_training(model="rtdetrv2-r18", start="none") == TrainingChoice("rtdetr-r18", "", "none")
    assert choose_training(model="rtdetr-r18") == TrainingChoice("rtdetr-r18", "", None)  # which starts whole itself
    assert choose_training() == TrainingChoice("rtdetr-r18", "", None)
    assert asked("--model", "rtdetrv2-r18")[0] == 0
    assert "recipe: rtdetr-r18 (of rtdetrv2-r18)" in capsys.readouterr().err
    assert asked("--model", "detr-r101-dc5")[:2] == (2, {})
    assert "edgedetr import detr-r101-dc5 --out B" in capsys.readouterr().err


def test_a_model_starts_whole_with_numbers_of_the_set_and_a_recipe_as_it_is_written(asked, capsys):
    assert choose_training(model="dfine-s") == TrainingChoice("dfine-s", "finetune", "dfine-s", implied=True)
    assert choose_training(model="dfine-s", start="mine").start == "mine"
    assert choose_training(model="dfine-s", preset="parity").preset == "parity"
    assert choose_training(model="dfine-s", start="random") == TrainingChoice("dfine-s", "", "random")
    assert choose_training(recipe="dfine-s") == TrainingChoice("dfine-s", "", None)
    assert choose_training(model="demo") == TrainingChoice("demo", "", None)  # no such size is published
    assert asked("--model", "dfine-s")[0] == 0
    said = capsys.readouterr().err
    assert "preset: finetune, for the start from dfine-s; as published: --recipe dfine-s" in said
    assert asked("--recipe", "dfine-s")[0] == 0 and "preset" not in capsys.readouterr().err


@pytest.mark.parametrize("row", [row for row in published().values() if row.recipe], ids=lambda row: row.name)
def test_every_published_size_can_be_fine_tuned_by_its_name(row):
    choice = choose_training(model=row.name)
    start = [] if choice.start is None else [f'train.start="{choice.start}"']
    train = Recipe.load(choice.recipe, start, preset=choice.preset).train
    assert train.start and (train.epochs, train.warmup_steps, train.schedule) == ("auto", "auto", "auto")


@pytest.mark.parametrize(
    "options, start", [({}, "rtdetrv2-r18"), ({"start": "other"}, "other"), ({"sets": ["train.start=mine"]}, "mine")]
)
def test_what_a_user_says_of_the_start_is_kept_beside_a_published_model(options, start, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    from edgedetr.training import train as module

    seen: list[Recipe] = []
    monkeypatch.setattr(module, "train", lambda recipe, *others, **rest: seen.append(recipe))
    api_train(tmp_path, recipe="rtdetrv2-r18", **options)
    assert seen[0].train.start == start


def test_every_member_has_a_recipe_by_its_name():
    from edgedetr.models import FAMILY

    for name in FAMILY:
        assert Recipe.load(recipe_of(name)).model.name == name


@pytest.mark.parametrize("typed, near", [("rtdetr-r81", "rtdetr-r18"), ("defromable_detr", "deformable_detr")])
def test_an_unknown_model_names_the_nearest(typed, near, tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    assert app.run(["train", "--data", str(tmp_path / "cells"), "--model", typed]) == 2
    assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_a_recipe_of_a_model_that_ships_none_is_an_error():
    with pytest.raises(RecipeError, match="no recipe is shipped for the model 'yolo'"):
        recipe_of("yolo")


class Gpus:
    """torch.cuda with so many GPUs."""

    def __init__(self, count: int) -> None:
        self.count = count

    def install(self, patch) -> None:
        import torch

        patch.setattr(torch.cuda, "is_available", lambda: self.count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: self.count)
        patch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {'AB'[number]}")
        patch.setattr(torch.version, "cuda", "12.6" if self.count else None)


@pytest.mark.parametrize(
    "word, accelerator, gpus",
    [
        (None, "auto", ()),
        ("auto", "auto", ()),
        ("cpu", "cpu", ()),
        ("cuda", "cuda", ()),
        ("GPU", "cuda", ()),
        ("0", "cuda", (0,)),
        ("cuda:1", "cuda", (1,)),
        ("0,1", "cuda", (0, 1)),
    ],
)
def test_a_device_becomes_what_fabric_takes(word, accelerator, gpus, monkeypatch):
    torch = pytest.importorskip("torch")
    from edgedetr.training.device_choice import choose_device

    Gpus(2).install(monkeypatch)
    chosen = choose_device(word)
    assert (chosen.accelerator, chosen.gpus) == (accelerator, gpus)
    assert chosen.of_fabric(Recipe.load().train) == (list(gpus) or 1)
    assert torch.cuda.device_count() == 2


@pytest.mark.parametrize(
    "word, count, error, message",
    [
        ("cuda", 0, DeviceError, r"was built without CUDA; there is the CPU \(\d+ cores\)"),
        ("0,1", 0, DeviceError, "there is the CPU"),
        ("2", 2, DeviceError, "there is no GPU 2; there is the CPU .*, and GPUs: 0 GPU A, 1 GPU B"),
        ("1,1", 2, UsageError, "names a GPU twice"),
        ("tpu", 2, UsageError, "expected cpu, cuda"),
    ],
)
def test_a_device_that_is_not_here_is_an_error_that_names_what_is(word, count, error, message, monkeypatch):
    pytest.importorskip("torch")
    from edgedetr.training.device_choice import choose_device

    Gpus(count).install(monkeypatch)
    with pytest.raises(error, match=message):
        choose_device(word)


def test_gpus_by_number_are_the_devices_of_the_training(monkeypatch):
    pytest.importorskip("torch")
    from edgedetr.training.device_choice import DeviceChoice, with_devices

    two = DeviceChoice("cuda", (0, 1))
    assert with_devices(Recipe.load(), two).train.devices == 2
    assert with_devices(Recipe.load(sets=["train.devices=2"]), two).train.devices == 2
    with pytest.raises(UsageError, match="names 2 GPUs and train.devices is 4"):
        with_devices(Recipe.load(sets=["train.devices=4"]), two)


def test_a_training_runs_on_the_device_that_was_named(monkeypatch):
    pytest.importorskip("torch")
    from edgedetr.training.device_choice import DeviceChoice
    from edgedetr.training.train import start_devices

    assert start_devices(Recipe.load(sets=["train.precision=32"]).train, DeviceChoice("cpu")).device.type == "cpu"
