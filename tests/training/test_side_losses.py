"""The losses of boxes by distributions of their sides, against loops over queries and transformers' loss."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import DFineConfig
from transformers.loss.loss_d_fine import DFineLoss

from edgedetr.errors import RecipeError
from edgedetr.layers.box_ops import cxcywh_to_xyxy, paired_giou, paired_iou
from edgedetr.layers.side_distributions import SideBins
from edgedetr.models.records import Outputs, Sides
from edgedetr.recipe import Recipe
from edgedetr.training.config import LossConfig
from edgedetr.training.criterion import Criterion, DenoisingOutputs
from edgedetr.training.data.dataset import Target, pad
from edgedetr.training.matcher import Assignment, Costs, match, match_and_join
from edgedetr.training.side_losses import side_losses, side_targets

LAYERS, BATCH, QUERIES, CLASSES, BINS = 3, 2, 7, 4, 8
SCALE, UP = 4.0, 0.5


def boxes(*shape: int) -> Tensor:
    return torch.cat([torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.4 + 0.05], -1)


def targets() -> list[Target]:
    return [Target(torch.tensor([2, 0, 3]), boxes(3)), Target(torch.tensor([1]), boxes(1))]


def outputs(queries: int = QUERIES) -> Outputs:
    bins = SideBins(BINS, UP, SCALE)
    first = (torch.randn(BATCH, queries, CLASSES), boxes(BATCH, queries))
    sides = Sides(torch.randn(LAYERS, BATCH, queries, 4, BINS + 1), first[1].clone(), first, bins.values(), bins.scale)
    encoder = (torch.randn(BATCH, queries, CLASSES), boxes(BATCH, queries))
    return Outputs(torch.randn(LAYERS, BATCH, queries, CLASSES), boxes(LAYERS, BATCH, queries), encoder, sides)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_losses_of_sides_are_those_of_transformers() -> None:
    """Its loss_local, for each layer with the last one as the teacher, at the same pairs."""
    out, wanted = outputs(), targets()
    padded = pad(wanted)
    _, union = match_and_join((out.logits, out.boxes), padded, Costs("focal", 2.0, 5.0, 2.0))
    ours = side_losses(out.sides, out.logits, out.boxes, union, padded, count=5.0)
    theirs = DFineLoss(DFineConfig(max_num_bins=BINS, reg_scale=SCALE, up=UP, num_labels=CLASSES))
    rows = [union.image == image for image in range(BATCH)]
    pairs = [(union.query[0, row], union.target[0, row]) for row in rows]
    for layer in range(LAYERS):
        given = {
            "logits": out.logits[layer],
            "pred_boxes": out.boxes[layer],
            "pred_corners": out.sides.logits[layer].flatten(-2),
            "ref_points": out.sides.start,
            "teacher_corners": out.sides.logits[-1].flatten(-2),
            "teacher_logits": out.logits[-1],
        }
        labels = [{"boxes": target.boxes, "class_labels": target.labels} for target in wanted]
        expected = theirs.loss_local(given, labels, pairs, 5.0)
        torch.testing.assert_close(ours.fine[layer], expected["loss_fgl"], rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.distilled[layer], expected["loss_ddf"], rtol=1e-5, atol=1e-7)


def test_targets_of_sides_lie_between_the_bins_that_mean_them() -> None:
    start, bins = boxes(50), SideBins(BINS, UP, SCALE)
    wanted = cxcywh_to_xyxy(boxes(50))
    lower, above = side_targets(wanted, start, bins.values(), bins.scale)
    values = bins.values()
    mean = values[lower] * (1 - above) + values[lower + 1] * above  # what a perfect distribution would say
    shares = torch.zeros(50, 4, BINS + 1).scatter_(-1, lower[..., None], (1 - above)[..., None])
    shares.scatter_add_(-1, lower[..., None] + 1, above[..., None])
    moved = shares.flatten(-2) @ bins()
    center, size = start.split(2, -1)
    reached = cxcywh_to_xyxy(torch.cat([center + size * moved[:, :2], size + size * moved[:, 2:]], -1))
    within = mean.abs() < values[-1]
    torch.testing.assert_close(reached[within], wanted[within], atol=1e-6, rtol=0)
    assert 0 < (~within).sum() < within.sum(), "some sides are further away than the bins reach; they get the last bin"


def test_the_union_takes_the_object_that_most_layers_gave_a_query() -> None:
    out, padded = outputs(), pad(targets())
    group = (out.logits, out.boxes)
    costs = Costs("focal", 2.0, 5.0, 2.0)
    each, union = match_and_join(group, padded, costs)
    assert torch.equal(each.query, match([group], padded, costs)[0].query)
    expected = set()
    for image in range(BATCH):
        found = Counter(
            (int(q), int(t))
            for layer in range(LAYERS)
            for i, q, t in zip(each.image, each.query[layer], each.target[layer])
            if int(i) == image
        )
        for query in {q for q, _ in found}:
            best = max(count for (q, _), count in found.items() if q == query)
            expected.add((image, query, min(t for (q, t), count in found.items() if q == query and count == best)))
    got = {(int(i), int(q), int(t)) for i, q, t in zip(union.image, union.query[0], union.target[0])}
    assert got == expected
    assert len(got) > each.query.shape[1], "layers disagree here"


def reference(out: Outputs, wanted: list[Target], denoised: DenoisingOutputs) -> dict[str, float]:
    """The authors' dfine_criterion.py, written as loops: weighted sums of each loss."""
    padded, costs = pad(wanted), Costs("focal", 2.0, 5.0, 2.0)
    groups = [out.sides.first, *zip(out.logits, out.boxes), out.encoder]
    matches = [match([(a[None], b[None])], padded, costs)[0] for a, b in groups]
    triples = [
        [(int(i), int(q), int(t)) for i, q, t in zip(found.image, found.query[0], found.target[0])] for found in matches
    ]
    votes = Counter(triple for layer in triples for triple in layer)
    union: dict[tuple[int, int], int] = {}
    for (image, query, target), _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
        union.setdefault((image, query), target)
    joined = [(image, query, target) for (image, query), target in union.items()]
    total, count = {"vfl": 0.0, "boxes": 0.0, "fgl": 0.0, "ddf": 0.0}, sum(len(t.labels) for t in wanted)
    for (logits, predicted), own in zip(groups, triples):
        total["vfl"] += vfl(logits, predicted, own, wanted) / count
        total["boxes"] += box_loss(predicted, joined, wanted) / len(joined)
    matched, others = len(joined), BATCH * QUERIES - len(joined)
    share = math.sqrt(matched) / (math.sqrt(matched) + math.sqrt(others))
    add_sides(total, out.sides, out.logits, out.boxes, joined, wanted, len(joined), share)

    known = denoised.assignment
    positive = [(int(i), int(q), int(t)) for i, q, t in zip(known.image, known.query[0], known.target[0])]
    copies = count * denoised.groups
    for logits, predicted in [denoised.sides.first, *zip(denoised.logits, denoised.boxes)]:
        total["vfl"] += vfl(logits, predicted, positive, wanted) / copies
        total["boxes"] += box_loss(predicted, positive, wanted) / copies
    add_sides(total, denoised.sides, denoised.logits, denoised.boxes, positive, wanted, copies, share)
    return total


