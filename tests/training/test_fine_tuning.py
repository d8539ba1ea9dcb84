"""What "auto" in [train] becomes: hand-worked numbers, the same on a resume, and never over a number that was given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import micro
import pytest

from edgedetr.errors import RecipeError, TrainingError
from edgedetr.progress import SilentTraining
from edgedetr.recipe import Recipe, shipped_recipes
from edgedetr.storage.digests import digest
from edgedetr.training import planning
from edgedetr.training.config import ResolvedTrainConfig, TrainConfig, resolved
from edgedetr.training.fine_tuning import (
    BEFORE,
    DEFAULTS,
    Plan,
    StartKind,
    as_recorded,
    fit_to_machine,
    frozen_at_random,
    recorded,
    resolve,
    start_of,
)
from edgedetr.training.train import train
from edgedetr.training.validator import Validator

AUTO = [name for name, hint in get_type_hints(TrainConfig).items() if "auto" in str(hint)]


def numbers(images: int, start: StartKind = "whole", *, width: int = 256, **settings: object) -> TrainConfig:
    machine = fit_to_machine(TrainConfig(**settings), gpu=False, bf16=False, cores=2, images=images)
    return resolve(machine.config, images=images, start=start, selects=True, width=width).config


def test_five_hundred_images_from_a_whole_detector() -> None:
    """31 steps of 16 images an epoch; 50,000 / 16 = 3,125 steps are 101 epochs, 3,131 steps."""
    found = numbers(500)
    assert (found.epochs, found.batch) == (101, 16)
    assert found.warmup_steps == 156  # 5 % of 3,131
    assert found.ema_decay == pytest.approx(1 - 1 / 156.55, abs=1e-6) and found.ema_warmup == 31
    assert found.eval_every == 3  # 34 evaluations
    assert found.patience == 11  # 30 % of 34
    assert (found.lr, found.backbone_lr_factor, found.schedule) == (2e-4, 0.5, "flat_cosine")
    sides = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)  # of 640, RT-DETR-R34
    assert found.sizes == tuple(side / 640 for side in sides)


@pytest.mark.parametrize(
    ("images", "start", "epochs", "warmup"),
    [
        (25, "whole", 3125, 156),  # one step an epoch: 3,125 of them
        (205, "whole", 261, 156),  # 12 an epoch
        (205, "backbone", 521, 312),
        (205, "random", 1042, 625),
        (20_000, "whole", 12, 750),  # 1,250 an epoch; at least 12 epochs
        (118_000, "whole", 12, 2000),  # 88,500 steps: the published warm-up
    ],
)
def test_epochs_follow_the_images_and_the_start(images: int, start: StartKind, epochs: int, warmup: int) -> None:
    found = numbers(images, start)
    assert (found.epochs, found.warmup_steps) == (epochs, warmup)


def test_a_large_set_takes_the_published_average_and_a_large_batch_enough_steps() -> None:
    published = numbers(118_000, epochs=72)
    assert (published.ema_decay, published.ema_warmup, published.warmup_steps) == (0.9999, 2000, 2000)
    large = numbers(6400, batch=64)  # 50,000 / 64 would be 781 steps; 1,500 are 15 epochs of 100
    assert large.epochs == 15 and large.lr == 4e-4  # a fourfold batch: twice the rate


@pytest.mark.parametrize("images", [10, 60, 500, 5000, 118_000])
@pytest.mark.parametrize("epochs", [1, 3, 72])
def test_warm_up_and_average_are_at_most_a_twentieth_of_the_steps(images: int, epochs: int) -> None:
    found = numbers(images, epochs=epochs)
    steps = epochs * max(images // 16, 1)
    assert found.warmup_steps <= 0.05 * steps and found.ema_warmup <= 0.05 * steps
    assert 1 / (1 - found.ema_decay) <= max(0.05 * steps, 1) * 1.01  # ema_decay has six digits
    assert len(range(0, epochs, found.eval_every)) <= DEFAULTS.evaluations


def test_the_rate_of_every_start() -> None:
    rates = [(numbers(500, start).lr, numbers(500, start).backbone_lr_factor) for start in get_args(StartKind)]
    assert rates == [(2e-4, 0.5), (1e-4, 0.1), (2e-4, 1.0)]
    assert numbers(500, "backbone").sizes == () == numbers(500, "random").sizes


def test_a_short_training_takes_one_size() -> None:
    """31 steps of 16 images an epoch: 26 epochs see 12,896 images, 25 see 12,400."""
    assert numbers(500, epochs=26).sizes == DEFAULTS.sizes and numbers(500, epochs=25).sizes == ()


def test_few_images_and_a_narrow_detector_take_a_higher_rate() -> None:
    """50,000 images seen / 12,500 = 4, whose root is 2; 256 / 128 = 2; and never more than ten times in all."""
    assert numbers(500, epochs=25, batch=20).lr == pytest.approx(2e-4 * (20 / 16) ** 0.5 * 2, rel=5e-3)
    assert numbers(500, width=128).lr == 4e-4
    assert numbers(160, epochs=1).lr == 8e-4  # 160 images: 4 times, not 17.7
    assert numbers(160, epochs=1, width=64).lr == 2e-3  # not 16 times
    assert numbers(205, epochs=12, batch=8, width=112).lr == 1.29e-3  # 300 steps, with which it was measured
    # Of 100,000 and 200,000 images, a sixteenth is 6,250 and 12,500: four times the rate.
    assert numbers(6250, "backbone", epochs=1, batch=16).lr == 4e-4 == 4 * numbers(500, "backbone").lr
    assert numbers(6250, "random", epochs=8, batch=16).lr == 4e-4 == 2 * numbers(500, "random").lr
    assert numbers(500, "random", width=512).lr == numbers(500, "random").lr


# For batches of 128: configs/deimv2/deimv2_hgnetv2_{atto,femto,pico}_coco.yml of DEIMv2, and D-FINE's N.
@pytest.mark.parametrize(("width", "published"), [(64, 2e-3), (96, 1.6e-3), (112, 1.6e-3), (128, 8e-4)])
def test_the_rate_of_narrow_detectors_is_near_the_published_one(width: int, published: float) -> None:
    ours = numbers(118_000, batch=128, epochs=72, width=width).lr
    assert 0.67 < ours / published < 1.5


def test_what_is_chosen_is_said_and_what_was_given_stays() -> None:
    plan = resolve(TrainConfig(epochs=74, batch=16), images=160, start="whole", selects=True)
    assert "warm-up 37 steps (5 % of 740)" in plan.notes
    assert "average of the weights over 37 steps (5 % of 740)" not in plan.notes  # it names its decay
    assert "average of the weights over 37 steps (5 %; ema_decay 0.972973)" in plan.notes
    given = {name: getattr(micro.numbers(epochs=7, patience=3, workers=2, lr=3e-3), name) for name in AUTO}
    given["warmup_steps"] = 3  # of 70
    asked = TrainConfig(**given)
    plan = resolve(asked, images=160, start="whole", selects=True)
    assert plan.config == asked and plan.notes == ()
    for name in AUTO:  # each alone too
        assert getattr(numbers(500, **{name: given[name]}), name) == given[name]


def test_every_auto_has_a_number_of_its_own_type_and_none_is_left() -> None:
    assert {name for name in get_type_hints(ResolvedTrainConfig) if name in AUTO} == set(AUTO)
    assert [item.name for item in fields(ResolvedTrainConfig)] == [item.name for item in fields(TrainConfig)]
    assert isinstance(resolved(numbers(500)), ResolvedTrainConfig)
    with pytest.raises(RecipeError, match=r"train\.epochs is 'auto'; expected a whole number"):
        resolved(TrainConfig())
    with pytest.raises(RecipeError, match="start is 'hole'; expected one of"):
        resolve(TrainConfig(), images=5, start="hole", selects=True)  # type: ignore[arg-type]


def test_early_stop_is_off_where_it_would_mislead() -> None:
    assert numbers(500, schedule="step", step_epochs=(40,)).patience == 0  # AP rises after the step
    assert numbers(500, epochs=10).patience == 0  # ten evaluations, and ten without improvement are needed
    machine = fit_to_machine(TrainConfig(), gpu=False, bf16=False, cores=2, images=500).config
    assert resolve(machine, images=500, start="whole", selects=False).config.patience == 0  # only the verify split
    assert numbers(500, "random").patience == 19  # half of 37, of 404 epochs: AP may be 0 for long


def test_the_start_of_a_recipe() -> None:
    for word, expected in (("none", "backbone"), ("random", "random"), ("some.bundle", "whole")):
        assert start_of(Recipe.load(sets=[f"train.start={word}"])) == expected
    assert start_of(Recipe.load("rtdetr-nano-bccd")) == "random"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (['model.backbone_weights="random"'], ["model.frozen_stages=0", "model.backbone_norm=trainable"]),
        (['model.backbone_weights="random"', "model.frozen_stages=0"], ["model.backbone_norm=trainable"]),
        (['model.backbone_weights="random"', "train.start=some.bundle"], []),  # the bundle's weights replace them
        (["train.start=random"], []),  # which lets everything learn
        (["train.start=none"], []),  # published weights of the backbone
    ],
)
def test_what_stays_at_random_weights_is_said_with_the_setting_that_lets_it_learn(sets, expected) -> None:
    found = frozen_at_random(Recipe.load("detr-r50", sets=sets))
    assert [sentence.rpartition("--set ")[2] for sentence in found] == expected


def test_no_shipped_recipe_freezes_random_weights() -> None:
    assert [name for name in shipped_recipes() if frozen_at_random(Recipe.load(name))] == []


@pytest.mark.parametrize("name", ["rtdetr-nano-bccd", "demo"])
def test_recipes_that_give_their_numbers_train_as_in_version_0_1(name: str) -> None:
    """The values that [train] had then for what the recipe does not say."""
    recipe, then = Recipe.load(name), {"eval_every": 1, "patience": 0, "sizes": (), "precision": "32", "workers": 0}
    given = {key: getattr(recipe.train, key) for key in AUTO if getattr(recipe.train, key) != "auto"}
    machine = fit_to_machine(recipe.train, gpu=False, bf16=False, cores=2, images=205)
    found = resolve(machine.config, images=205, start=start_of(recipe), selects=True).config
    assert {key: getattr(found, key) for key in AUTO} == {**then, **given}


def test_a_gpu_takes_bfloat16_and_workers_and_measures_its_batch() -> None:
    auto = TrainConfig(batch="auto")
    gpu = fit_to_machine(auto, gpu=True, bf16=True, cores=16, images=2000)
    assert (gpu.config.precision, gpu.config.workers, gpu.config.batch) == ("bf16", 8, "auto")
    assert gpu.notes == ("precision bf16: as this GPU can", "8 workers prepare images: for 16 cores")
    assert fit_to_machine(auto, gpu=True, bf16=False, cores=4, images=2000).config.precision == "32"
    assert fit_to_machine(auto, gpu=True, bf16=True, cores=4, images=2000).config.workers == 3
    assert fit_to_machine(auto, gpu=True, bf16=True, cores=16, images=40).config.workers == 0  # two steps an epoch
    cpu = fit_to_machine(auto, gpu=False, bf16=False, cores=16, images=2000)
    assert (cpu.config.precision, cpu.config.workers, cpu.config.batch) == ("32", 0, 16)
    assert cpu.notes == ("batch 16: train.batch 'auto' measures the memory of a GPU, and there is none here",)
    with pytest.raises(RecipeError, match="measured on one device"):
        TrainConfig(batch="auto", devices=2)


def test_a_resume_keeps_what_was_chosen_before() -> None:
    asked = TrainConfig(batch="auto", lr=1e-3)
    first = resolve(
        replace(asked, batch=48, precision="bf16", workers=8), images=500, start="whole", selects=True
    ).config
    chosen = json.loads(json.dumps(recorded(first, asked)))
    assert {key: chosen[key] for key in ("batch", "precision", "workers")} == {
        "batch": 48,
        "precision": "bf16",
        "workers": 8,
    }
    assert as_recorded(asked, chosen) == first  # on any machine, and whatever "auto" means by then
    assert "lr" not in chosen and as_recorded(first, {"batch": 4}) == first  # what was given is the recipe's


def test_a_checkpoint_of_version_0_1_is_resumed_with_the_numbers_of_0_1() -> None:
    """Its defaults, which its recipes left out."""
    assert set(BEFORE) == set(AUTO)
    then = TrainConfig(**{**micro.PUBLISHED, "batch": 16})
    assert as_recorded(TrainConfig(batch="auto"), {}) == then and recorded(then, TrainConfig(batch="auto")) == {}


@pytest.mark.parametrize("decay", [0.9997, 0.9999, 0.99999])
def test_an_average_that_was_given_a_long_horizon_still_leaves_the_first_weights(decay: float) -> None:
    """LW-DETR's 0.9997 looks back on 3,333 steps, and there are 1,575."""
    found = numbers(500, batch=32, ema_decay=decay)
    steps = 15 * found.epochs
    assert (steps, found.ema_decay) == (1575, decay)
    rates = [decay * (1 - math.exp(-step / found.ema_warmup)) for step in range(1, steps + 1)]
    assert 1 / (1 - rates[-1]) == pytest.approx(0.05 * steps, rel=0.05)
    tenth = steps // 10
    assert math.prod(rates[tenth:]) < 1e-6  # what the weights of the first tenth weigh in the last average
    short = [decay * (1 - math.exp(-step / 15)) for step in range(1, steps + 1)]  # with a ramp of 1 % of the steps
    assert math.prod(short[tenth:]) > 0.6


