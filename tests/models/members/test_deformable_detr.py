"""Deformable DETR equals transformers' at random weights in every form, whole and padded, and keeps its traps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from references import reference_resnet, transformers, with_spread
from torch import nn

from edgedetr.errors import ModelError
from edgedetr.models import build
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.detector import DetrModel
from edgedetr.models.encoders.deformable import cell_centers
from edgedetr.models.members.deformable_detr import DeformableDetrConfig
from edgedetr.models.queries.two_stage import Anchors
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.data.dataset import Target
from edgedetr.training.optimizer import parameter_groups

CLASSES = 5
PIXELS = (96, 128)  # rectangular, so that a swap of x and y shows
FORMS = {
    "plain": DeformableDetrConfig(),
    "refined": DeformableDetrConfig(refine=True),
    "two-stage": DeformableDetrConfig(refine=True, two_stage=True),
    "single-scale": DeformableDetrConfig(levels=1),
}
SMALL = {
    "backbone": "resnet18",
    "backbone_width": 0.5,
    "hidden": 64,
    "heads": 4,
    "ffn": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 20,
    "dropout": 0.0,
}


def pair(form: str) -> tuple[DetrModel, nn.Module]:
    """Ours with transformers' random weights, through the importer's names."""
    config = replace(FORMS[form], **SMALL)
    stages = (4,) if config.levels == 1 else (2, 3, 4)
    reference = with_spread(
        transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(
                backbone_config=reference_resnet(18, stages, 0.5),
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                num_labels=CLASSES,
                d_model=64,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=96,
                decoder_ffn_dim=96,
                num_queries=20,
                two_stage_num_proposals=20,
                num_feature_levels=config.levels,
                with_box_refine=config.refine,
                two_stage=config.two_stage,
                dropout=0.0,
            )
        )
    )
    if not config.refine:  # one pair of heads for all layers, as the authors' model and files have it
        for heads in (reference.class_embed, reference.bbox_embed):
            for head in heads[1:]:
                head.load_state_dict(heads[0].state_dict())
    if config.two_stage:  # with this sign the cells off the image, which all say the same, are not chosen
        with torch.no_grad():
            reference.class_embed[-1].weight.neg_()
    ours = build("deformable_detr", config, CLASSES).eval()
    load_weights(ours, translate("deformable_detr", reference.state_dict()), form)
    return ours, reference


def as_set(logits: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """[B, N, K + 4], ordered by the first class logit of each query: the order of equal models may still differ."""
    rows = torch.cat([logits, boxes], dim=-1)
    return torch.stack([row[row[:, 0].argsort()] for row in rows])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_detections_equal_those_of_transformers(form: str, padded: bool) -> None:
    ours, reference = pair(form)
    images, padding = torch.randn(2, 3, *PIXELS), torch.zeros(2, *PIXELS, dtype=torch.bool)
    if padded:
        padding[0, 64:], padding[1, :, 80:] = True, True
        images = images.masked_fill(padding[:, None], 0.0)
    theirs = reference(pixel_values=images, pixel_mask=(~padding).long())
    got = ours(images, padding if padded else None)
    assert min(theirs.logits.std(), theirs.pred_boxes.std()) > 1e-2, "the reference says something"
    expected, found = as_set(theirs.logits, theirs.pred_boxes), as_set(got.logits[-1], got.boxes[-1])
    # float32 through about 40 layers; measured 6e-8 and 2e-7
    torch.testing.assert_close(found[..., :CLASSES], expected[..., :CLASSES], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[..., CLASSES:], expected[..., CLASSES:], atol=1e-5, rtol=0)
    if got.encoder is not None:
        torch.testing.assert_close(got.encoder[0], theirs.enc_outputs_class, atol=1e-4, rtol=0)
        torch.testing.assert_close(got.encoder[1], theirs.enc_outputs_coord_logits.sigmoid(), atol=1e-5, rtol=0)


def test_the_loss_equals_that_of_transformers() -> None:
    ours, reference = pair("refined")
    reference.config.auxiliary_loss = True
    images, generator = torch.randn(2, 3, *PIXELS), torch.Generator().manual_seed(4)
    targets = [
        Target(
            torch.randint(CLASSES, (count,), generator=generator), torch.rand(count, 4, generator=generator) * 0.3 + 0.2
        )
        for count in (3, 1)
    ]
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    with torch.no_grad():
        theirs = reference(pixel_values=images, labels=labels).loss
        config = TrainConfig(cost_class=reference.config.class_cost, weight_class=1.0)
        mine = Criterion(config, "focal")(ours(images), targets).total
    assert mine == pytest.approx(float(theirs), rel=1e-5)


def test_proposals_of_the_two_stage_form_learn_objects_and_not_classes() -> None:
    """Every object is of class 0 to the encoder's head; by hand: the loss with all labels 0, and no other change."""
    ours = build("deformable_detr", replace(FORMS["two-stage"], **SMALL), CLASSES)
    assert ours.selector.class_agnostic
    outputs = ours(torch.randn(1, 3, *PIXELS))
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.5, 0.1, 0.3]])
    config = TrainConfig()
    wanted = Criterion(config, "focal", class_agnostic_proposals=True)(outputs, [Target(torch.tensor([3, 4]), boxes)])
    as_zero = Criterion(config, "focal")(outputs, [Target(torch.tensor([0, 0]), boxes)])
    as_is = Criterion(config, "focal")(outputs, [Target(torch.tensor([3, 4]), boxes)])
    assert wanted.encoder == pytest.approx(float(as_zero.encoder))
    assert wanted.class_ == pytest.approx(float(as_is.class_))
    assert abs(float(as_zero.encoder - as_is.encoder)) > 1e-4, "the labels matter to this loss"


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(form: str) -> None:
    ours = build("deformable_detr", replace(FORMS[form], **SMALL, frozen_stages=0), CLASSES).train()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    out = ours(torch.randn(2, 3, *PIXELS))
    loss = out.logits.square().sum() + out.boxes.square().sum()
    if out.encoder is not None:
        loss = loss + out.encoder[0].square().sum() + out.encoder[1].square().sum()
    loss.backward()
    dead = [name for name, p in ours.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert [name for name in dead if not name.endswith(".k.bias")] == []  # a softmax does not see a common shift


def test_a_box_does_not_learn_through_the_layer_before() -> None:
    """Not "look forward twice": the reference of a layer is a constant to its loss."""
    ours = build("deformable_detr", replace(FORMS["refined"], **SMALL), CLASSES).eval()
    ours(torch.randn(1, 3, *PIXELS)).boxes[1].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.decoder.boxes.box[0].parameters())
    assert all(p.grad is not None for p in ours.decoder.boxes.box[1].layers[-1].parameters())


