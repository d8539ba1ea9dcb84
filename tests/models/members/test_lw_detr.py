"""LW-DETR and RF-DETR: published sizes, training in groups as transformers does, the authors' files, the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from author_state_dicts import both
from members import CLASSES, GROUPED, SMALL, deployed, exported, small
from references import transformers
from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.importing.weights import architecture
from edgedetr.models import FAMILY, build, member
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.members.rf_detr import RfDetrConfig
from edgedetr.recipe import Recipe
from edgedetr.training.config import TrainConfig
from edgedetr.training.criterion import Criterion
from edgedetr.training.data.dataset import Target

# Million parameters, with all groups and 91 classes: README of roboflow/rf-detr and of Atten4Vis/LW-DETR.
PUBLISHED = {
    "rfdetr-n": 30.5,
    "rfdetr-s": 32.1,
    "rfdetr-m": 33.7,
    "rfdetr-l": 33.9,
    "lwdetr-t": 12.1,
    "lwdetr-s": 14.6,
    "lwdetr-m": 28.2,
    "lwdetr-l": 46.8,
    "lwdetr-x": 118.0,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    recipe = Recipe.load(name)
    with torch.device("meta"):
        model = build(recipe.model.name, recipe.model.config, 91)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", ["rfdetr-bccd", "lwdetr-bccd"])
def test_the_recipes_for_blood_cells_have_at_most_six_million_parameters(name: str) -> None:
    recipe = Recipe.load(name)
    with torch.device("meta"):
        model = build(recipe.model.name, recipe.model.config, 3)
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000


DECODER = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 8,
    "decoder_ffn_dim": 48,
    "decoder_n_points": 2,
    "num_queries": 6,
    "group_detr": 3,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "patch_size": 16, "out_indices": [1, 3]}
THEIRS = {
    "lw_detr": (
        "LwDetr",
        {
            **VIT,
            "model_type": "lw_detr_vit",
            "image_size": 64,
            "num_attention_heads": 12,
            "num_windows": 4,
            "window_block_indices": [0, 2],
        },
        {"projector_scale_factors": [2.0, 0.5]},
    ),
    "rf_detr": (
        "RfDetr",
        {**VIT, "model_type": "rf_detr_dinov2", "image_size": 64, "num_attention_heads": 6, "num_windows": 2},
        {},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_training_step_in_groups_has_the_loss_and_the_gradients_of_transformers(name: str, tmp_path: Path) -> None:
    kind, backbone, more = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**DECODER, **more, backbone_config=backbone)
    theirs = getattr(transformers, f"{kind}ForObjectDetection")(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    read = architecture(WeightSource(str(tmp_path)), name)
    ours = build(name, read.recipe.model.config, CLASSES)
    load_weights(ours, read.weights, "x")
    images = torch.rand(2, 3, 64, 64)
    targets = [Target(torch.tensor([1, 0]), torch.rand(2, 4) * 0.3 + 0.2), Target(torch.tensor([2]), torch.rand(1, 4))]
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
    expected = theirs.train()(images, labels=labels)
    memory = ours.train().encode(images)
    outputs = ours.decode(ours.select_to_train(memory), memory)
    assert outputs.logits.shape == (2, 2, 3 * 6, CLASSES)
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)
    found = Criterion(TrainConfig(), SMALL[name].class_loss)(outputs, targets).total
    torch.testing.assert_close(found, expected.loss, rtol=1e-5, atol=1e-5)
    found.backward()
    expected.loss.backward()
    for group, mine in enumerate([ours.selector, *ours.selector.others]):
        own = theirs.model.enc_out_class_embed[group].weight.grad
        torch.testing.assert_close(mine.score.weight.grad, own, atol=1e-5, rtol=1e-4)
    first = theirs.model.decoder.layers[0].cross_attn.value_proj.weight.grad
    torch.testing.assert_close(ours.decoder.layers[0].cross_attention.value.weight.grad, first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_the_deployed_graph_has_one_group_and_is_the_same_whatever_the_others_hold(name: str) -> None:
    model = onnx.load(exported(name, 1))
    assert not [item.name for item in model.graph.initializer if "others" in item.name]
    size = sum(torch.Size(item.dims).numel() for item in model.graph.initializer)
    one_group = build(name, replace(SMALL[name], groups=1), CLASSES)
    # Positions, the boxes of the cells and folded constants beside the weights.
    assert size < 1.3 * sum(parameter.numel() for parameter in one_group.parameters())
    detector = small(name)
    images = torch.rand(1, 3, 96, 128)
    before = detector(images)
    for parameter in detector.selector.others.parameters():
        parameter.fill_(7.0)
    assert torch.equal(detector(images).logits, before.logits)
    assert deployed(name).detector.select_to_train(detector.encode(images)).groups == SMALL[name].groups


@pytest.mark.parametrize("name", GROUPED)
def test_a_training_image_with_fewer_cells_than_queries_trains_the_best_of_them(name: str) -> None:
    """RF-DETR nano is trained down to 224 px, 196 cells, with 300 queries."""
    detector = build(name, replace(SMALL[name], queries=50, scales=(1,)), CLASSES).train()
    memory = detector.encode(torch.rand(2, 3, 64, 96))
    outputs = detector.decode(detector.select_to_train(memory), memory)
    assert outputs.logits.shape[2] == SMALL[name].groups * 24
    with pytest.raises(ModelError, match="50 queries asked for, but the image has 24 cells"):
        detector(torch.rand(2, 3, 64, 96))


def _conv(theirs: str, name: str, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A convolution with its norm, which the authors call bn, whatever it is."""
    norm = {key.removeprefix(f"{name}.norm."): t for key, t in ours.items() if key.startswith(f"{name}.norm.")}
    return {f"{theirs}.conv.weight": ours[f"{name}.conv.weight"], **{f"{theirs}.bn.{k}": t for k, t in norm.items()}}


