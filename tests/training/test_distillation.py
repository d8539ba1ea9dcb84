"""Distillation: the loss against loops, the teacher's detections against hand-worked ones, and short trainings."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import permutations

import members
import micro
import pytest
import torch
from hub_folder import SETS, small_rt_detr_v2, write_hub_folder

from edgedetr import cli
from edgedetr.errors import ModelError, TrainingError
from edgedetr.models import FAMILY, build
from edgedetr.models.records import Outputs
from edgedetr.published.published_detectors import LicenseError
from edgedetr.recipe import Recipe
from edgedetr.training import teacher as teacher_module
from edgedetr.training.config import LossConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.distillation import detections_of, distillation_loss
from edgedetr.training.teacher import Teacher, load_teacher

CPU = torch.device("cpu")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def boxes(*shape: int) -> torch.Tensor:
    """Random boxes inside the image, cx cy w h."""
    return torch.rand(*shape, 4, generator=generator()) * 0.3 + 0.3


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator()) * 2


def test_the_detections_above_the_score_are_taken_with_the_students_classes_by_column():
    # Teacher's classes a, b, c; the student's are c, x (unknown), a.
    score = torch.tensor([[[0.1, 0.9, 0.2], [0.6, 0.1, 0.1], [0.2, 0.1, 0.8]], [[0.1, 0.1, 0.1]] * 3])
    where = boxes(2, 3)
    found = detections_of(torch.logit(score), where, [2, None, 0], softmax=False, least_score=0.5)
    assert found.counts == [2, 0]
    # Query 2 by class c at 0.8, then query 1 by class a at 0.6; query 0 is sure of b alone, which the student lacks.
    expected = torch.tensor([[0.8, 0.0, 0.2], [0.1, 0.0, 0.6]])
    torch.testing.assert_close(found.probabilities[0], expected)
    torch.testing.assert_close(found.boxes[0], where[0, [2, 1]])
    torch.testing.assert_close(found.scores, torch.tensor([[0.8, 0.6], [0.0, 0.0]]))
    assert found.known.tolist() == [True, False, True]
    assert found.as_targets().labels.tolist() == [[0, 2], [0, 0]]


def test_no_object_of_a_softmax_teacher_is_no_class():
    found = detections_of(
        torch.tensor([[[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]]]), boxes(1, 2), [0, 1], softmax=True, least_score=0.5
    )
    assert found.counts == [1] and found.as_targets().labels.tolist() == [[0]]


def giou(one, other) -> float:
    """Rezatofighi et al. 2019, by corners."""
    a, b = ([c - s / 2 for c, s in zip(x[:2], x[2:])] + [c + s / 2 for c, s in zip(x[:2], x[2:])] for x in (one, other))
    inside = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = one[2] * one[3] + other[2] * other[3] - inside
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inside / union - (hull - union) / hull


def divergence(p: float, q: float) -> float:
    """Of a coin of probability q from one of probability p."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def probabilities(row: list[float], softmax: bool) -> list[float]:
    if softmax:
        exponents = [math.exp(value) for value in row]
        return [value / sum(exponents) for value in exponents]
    return [1 / (1 + math.exp(-value)) for value in row]


def cost(z: list[float], box: list[float], wanted: list[float], where: list[float], softmax: bool) -> float:
    """Of one query for one detection: Deformable DETR's focal cost, or DETR's."""
    p = probabilities(z, softmax)[max(range(len(wanted)), key=wanted.__getitem__)]
    class_cost = -p if softmax else 2 * (0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p))
    return class_cost + 5 * sum(abs(x - y) for x, y in zip(box, where)) - 2 * giou(box, where)


def distance(z: list[float], box: list[float], wanted: list[float], where: list[float], softmax: bool) -> float:
    """Of one query from the detection that it is matched with; the teacher does not know class 1."""
    p, q = wanted, probabilities(z, softmax)
    if softmax:
        p = [value / max(sum(p), 1) for value in p]
        p = [*p, 1 - sum(p)]
        class_ = sum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)
    else:
        class_ = divergence(p[0], q[0]) + divergence(p[2], q[2])
    return class_ + 5 * sum(abs(x - y) for x, y in zip(box, where)) + 2 * (1 - giou(box, where))


