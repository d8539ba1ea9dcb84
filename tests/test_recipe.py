"""Recipes are strict: what is unknown, mistyped or out of range is named, with the nearest known word."""

from __future__ import annotations

import pytest

from edgedetr.errors import RecipeError
from edgedetr.idle_settings import NEEDS
from edgedetr.package_data import recipes_directory
from edgedetr.recipe import Recipe


def load(tmp_path, text, sets=()):
    path = tmp_path / "x.toml"
    path.write_text(text)
    return Recipe.load(path, sets)


def test_an_empty_recipe_is_all_defaults(tmp_path):
    recipe = load(tmp_path, "")
    assert recipe.model.name == "rt_detr" and recipe.input.height == 640 and recipe.verify.budget == 1.0


def test_a_recipe_says_only_what_differs(tmp_path):
    recipe = load(tmp_path, "[input]\nheight = 320\nwidth = 256\n[train]\nlr = 2e-4\n")
    assert (recipe.input.height, recipe.input.width, recipe.train.lr) == (320, 256, 2e-4)


def test_a_number_among_words_is_that_word():
    assert Recipe.load(sets=["train.precision=16"]).train.precision == "16"
    assert Recipe.load(sets=['train.precision="32"']).train.precision == "32"
    with pytest.raises(RecipeError, match="precision = '64': Input should be '32', 'bf16', '16' or 'auto'"):
        Recipe.load(sets=["train.precision=64"])


def test_set_overrides_the_recipe_and_keeps_its_types(tmp_path):
    recipe = load(tmp_path, "[train]\nlr = 1e-3\n", ["train.lr=2e-4", "train.epochs=3", "input.resize=letterbox"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.input.resize) == (2e-4, 3, "letterbox")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[quant]\nimges = 3", r"x\.toml \[quant\]: unknown key 'imges'; did you mean 'images'\?"),
        ("[trian]\nlr = 1", r"unknown section \[trian\]; did you mean 'train'\?"),
        ("lr = 1", "unknown section"),
        ("train = 1", "outside any section"),
        ("[model]\nname = 'rtdetr'", "unknown model 'rtdetr'; did you mean 'rt_detr'"),
        ("[train]\nlr = '1e-4'", r"\[train\]: lr = '1e-4'"),
        ("[train]\nlr = nan", "finite"),
        ("[train]\nepochs = 1.5", "epochs"),
        ("[train]\nlr = -1.0", "lr"),
        ("[train]\nepochs = 0", "epochs"),
        ("[input]\nheight = -320", "input.height is -320"),
        ("[input]\nresize = 'crop'", "resize"),
        ("[train\nlr = 1", "not readable as TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, text, message):
    with pytest.raises((RecipeError, Exception), match=message) as caught:
        load(tmp_path, text)
    assert getattr(caught.value, "exit_code", None) in (1, 2), f"not an edgedetr error: {caught.value!r}"


@pytest.mark.parametrize("assignment", ["lr", "train", "train.lr", "=3", "trian.lr=3", "train.lrr=3"])
def test_a_set_that_says_nothing_usable_is_refused(tmp_path, assignment):
    with pytest.raises(RecipeError, match="lr|expected|did you mean"):
        load(tmp_path, "", [assignment])


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(RecipeError, match="shipped: .*rtdetr-r18"):
        Recipe.load("rtdetr-r81")


def test_a_binary_file_is_no_recipe(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="x.toml: not UTF-16 text"):
        Recipe.load(tmp_path / "x.toml")


@pytest.mark.parametrize("name", [p.stem for p in sorted(recipes_directory().glob("*.toml"))])
def test_every_shipped_recipe_loads_and_reads_back_equal(tmp_path, name):
    recipe = Recipe.load(name)
    assert load(tmp_path, recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    "assignment",
    [
        "train.lr=" + "9" * 5000,
        "train.step_epochs=" + "[" * 20_000,
        "train.step_epochs=" + "[" * 400 + "]" * 400,
        "train.lr=1\nepochs = 2",
        "train.lr=" + "x" * 5000,
        "train.lr=2026-11-28",
        "train.epochs=" + "9" * 4000,
    ],
)
def test_a_set_of_endless_digits_or_brackets_is_one_short_error(tmp_path, assignment):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "", [assignment])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    ["[train]\nlr = " + "9" * 5000, "[train]\nlr = " + "[" * 20_000, "[train]\nstep_epochs = " + "[" * 400 + "]" * 400],
)
def test_a_recipe_of_endless_digits_or_brackets_is_one_error_with_its_path(tmp_path, text):
    with pytest.raises(RecipeError, match=r"x\.toml"):
        load(tmp_path, text)