def lw_detr_authors(ours: dict[str, Tensor], groups: int, blocks: int, layers: int) -> dict[str, Tensor]:
    """Atten4Vis/LW-DETR (models/): q and v alone have a bias, and one position is before those of the patches."""
    trunk, out = "backbone.0.encoder", {}
    out[f"{trunk}.pos_embed"] = torch.cat([torch.ones(1, 1, 24), ours["backbone.position.table"]], dim=1)
    out |= both(f"{trunk}.patch_embed.proj", "backbone.patch", ours)
    for index in range(blocks):
        block, mine = f"{trunk}.blocks.{index}", f"backbone.blocks.{index}"
        out |= both(f"{block}.norm1", f"{mine}.attention_norm", ours)
        out |= both(f"{block}.norm2", f"{mine}.feedforward_norm", ours)
        out[f"{block}.attn.qkv.weight"] = torch.cat([ours[f"{mine}.attention.{part}.weight"] for part in "qkv"])
        for part in "qv":
            out[f"{block}.attn.{part}_bias"] = ours[f"{mine}.attention.{part}.bias"]
        out |= both(f"{block}.attn.proj", f"{mine}.attention.out", ours)
        out |= both(f"{block}.mlp.fc1", f"{mine}.feedforward.up", ours)
        out |= both(f"{block}.mlp.fc2", f"{mine}.feedforward.down", ours)
        out[f"{block}.gamma_1"] = ours[f"{mine}.attention_scale.gamma"]
        out[f"{block}.gamma_2"] = ours[f"{mine}.feedforward_scale.gamma"]
    projector, mine = "backbone.0.projector", "encoder.project"
    for number in range(2):  # of the maps
        out |= both(f"{projector}.stages_sampling.0.{number}.0", f"{mine}.sampling.0.{number}.0", ours)
        out |= _conv(f"{projector}.stages_sampling.1.{number}.0", f"{mine}.sampling.1.{number}.0", ours)
    for level in range(2):
        out |= _conv(f"{projector}.stages.{level}.0.cv1", f"{mine}.fuse.{level}.spread", ours)
        out |= _conv(f"{projector}.stages.{level}.0.cv2", f"{mine}.fuse.{level}.merge", ours)
        for number in range(3):
            for part in range(2):
                theirs = f"{projector}.stages.{level}.0.m.{number}.cv{part + 1}"
                out |= _conv(theirs, f"{mine}.fuse.{level}.blocks.{number}.{part}", ours)
        out |= both(f"{projector}.stages.{level}.1", f"{mine}.norms.{level}", ours)
    for index in range(layers):
        layer, mine = f"transformer.decoder.layers.{index}", f"decoder.layers.{index}"
        for kind in ("weight", "bias"):
            parts = [ours[f"{mine}.self_attention.{part}.{kind}"] for part in "qkv"]
            out[f"{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
        for theirs, name in {
            "self_attn.out_proj": "self_attention.out",
            "norm1": "self_norm",
            "cross_attn.sampling_offsets": "cross_attention.offsets",
            "cross_attn.attention_weights": "cross_attention.weights",
            "cross_attn.value_proj": "cross_attention.value",
            "cross_attn.output_proj": "cross_attention.out",
            "norm2": "cross_norm",
            "linear1": "feedforward.up",
            "linear2": "feedforward.down",
            "norm3": "feedforward_norm",
        }.items():
            out |= both(f"{layer}.{theirs}", f"{mine}.{name}", ours)
    out |= both("transformer.decoder.norm", "decoder.norm", ours)
    owners = ["selector", *(f"selector.others.{index}" for index in range(groups - 1))]
    for group, owner in enumerate(owners):
        out |= both(f"transformer.enc_output.{group}", f"{owner}.project", ours)
        out |= both(f"transformer.enc_output_norm.{group}", f"{owner}.norm", ours)
        out |= both(f"transformer.enc_out_class_embed.{group}", f"{owner}.score", ours)
        for number in range(3):
            theirs = f"transformer.enc_out_bbox_embed.{group}.layers.{number}"
            out |= both(theirs, f"{owner}.box.layers.{number}", ours)
    for number in range(2):
        out |= both(f"transformer.decoder.ref_point_head.layers.{number}", f"selector.place.layers.{number}", ours)
    for number in range(3):
        out |= both(f"bbox_embed.layers.{number}", f"decoder.boxes.box.layers.{number}", ours)
    out |= both("class_embed", "decoder.boxes.score", ours)
    out["refpoint_embed.weight"] = torch.cat([ours[f"{owner}.offset.weight"] for owner in owners])
    out["query_feat.weight"] = torch.cat([ours[f"{owner}.content.weight"] for owner in owners])
    return out


def test_lw_detrs_own_files_come_back_tensor_by_tensor() -> None:
    config = replace(SMALL["lw_detr"], backbone_width=0.125)
    state = build("lw_detr", config, CLASSES).state_dict()
    generator = torch.Generator().manual_seed(1)
    ours = {
        name: torch.randn(tensor.shape, generator=generator) * (not name.endswith("attention.k.bias"))
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    ours |= {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in ours.items()
        if name.startswith("decoder") and name.endswith("self_attention.k.bias")
    }
    written = lw_detr_authors(ours, config.groups, 2, config.decoder_layers)
    found = translate("lw_detr", written)
    assert found.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(found[name], ours[name])] == []
    read = config_from_state_dict(member("lw_detr"), found)
    assert (read["groups"], read["queries"], read["scales"]) == (3, config.queries, (2.0, 0.5))
    with pytest.raises(ModelError, match=r"query_feat\.weight has 35 rows for 3 groups"):
        translate("lw_detr", {**written, "query_feat.weight": written["query_feat.weight"][:-1]})


def test_an_rf_detr_with_masks_is_refused() -> None:
    names = {"backbone.0.encoder.encoder.embeddings.cls_token": torch.zeros(1, 1, 8)}
    with pytest.raises(ModelError, match="predict masks"):
        translate("rf_detr", {**names, "segmentation_head.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    "patch, grid, windows, square", [(16, 24, 2, 384), (16, 44, 2, 704), (14, 37, 4, 560), (20, 35, 1, 700)]
)
def test_windows_and_size_of_rf_detrs_own_files_follow_from_patch_and_positions(
    patch: int, grid: int, windows: int, square: int
) -> None:
    """Nano and large; base, the first release; XL (rfdetr/config.py and rfdetr/platform/models.py)."""
    config = RfDetrConfig(backbone_patch=patch, backbone_grid=grid, backbone_windows=windows, groups=1)
    with torch.device("meta"):
        state = build("rf_detr", config, 91).state_dict()
    found = config_from_state_dict(FAMILY["rf_detr"], state)
    assert found.get("backbone_windows", RfDetrConfig().backbone_windows) == windows
    assert FAMILY["rf_detr"].resize_of(found).square == square