@pytest.mark.parametrize("softmax", [False, True])
def test_the_loss_is_that_of_loops_over_the_cheapest_assignment(softmax):
    config = LossConfig()
    criterion = Criterion(config, "softmax_ce" if softmax else "focal")
    layers, images, queries, classes = 2, 2, 4, 3
    ours = Outputs(logits(layers, images, queries, classes + softmax), boxes(layers, images, queries))
    theirs, their_boxes = logits(images, 3, 2) - 1, boxes(images, 3).flip(1)
    teacher = detections_of(theirs, their_boxes, [1, None, 0], softmax=False, least_score=0.4)
    assert len(set(teacher.counts)) == 2
    found = distillation_loss(ours, teacher, criterion.costs, config, weight=0.5)
    total = 0.0
    for layer in range(layers):
        for image, count in enumerate(teacher.counts):
            z, b = ours.logits[layer, image].tolist(), ours.boxes[layer, image].tolist()
            wanted, where = teacher.probabilities[image].tolist(), teacher.boxes[image].tolist()
            costs = [[cost(z[q], b[q], wanted[t], where[t], softmax) for t in range(count)] for q in range(queries)]
            sums = {
                chosen: sum(costs[q][t] for t, q in enumerate(chosen)) for chosen in permutations(range(queries), count)
            }
            for t, q in enumerate(min(sums, key=sums.__getitem__)):
                total += float(teacher.scores[image, t]) * distance(z[q], b[q], wanted[t], where[t], softmax)
    expected = 0.5 * total / max(float(teacher.scores.sum()), 1)
    assert float(found) == pytest.approx(expected, rel=1e-4)  # float32, and probabilities clamped at 1e-6


@pytest.mark.parametrize("softmax", [False, True])
def test_equal_detections_have_distance_0_and_no_gradient(softmax):
    """As in quantization-aware training, where the teacher is the same model in float32."""
    z, b = logits(1, 2, 5, 3 + softmax).requires_grad_(), boxes(1, 2, 5).requires_grad_()
    teacher = detections_of(z[-1], b[-1], [0, 1, 2], softmax=softmax, least_score=0.3)
    criterion = Criterion(LossConfig(), "softmax_ce" if softmax else "focal")
    distance = distillation_loss(Outputs(z, b), teacher, criterion.costs, LossConfig())
    assert sum(teacher.counts) > 0 and float(distance.detach()) == pytest.approx(0, abs=1e-5)
    (slope,) = torch.autograd.grad(distance, z)
    assert float(slope.abs().max()) < 1e-5


def test_nothing_to_teach_is_a_distance_of_0_with_a_gradient():
    z, b = logits(2, 1, 4, 3).requires_grad_(), boxes(2, 1, 4).requires_grad_()
    teacher = detections_of(torch.full((1, 4, 3), -9.0), boxes(1, 4), [0, 1, 2], softmax=False, least_score=0.3)
    distance = distillation_loss(Outputs(z, b), teacher, Criterion(LossConfig(), "vfl").costs, LossConfig())
    distance.backward()
    assert float(distance.detach()) == 0 and z.grad is not None and float(z.grad.abs().max()) == 0


def test_each_group_of_queries_learns_all_detections():
    z, b = logits(1, 1, 4, 3), boxes(1, 1, 4)
    teacher = detections_of(logits(1, 2, 3) + 2, boxes(1, 2).flip(1), [0, 1, 2], softmax=False, least_score=0.3)
    costs, config = Criterion(LossConfig(), "vfl").costs, LossConfig()
    one = distillation_loss(Outputs(z, b), teacher, costs, config)
    three = distillation_loss(Outputs(z.repeat(1, 1, 3, 1), b.repeat(1, 1, 3, 1), groups=3), teacher, costs, config)
    torch.testing.assert_close(one, three)


def test_a_student_that_is_taught_ends_nearer_to_its_teacher(teaching, micro_data, tmp_path):
    ends, learners = {}, {}
    for name, settings in (("alone", {}), ("taught", {"teacher": teaching, "teacher_weight": 2.0})):
        recipe = micro.recipe(seed=11, denoising=0, warmup_steps=0, schedule="constant", lr=3e-3, **settings)
        trainer = micro.new_trainer(recipe, micro_data, tmp_path / name)
        batch = next(iter(trainer._batches(0)))
        for step in range(25):
            assert not trainer.learner.step(batch, step, trainer.schedule).nonfinite
        learners[name] = trainer.learner
        images = batch.images.float()
        teacher = load_teacher(teaching, ["large", "small"], CPU, 0.3)
        with torch.no_grad():
            taught = teacher(images)
            student = trainer.learner.model.eval()
            found = student(student.normalize(images))
        assert sum(taught.counts) > 4
        ends[name] = float(distillation_loss(found, taught, Criterion(LossConfig(), "vfl").costs, LossConfig()))
    assert ends["taught"] < 0.7 * ends["alone"]
    alone, taught_ = (set(learner.model.state_dict()) for learner in learners.values())
    assert alone == taught_ and len(learners["taught"].optimizer.state) == len(learners["alone"].optimizer.state)


def test_another_teacher_under_the_same_name_cannot_go_on(teaching, trained, micro_data, tmp_path):

    shutil.copytree(teaching, tmp_path / "t.bundle")
    recipe = micro.recipe(teacher=str(tmp_path / "t.bundle"), epochs=1)
    first = micro.new_trainer(recipe, micro_data, tmp_path / "b")
    first._save()
    shutil.rmtree(tmp_path / "t.bundle")
    shutil.copytree(trained.path, tmp_path / "t.bundle")
    with pytest.raises(TrainingError, match="made by another recipe"):
        micro.new_trainer(recipe, micro_data, tmp_path / "b").resume()


