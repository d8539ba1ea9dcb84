"""Distillation of features: the loss and its weight against hand-worked numbers, the teacher against transformers."""

from __future__ import annotations

import members
import micro
import pytest
import torch
from safetensors.torch import load_file

from edgedetr.errors import ModelError, RecipeError
from edgedetr.models import build
from edgedetr.models.backbones.vit_designs import DESIGNS
from edgedetr.models.backbones.windowed_vit import WindowedVit
from edgedetr.storage.digests import digest
from edgedetr.training import feature_distillation, trainer
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Losses
from edgedetr.training.data.dataset import PaddedTargets
from edgedetr.training.feature_distillation import (
    FeatureDistillation,
    FeatureTeacher,
    adapted_weight,
    feature_distance,
    gradient_share,
    load_feature_teacher,
)
from edgedetr.training.teacher import Teacher
from edgedetr.training.training_module import TrainingModule


def test_the_distance_is_one_minus_the_cosine_over_all_cells():
    student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [-7.0, 0.0]]])
    assert float(feature_distance(student, teacher)) == pytest.approx(((1 - 24 / 25) + (1 + 1)) / 2)
    assert float(feature_distance(student, 5 * student)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "share, expected",
    [
        (10.0, 5.0),  # inside: it stays
        (11.3, 5.0),
        (12.0, 5.0),
        (4.0, 5 * (0.12 / 0.88) / (0.04 / 0.96)),  # below: the odds of 12 % over those of 4 %
        (30.0, 5 * (0.10 / 0.90) / (0.30 / 0.70)),  # above: the odds of 10 % over those of 30 %
        (0.1, 50.0),  # at most ten times
        (90.0, 0.5),  # at least a tenth
    ],
)
def test_the_weight_moves_by_the_odds_of_the_share(share, expected):
    assert adapted_weight(5.0, share, (10.0, 12.0)) == pytest.approx(expected)


def test_the_share_of_the_gradient_is_that_of_absolute_values():
    one, other, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, other.grad = torch.tensor([1.0, -2.0]), torch.tensor([5.0, -4.0])
    assert gradient_share([one, none], [one, other, none]) == pytest.approx(100 * 3 / 12)
    assert gradient_share([none], [none]) == 0.0


def tiny_teacher() -> FeatureTeacher:
    """A transformer of one block of 12 channels, patches of 14 px."""
    from dataclasses import replace

    torch.manual_seed(5)
    design = replace(DESIGNS["dinov2_small"], dim=12, heads=2)
    return FeatureTeacher(WindowedVit(design, patch=14, windows=1, maps=[0], full_attention=[0], grid=4))


def test_every_cell_of_the_map_is_one_patch_of_the_teacher():
    teacher = tiny_teacher()
    found = teacher(torch.full((2, 3, 64, 96), 128.0), (2, 3))
    assert found.shape == (2, 6, 12) and not found.requires_grad
    # A patch that alone is bright is the one that answers differently, in the order of the student's cells.
    pixels = torch.zeros(1, 3, 64, 96)
    plain = teacher(pixels, (2, 3))
    pixels[:, :, 32:, 64:] = 255.0
    change = (teacher(pixels, (2, 3)) - plain).abs().sum(-1)[0]
    assert int(change.argmax()) == 5