def vfl(logits: Tensor, predicted: Tensor, pairs: list[tuple[int, int, int]], wanted: list[Target]) -> float:
    score = torch.zeros_like(logits)
    positive = torch.zeros_like(logits)
    for image, query, target in pairs:
        label = int(wanted[image].labels[target])
        score[image, query, label] = iou(predicted[image, query], wanted[image].boxes[target])
        positive[image, query, label] = 1
    prob = logits.sigmoid()
    weight = 0.75 * prob**2 * (1 - positive) + score
    return float(-(weight * (score * prob.log() + (1 - score) * (1 - prob).log())).sum())


def box_loss(predicted: Tensor, pairs: list[tuple[int, int, int]], wanted: list[Target]) -> float:
    total = 0.0
    for image, query, target in pairs:
        a, b = predicted[image, query], wanted[image].boxes[target]
        total += 5 * float((a - b).abs().sum()) + 2 * float(1 - paired_giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)))
    return total


def iou(a: Tensor, b: Tensor) -> float:
    return float(paired_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)))


def add_sides(
    total: dict[str, float],
    sides: Sides,
    logits: Tensor,
    predicted: Tensor,
    pairs: list[tuple[int, int, int]],
    wanted: list[Target],
    count: float,
    share: float,
) -> None:
    values = sides.values.tolist()
    for layer in range(LAYERS):
        quality = {}
        for image, query, target in pairs:
            quality[image, query] = iou(predicted[layer, image, query], wanted[image].boxes[target])
            x0, y0, x1, y1 = cxcywh_to_xyxy(wanted[image].boxes[target]).tolist()
            cx, cy, w, h = sides.start[image, query].tolist()
            reach = [(cx - x0) / w, (cy - y0) / h, (x1 - cx) / w, (y1 - cy) / h]
            for side, box_sides in enumerate(reach):
                moved = (box_sides - 0.5) * SCALE
                low = max([n for n, value in enumerate(values) if value <= moved], default=0)
                low = min(low, BINS - 1)
                part = min(max((moved - values[low]) / (values[low + 1] - values[low]), 0.0), 1.0)
                log = sides.logits[layer, image, query, side].log_softmax(-1).tolist()
                total["fgl"] -= 0.15 * quality[image, query] * ((1 - part) * log[low] + part * log[low + 1]) / count
        if layer == LAYERS - 1:
            continue
        means: dict[bool, list[float]] = {True: [], False: []}
        for image in range(BATCH):
            for query in range(predicted.shape[2]):
                known = quality.get((image, query))
                weight = float(logits[-1, image, query].sigmoid().max()) if known is None else known
                for side in range(4):
                    soft = (sides.logits[-1, image, query, side] / 5).softmax(-1)
                    own = (sides.logits[layer, image, query, side] / 5).softmax(-1)
                    means[known is not None].append(weight * 25 * float((soft * (soft / own).log()).sum()))
        total["ddf"] += 1.5 * share * sum(means[True]) / len(means[True])
        total["ddf"] += 1.5 * (1 - share) * sum(means[False]) / len(means[False])


