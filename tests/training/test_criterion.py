"""The criterion against transformers' losses on the same outputs, and against properties that the papers state."""

from __future__ import annotations

import pytest
import torch

from edgedetr.errors import RecipeError
from edgedetr.models import FAMILY
from edgedetr.models.records import Outputs
from edgedetr.recipe import ModelChoice, Recipe
from edgedetr.training import criterion as criterion_module
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion, DenoisingOutputs
from edgedetr.training.data.dataset import Target
from edgedetr.training.matcher import Assignment

LAYERS, BATCH, QUERIES, CLASSES = 3, 3, 12, 4


def boxes(generator, *shape):
    return torch.cat(
        [
            torch.rand(*shape, 2, generator=generator) * 0.6 + 0.2,
            torch.rand(*shape, 2, generator=generator) * 0.3 + 0.05,
        ],
        -1,
    )


def case(seed=0, counts=(4, 0, 6), extra=0, encoder=True):
    generator = torch.Generator().manual_seed(seed)
    targets = [Target(torch.randint(CLASSES, (n,), generator=generator), boxes(generator, n)) for n in counts]
    logits = torch.randn(LAYERS, BATCH, QUERIES, CLASSES + extra, generator=generator)
    outputs = Outputs(logits, boxes(generator, LAYERS, BATCH, QUERIES))
    if encoder:
        outputs.encoder = torch.randn(BATCH, QUERIES, CLASSES, generator=generator), boxes(generator, BATCH, QUERIES)
    return outputs, targets, generator


def as_theirs(targets):
    return [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]


def test_rt_detr_losses_equal_transformers_with_auxiliary_encoder_and_denoising():
    from transformers import RTDetrConfig
    from transformers.loss.loss_rt_detr import RTDetrLoss

    outputs, targets, generator = case()
    groups, noised = 2, 2 * 2 * 6  # groups x positive and negative x the fullest image
    dn_logits = torch.randn(LAYERS, BATCH, noised, CLASSES, generator=generator)
    dn_boxes = boxes(generator, LAYERS, BATCH, noised)
    positive = [torch.cat([torch.arange(len(t)) + 12 * group for group in range(groups)]) for t in targets]

    theirs = RTDetrLoss(RTDetrConfig(num_labels=CLASSES))
    encoder = {"logits": outputs.encoder[0], "pred_boxes": outputs.encoder[1]}
    auxiliary = [{"logits": outputs.logits[i], "pred_boxes": outputs.boxes[i]} for i in range(LAYERS - 1)]
    expected = theirs(
        {
            "logits": outputs.logits[-1],
            "pred_boxes": outputs.boxes[-1],
            "auxiliary_outputs": [*auxiliary, encoder],
            "dn_auxiliary_outputs": [{"logits": lo, "pred_boxes": bo} for lo, bo in zip(dn_logits, dn_boxes)],
            "denoising_meta_values": {"dn_positive_idx": positive, "dn_num_group": groups},
        },
        as_theirs(targets),
    )

    image = torch.cat([torch.full_like(p, row) for row, p in enumerate(positive)])
    target = torch.cat([torch.arange(len(t)).repeat(groups) for t in targets])
    assignment = Assignment(image, torch.cat(positive).expand(LAYERS, -1), target.expand(LAYERS, -1))
    ours = Criterion(TrainConfig(), "vfl")(outputs, targets, DenoisingOutputs(dn_logits, dn_boxes, assignment, groups))

    def part(*suffixes):
        return sum(v for k, v in expected.items() if k.endswith(suffixes))

    close = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums over some hundred terms in another order
    torch.testing.assert_close(ours.class_, expected["loss_vfl"], **close)
    torch.testing.assert_close(ours.l1, expected["loss_bbox"], **close)
    torch.testing.assert_close(ours.giou, expected["loss_giou"], **close)
    torch.testing.assert_close(ours.auxiliary, part("_aux_0", "_aux_1"), **close)
    torch.testing.assert_close(ours.encoder, part("_aux_2"), **close)
    torch.testing.assert_close(ours.denoising, part("_dn_0", "_dn_1", "_dn_2"), **close)
    torch.testing.assert_close(ours.total, sum(expected.values()), **close)


COUNTS = pytest.mark.parametrize(
    "counts", [(4, 0, 6), (0, 0, 0), (15, 1, 2)], ids=["mixed", "empty", "more than queries"]
)


