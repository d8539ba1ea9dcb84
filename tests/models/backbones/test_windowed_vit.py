"""Windowed transformers against those of transformers' RF-DETR, LW-DETR and DINOv2, their windows, and their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from members import CLASSES, SMALL

from edgedetr.errors import ModelError, RecipeError
from edgedetr.layers.patch_embedding import PatchPosition, merge_windows, split_windows
from edgedetr.models import build
from edgedetr.models.backbones.vit_designs import DESIGNS, Design
from edgedetr.models.backbones.windowed_vit import WindowedVit
from edgedetr.models.checkpoints.backbone_names import rename_vit
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, _backbone
from edgedetr.models.checkpoints.pretrained import load_backbone, load_weights
from edgedetr.models.windowed_backbone import WindowedVitConfig, make_windowed_backbone

DIM, HEADS = 24, 3
DINOV2 = replace(DESIGNS["dinov2_small"], dim=DIM, heads=HEADS)
LW_VIT = replace(DESIGNS["lw_vit_tiny"], dim=DIM, heads=HEADS)
PLAIN = Design(DIM, HEADS, class_token=False, norm=False, antialias=False, layer_scale=0.5)


@torch.no_grad()
def varied(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def assert_same_maps(ours: list[torch.Tensor], theirs: tuple[torch.Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)  # float32 values up to 11; measured 0


@pytest.mark.parametrize("patch, windows, side", [(16, 2, 128), (16, 2, 64), (14, 4, 112), (16, 1, 96)])
@torch.no_grad()
def test_it_computes_what_transformers_rf_detr_backbone_does(patch: int, windows: int, side: int) -> None:
    """At the size of the positions, at a smaller one, and at one where the last window begins in half a patch.

    transformers mixes up rows and columns of windows where they are not squares, so those have a test of their own.
    """
    transformers = pytest.importorskip("transformers")
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

    config = transformers.models.rf_detr.configuration_rf_detr.RfDetrDinov2Config(
        hidden_size=DIM,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        image_size=8 * patch,
        patch_size=patch,
        num_windows=windows,
        out_indices=[1, 3, 5],  # maps after blocks 0, 2 and 4; full attention in blocks 1 and 3, by the authors' count
    )
    assert config.window_block_indexes == [0, 2, 4]
    reference = varied(RfDetrDinov2Backbone(config))
    ours = WindowedVit(DINOV2, patch=patch, windows=windows, maps=(0, 2, 4), full_attention=(1, 3), grid=8).eval()
    load_weights(ours, rename_vit(reference.state_dict()), "test")
    images = torch.randn(2, 3, side, side)
    assert_same_maps(ours(images), reference(images).feature_maps)
    assert ours.strides == [patch] * 3 and ours.channels == [DIM] * 3 and ours.size_multiple == patch * windows


@pytest.mark.parametrize("height, width", [(128, 128), (64, 192)])
@torch.no_grad()
def test_it_computes_what_transformers_lw_detr_backbone_does(height: int, width: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.lw_detr.modeling_lw_detr import LwDetrViTBackbone

    config = transformers.LwDetrViTConfig(
        hidden_size=DIM,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=1024,
        pretrain_image_size=128,
        window_block_indices=[0, 1, 3],
        out_indices=[2, 4],
        num_windows=16,
    )
    reference = varied(LwDetrViTBackbone(config))
    ours = WindowedVit(LW_VIT, patch=16, windows=4, maps=(1, 3), full_attention=(2,), grid=8).eval()
    load_weights(ours, rename_vit(reference.state_dict()), "test")
    images = torch.randn(2, 3, height, width)
    assert_same_maps(ours(images), reference(images).feature_maps)


@torch.no_grad()
def test_registers_are_those_of_transformers_dinov2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2],
    )
    reference = varied(transformers.Dinov2WithRegistersBackbone(config))
    design = replace(DESIGNS["dinov2_small_registers"], dim=DIM, heads=HEADS)
    ours = WindowedVit(design, patch=14, windows=1, maps=(0, 1), full_attention=(), grid=4).eval()
    load_weights(ours, rename_vit(reference.state_dict()), "test")
    images = torch.randn(2, 3, 56, 56)
    assert_same_maps(ours(images), reference(images).feature_maps)


@torch.no_grad()
def test_a_windowed_block_sees_its_window_alone_and_a_full_one_the_image() -> None:
    """The oracle is a transformer without windows: on each part of the image, and on all of it."""
    ours = varied(WindowedVit(PLAIN, patch=8, windows=2, maps=(0, 1), full_attention=(1,), grid=4))
    plain = WindowedVit(PLAIN, patch=8, windows=1, maps=(0, 1), full_attention=(), grid=4).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 80)  # 4 x 10 patches; windows of 2 x 5
    position = ours.position((4, 10)).unflatten(1, (4, 10))
    first, second = ours(images)
    expected = torch.empty_like(first)
    for row in range(2):
        for column in range(2):
            rows, columns = slice(2 * row, 2 * row + 2), slice(5 * column, 5 * column + 5)
            cells = plain.patch(images)[:, :, rows, columns].permute(0, 2, 3, 1) + position[:, rows, columns]
            out = plain.blocks[0](cells.flatten(1, 2), (2, 5))
            expected[:, :, rows, columns] = out.transpose(1, 2).unflatten(2, (2, 5))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    out = plain.blocks[1](first.flatten(2).transpose(1, 2), (4, 10))
    torch.testing.assert_close(second, out.transpose(1, 2).unflatten(2, (4, 10)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape, count", [((4, 6), 2), ((3, 9), 3), ((2, 2), 1)])
def test_windows_of_a_count_are_equal_parts_of_the_map(shape: tuple[int, int], count: int) -> None:
    tokens = torch.randn(2, shape[0] * shape[1], 5)
    windows = split_windows(tokens, shape, count)
    height, width = shape[0] // count, shape[1] // count
    assert windows.shape == (2 * count * count, height * width, 5)
    for image in range(2):
        for y in range(shape[0]):
            for x in range(shape[1]):
                window = (image * count + y // height) * count + x // width
                inside = windows[window, y % height * width + x % width]
                assert torch.equal(inside, tokens[image, y * shape[1] + x])
    assert torch.equal(merge_windows(windows, shape, count), tokens)


@torch.no_grad()
def test_the_authors_names_are_read(tmp_path: Path) -> None:
    """LW-DETR's own files: q, k, v in one matrix, whose middle has no bias, and a position for no class token."""
    source = varied(WindowedVit(LW_VIT, patch=16, windows=2, maps=(0, 1), full_attention=(1,), grid=4))
    ours, theirs = source.state_dict(), {}
    for name, tensor in ours.items():
        for part, other in (
            ("patch.", "patch_embed.proj."),
            ("attention_norm", "norm1"),
            ("feedforward_norm", "norm2"),
            ("attention_scale.gamma", "gamma_1"),
            ("feedforward_scale.gamma", "gamma_2"),
            ("feedforward.up", "mlp.fc1"),
            ("feedforward.down", "mlp.fc2"),
            ("attention.out", "attn.proj"),
        ):
            name = name.replace(part, other)
        if ".attention." not in name and name != "position.table":
            theirs[name] = tensor
    theirs["pos_embed"] = torch.cat([torch.randn(1, 1, DIM), ours["position.table"]], dim=1)
    for block in range(2):
        own = f"blocks.{block}.attention."
        ours[f"{own}k.bias"] = torch.zeros(DIM)
        theirs[f"blocks.{block}.attn.qkv.weight"] = torch.cat([ours[f"{own}{part}.weight"] for part in "qkv"])
        theirs |= {f"blocks.{block}.attn.{part}_bias": ours[f"{own}{part}.bias"] for part in "qv"}
    target = WindowedVit(LW_VIT, patch=16, windows=2, maps=(0, 1), full_attention=(1,), grid=4)
    load_weights(target, rename_vit(theirs), "test")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("name", ["dinov2_small", "dinov2_base_registers", "lw_vit_tiny"])