def test_the_loss_of_a_batch_is_the_authors_written_as_loops() -> None:
    out, wanted, noised = outputs(), targets(), outputs(queries=12)
    image = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1])  # two groups of three positive and three negative copies
    query = torch.tensor([0, 1, 2, 0, 6, 7, 8, 6])
    target = torch.tensor([0, 1, 2, 0, 0, 1, 2, 0])
    assignment = Assignment(image, query.expand(LAYERS, -1), target.expand(LAYERS, -1))
    denoised = DenoisingOutputs(noised.logits, noised.boxes, assignment, 2, noised.sides)
    got = Criterion(LossConfig(), "vfl")(out, wanted, denoised)
    expected = reference(out, wanted, denoised)
    assert float(got.total) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert min(expected.values()) > 0.05, "each loss is large enough to be missed"
    plain = Criterion(LossConfig(weight_fgl=0.0, weight_ddf=0.0), "vfl")(out, wanted, denoised)
    assert float(plain.total) == pytest.approx(expected["vfl"] + expected["boxes"], rel=1e-5)
    assert float(plain.sides) == 0
    shown = [got.class_, got.l1, got.giou, got.auxiliary, got.encoder, got.denoising, got.sides]
    assert float(sum(shown)) == pytest.approx(float(got.total), rel=1e-5), "the parts are the whole"


def test_a_batch_without_objects_has_finite_losses_and_gradients() -> None:
    out = outputs()
    leaves = [out.logits, out.boxes, out.sides.logits]
    for leaf in leaves:
        leaf.requires_grad_()
    empty = [Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))] * BATCH
    loss = Criterion(LossConfig(), "vfl")(out, empty).total
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("key", ["weight_fgl", "weight_ddf"])
def test_a_weight_of_sides_is_refused_where_boxes_have_none(key: str) -> None:
    with pytest.raises(RecipeError, match=f"train.{key} is 0.2, but boxes of rt_detr are no distributions"):
        Recipe.load("rtdetr-nano-bccd", [f"train.{key}=0.2"])