@COUNTS
def test_lw_detr_losses_of_groups_and_their_gradients_equal_transformers(counts):
    """Four groups of three queries; the loss is the groups' mean, whatever layer it is of."""
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

    outputs, targets, _ = case(7, counts)
    outputs.groups = 4
    leaves = [outputs.logits, outputs.boxes, *outputs.encoder]
    for leaf in leaves:
        leaf.requires_grad_()
    theirs = LwDetrImageLoss(LwDetrHungarianMatcher(2, 5, 2), CLASSES, 0.25, ["labels", "boxes"], group_detr=4)
    layers = [{"logits": logits, "pred_boxes": boxes} for logits, boxes in zip(outputs.logits, outputs.boxes)]
    encoder = {"logits": outputs.encoder[0], "pred_boxes": outputs.encoder[1]}
    expected = theirs({**layers[-1], "auxiliary_outputs": layers[:-1], "enc_outputs": encoder}, as_theirs(targets))
    weights = {"ce": 1.0, "bbox": 5.0, "giou": 2.0}
    weighted = {name: value * weights[name.split("_")[1]] for name, value in expected.items()}
    ours = Criterion(TrainConfig(), "ia_bce")(outputs, targets)

    def part(*suffixes):
        return sum(v for k, v in weighted.items() if k.endswith(suffixes))

    close = {"rtol": 1e-5, "atol": 1e-5}  # float32, another order of summation
    torch.testing.assert_close(ours.class_, expected["loss_ce"], **close)
    torch.testing.assert_close(ours.auxiliary, part("_0", "_1"), **close)
    torch.testing.assert_close(ours.encoder, part("_enc"), **close)
    torch.testing.assert_close(ours.total, sum(weighted.values()), **close)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours.total, sum(weighted.values()))]
    torch.testing.assert_close(*gradients, **close)


@COUNTS
def test_detr_losses_equal_transformers(counts):
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    outputs, targets, _ = case(1, counts, extra=1, encoder=False)
    theirs = ImageLoss(HungarianMatcher(1, 5, 2), CLASSES, 0.1, ["labels", "boxes"])
    expected = theirs(
        {
            "logits": outputs.logits[-1],
            "pred_boxes": outputs.boxes[-1],
            "auxiliary_outputs": [
                {"logits": outputs.logits[i], "pred_boxes": outputs.boxes[i]} for i in range(LAYERS - 1)
            ],
        },
        as_theirs(targets),
    )
    weights = {"ce": 1.0, "bbox": 5.0, "giou": 2.0}
    total = sum(value * weights[name.split("_")[1]] for name, value in expected.items())
    ours = Criterion(TrainConfig(), "softmax_ce")(outputs, targets)
    torch.testing.assert_close(ours.total, total, rtol=1e-5, atol=1e-5)  # float32, another order of summation
    torch.testing.assert_close(ours.class_, expected["loss_ce"], rtol=1e-5, atol=1e-6)


def test_focal_varifocal_matchability_and_iou_aware_bce_follow_their_formulas_element_by_element():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 2, 3, CLASSES, generator=generator)
    onehot, quality = torch.zeros_like(logits), torch.zeros(1, 2, 3)
    onehot[0, 0, 1, 2], quality[0, 0, 1] = 1, 0.7
    onehot[0, 1, 0, 0], quality[0, 1, 0] = 1, 0.2
    focal = vfl = mal = aware = 0.0
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(CLASSES)).tolist():
        b, n, k = index
        p = logits[0, b, n, k].double().sigmoid()
        y, q = onehot[0, b, n, k].double(), quality[0, b, n].double() * onehot[0, b, n, k]

        def bce(t, p=p):
            return -(t * p.log() + (1 - t) * (1 - p).log())

        focal += 0.25 * (1 - p) ** 2 * -p.log() if y else 0.75 * p**2 * -(1 - p).log()
        vfl += q * bce(q) if y else 0.75 * p**2 * bce(0.0)
        mal += bce(q**1.5) if y else p**1.5 * bce(0.0)
        aware += bce(p**0.25 * q**0.75) if y else p**2 * bce(0.0)

    def close(a, b):
        torch.testing.assert_close(a.double().sum(), b, rtol=1e-5, atol=0)  # float32 against float64

    close(criterion_module.focal(logits, onehot, 0.25, 2.0), focal)
    close(criterion_module.varifocal(logits, onehot, quality, 0.75, 2.0), vfl)
    close(criterion_module.matchability(logits, onehot, quality, 1.5), mal)
    close(criterion_module.iou_aware_bce(logits, onehot, quality, 0.25, 2.0), aware)


@pytest.mark.parametrize("class_loss", ["softmax_ce", "focal", "vfl", "mal", "ia_bce"])
def test_unmatched_queries_learn_their_class_but_get_no_box_gradient(class_loss):
    outputs, targets, _ = case(3, (2, 0, 3), extra=class_loss == "softmax_ce", encoder=False)
    outputs.logits.requires_grad_()
    outputs.boxes.requires_grad_()
    Criterion(TrainConfig(), class_loss)(outputs, targets).total.backward()
    moved = (outputs.boxes.grad != 0).any(-1)
    assert moved.sum((0, 2)).tolist() == [2 * LAYERS, 0, 3 * LAYERS]  # one query per object, layer by layer
    assert (outputs.logits.grad != 0).any(-1).all()