def test_sizes_are_those_of_transformers(name: str) -> None:
    """Counted there, without DINOv2's token for hidden patches, and with LW-DETR's unread position."""
    transformers = pytest.importorskip("transformers")
    design = DESIGNS[name]
    options = {"hidden_size": design.dim, "num_attention_heads": design.heads}
    if design.class_token:
        kind = transformers.Dinov2WithRegistersConfig if design.registers else transformers.Dinov2Config
        theirs = kind(**options, image_size=518, patch_size=14)
        model, beside = transformers.AutoBackbone, design.dim
        config = WindowedVitConfig(backbone=name, backbone_patch=14, backbone_grid=37)
    else:
        theirs, model = transformers.LwDetrViTConfig(**options), transformers.AutoBackbone
        config = WindowedVitConfig(backbone=name, backbone_grid=14)
        beside = design.dim - 12 * design.dim  # less the biases of the keys, which ours has
    with torch.device("meta"):
        expected = sum(p.numel() for p in model.from_config(theirs).parameters()) - beside
        assert sum(p.numel() for p in make_windowed_backbone(config).parameters()) == expected


@torch.no_grad()
def test_published_dinov2_weights_start_a_backbone_of_another_grid_and_fewer_blocks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=192, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14
    )
    reference = varied(transformers.Dinov2Model(config))
    reference.save_pretrained(tmp_path)
    ours = WindowedVitConfig(
        backbone_weights=str(tmp_path / "model.safetensors"),
        backbone_width=0.5,
        backbone_patch=14,
        backbone_grid=8,
        backbone_maps=(1,),
        backbone_full_attention=(),
    )
    detector = build("detr", SMALL["detr"], CLASSES)
    detector.backbone = make_windowed_backbone(ours)
    loaded = load_backbone(detector, ours)
    assert loaded is not None and loaded.tensors == len(detector.backbone.state_dict())
    theirs = reference.embeddings.position_embeddings
    table = torch.nn.functional.interpolate(
        theirs[0, 1:].T.reshape(1, 192, 4, 4), size=(8, 8), mode="bicubic", antialias=True
    )
    torch.testing.assert_close(detector.backbone.position.table[0, 1:], table[0].flatten(1).T)
    assert torch.equal(detector.backbone.position.table[0, 0], theirs[0, 0])
    auto = replace(ours, backbone_weights="auto", backbone_width=1.0, backbone_patch=16)
    with pytest.raises(ModelError, match="no published weights for dinov2_small with patches of 16 px"):
        load_backbone(detector, auto)
    with pytest.raises(ModelError, match="no published weights for lw_vit_tiny alone; start from a whole detector"):
        load_backbone(detector, replace(auto, backbone="lw_vit_tiny"))


