"""train() on a GPU: in each precision it learns, delivers float32 weights and goes on from where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from members import SMALL
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # `import micro`
import micro

from edgedetr.models import FAMILY, build
from edgedetr.models.deploy import load_bundle_model
from edgedetr.recipe import Recipe
from edgedetr.training.config import TrainConfig
from edgedetr.training.data.dataset import Target, pad
from edgedetr.training.optimizer import adamw
from edgedetr.training.train import start_devices, train
from edgedetr.training.training_module import TrainingModule


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return micro.write_data(tmp_path_factory.mktemp("micro") / "data")


def losses(bundle):
    lines = [json.loads(line) for line in (bundle.path / "train" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_training_learns_and_delivers_float32(precision, data, tmp_path, cuda):
    recipe = micro.recipe(precision=precision, epochs=30, lr=4e-3)
    assert start_devices(recipe.train).device.type == "cuda"
    bundle = train(recipe, data, tmp_path / "b")
    history = losses(bundle)
    assert sum(history[-3:]) / 3 < 0.75 * history[0]  # 32 on a CPU: 0.55
    weights = load_file(bundle.path / "weights.safetensors")
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int64}
    assert all(torch.isfinite(value).all() for value in weights.values())
    logits, boxes = load_bundle_model(bundle)[1](torch.zeros(1, 3, 64, 64))  # on the CPU
    assert torch.isfinite(logits).all() and torch.isfinite(boxes).all()


@pytest.mark.parametrize("precision", ["32", "16"])
def test_a_training_that_was_stopped_goes_on(precision, data, tmp_path, cuda, monkeypatch):
    recipe = micro.recipe(precision=precision, epochs=4)
    real, calls = TrainingModule.forward, []

    def stopped(self, *inputs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, *inputs)

    monkeypatch.setattr(TrainingModule, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "b")
    monkeypatch.setattr(TrainingModule, "forward", real)
    bundle = train(recipe, data, tmp_path / "b", resume=True)
    whole = train(recipe, data, tmp_path / "whole")
    # Kernels that add in another order each time: the last losses are alike, not equal.
    assert losses(bundle)[-1] == pytest.approx(losses(whole)[-1], rel=0.05)


@pytest.mark.parametrize("name", FAMILY)
def test_the_loss_of_every_member_falls(name, cuda):
    """Ten objects are learned by heart, denoising and matching on the GPU included."""
    torch.manual_seed(0)
    config, settings = SMALL[name], TrainConfig(lr=2e-3, backbone_lr_factor=1.0, clip=0.1)
    detector = build(name, config, 3).train().to(cuda).to(memory_format=torch.channels_last)
    training_module, optimizer = TrainingModule(detector, settings, config.class_loss, 3), adamw(detector, settings)
    for group in optimizer.param_groups:
        group["lr"] = 2e-3
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8).to(cuda)
    padded = pad([Target(torch.randint(0, 3, (5,)), torch.rand(5, 4) * 0.2 + 0.3) for _ in range(2)]).to(cuda)
    history = []
    for _ in range(40):
        loss = training_module(images, lambda: padded, 10.0)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.item())
    assert sum(history[-5:]) / 5 < 0.7 * history[0]


def test_what_is_automatic_fits_this_gpu(tmp_path, cuda):
    """200 images leave a batch of up to 25 to the memory; the model is so small that all of them fit."""
    data = micro.write_data(tmp_path / "data", train_images=200)
    recipe = micro.recipe(batch="auto", precision="auto", workers="auto", epochs=1)
    before = torch.cuda.memory_allocated()
    found = Recipe.from_bundle(train(recipe, data, tmp_path / "b")).train
    assert found.batch == 25 and found.precision == ("bf16" if torch.cuda.is_bf16_supported() else "32")
    assert 0 <= found.workers <= 8
    assert torch.cuda.memory_allocated() - before < 2**28  # the model that was thrown away is gone