@pytest.mark.parametrize("class_loss", ["softmax_ce", "focal", "vfl", "mal", "ia_bce"])
def test_a_batch_without_objects_has_a_finite_loss_that_reaches_every_output(class_loss):
    outputs, targets, _ = case(4, (0, 0, 0), extra=class_loss == "softmax_ce", encoder=class_loss != "softmax_ce")
    leaves = [outputs.logits, outputs.boxes, *(outputs.encoder or ())]
    for leaf in leaves:
        leaf.requires_grad_()
    found = Criterion(TrainConfig(), class_loss)(outputs, targets)
    found.total.backward()
    assert torch.isfinite(found.total) and float(found.l1) == 0 and float(found.giou) == 0
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("class_loss", ["softmax_ce", "focal", "vfl", "mal", "ia_bce"])
def test_label_smoothing_reaches_every_class_loss(class_loss):
    outputs, targets, _ = case(3, (2, 0, 3), extra=class_loss == "softmax_ce", encoder=False)
    for row, target in enumerate(targets):
        outputs.boxes[:, row, : len(target)] = target.boxes  # matched with an overlap of 1
    sharp, smooth = (
        Criterion(TrainConfig(label_smoothing=fraction), class_loss)(outputs, targets) for fraction in (0, 0.1)
    )
    assert abs(float(sharp.class_ - smooth.class_)) > 1e-3
    assert float(sharp.l1) == float(smooth.l1)


@pytest.mark.parametrize(
    "own, asked",
    [
        ("softmax_ce", "focal"),
        ("softmax_ce", "vfl"),
        ("softmax_ce", "mal"),
        ("softmax_ce", "ia_bce"),
        ("focal", "softmax_ce"),
        ("vfl", "softmax_ce"),
    ],
)
def test_a_class_loss_of_other_logits_is_refused(own, asked):
    with pytest.raises(RecipeError, match=f"train.class_loss is '{asked}', a loss of .* logits, .* expected '"):
        Criterion(TrainConfig(class_loss=asked), own)


@pytest.mark.parametrize("name", FAMILY)
def test_a_recipe_refuses_the_class_losses_that_its_member_cannot_have(name):
    own = FAMILY[name].config.class_loss
    for asked in ("softmax_ce", "focal", "vfl", "mal", "ia_bce"):
        sets = [f"train.class_loss={asked}"]
        if (asked == "softmax_ce") == (own == "softmax_ce"):
            assert Recipe.from_dict({"model": {"name": name}}, where="x", sets=sets).train.class_loss == asked
        else:
            with pytest.raises(RecipeError, match=f"class_loss is '{asked}'"):
                Recipe.from_dict({"model": {"name": name}}, where="x", sets=sets)
    with pytest.raises(RecipeError, match="class_loss"):
        Recipe(ModelChoice("detr", FAMILY["detr"].config()), train=TrainConfig(class_loss="focal"))


def test_losses_are_divided_by_the_objects_per_process():
    outputs, targets, _ = case(5)
    criterion = Criterion(TrainConfig(), "vfl")
    one = criterion(outputs, targets).total
    torch.testing.assert_close(criterion(outputs, targets, objects_per_process=20.0).total, one / 2)  # 10 objects here


def test_encoder_proposals_of_another_count_are_matched_separately():
    outputs, targets, generator = case(6)
    together = Criterion(TrainConfig(), "focal")(outputs, targets)
    far = torch.full((BATCH, 5, CLASSES), -20.0), torch.tensor([0.0, 0.0, 1e-3, 1e-3]).repeat(BATCH, 5, 1)
    order = torch.randperm(QUERIES + 5, generator=generator)  # 5 useless proposals more must change nothing else
    outputs.encoder = tuple(torch.cat([own, more], 1)[:, order] for own, more in zip(outputs.encoder, far))
    apart = Criterion(TrainConfig(), "focal")(outputs, targets)
    torch.testing.assert_close(apart.encoder, together.encoder)
    torch.testing.assert_close(apart.auxiliary, together.auxiliary)


def test_l1_is_of_center_and_size_or_of_corners():
    """By hand: one query, one object, dx 0.1 and dw 0.2 apart."""
    outputs = Outputs(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.6, 0.5, 0.4, 0.2]]]]))
    targets = [Target(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))]
    for form, expected in (("cxcywh", 0.1 + 0.2), ("xyxy", 0.0 + 0.2)):  # left sides agree, right ones are 0.2 apart
        found = Criterion(TrainConfig(l1=form, weight_l1=1.0), "focal")(outputs, targets).l1
        torch.testing.assert_close(found, torch.tensor(expected))
