"""train.minutes sets the number of epochs and changes nothing else of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
from safetensors.torch import load_file

from edgedetr.errors import RecipeError, TrainingError
from edgedetr.progress import SilentTraining
from edgedetr.storage.digests import digest
from edgedetr.training import time_budget
from edgedetr.training.config import TrainConfig
from edgedetr.training.optimizer import Schedule
from edgedetr.training.train import train


class Interrupted(SilentTraining):
    """Stops after so many steps, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        if step == self.after:
            raise KeyboardInterrupt


def weights(bundle: Path) -> str:
    return digest(bundle / "weights.safetensors")


def lines(bundle: Path) -> list[dict]:
    return [json.loads(line) for line in (bundle / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "left, expected", [(15.9, 0), (16, 1), (55, 1), (56, 2), (71, 2), (72, 3), (111, 3), (112, 4), (9e9, 4)]
)
def test_the_most_epochs_that_fit(left: float, expected: int) -> None:
    """Half of the epochs take 10 s, half 40 s (rounded towards the short ones), and every second one 6 s more:

    16, 56, 72 and 112 s for one to four.
    """
    schedule = Schedule(micro.numbers(growth=(0.5, 1.0), eval_every=2), epochs=4, steps_per_epoch=10)
    assert time_budget.most_epochs(schedule, {0.5: 1.0, 1.0: 4.0}, 6.0, left) == expected


def test_sizes_between_the_timed_ones_take_time_by_their_pixels() -> None:
    """0.2 s for a step and 0.8 s for the input's pixels: at half of the sides, a quarter of them."""
    found = time_budget.by_area([0.5, 0.75, 1.0, 1.25], {0.5: 0.4, 1.0: 1.0, 1.25: 1.45})
    assert found == pytest.approx({0.5: 0.4, 0.75: 0.2 + 0.8 * 0.5625, 1.0: 1.0, 1.25: 1.45})


def test_thousands_of_epochs_of_a_small_set_are_decided_at_once() -> None:
    schedule = Schedule(micro.numbers(sizes=(0.75, 1.0, 1.25)), epochs=10**9, steps_per_epoch=3)
    assert time_budget.most_epochs(schedule, dict.fromkeys((0.75, 1.0, 1.25), 1.0), 0.0, 301.0) == 100


def test_timed_steps_do_not_change_the_training(micro_data: Path, tmp_path: Path) -> None:
    settings = {"growth": [0.5, 1.0], "epochs": 2}
    asked = train(micro.recipe(**settings), micro_data, tmp_path / "asked")
    found = train(micro.recipe(**settings, minutes=60), micro_data, tmp_path / "found")
    assert weights(found.path) == weights(asked.path)
    ours, theirs = (load_file(bundle.path / "train" / "last.safetensors") for bundle in (found, asked))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    plan, *rest = lines(found.path)
    assert plan == {"kind": "plan", "step": 0, "epochs": 2, "minutes": 60.0} and rest == lines(asked.path)


def test_less_time_means_fewer_epochs_and_a_resume_keeps_their_number(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_budget, "time_step", lambda *inputs: 60.0)  # 3 steps an epoch; 20 s for 4 images
    limited = micro.recipe(minutes=9)  # 8.5 min are usable; three epochs take 10
    with pytest.raises(KeyboardInterrupt):
        train(limited, micro_data, tmp_path / "limited", progress=Interrupted(after=4))
    monkeypatch.setattr(time_budget, "time_step", lambda *inputs: pytest.fail("measured again"))
    train(limited, micro_data, tmp_path / "limited", resume=True)
    train(micro.recipe(epochs=2), micro_data, tmp_path / "two")
    assert weights(tmp_path / "limited") == weights(tmp_path / "two")
    assert lines(tmp_path / "limited")[1:] == lines(tmp_path / "two")


def test_too_little_time_for_one_epoch_is_an_error_with_the_time_of_one(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_budget, "time_step", lambda *inputs: 60.0)
    with pytest.raises(TrainingError, match=r"train\.minutes is 2, and one epoch takes about 3\.3 minutes here"):
        train(micro.recipe(minutes=2), micro_data, tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.safetensors"))


def test_the_gradient_scaler_that_learners_share_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = {"scale": 65536.0, "_growth_tracker": 3}
    precision = SimpleNamespace(state_dict=lambda: dict(scaler), load_state_dict=scaler.update)
    fabric = SimpleNamespace(strategy=SimpleNamespace(precision=precision), broadcast=lambda value: value)

    def time_step(*inputs: object) -> float:
        scaler.update(scale=1.0, _growth_tracker=0)
        return 0.01

    monkeypatch.setattr(time_budget, "time_step", time_step)
    schedule = Schedule(micro.numbers(minutes=1), epochs=2, steps_per_epoch=3)
    learner, images = SimpleNamespace(fabric=fabric), SimpleNamespace()
    assert time_budget.choose_epochs(learner, images, schedule, select_images=4, spent=0.0) == 2
    assert scaler == {"scale": 65536.0, "_growth_tracker": 3}


def test_contradictory_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match="step_epochs"):
        TrainConfig(minutes=5, schedule="step", step_epochs=(2,))
    with pytest.raises(RecipeError, match="minutes"):
        TrainConfig(minutes=-1)
