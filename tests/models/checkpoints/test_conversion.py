"""Every layout is converted: the authors' files, those of transformers, tied copies, packed tensors."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import author_state_dicts
import pytest
import torch
from members import GROUPED, SELECTING, SMALL
from references import reference_resnet, transformers

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.conversion import backbone_of, translate
from edgedetr.models.checkpoints.pretrained import load_detector, load_weights, read_weights, rows_by_name
from edgedetr.models.checkpoints.rename_rules import rename, split_packed
from edgedetr.models.members.deformable_detr import DeformableDetrConfig
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig

CLASSES = 4
PLAIN = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 6,
}
RT = {"backbone_width": 0.25, "hidden": 32, "heads": 4, "encoder_ffn": 48, "decoder_ffn": 40, "decoder_layers": 2}

# name of the case: member, configuration, its weights under the authors' names
ORIGINALS = {
    "detr": ("detr", DetrConfig(**PLAIN), lambda ours: author_state_dicts.detr(ours, 2)),
    "detr r50": (
        "detr",
        DetrConfig(**{**PLAIN, "backbone": "resnet50"}),
        lambda ours: author_state_dicts.detr(ours, 2),
    ),
    "detr pre-norm": ("detr", DetrConfig(**PLAIN, pre_norm=True), lambda ours: author_state_dicts.detr(ours, 2)),
    "deformable": (
        "deformable_detr",
        DeformableDetrConfig(**PLAIN),
        lambda ours: author_state_dicts.deformable_detr(ours, 2),
    ),
    "deformable single-scale": (
        "deformable_detr",
        DeformableDetrConfig(**PLAIN, levels=1),
        lambda ours: author_state_dicts.deformable_detr(ours, 2),
    ),
    "deformable refined": (
        "deformable_detr",
        DeformableDetrConfig(**PLAIN, refine=True),
        lambda ours: author_state_dicts.deformable_detr(ours, 2),
    ),
    "deformable two-stage": (
        "deformable_detr",
        DeformableDetrConfig(**PLAIN, refine=True, two_stage=True),
        lambda ours: author_state_dicts.deformable_detr(ours, 2),
    ),
    "rt_detr v1": ("rt_detr", RtDetrConfig(**RT, version=1), lambda ours: author_state_dicts.rt_detr(ours, 1)),
    "rt_detr v2": ("rt_detr", RtDetrConfig(**RT), lambda ours: author_state_dicts.rt_detr(ours, 2)),
    "rt_detr v2, learned content": (
        "rt_detr",
        RtDetrConfig(**RT, learned_content=True),
        lambda ours: author_state_dicts.rt_detr(ours, 2),
    ),
    "rt_detr v2 r50": (
        "rt_detr",
        RtDetrConfig(**RT, backbone="resnet50vd", expansion=1.0),
        lambda ours: author_state_dicts.rt_detr(ours, 2),
    ),
}
original = pytest.mark.parametrize("case", ORIGINALS)


def random_state(member: str, config: object) -> dict[str, torch.Tensor]:
    state = build(member, config, CLASSES).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


@original
def test_the_authors_files_come_back_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    member, config, written = ORIGINALS[case]
    ours = random_state(member, config)
    path = tmp_path / "model.pth"
    wrapped = {
        "model": {f"module.{name}": tensor for name, tensor in written(ours).items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(lr=1e-4),
    }
    torch.save(wrapped, path)
    found = translate(member, read_weights(str(path)), case)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)
    loaded = load_detector(build(member, config, CLASSES), member, str(path))
    assert loaded.fresh == ()


@original
def test_the_architecture_follows_from_the_tensors(case: str) -> None:
    member, config, written = ORIGINALS[case]
    found = config_from_state_dict(FAMILY[member], translate(member, written(random_state(member, config))), heads=4)
    # What no tensor shows: heads, and how many proposals a two-stage model selects.
    not_in_tensors = {"heads", "dropout", "version"} | ({"queries"} if "queries" not in found else set())
    for name, value in found.items():
        assert value == getattr(config, name), name
    assert {"backbone", "backbone_width", "hidden", "decoder_layers"} <= found.keys()
    rebuilt = type(config)(**found, **{name: getattr(config, name) for name in not_in_tensors if hasattr(config, name)})
    assert build(member, rebuilt, CLASSES).state_dict().keys() == build(member, config, CLASSES).state_dict().keys()


@pytest.mark.parametrize("member", SMALL)
def test_every_members_architecture_follows_from_its_tensors(member: str) -> None:
    config = SMALL[member]
    found = config_from_state_dict(FAMILY[member], build(member, config, CLASSES).state_dict(), heads=4)
    not_in_tensors = {"heads", "backbone_norm", "frozen_stages", "dilate_last", "first_queries", "points"}
    if member in SELECTING:
        not_in_tensors.add("queries")  # selected, not learned
    if member in GROUPED:  # how a transformer is cut and read, and the heads of another width than the published ones
        not_in_tensors |= {"backbone_windows", "backbone_maps", "backbone_full_attention", "cross_heads"}
    default = type(config)()
    for field in fields(config):
        wanted = getattr(config, field.name)
        if field.name not in not_in_tensors and wanted != getattr(default, field.name):
            assert found[field.name] == wanted, field.name


@pytest.mark.parametrize("form", ["plain", "refined", "two-stage"])
def test_files_of_transformers_deformable_detr_load(form: str, tmp_path: Path) -> None:
    """As `save_pretrained` writes them: with refinement, copies of the heads are left out."""
    refine, two_stage = form != "plain", form == "two-stage"
    theirs = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            backbone_config=reference_resnet(18, (2, 3, 4), 0.25),
            use_timm_backbone=False,
            backbone=None,
            use_pretrained_backbone=False,
            num_labels=CLASSES,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=6,
            with_box_refine=refine,
            two_stage=two_stage,
        )
    )
    if not refine:
        for heads in (theirs.class_embed, theirs.bbox_embed):
            for head in heads[1:]:
                head.load_state_dict(heads[0].state_dict())
    theirs.save_pretrained(tmp_path)
    ours = build("deformable_detr", DeformableDetrConfig(**PLAIN, refine=refine, two_stage=two_stage), CLASSES)
    for tensor in ours.state_dict().values():
        tensor.fill_(-7)  # so that a tensor that was not loaded would show
    assert load_detector(ours, "deformable_detr", str(tmp_path)).fresh == ()
    assert [name for name, p in ours.named_parameters() if (p == -7).all()] == []
    assert torch.equal(
        ours.decoder.layers[1].cross_norm.weight, theirs.model.decoder.layers[1].encoder_attn_layer_norm.weight
    )


def test_copies_of_one_tensor_that_differ_are_an_error_that_names_both() -> None:
    weights = author_state_dicts.deformable_detr(random_state("deformable_detr", DeformableDetrConfig(**PLAIN)), 2)
    weights["class_embed.1.bias"] = weights["class_embed.1.bias"] + 1
    with pytest.raises(ModelError, match=r"class_embed.0.bias and class_embed.1.bias differ.*decoder.boxes.score.bias"):
        translate("deformable_detr", weights)


def test_missing_and_unused_tensors_are_named() -> None:
    config = DetrConfig(**PLAIN)
    weights = author_state_dicts.detr(random_state("detr", config), 2)
    weights["mask_head.lay1.weight"] = torch.zeros(3)
    del weights["bbox_embed.layers.1.bias"]
    with pytest.raises(ModelError, match=r"missing \(1\): decoder.boxes.box.layers.1.bias; left over \(1\): mask_head"):
        load_weights(build("detr", config, CLASSES), translate("detr", weights), "file")


@pytest.mark.parametrize("member", FAMILY)
def test_weights_of_something_else_say_which_layouts_are_known(member: str) -> None:
    with pytest.raises(ModelError, match=rf"w.pth: no known layout of {member} \(known: .*\).*a.weight"):
        translate(member, {"a.weight": torch.zeros(2)}, "w.pth")


@original
def test_a_backbone_is_found_inside_a_detector(case: str) -> None:
    member, config, written = ORIGINALS[case]
    ours = random_state(member, config)
    found = backbone_of(written(ours))
    assert found.keys() == {name.removeprefix("backbone.") for name in ours if name.startswith("backbone.")}


def test_packed_projections_split_in_their_order() -> None:
    weights = {"a.in_proj_weight": torch.arange(12.0).reshape(6, 2), "a.in_proj_bias": torch.arange(6.0)}
    split = split_packed(weights)
    assert split["a.q.weight"].tolist() == [[0, 1], [2, 3]]
    assert split["a.k.bias"].tolist() == [2, 3]
    assert split["a.v.weight"].tolist() == [[8, 9], [10, 11]]
    assert split_packed(weights, ("row", "column")).keys() == weights.keys(), "another number of parts: left alone"


def test_equal_copies_become_one() -> None:
    assert rename({"a.x": torch.ones(2), "b.x": torch.ones(2)}, [(r"^[ab]\.", "c.")]).keys() == {"c.x"}


def test_class_rows_are_taken_over_by_name() -> None:
    """By hand: three classes become two, one of them known, the other new; "no object" stays the last row."""
    rows = rows_by_name(["cat", "dog", "Car"], ["car", "tree"])
    assert rows == [2, None]
    source, target = (build("detr", DetrConfig(**PLAIN), classes) for classes in (3, 2))
    fresh = target.decoder.boxes.score.weight[1].clone()
    load_weights(target, source.state_dict(), "three classes", rows)
    assert torch.equal(target.decoder.boxes.score.weight[0], source.decoder.boxes.score.weight[2])
    assert torch.equal(target.decoder.boxes.score.weight[1], fresh)
    assert torch.equal(target.decoder.boxes.score.weight[2], source.decoder.boxes.score.weight[3])


def test_a_head_that_finds_any_object_keeps_its_first_row() -> None:
    config = DeformableDetrConfig(**PLAIN, refine=True, two_stage=True)
    source, target = (build("deformable_detr", config, classes) for classes in (3, 2))
    load_weights(target, source.state_dict(), "three classes", rows_by_name(["cat", "dog", "car"], ["tree", "dog"]))
    assert torch.equal(target.selector.score.weight[0], source.selector.score.weight[0])
    assert torch.equal(target.decoder.boxes.score[1].weight[1], source.decoder.boxes.score[1].weight[1])
