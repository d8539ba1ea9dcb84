"""Parameter groups, learning rates and the moving average against closed forms."""

from __future__ import annotations

import math
from dataclasses import fields

import micro
import pytest
import torch
from torch import nn

from edgedetr.errors import ModelError, RecipeError
from edgedetr.models import build
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig
from edgedetr.training.config import AugmentConfig, LossConfig, TrainConfig
from edgedetr.training.optimizer import Ema, Schedule, adamw, parameter_groups, set_lr

MEMBERS = {
    "rt_detr": RtDetrConfig(backbone_width=0.125, backbone_norm="trainable", hidden=32, heads=4, queries=10),
    "detr": DetrConfig(
        backbone="resnet18", backbone_width=0.125, hidden=32, heads=4, ffn=32, encoder_layers=1, decoder_layers=1
    ),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_trainable_parameter_is_in_exactly_one_group_with_its_rate_and_decay(name):
    detector = build(name, MEMBERS[name], 3)
    config = micro.numbers(lr=1e-3, backbone_lr_factor=0.1, weight_decay=0.05)
    where = {id(p): g for g in parameter_groups(detector, config) for p in g["params"]}
    assert sum(len(g["params"]) for g in parameter_groups(detector, config)) == len(where)
    trainable = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    assert where.keys() == {id(p) for p in trainable.values()}
    kinds = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    norms = tuple(n for n, m in detector.named_modules() if isinstance(m, kinds))
    for parameter_name, parameter in trainable.items():
        group = where[id(parameter)]
        assert group["base_lr"] == pytest.approx(1e-4 if parameter_name.startswith("backbone.") else 1e-3)
        no_decay = parameter_name.endswith("bias") or parameter_name.rpartition(".")[0] in norms
        assert group["weight_decay"] == (0.0 if no_decay else 0.05), parameter_name


def test_the_learning_rate_reaches_every_group():
    optimizer = adamw(build("rt_detr", MEMBERS["rt_detr"], 3), micro.numbers(lr=1e-3))
    set_lr(optimizer, 0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([5e-5, 5e-4])


def schedule(steps_per_epoch: int, **settings: object) -> Schedule:
    config = micro.numbers(**settings)
    return Schedule(config, config.epochs, steps_per_epoch)


@pytest.mark.parametrize("step", [0, 1, 49, 99, 100, 5000])
def test_warm_up_is_linear_quadratic_or_exponential(step):
    kinds = ("linear", "quadratic", "exponential")
    linear, quadratic, exponential = (schedule(10, warmup_steps=100, warmup=kind) for kind in kinds)
    assert quadratic.lr_factor(step) == pytest.approx(linear.lr_factor(step) ** 2)
    fraction = min((step + 1) / 101, 1.0)
    assert linear.lr_factor(step) == pytest.approx(fraction)
    assert exponential.lr_factor(step) == pytest.approx(math.exp(-(1 - fraction) * math.log(1000)))


def test_cosine_starts_full_is_half_way_in_the_middle_and_ends_at_its_factor():
    cosine = schedule(100, epochs=11, schedule="cosine", warmup_steps=100, final_lr_factor=0.1)
    assert cosine.lr_factor(100) == pytest.approx(1.0)
    assert cosine.lr_factor(600) == pytest.approx(0.55)
    assert cosine.lr_factor(1100) == pytest.approx(0.1)
    for step in range(100, 1100, 83):
        expected = 0.1 + 0.9 * math.cos((step - 100) / 1000 * math.pi / 2) ** 2  # cos^2(x/2) = (1 + cos x) / 2
        assert cosine.lr_factor(step) == pytest.approx(expected)


def deim_rate(step: int, warmup: int, flat: int, total: int, last: int, final: float) -> float:
    """Huang et al. 2024, engine/optim/lr_scheduler.py, of a full rate of 1, after the warm-up; all in steps."""
    assert step > warmup
    if step <= flat:
        return 1.0
    if step >= total - last:
        return final
    return final + (1 - final) * (1 + math.cos(math.pi * (step - flat) / (total - flat - last))) / 2


@pytest.mark.parametrize(
    ("epochs", "flat", "last"), [(120, 64, 3), (60, 34, 2), (132, 64, 12), (102, 49, 12), (58, 29, 8)]
)
def test_flat_cosine_is_deims(epochs, flat, last):
    """R18, R50, S, M, L of its configurations: the last rate begins where strong augmentation ends."""
    config = micro.numbers(
        epochs=epochs, schedule="flat_cosine", flat=round(flat / epochs, 4), final_lr_factor=0.5, warmup_steps=50
    )
    ours = Schedule(config, epochs, 10, AugmentConfig(off_for_last=math.ceil(last / epochs * 1e4) / 1e4))
    for step in range(51, 10 * epochs, 7):
        assert ours.lr_factor(step) == pytest.approx(deim_rate(step, 50, 10 * flat, 10 * epochs, 10 * last, 0.5))


def test_strong_augmentation_is_off_in_deims_first_and_last_epochs():
    """deim_r18vd_120e_coco.yml: policy [4, 64, 117], of 120; mixup_epochs [4, 64]."""
    augment = AugmentConfig(off_for_first=0.0333, mix_until=0.5333, off_for_last=0.025)
    assert [epoch for epoch in range(120) if augment.is_strong(epoch, 120)] == list(range(4, 117))
    assert [epoch for epoch in range(120) if augment.mixes(epoch, 120)] == list(range(64))


def test_steps_fall_to_a_tenth_at_their_epochs():
    steps = schedule(5, epochs=30, schedule="step", step_epochs=(10, 20), warmup_steps=0)
    assert [steps.lr_factor(step) for step in (49, 50, 99, 100)] == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 0), (0.99, 20), (0.0, 0)])
