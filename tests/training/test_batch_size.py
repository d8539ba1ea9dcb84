"""The largest batch that fits: found on a fake device whose memory is known, and everything undone afterwards."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
import torch

from edgedetr.bundle import InputContract
from edgedetr.errors import TrainingError
from edgedetr.storage.digests import digest
from edgedetr.training import planning
from edgedetr.training import train as train_module
from edgedetr.training.batch_size import largest_batch, measure_batch
from edgedetr.training.data.dataset import open_splits
from edgedetr.training.device_choice import ANY_DEVICE
from edgedetr.training.fine_tuning import Plan
from edgedetr.training.planning import for_machine, plan_training
from edgedetr.training.train import start_devices, train
from edgedetr.training.trainer import Learner, training_set


@pytest.mark.parametrize(("unit", "most"), [(1, 64), (3, 60), (4, 200), (1, 1)])
def test_the_search_ends_within_an_eighth_of_the_largest_that_fits(unit: int, most: int) -> None:
    for limit in range(1, 2 * most):
        tried: list[int] = []

        def fits(images: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(images)
            return images <= limit

        found = largest_batch(fits, unit=unit, most=most)
        best = min(limit, most) // unit * unit  # by hand: whole units that fit
        assert found % unit == 0 and best - max(best // 8, unit) <= found <= best, (limit, found)
        assert len(tried) == len(set(tried)) <= 12


class FakeDevice:
    """A device with room for so many images: a step with more runs out of memory."""

    def __init__(self, limit: int, used: float = 0.5) -> None:
        self.limit, self.used, self.released, self.steps = limit, used, 0, []

    def step(self, batch, number, schedule):
        self.steps.append((len(batch.targets), number, tuple(batch.images.shape[1:]), len(batch.targets[0])))
        if len(batch.targets) > self.limit:
            raise torch.cuda.OutOfMemoryError("out of memory")

    def peak(self) -> float:
        return self.used

    def release(self) -> None:
        self.released += 1


def fake_learner(device: FakeDevice) -> SimpleNamespace:
    scaler = {"scale": 64.0}
    precision = SimpleNamespace(state_dict=lambda: dict(scaler), load_state_dict=scaler.update)
    return SimpleNamespace(
        step=device.step,
        config=SimpleNamespace(accumulate=1),
        optimizer=SimpleNamespace(zero_grad=lambda set_to_none: None),
        fabric=SimpleNamespace(strategy=SimpleNamespace(precision=precision)),
        scaler=scaler,
    )


def test_a_batch_that_runs_out_of_memory_or_fills_it_does_not_fit() -> None:
    device = FakeDevice(limit=24)
    learner = fake_learner(device)
    found = measure_batch(learner, None, InputContract(96, 64), objects=5, most=64, memory=device)
    assert found == 24
    assert {shape for _, _, shape, _ in device.steps} == {(3, 96, 64)} and {n for *_, n in device.steps} == {5}
    assert [number for images, number, *_ in device.steps if images == 16] == [0, 1]  # the second has all states
    assert device.released > len({images for images, *_ in device.steps})  # and once more at the end
    full = FakeDevice(limit=1000, used=0.95)
    assert measure_batch(fake_learner(full), None, InputContract(64, 64), objects=1, most=64, memory=full) == 0


def test_an_automatic_batch_trains_as_if_it_had_been_given(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device with room for two images; the step of a real learner runs, then the fake memory ends."""
    real, tried = Learner.step, []

    def step(self, batch, number, schedule):
        if not (batch.images == 128).all():
            return real(self, batch, number, schedule)
        tried.append(len(batch.targets))
        if len(batch.targets) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(self, batch, number, schedule)

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(planning, "CudaMemory", lambda device: FakeDevice(0))
    monkeypatch.setattr(planning, "DEFAULTS", replace(planning.DEFAULTS, least_steps=2))
    monkeypatch.setattr(train_module, "for_machine", lambda config, *rest: Plan(config))  # as on a GPU
    found = train(micro.recipe(batch="auto", epochs=1), micro_data, tmp_path / "auto")
    assert set(tried) == {1, 2, 3, 4}
    given = train(micro.recipe(batch=2, epochs=1), micro_data, tmp_path / "given")
    assert digest(found.path / "weights.safetensors") == digest(given.path / "weights.safetensors")
    assert "batch = 2\n" in (found.path / "recipe.toml").read_text()


def test_a_device_without_room_for_one_image_is_an_error(micro_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "step", FakeDevice(limit=0).step)
    monkeypatch.setattr(planning, "CudaMemory", lambda device: FakeDevice(0))
    recipe = micro.recipe(batch="auto")
    splits, fabric = open_splits(micro_data, recipe.data), start_devices(recipe.train)
    images = training_set(recipe, splits)
    with pytest.raises(TrainingError, match="not even 1 images of 64 x 64 pixels fit the memory of this GPU"):
        plan_training(recipe, Plan(recipe.train), splits, images, fabric, None, time.monotonic())
    assert for_machine(recipe.train, ANY_DEVICE, 14).config.batch in (16, "auto")  # "auto" where there is a GPU