def test_a_table_that_is_no_square_grid_is_left_for_the_comparison() -> None:
    position = PatchPosition(4, 3, class_token=True)
    for rows in (0, 1, 3, 8):
        table = torch.randn(1, rows, 4)
        assert position.fitted(table) is table


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "dinov2_small", "backbone_width": 0.5},
        {"backbone": "dinov2_base_registers", "backbone_patch": 14, "backbone_grid": 37},
        {"backbone": "lw_vit_small", "backbone_grid": 14},
    ],
)
def test_a_configuration_follows_from_the_tensors(changes: dict[str, object]) -> None:
    config = WindowedVitConfig(**changes)
    with torch.device("meta"):
        weights = {f"backbone.{name}": tensor for name, tensor in make_windowed_backbone(config).state_dict().items()}
    found = _backbone(StateDict(weights))
    assert found == {name: getattr(config, name) for name in found}
    assert set(found) == {"backbone", "backbone_width", "backbone_patch", "backbone_grid"}


def test_the_learning_rate_falls_from_block_to_block_and_quarters_freeze() -> None:
    with torch.device("meta"):
        net = make_windowed_backbone(WindowedVitConfig(frozen_stages=2))
    exponents = {name: net.layers_above(name) for name, _ in net.named_parameters()}
    assert [exponents[f"blocks.{block}.attention.q.weight"] for block in (0, 11)] == [12, 1]
    embedded = ("patch.weight", "position.table", "class_token")
    assert [exponents[name] for name in embedded] == [13] * 3 and exponents["norm.weight"] == 0
    learning = {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad and "blocks" in name}
    assert learning == {str(block) for block in range(3, 12)}
    assert not any(dict(net.named_parameters())[name].requires_grad for name in embedded)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "dinov2_smal"}, "did you mean 'dinov2_small'"),
        ({"backbone_width": 0.51}, "196 channels with 6 heads; .*model.backbone_width"),
        ({"backbone_maps": ()}, r"model.backbone_maps is \[\]; expected numbers of blocks"),
        ({"backbone_maps": (5, 2)}, r"model.backbone_maps is \[5, 2\]"),
        ({"backbone_full_attention": (3, 12)}, r"full_attention is \[3, 12\].* at most 11"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message), torch.device("meta"):
        make_windowed_backbone(WindowedVitConfig(**changes))


def test_another_member_says_whose_backbone_it_is() -> None:
    with pytest.raises(ModelError, match="dinov2_small .* which rf_detr and lw_detr read; expected one of resnet18"):
        build("detr", replace(SMALL["detr"], backbone="dinov2_small"), CLASSES)


def test_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(RecipeError, match="model.backbone_windows is 0; expected 1 to 32"):
        WindowedVitConfig(backbone_windows=0)