@pytest.mark.parametrize("name, registers", [("dinov2_small", 0), ("dinov2_small_registers", 4)])
def test_the_teacher_is_transformers_dinov2(name, registers, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(feature_distillation, "BLOCKS", 2)  # of twelve
    torch.manual_seed(1)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 2, "image_size": 518, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "dino")
    chosen = TrainConfig(feature_teacher=name, feature_teacher_weights=str(tmp_path / "dino"))
    ours = load_feature_teacher(chosen, torch.device("cpu"))
    pixels = torch.randint(0, 256, (1, 3, 56, 70), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs((pixels / 255 - mean) / std).last_hidden_state[:, 1 + registers :]
    # float32 through two blocks; the image has the teacher's own size, so nothing is resized
    torch.testing.assert_close(ours(pixels, (4, 5)), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def taught(monkeypatch):
    """Trainings whose feature teacher is the tiny one."""
    monkeypatch.setattr(
        trainer, "load_feature_teacher", lambda config, device: tiny_teacher() if config.feature_teacher else None
    )
    return {"feature_teacher": "dinov2_small", "feature_weight": 2.0}


def test_the_features_come_nearer_and_the_weight_follows_the_share(taught, micro_data, tmp_path):
    run = micro.new_trainer(micro.recipe(lr=3e-3, warmup_steps=0, **taught), micro_data, tmp_path / "b")
    learner, batch = run.learner, next(iter(run._batches(0)))
    features = learner.features
    before = features.project.weight.clone()
    found = [float(learner.step(batch, step, run.schedule).losses[-1]) for step in range(12)]
    assert found[-1] < 0.8 * found[0]  # losses.teacher at weight 2
    assert not torch.equal(features.project.weight, before)
    share, steps = features.shares.tolist()
    assert steps == 12 and 0 < share / steps < 100
    features.adapt(last=False)
    assert float(features.weight) == pytest.approx(adapted_weight(2.0, share / 12, (10.0, 12.0)))
    assert features.shares.tolist() == [0, 0]
    features.count([])
    features.adapt(last=True)
    assert float(features.weight) == 20.0
    assert not any("project.bias" == name or "shares" in name for name in learner.model.state_dict())


def test_a_resumed_training_with_both_teachers_ends_in_the_same_bytes(taught, teaching, micro_data, tmp_path):
    from edgedetr.training.train import train

    recipe = micro.recipe(epochs=2, teacher=teaching, **taught)
    straight = micro.train(recipe, micro_data, tmp_path / "straight")
    halted = micro.new_trainer(recipe, micro_data, tmp_path / "halted")
    assert sum(halted.learner._module.teacher(next(iter(halted._batches(0))).images.float()).counts) > 0

    class Stop(Exception):
        pass

    def step(number: int, losses: object, rate: float) -> None:
        if number == 4:  # in the second epoch, whose weight follows from the first
            raise Stop

    halted.progress.step = step
    with pytest.raises(Stop):
        halted.fit()
    resumed = train(recipe, micro_data, tmp_path / "halted", resume=True)
    ends = [load_file(bundle.path / "train" / "last.safetensors") for bundle in (straight, resumed)]
    assert ends[0].keys() == ends[1].keys() and {"beside.project.weight", "beside.weight"} < ends[0].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    weights = [digest(bundle.path / "weights.safetensors") for bundle in (straight, resumed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])
def test_both_teachers_are_parts_of_the_loss_of_a_step(name):
    torch.manual_seed(0)
    config = members.micro(name)
    model = build(name, config, members.CLASSES)
    seen = FeatureDistillation(model, tiny_teacher(), TrainConfig(feature_weight=2.0))
    teacher = Teacher(build(name, config, members.CLASSES), range(members.CLASSES), softmax=False, least_score=0.005)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = PaddedTargets(torch.tensor([[1], [2]]), torch.tensor([[[0.5, 0.5, 0.4, 0.3]]] * 2), [1, 1])
    found = {}
    for which, parts in {"none": {}, "one": {"features": seen}, "both": {"features": seen, "teacher": teacher}}.items():
        module = TrainingModule(model, TrainConfig(denoising=0), config.class_loss, members.CLASSES, **parts)
        torch.manual_seed(1)
        losses = dict(zip(Losses.NAMES, module(images, lambda: targets, 2.0)))
        found[which] = (float(losses["loss"].detach()), float(losses["teacher"].detach()))
        assert not any("teacher" in key for key in module.state_dict())
    plain, one, both = (found[which] for which in ("none", "one", "both"))
    assert plain[1] == 0 and 0 < one[1] <= 2 * 2.0 and both[1] > one[1]
    for total, part in (one, both):  # BatchNorm's statistics do not enter a forward pass in training
        assert total == pytest.approx(plain[0] + part, rel=1e-3)


def test_without_a_share_the_weight_stays():
    config = TrainConfig(feature_share=(), feature_weight=3.0)
    features = FeatureDistillation(build("rt_detr", micro.recipe().model.config, 2), tiny_teacher(), config)
    features.shares += torch.tensor([50.0, 1.0])
    features.adapt(last=True)
    assert float(features.weight) == 3.0


def test_a_model_without_attention_within_its_coarsest_level_is_refused():
    from edgedetr.models import FAMILY

    config = FAMILY["detr"].config(backbone_weights="random", backbone_norm="trainable", frozen_stages=0)
    with pytest.raises(ModelError, match="train.feature_teacher needs a model with attention .*; detr has none"):
        FeatureDistillation(build("detr", config, 2), tiny_teacher(), TrainConfig())


def test_an_unknown_transformer_and_a_share_that_is_no_range_are_refused():
    with pytest.raises(ModelError, match=r"did you mean 'dinov2_small'"):
        load_feature_teacher(TrainConfig(feature_teacher="dinov2_smal"), torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"train.feature_share is \[12.0, 10.0\]; expected \[least, most\] percent"):
        TrainConfig(feature_share=(12.0, 10.0))
    assert load_feature_teacher(TrainConfig(), torch.device("cpu")) is None