def test_the_moving_average_follows_its_formula(decay, warmup):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(model, decay, warmup)
    expected = {n: v.clone().double() for n, v in model.state_dict().items()}
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3))  # moves the running statistics
        d = decay * (1 - math.exp(-step / warmup)) if warmup else decay
        for name, value in model.state_dict().items():
            whole = not value.is_floating_point()
            expected[name] = value.double() if whole else d * expected[name] + (1 - d) * value.double()
        ema.update(step)
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"batch": 7, "devices": 2},
        {"schedule": "step"},
        {"ema_decay": 1.0},
        {"growth": (0.5, 0.8)},
        {"step_epochs": (4, 2)},
        {"label_noise": 1.5},
        {"clip": -1.0},
        {"workers": -1},
        {"cost_class": -2.0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(RecipeError, match=rf"train\.{next(iter(wrong))}"):
        TrainConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"crop": 1.2}, {"crop_scale": (0.9, 0.3)}, {"zoom_out_scale": 0.5}, {"hue": 1.0}])
def test_augmentation_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(RecipeError, match=rf"augment\.{next(iter(wrong))}"):
        AugmentConfig(**wrong)


def test_rates_fall_from_block_to_block_of_a_vision_transformer_towards_its_input():
    with torch.device("meta"):
        detector = build(
            "detr",
            DetrConfig(backbone="vit_tiny", hidden=32, heads=4, encoder_layers=1, decoder_layers=1, frozen_stages=0),
            3,
        )
    config = micro.numbers(lr=1.0, backbone_lr_factor=0.5, layer_decay=0.8)
    where = {id(p): g["base_lr"] for g in parameter_groups(detector, config) for p in g["params"]}
    rates = {name: where[id(p)] for name, p in detector.named_parameters()}
    trunk = "backbone.transformer."
    assert rates[f"{trunk}blocks.11.attention.q.weight"] == pytest.approx(0.5 * 0.8)
    assert rates[f"{trunk}blocks.0.attention.q.weight"] == pytest.approx(0.5 * 0.8**12)
    assert rates[f"{trunk}patch.weight"] == pytest.approx(0.5 * 0.8**13)
    assert rates[f"{trunk}norm.weight"] == 0.5
    assert rates["decoder.layers.0.self_attention.q.weight"] == 1.0
    with pytest.raises(ModelError, match="train.layer_decay is 0.8, but the backbone is not a ViT; expected 1"):
        parameter_groups(build("detr", MEMBERS["detr"], 3), config)


@pytest.mark.parametrize("decay", ["matrices", "not_norms", "all"])
def test_the_setting_selects_the_parameters_with_decay(decay):
    detector = build("rt_detr", MEMBERS["rt_detr"], 3)
    norms = {id(p) for m in detector.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    expected = {"matrices": lambda p: p.ndim >= 2, "not_norms": lambda p: id(p) not in norms, "all": lambda p: True}
    listed = parameter_groups(detector, micro.numbers(decay=decay, weight_decay=0.05))
    seen = {id(p): group["weight_decay"] for group in listed for p in group["params"]}
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert len(seen) == sum(len(group["params"]) for group in listed) == len(trained)
    assert {seen[id(p)] for p in trained if expected[decay](p)} == {0.05}
    assert {seen[id(p)] for p in trained if not expected[decay](p)} <= {0.0}
    assert any(id(p) in norms for p in trained) and any(p.ndim < 2 and id(p) not in norms for p in trained)


def test_a_part_of_the_configuration_is_checked_as_the_whole_is() -> None:
    """A part may be made alone, as `Criterion(LossConfig())` does."""
    for part in TrainConfig.__bases__:
        names = [item.name for item in fields(part)]
        assert names and all(getattr(part(), name) == getattr(TrainConfig(), name) for name in names)
    with pytest.raises(RecipeError, match=r"train\.gamma is -1"):
        LossConfig(gamma=-1.0)