def test_a_published_warm_up_on_a_small_set_is_noticed_and_the_preset_helps() -> None:
    plan = resolve(Recipe.load("dfine-s").train, images=500, start="whole", selects=True)
    assert plan.config.warmup_steps == 500  # of 132 epochs of 15 steps
    assert "the recipe's warm-up takes 500 of 1980 steps: for a set of this size, add --preset finetune" in plan.notes
    tuned = Recipe.load("dfine-s", preset="finetune").train
    found = resolve(tuned, images=500, start="whole", selects=True)
    assert (found.config.warmup_steps, found.config.epochs, found.config.batch) == (78, 105, 32)
    assert not any("finetune" in note for note in found.notes)


class Notes(SilentTraining):
    """Keeps what a training says, and stops it after so many steps."""

    def __init__(self, stop: int = 0) -> None:
        self.notes, self._stop = [], stop

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        if step == self._stop:
            raise KeyboardInterrupt


def test_an_automatic_training_says_its_numbers_writes_them_down_and_resumes(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 images in batches of 4: 3 steps an epoch, 24 in all."""
    auto = {"epochs": 8, "warmup_steps": "auto", "ema_decay": "auto", "ema_warmup": "auto", "schedule": "auto"}
    recipe = micro.recipe(**auto, eval_every="auto", patience="auto", lr="auto", sizes="auto", batch=4)
    straight = train(recipe, micro_data, tmp_path / "a", progress=(said := Notes()))
    assert "warm-up 1 steps (4.2 % of 24)" in said.notes
    written = Recipe.from_bundle(straight).train
    assert (written.warmup_steps, written.eval_every, written.patience) == (1, 1, 0)
    assert written.lr == 1e-3  # from random weights: half of 2e-4 for a batch of 4, and ten times at most
    assert not [name for name in AUTO if getattr(written, name) == "auto"]
    with pytest.raises(KeyboardInterrupt):
        train(recipe, micro_data, tmp_path / "b", progress=Notes(stop=10))
    again = Recipe.load(tmp_path / "a" / "recipe.toml")  # the numbers, or "auto" once more: the same training
    monkeypatch.setattr(planning.fine_tuning, "resolve", lambda config, **rest: Plan(config))  # and chosen only once
    train(again, micro_data, tmp_path / "b", resume=True)
    train(recipe, micro_data, tmp_path / "b", resume=True)
    assert digest(tmp_path / "a" / "weights.safetensors") == digest(tmp_path / "b" / "weights.safetensors")


def test_an_early_stop_is_said_and_a_resume_does_not_go_on(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([10.0, 30.0, 20.0, 30.0, 99.0])  # an equal AP is no better one
    real = Validator.measure
    monkeypatch.setattr(Validator, "measure", lambda self, found: replace(real(self, found), ap=next(scores)))
    train(micro.recipe(epochs=9, patience=2), micro_data, tmp_path / "a", progress=(said := Notes()))
    why = "no better AP in 2 evaluations (train.patience); the weights of epoch 2, AP 30.0, are kept"
    assert said.notes == [f"stopped after epoch 4 of 9: {why}"]
    lines = [json.loads(line) for line in (tmp_path / "a/train/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [1, 2, 3, 4]
    weights = digest(tmp_path / "a/weights.safetensors")
    train(micro.recipe(epochs=9, patience=2), micro_data, tmp_path / "a", resume=True)
    assert digest(tmp_path / "a/weights.safetensors") == weights and next(scores) == 99.0


def test_a_damaged_checkpoint_is_an_error_before_anything_is_planned(micro_data: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "train").mkdir(parents=True)
    (tmp_path / "a" / "train" / "last.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        train(micro.recipe(), micro_data, tmp_path / "a", resume=True)