def test_a_pipe_is_no_recipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match="x.toml"):
        Recipe.load(tmp_path / "x.toml")


def test_an_input_larger_than_a_frame_of_8k_video_is_refused():
    with pytest.raises(RecipeError, match="input is 16000 x 16000; expected at most"):
        Recipe.load("demo", ["input.height=16000", "input.width=16000"])
    assert Recipe.load("demo", ["input.height=4320", "input.width=7680"]).input.width == 7680


@pytest.mark.parametrize(
    "sides, nearest", [((600, 650), (608, 640)), ((15, 33), (32, 32)), ((48, 64), (64, 64)), ((640, 47), (640, 32))]
)
def test_an_input_that_the_model_cannot_read_is_refused_with_the_nearest_size(sides, nearest):
    sets = [f"input.{name}={side}" for name, side in zip(("height", "width"), sides)]
    expected = (
        f"rt_detr reads multiples of 32; the nearest: --set input.height={nearest[0]} --set input.width={nearest[1]}"
    )
    with pytest.raises(RecipeError, match=expected):
        Recipe.load(sets=sets)
    Recipe.load(sets=expected.partition("nearest: ")[2].replace("--set ", "").split())


def test_a_key_of_0_1_with_another_name_is_read_with_a_warning_and_keeps_older_trainings(tmp_path, caplog):
    old = tmp_path / "old.toml"
    old.write_text("[augment]\ncolour = 0.25\n")
    recipe = Recipe.load(old)
    assert recipe.augment.color == 0.25
    assert "'colour' is now named 'color'" in caplog.text
    # What decides whether a training may be resumed keeps the name of 0.1, the recipe that is written has the new one.
    assert "colour = 0.25" in recipe.to_toml(later=False)
    assert "color = 0.25" in recipe.to_toml()


def test_an_older_and_a_newer_name_of_one_key_together_are_refused(tmp_path):
    both = tmp_path / "both.toml"
    both.write_text("[augment]\ncolour = 0.25\ncolor = 0.5\n")
    with pytest.raises(RecipeError, match="'colour' is the older name of 'color', and both are given"):
        Recipe.load(both)


@pytest.mark.parametrize(
    "sets, said",
    [
        (["augment.mosaic_degrees=5"], "it needs augment.mosaic above 0 and augment.mosaic_kind = 'affine'"),
        (["augment.mosaic_degrees=5", "augment.mosaic=0.5", "augment.mosaic_kind=affine"], ""),
        (["train.denoising=50", "model.name=detr"], "it needs model.denoising = true"),
        (["train.denoising=50"], ""),
        (["train.vfl_alpha=0.5"], ""),  # rt_detr's own loss
        (["train.vfl_alpha=0.5", "train.class_loss=focal"], "it needs the loss 'vfl'"),
        (["quant.percentile=99.9"], "it needs quant.observer = 'percentile'"),
        (["quant.percentile=99.9", "quant.observer=percentile"], ""),
        (["train.flat=0.3"], ""),
        (["train.flat=0.3", "train.schedule=cosine"], "it needs train.schedule = 'flat_cosine'"),
        (["augment.crop=0.9", "augment.off_for_last=1"], "it needs augment.off_for_first and off_for_last below 1"),
    ],
)
def test_a_setting_without_effect_beside_the_others_is_said(caplog, sets, said):
    Recipe.from_dict({}, where="test", sets=sets)
    found = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(found) == bool(said) and all(f"--set {sets[0].partition('=')[0]} has" in one for one in found)
    assert all(said in one for one in found)


def test_settings_that_need_others_are_keys_of_a_recipe():
    recipe = Recipe.from_dict({}, where="test")
    for need in NEEDS:
        for section, key in (name.split(".") for name in need.keys):
            assert hasattr(getattr(recipe, section), key)
