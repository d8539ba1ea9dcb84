"""Denoising queries: their labels and boxes, their loss, and that they never change the real queries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from members import SMALL

from edgedetr.boxes import iou
from edgedetr.errors import ModelError, RecipeError
from edgedetr.layers.box_ops import cxcywh_to_xyxy
from edgedetr.models import build
from edgedetr.models.records import Outputs, Queries
from edgedetr.training import denoising
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion, Losses
from edgedetr.training.data.dataset import Target, pad
from edgedetr.training.training_module import TrainingModule

CLASSES = 3
# Members that make noised queries, at micro size; an anchor point has no size, so it starts from the center alone.
NOISED = {
    "rt_detr": SMALL["rt_detr"],
    "dn_detr": SMALL["dn_detr"],
    **{
        name: replace(SMALL[name], denoising=True)
        for name in ("anchor_detr", "deformable_detr", "efficient_detr", "sparse_rcnn", "dynamic_detr")
    },
}


def targets(*counts: int):
    generator = torch.Generator().manual_seed(sum(counts))
    near, size = torch.tensor([0.4, 0.4, 0.1, 0.1]), torch.tensor([0.2, 0.2, 0.1, 0.1])  # noise stays in the image
    return pad(
        [
            Target(
                torch.randint(CLASSES, (n,), generator=generator), near + size * torch.rand(n, 4, generator=generator)
            )
            for n in counts
        ]
    )


def noise(padded, classes=CLASSES, **settings):
    return denoising.noise(padded, classes, TrainConfig(**settings))


def prepended(detector, queries, noised):
    return denoising.prepend(queries, detector.selector.noised(noised.labels, noised.boxes), noised)


def moved(found, truth):
    """The distance of both sides of each axis from the object's, and from the object's other side: [..., 2, 2] each.

    A pair of sides that were swapped was drawn as the second formula has it.
    """
    low, high = found.unflatten(-1, (2, 2)).unbind(-2)
    first, last = truth.unflatten(-1, (2, 2)).unbind(-2)
    return (torch.stack([low - first, high - last], -2).abs(), torch.stack([high - first, low - last], -2).abs())


def test_groups_fill_the_requested_number_and_positive_copies_stay_nearer_than_negative_ones():
    padded = targets(4, 2)
    noised = noise(padded, denoising=10, label_noise=0.0)
    assert (noised.groups, noised.per_group, len(noised)) == (2, 4, 16)
    truth, found = cxcywh_to_xyxy(padded.boxes), cxcywh_to_xyxy(noised.boxes)
    straight, swapped = moved(found.reshape(2, 2, 2, 4, 4), truth[:, None, None].expand(2, 2, 2, 4, 4))
    half = padded.boxes[:, None, :, None, 2:] / 2  # [image, group, object, side, axis]
    for row, count in enumerate((4, 2)):
        limit, rounding = half[row, :, :count], 1e-6  # float32 of a coordinate in 0..1
        assert (straight[row, :, 0, :count] <= limit + rounding).all()
        negative = [far[row, :, 1, :count] for far in (straight, swapped)]
        drawn = [((far >= limit - rounding) & (far <= 2 * limit + rounding)).all(-2) for far in negative]
        assert (drawn[0] | drawn[1]).all() and drawn[0].any()
    assert noised.labels[1].reshape(4, 4)[:, 2:].eq(CLASSES).all()  # the emptier image's filling


@pytest.mark.parametrize("amount", [0.4, 1.0, 2.0, 5.0])
def test_no_copy_has_a_negative_side_and_every_side_of_a_negative_one_was_moved_far(amount):
    """Over 200 seeds; a side of a negative copy moves at least `amount` half sizes, where the image has room."""
    middle = pad([Target(torch.tensor([0, 1]), torch.tensor([[0.5, 0.5, 0.1, 0.16], [0.45, 0.6, 0.02, 0.01]]))])
    edge = pad(
        [
            Target(
                torch.tensor([0, 1, 2]),
                torch.tensor([[0.05, 0.98, 0.1, 0.04], [0.999, 0.001, 0.002, 0.002], [0.5, 0.5, 1.0, 1.0]]),
            )
        ]
    )
    for seed in range(200):
        torch.manual_seed(seed)
        for padded in (middle, edge):
            noised = noise(padded, denoising_groups=3, box_noise=amount)
            found, most = cxcywh_to_xyxy(noised.boxes), noised.per_group
            assert (noised.boxes[..., 2:] >= 0).all(), seed
            assert (found >= -1e-6).all() and (found <= 1 + 1e-6).all(), seed  # float32
            if padded is middle:
                truth = cxcywh_to_xyxy(padded.boxes)[:, None].expand(1, 3, most, 4)
                far = [
                    (side >= amount * padded.boxes[:, None, :, None, 2:] / 2 - 1e-6).all(-2)
                    for side in moved(found.view(1, 3, 2, most, 4)[:, :, 1], truth)
                ]
                assert (far[0] | far[1]).all(), seed


def test_directions_of_negative_copies_are_dinos_and_crossed_sides_are_swapped():
    """DINO draws both directions of a pair of sides evenly: a quarter moves inwards, and crosses."""
    torch.manual_seed(0)
    padded = pad([Target(torch.zeros(5, dtype=torch.int64), torch.tensor([[0.5, 0.5, 0.1, 0.1]] * 5))])
    boxes = cxcywh_to_xyxy(noise(padded, denoising_groups=1000).boxes)[0].view(1000, 2, 5, 4)[:, 1].flatten(0, 1)
    low, high = boxes[:, :2], boxes[:, 2:]
    outwards = (low <= 0.4 + 1e-6) & (high >= 0.6 - 1e-6)
    crossed = (low >= 0.45 - 1e-6) & (low <= 0.5) & (high >= 0.5) & (high <= 0.55 + 1e-6)
    # 10,000 pairs have a standard deviation of 0.004.
    assert float(outwards.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(crossed.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(crossed.any(1).float().mean()) == pytest.approx(1 - 0.75**2, abs=0.02)  # the 44 %


@pytest.mark.parametrize("name", NOISED)
def test_a_step_with_noised_queries_is_finite_in_float16(name):
    padded = pad(
        [
            Target(
                torch.tensor([0, 1, 2]),
                torch.tensor([[0.999, 0.5, 0.002, 0.5], [0.5, 0.001, 0.3, 0.002], [0.3, 0.3, 0.01, 0.01]]),
            )
        ]
    )
    torch.manual_seed(0)
    detector = build(name, NOISED[name], CLASSES).train()
    training_module = TrainingModule(detector, TrainConfig(denoising=6), NOISED[name].class_loss, CLASSES)
    for seed in range(3):
        torch.manual_seed(seed)
        images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        with torch.autocast("cpu", dtype=torch.float16):
            losses = training_module(images, lambda: padded, 3.0)
        assert torch.isfinite(losses).all(), (seed, losses)


def test_cdn_redraws_half_of_the_fraction_of_labels():
    torch.manual_seed(0)
    padded = targets(50, 50)
    noised = noise(padded, 10, denoising=5000, box_noise=0.0)
    changed = (noised.labels != padded.labels.repeat(1, 2 * noised.groups)).float().mean()
    # A quarter is drawn, a tenth of that as it was; 20,000 draws have a standard deviation of 0.003.
    assert abs(float(changed) - 0.25 * 0.9) < 0.01


def test_without_noise_every_positive_query_is_its_object():
    padded = targets(3, 0, 5)
    noised = noise(padded, denoising=20, label_noise=0.0, box_noise=0.0)
    assignment = denoising.assign_positives(noised, padded, layers=1)
    assert len(assignment.image) == noised.groups * 8
    query, target = (assignment.image, assignment.query[0]), (assignment.image, assignment.target[0])
    torch.testing.assert_close(noised.boxes[query], padded.boxes[target])
    assert torch.equal(noised.labels[query], padded.labels[target])
    assert torch.bincount(assignment.image, minlength=3).tolist() == [3 * noised.groups, 0, 5 * noised.groups]


def test_a_batch_without_objects_has_no_denoising():
    assert noise(targets(0, 0)) is None
    assert noise(targets(2, 1), denoising=0) is None


@pytest.mark.parametrize("mode, copies", [("cdn", 2), ("dn", 1)])
def test_the_mask_follows_its_rule_pair_by_pair(mode, copies):
    noised = noise(targets(2, 1), denoising_mode=mode, denoising_groups=3)
    queries = Queries(torch.zeros(2, 3, 8), reference=torch.full((2, 3, 4), 0.5))
    known = Queries(torch.ones(2, len(noised), 8), reference=noised.boxes)
    together = denoising.prepend(queries, known, noised)
    count = len(noised)
    assert count == 3 * copies * 2
    for row in range(count + 3):
        for column in range(count + 3):
            if column >= count:
                hidden = False  # everybody sees the real queries
            elif row >= count:
                hidden = True  # real ones do not see noised ones
            else:
                hidden = row // (copies * 2) != column // (copies * 2)  # groups of two objects
            assert bool(together.self_mask[row, column]) == hidden, (row, column)
    assert torch.equal(together.reference[:, :count], noised.boxes) and (together.content[:, count:] == 0).all()


def test_queries_with_different_fields_are_refused():
    noised = noise(targets(2, 1))
    queries = Queries(torch.zeros(2, 3, 8), position=torch.zeros(2, 3, 8), reference=torch.zeros(2, 3, 4))
    known = Queries(torch.zeros(2, len(noised), 8), reference=noised.boxes)
    with pytest.raises(ValueError, match="noised and real queries have different fields"):
        denoising.prepend(queries, known, noised)


def test_dn_moves_centers_and_sizes_by_at_most_their_fraction():
    """DN-DETR, section 4.1: |dx| < l w / 2, and a width of (1 - l) w to (1 + l) w; here l = 0.4 and 20,000 draws."""
    torch.manual_seed(0)
    padded = targets(50, 50)
    noised = noise(padded, denoising_mode="dn", denoising_groups=200, label_noise=0.0, box_noise=0.4)
    assert (noised.groups, noised.per_group, noised.copies, len(noised)) == (200, 50, 1, 10000)
    truth = padded.boxes.repeat(1, 200, 1)
    moved = (noised.boxes[..., :2] - truth[..., :2]) / (truth[..., 2:] / 2)
    grown = noised.boxes[..., 2:] / truth[..., 2:] - 1
    for fraction in (moved, grown):
        assert fraction.abs().max() <= 0.4 + 1e-4  # float32 of a quotient
        assert fraction.abs().max() > 0.399 and abs(float(fraction.mean())) < 0.01
        assert float(fraction.std()) == pytest.approx(0.4 / 3**0.5, rel=0.02)  # of a uniform distribution
    assert torch.equal(noised.labels, padded.labels.repeat(1, 200))


def test_dn_redraws_the_whole_fraction_of_labels():
    torch.manual_seed(0)
    padded = targets(50, 50)
    noised = noise(padded, 10, denoising_mode="dn", denoising_groups=200, label_noise=0.2)
    changed = (noised.labels != padded.labels.repeat(1, 200)).float().mean()
    # A fifth is drawn, a tenth of that as it was; 20,000 draws have a standard deviation of 0.003.
    assert abs(float(changed) - 0.2 * 0.9) < 0.01


def test_noised_boxes_stay_in_the_image_and_every_copy_is_assigned_to_its_object():
    whole = pad(
        [
            Target(torch.tensor([1]), torch.tensor([[0.05, 0.9, 0.1, 0.2]])),
            Target(torch.tensor([2, 0]), torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.2, 0.2, 0.1, 0.1]])),
        ]
    )
    noised = noise(whole, denoising_mode="dn", denoising_groups=5, label_noise=0.0, box_noise=1.0)
    assert noised.boxes.min() >= 0 and noised.boxes.max() <= 1
    assignment = denoising.assign_positives(noised, whole, layers=2)
    pairs = set(zip(assignment.image.tolist(), assignment.query[0].tolist(), assignment.target[0].tolist()))
    assert pairs == {(0, group * 2, 0) for group in range(5)} | {
        (1, group * 2 + t, t) for group in range(5) for t in range(2)
    }
    assert noised.labels[0].tolist() == [1, CLASSES] * 5  # K fills up


def test_the_denoising_loss_is_divided_by_objects_times_groups():
    """Against the sums of the specification: focal and L1 of every copy and layer, over (objects x groups).

    Queries that only fill up count for nothing.
    """
    torch.manual_seed(0)
    padded, config = targets(3, 1), TrainConfig(weight_class=1.0, weight_giou=0.0)
    noised = noise(padded, denoising_mode="dn", denoising_groups=4)
    layers, count = 2, len(noised)
    logits, boxes = torch.randn(layers, 2, count, CLASSES), torch.rand(layers, 2, count, 4)
    outputs = Outputs(
        torch.cat([logits, torch.randn(layers, 2, 6, CLASSES)], 2), torch.cat([boxes, torch.rand(layers, 2, 6, 4)], 2)
    )
    real, found = denoising.split(outputs, noised, padded)
    got = Criterion(config, "focal")(real, padded, found).denoising
    expected = 0.0
    for layer in range(layers):
        wanted, known = torch.zeros(2, count, CLASSES), torch.zeros(2, count, 1)
        for image, number in enumerate(padded.counts):
            for group in range(4):
                for t in range(number):
                    query = group * noised.per_group + t
                    wanted[image, query, padded.labels[image, t]] = known[image, query] = 1
                    expected += 5 * (boxes[layer, image, query] - padded.boxes[image, t]).abs().sum() / (4 * 4)
        prob = logits[layer].sigmoid()
        weight = torch.where(wanted > 0, 0.25 * (1 - prob) ** 2, 0.75 * prob**2)
        expected += (known * weight * F.binary_cross_entropy(prob, wanted, reduction="none")).sum() / (4 * 4)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["cdn", "dn"])
@pytest.mark.parametrize("name", NOISED)
def test_noised_queries_change_nothing_for_the_real_ones(name, mode):
    torch.manual_seed(0)
    detector = build(name, NOISED[name], CLASSES).eval()
    images, padded = torch.rand(2, 3, 96, 96), targets(3, 1)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        memory = detector.encode(images)
        queries = detector.select(memory)
        alone = detector.decode(queries, memory)
        for _ in range(2):  # other noise each time
            noised = noise(padded, denoising=12, denoising_mode=mode)
            together = detector.decode(prepended(detector, queries, noised), memory)
            real, denoised = denoising.split(together, noised, padded)
            # The same sums with more rows in the same call: float32 sums in another order.
            torch.testing.assert_close(real.logits, alone.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(real.boxes, alone.boxes, rtol=1e-4, atol=1e-5)
            assert denoised.logits.shape == (NOISED[name].decoder_layers, 2, len(noised), CLASSES)


@pytest.mark.parametrize("name", NOISED)
def test_real_queries_are_bit_for_bit_the_same_whatever_the_noise(name):
    """The same number of noised queries, other contents: identical, since masked weights are exactly zero."""
    torch.manual_seed(0)
    detector = build(name, NOISED[name], CLASSES).eval()
    padded, answers = targets(3, 1), []
    with torch.no_grad():
        memory = detector.encode(torch.rand(2, 3, 96, 96))
        queries = detector.select(memory)
        for seed in range(2):
            torch.manual_seed(seed)
            noised = noise(padded, denoising=12, denoising_mode="dn", label_noise=1.0)
            outputs = detector.decode(prepended(detector, queries, noised), memory)
            answers.append(denoising.split(outputs, noised, padded))
    assert torch.equal(answers[0][0].logits, answers[1][0].logits)
    assert torch.equal(answers[0][0].boxes, answers[1][0].boxes)
    assert not torch.equal(answers[0][1].logits, answers[1][1].logits)


@pytest.mark.parametrize("name", NOISED)
def test_a_step_with_noise_trains_the_vectors_of_the_labels(name):
    detector = build(name, NOISED[name], CLASSES).train()
    training_module = TrainingModule(
        detector, TrainConfig(denoising=8, label_noise=0.0), NOISED[name].class_loss, CLASSES
    )
    padded = targets(3, 1)
    found = training_module(torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8), lambda: padded, 4.0)
    assert found[Losses.NAMES.index("denoising")] > 0
    found[0].backward()
    gradient, seen = detector.selector.denoising_class_embed.weight.grad, padded.labels[padded.valid].unique()
    assert (gradient[seen].abs().sum(1) > 0).all()


def test_members_without_box_queries_refuse_denoising():
    with pytest.raises(ModelError, match="model.denoising needs queries that start from boxes"):
        replace(SMALL["deformable_detr"], two_stage=False, denoising=True)
    detector = build("deformable_detr", SMALL["deformable_detr"], CLASSES)
    with pytest.raises(ModelError, match="built without model.denoising"):
        detector.selector.noised(torch.zeros(1, 1, dtype=torch.int64), torch.rand(1, 1, 4))


def test_invalid_settings_are_refused():
    with pytest.raises(RecipeError, match="train.denoising_groups is -1"):
        TrainConfig(denoising_groups=-1)


def test_negative_copies_overlap_less_than_positive_ones_on_average():
    padded = targets(6)
    noised = noise(padded, denoising=600, label_noise=0.0)
    truth, found = cxcywh_to_xyxy(padded.boxes)[0].numpy(), cxcywh_to_xyxy(noised.boxes)[0].numpy()
    overlap = iou(truth, found).reshape(6, noised.groups, 2, 6)
    own = overlap[range(6), :, :, range(6)].mean((0, 1))
    assert own[0] > own[1] + 0.1