def test_offsets_start_on_squares_of_growing_radius() -> None:
    config = replace(FORMS["plain"], **{**SMALL, "heads": 8})
    attention = build("deformable_detr", config, 1).encoder.layers[0].attention
    bias = attention.offsets.bias.unflatten(0, (8, 4, 4, 2))  # heads, levels, points, x y
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            torch.testing.assert_close(bias[head, :, point], expected.expand(4, 2), atol=1e-5, rtol=0)


def test_cells_of_a_padded_image_are_placed_in_the_image() -> None:
    valid = torch.tensor([[[0.5, 1.0]]])  # the left half of 4 x 2 cells is image
    centers = cell_centers(torch.zeros(1), [(2, 4)], valid)[0]
    assert centers[:4].tolist() == [[0.25, 0.25], [0.75, 0.25], [1.25, 0.25], [1.75, 0.25]]
    logits, usable = Anchors()(torch.zeros(1), [(2, 4)], valid)
    assert usable[0, :, 0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    torch.testing.assert_close(logits[0, 0].sigmoid(), torch.tensor([0.25, 0.25, 0.05, 0.05]))
    assert (logits[0, 2].sigmoid() == 1).all()  # off the image: finite, and a box nobody takes


@torch.no_grad()
def test_the_content_of_the_padding_changes_nothing() -> None:
    ours, padding = pair("two-stage")[0], torch.zeros(1, *PIXELS, dtype=torch.bool)
    padding[0, :, 64:] = True
    maps = ours.backbone(torch.randn(1, 3, *PIXELS))
    changed = [level.clone() for level in maps]
    for level in changed:
        level[..., level.shape[-1] // 2 :] = level[..., level.shape[-1] // 2 :].flip(2)  # same statistics: GroupNorm
    ours.encoder.project[3] = nn.Sequential(nn.Conv2d(256, 64, 1, 2), nn.Identity())  # a window would see padding
    one, other = (ours.decode(ours.select(m), m) for m in (ours.encoder(maps, padding), ours.encoder(changed, padding)))
    torch.testing.assert_close(other.logits, one.logits, atol=1e-5, rtol=0)  # GroupNorm adds in another order
    torch.testing.assert_close(other.boxes, one.boxes, atol=1e-6, rtol=0)


def test_offsets_and_reference_points_learn_at_a_tenth_of_the_rate() -> None:
    ours = build("deformable_detr", replace(FORMS["plain"], **SMALL, frozen_stages=0), CLASSES)
    config = TrainConfig(lr=1e-3, backbone_lr_factor=0.5)
    found = {id(p): group["base_lr"] for group in parameter_groups(ours, config) for p in group["params"]}
    for name, parameter in ours.named_parameters():
        slow = "attention.offsets." in name or name.startswith("selector.reference.")
        expected = 5e-4 if name.startswith("backbone.") else 1e-4 if slow else 1e-3
        assert found[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    "form, million",
    [
        ("plain", 40.0),  # the authors' table
        ("single-scale", 34.0),
    ],
)
def test_parameter_counts_are_the_published_ones(form: str, million: float) -> None:
    with torch.device("meta"):
        detector = build("deformable_detr", FORMS[form], 91)
    assert sum(p.numel() for p in detector.parameters()) / 1e6 == pytest.approx(million, rel=0.01)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"two_stage": True}, "add --set model.refine=true"),
        ({"levels": 2}, "expected 1"),
        ({"hidden": 100}, "expected a multiple of 4 and of 8 heads"),
    ],
)
def test_what_cannot_be_built_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        DeformableDetrConfig(**change)


def test_an_image_with_fewer_cells_than_queries_says_so() -> None:
    ours = build("deformable_detr", replace(FORMS["two-stage"], **{**SMALL, "queries": 300}), CLASSES)
    with pytest.raises(ModelError, match="300 queries asked for, but the image has 256 cells"):
        ours(torch.randn(1, 3, *PIXELS))