def test_a_teacher_is_frozen_and_answers_at_a_size_that_it_can_read():
    model = build("rt_detr", micro.recipe().model.config, 2)
    teacher = Teacher(model, [0, 1], softmax=False, least_score=0.01)
    teacher.model.size_multiple = 64
    taught = teacher(torch.zeros(1, 3, 96, 130))  # neither side is a multiple of 64
    assert taught.boxes.shape[1] > 0 and not taught.boxes.requires_grad
    assert not model.training and not any(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize(
    "classes, message",
    [(["cat", "dog"], "knows large, small and the data set has cat, dog: no class has the same name")],
)
def test_a_teacher_of_other_classes_is_refused(trained, classes, message):
    with pytest.raises(ModelError, match=message):
        load_teacher(str(trained.path), classes, CPU, 0.3)


def test_classes_that_the_teacher_does_not_know_are_named(trained, caplog):
    teacher = load_teacher(str(trained.path), ["Small", "dog"], CPU, 0.3)  # names as people write them
    assert teacher.columns == (1, None)
    assert "teaches 1 of 2 classes by name; not taught: dog; of no use here: large" in caplog.text


def test_what_is_no_bundle_is_no_teacher(micro_data, tmp_path, capsys):
    words = ["train", "--data", str(micro_data), "--model", "demo", "--out", str(tmp_path / "b")]
    assert cli.run([*words, "--teacher", "yolo11n"]) == 1
    assert "train.teacher is 'yolo11n', which is no bundle and no published detector" in capsys.readouterr().err
    with pytest.raises(ModelError, match="did you mean 'rtdetrv2-r18'"):
        load_teacher("rtdetrv2-r81", ["cat"], CPU, 0.3)
    with pytest.raises(ModelError, match="import it, and name the bundle: edgedetr import .* --model detr"):
        load_teacher("detr-r101-dc5", ["cat"], CPU, 0.3)
    with pytest.raises(LicenseError, match="--accept-license"):
        load_teacher("rfdetr-2xlarge", ["cat"], CPU, 0.3)


def test_a_published_detector_teaches_by_its_name(tmp_path, monkeypatch, caplog):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    theirs = small_rt_detr_v2()
    write_hub_folder(tmp_path, "PekingU/rtdetr_v2_r18vd", theirs)
    small = Recipe.load("rtdetr-r18", SETS).model.config
    monkeypatch.setattr(
        teacher_module, "published_config", lambda row: replace(small, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    )
    teacher = load_teacher("rtdetrv2-r18", ["gadget", "cat"], CPU, 0.01)
    assert teacher.columns == (None, 15) and len(teacher.digest) == 64  # cat is the 16th of COCO's 80 classes
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=generator()).float()
    taught = teacher(pixels)
    with torch.no_grad():
        expected = theirs(pixels / 255)
    scores = expected.logits[0, :, 15].sigmoid().sort(descending=True)
    found = taught.probabilities[0, : taught.counts[0], 1]
    torch.testing.assert_close(found, scores.values[: taught.counts[0]], rtol=1e-3, atol=1e-4)


def test_without_a_teacher_the_recipe_of_a_bundle_and_its_fingerprint_are_those_of_before(trained):
    recipe = Recipe.from_bundle(trained)
    assert "teacher" not in recipe.to_toml(later=False)
    taught = replace(recipe, train=replace(recipe.train, teacher="t"))
    assert 'teacher = "t"' in taught.to_toml(later=False)


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_teaches_its_most_certain_detection_and_learns_from_itself(name):
    torch.manual_seed(0)
    config = members.micro(name)
    model, softmax = build(name, config, members.CLASSES).eval(), config.activation == "softmax"
    pixels = torch.rand(1, 3, 64, 64, generator=generator()) * 255
    teacher = Teacher(model, range(members.CLASSES), softmax=softmax, least_score=0.005)  # untrained: all are low
    taught = teacher(pixels)
    outputs = model.requires_grad_(True)(model.normalize(pixels))
    logits = outputs.logits[-1, 0].detach()
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    query = int(scores.amax(-1).argmax())
    torch.testing.assert_close(taught.probabilities[0, 0], scores[query])
    torch.testing.assert_close(taught.boxes[0, 0], outputs.boxes[-1, 0, query].detach())
    distance = distillation_loss(outputs, taught, Criterion(LossConfig(), config.class_loss).costs, LossConfig())
    distance.backward()
    assert torch.isfinite(distance)
    slopes = [p.grad for key, p in model.named_parameters() if key.startswith("decoder.") and p.grad is not None]
    assert sum(float(slope.abs().sum()) for slope in slopes) > 0
