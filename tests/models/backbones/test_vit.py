"""The vision transformer against transformers' ViT and ViTDet, its windows, its pyramid, and a member on top of it."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from members import CLASSES, SMALL

from edgedetr.errors import ModelError
from edgedetr.layers.drop_path import DropPath, set_rates
from edgedetr.layers.lora import LoraLinear, adapt
from edgedetr.layers.patch_embedding import PatchPosition, from_windows, to_windows
from edgedetr.models import FAMILY, build
from edgedetr.models.backbones.backbone import BackboneConfig, make_backbone
from edgedetr.models.backbones.vit import LayerScale, VisionTransformer, VitPyramid
from edgedetr.models.checkpoints.backbone_names import rename_vit
from edgedetr.models.checkpoints.pretrained import load_backbone, load_weights
from edgedetr.models.deploy import ConstantFolded, DeployGraph
from edgedetr.models.windowed_backbone import WindowedVitConfig

DIM, HEADS, DEPTH = 24, 3, 4


def backbone(name, levels, dilate_last=False, **options):
    return make_backbone(BackboneConfig(backbone=name, **{"frozen_stages": 0, **options}), levels, dilate_last)


@torch.no_grad()
def varied(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
@torch.no_grad()
def test_it_computes_what_transformers_vit_does(size: tuple[int, int]) -> None:
    """The weights pass through the importer; other sizes than 224 interpolate the positions."""
    transformers = pytest.importorskip("transformers")
    reference = varied(
        transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=DIM,
                num_hidden_layers=DEPTH,
                num_attention_heads=HEADS,
                intermediate_size=4 * DIM,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        )
    )
    ours = VisionTransformer(DIM, HEADS, DEPTH).eval()
    load_weights(ours, rename_vit(reference.state_dict()), "test")
    images = torch.randn(2, 3, *size)
    expected = reference(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)  # float32; measured 0


@torch.no_grad()
def test_a_patch_is_flattened_and_projected() -> None:
    trunk = VisionTransformer(DIM, HEADS, 1)
    images = torch.randn(2, 3, 32, 48)
    matrix, expected = trunk.patch.weight.flatten(1), []
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
            expected.append(patch.flatten(1) @ matrix.T + trunk.patch.bias)
    actual = trunk.patch(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(actual, torch.stack(expected, dim=1), atol=1e-5, rtol=0)  # sums of 768 products


@torch.no_grad()
def test_files_of_timm_and_of_transformers_are_read(tmp_path: Path) -> None:
    """timm's names are written out here; transformers writes its own. Classifiers and poolers are no backbone's."""
    source = varied(VisionTransformer(DIM, HEADS, 2, layer_scale=0.1))
    ours, timm = source.state_dict(), {}
    for name, tensor in ours.items():
        name = re.sub(r"^class_token$", "cls_token", name).replace("position.table", "pos_embed")
        name = re.sub(r"^patch\.", "patch_embed.proj.", name)
        for mine, theirs in (
            ("attention_norm", "norm1"),
            ("feedforward_norm", "norm2"),
            ("attention_scale", "ls1"),
            ("feedforward_scale", "ls2"),
            ("feedforward.up", "mlp.fc1"),
            ("feedforward.down", "mlp.fc2"),
            ("attention.out", "attn.proj"),
        ):
            name = name.replace(f".{mine}.", f".{theirs}.")
        timm[name] = tensor
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [timm.pop(f"blocks.{block}.attention.{part}.{kind}") for part in "qkv"]
            timm[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    timm |= {"head.weight": torch.zeros(10, DIM), "head.bias": torch.zeros(10)}
    assert set(timm) >= {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "norm.weight",
        "blocks.1.ls2.gamma",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.bias",
        "blocks.1.mlp.fc1.weight",
    }
    target = VisionTransformer(DIM, HEADS, 2, layer_scale=0.1)
    load_weights(target, rename_vit(timm), "timm")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in target.state_dict().items())

    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=HEADS, patch_size=16, intermediate_size=4 * 192
    )
    reference = varied(transformers.ViTForImageClassification(config))
    reference.save_pretrained(tmp_path)
    config = replace(
        SMALL["detr"], backbone="vit_tiny", backbone_width=1.0, backbone_weights=str(tmp_path / "model.safetensors")
    )
    detector = build("detr", config, CLASSES)
    loaded = load_backbone(detector, config)
    trunk = detector.backbone.transformer
    assert loaded.tensors == len(trunk.state_dict())
    assert torch.equal(trunk.position.table, reference.vit.embeddings.position_embeddings)


@torch.no_grad()
def test_windows_are_those_of_transformers_vitdet() -> None:
    transformers = pytest.importorskip("transformers")
    reference = varied(
        transformers.VitDetBackbone(
            transformers.VitDetConfig(
                hidden_size=DIM,
                num_hidden_layers=DEPTH,
                num_attention_heads=HEADS,
                mlp_ratio=4,
                image_size=128,
                pretrain_image_size=128,
                patch_size=16,
                window_size=3,
                window_block_indices=[0, 2],
                out_features=["stage4"],
            )
        )
    )
    ours = VisionTransformer(DIM, HEADS, DEPTH, windowed=True, window_side=3, grid=8).eval()
    for block, window in zip(ours.blocks, (3, 0, 3, 0)):
        block.window = window
    weights = reference.state_dict()
    renamed = {}
    for name, tensor in weights.items():
        name = name.removeprefix("embeddings.").replace("projection.", "patch.").replace("encoder.layer.", "blocks.")
        name = name.replace("norm1", "attention_norm").replace("norm2", "feedforward_norm")
        name = name.replace("mlp.fc1", "feedforward.up").replace("mlp.fc2", "feedforward.down")
        name = name.replace("attention.proj", "attention.out")
        if name == "position_embeddings":
            renamed["position.table"] = tensor[:, 1:]  # ViTDet drops the class token's
        elif "attention.qkv" in name:
            for part, chunk in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("qkv", part)] = chunk
        else:
            renamed[name] = tensor
    renamed |= {"norm.weight": torch.ones(DIM), "norm.bias": torch.zeros(DIM)}
    load_weights(ours, renamed, "test")
    images = torch.randn(2, 3, 128, 128)
    expected = reference(images).feature_maps[-1]  # [2, C, 8, 8], before a last norm
    expected = F.layer_norm(expected.flatten(2).transpose(1, 2), (DIM,), eps=1e-6)
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)  # float32; measured 5e-7


@pytest.mark.parametrize("shape, side", [((6, 8), 2), ((5, 7), 3), ((2, 3), 4)])
def test_windows_are_squares_of_the_map_filled_up_with_zeros(shape: tuple[int, int], side: int) -> None:
    tokens = torch.randn(2, shape[0] * shape[1], 3)
    windows = to_windows(tokens, shape, side)
    rows, columns = -(-shape[0] // side), -(-shape[1] // side)
    assert windows.shape == (2 * rows * columns, side * side, 3)
    for image in range(2):
        for y in range(rows * side):
            for x in range(columns * side):
                window = (image * rows + y // side) * columns + x // side
                inside = y < shape[0] and x < shape[1]
                expected = tokens[image, y * shape[1] + x] if inside else torch.zeros(3)
                assert torch.equal(windows[window, y % side * side + x % side], expected)
    assert torch.equal(from_windows(windows, shape, side), tokens)


class Windows(torch.nn.Module):
    """A map [B, C, H, W] cut into windows twice, and back."""

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        shape = (cells.shape[2], cells.shape[3])  # tensors while torch traces
        tokens = cells.flatten(2).transpose(1, 2)
        for _ in range(2):
            tokens = from_windows(to_windows(tokens, shape, 14) * 2, shape, 14)
        return tokens


@pytest.mark.parametrize("shape", [(4, 6), (12, 12), (20, 16)])
@torch.no_grad()
def test_a_map_that_does_not_fill_its_windows_is_exported(shape: tuple[int, int], tmp_path: Path) -> None:
    """Inputs of 96 or 192 px, less than the 224 px of one window, ended the process."""
    cells = torch.randn(1, 3, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Windows(), (cells,), tmp_path / "x.onnx", opset_version=19, dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: cells.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), 4 * cells.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_positions_are_interpolated_as_an_image() -> None:
    position = PatchPosition(8, 14, class_token=True)
    out = position((5, 9))
    cells = position.table[0, 1:].reshape(14, 14, 8).permute(2, 0, 1)[None]
    expected = F.interpolate(cells, size=(5, 9), mode="bicubic", align_corners=False)
    assert torch.equal(out[0, 0], position.table[0, 0])
    torch.testing.assert_close(out[0, 1:], expected[0].permute(1, 2, 0).reshape(45, 8))
    assert position((14, 14)) is position.table


@pytest.mark.parametrize("name", ["vit_tiny", "vit_tiny_window"])
@torch.no_grad()
def test_the_pyramid_has_the_strides_of_a_resnet(name: str) -> None:
    net = backbone(name, (2, 3, 4, 5), backbone_width=0.125).eval()
    maps = net(torch.randn(1, 3, 64, 96))
    assert net.strides == [4, 8, 16, 32]
    assert net.channels == [32] * 4
    assert [tuple(level.shape) for level in maps] == [(1, 32, 64 // s, 96 // s) for s in net.strides]
    windows = [block.window for block in net.transformer.blocks]
    assert windows == ([14, 14, 0] * 4 if name.endswith("window") else [0] * 12)


def test_sizes_are_those_of_the_papers() -> None:
    """Without the classifier, as transformers counts ViTModel: 5.5, 21.7 and 85.8 M."""
    for name, million in (("vit_tiny", 5.52), ("vit_small", 21.67), ("vit_base", 85.80)):
        with torch.device("meta"):
            trunk = backbone(name, (4,)).transformer
        assert sum(p.numel() for p in trunk.parameters()) / 1e6 == pytest.approx(million, rel=0.002)


@pytest.mark.parametrize("stages, blocks", [(0, 0), (1, 0), (2, 3), (5, 12)])
def test_freezing_goes_from_the_patches_up(stages: int, blocks: int) -> None:
    net = backbone("vit_tiny", (5,), backbone_width=0.125, frozen_stages=stages)
    trunk = net.transformer
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in trunk.blocks]
    assert frozen == [True] * blocks + [False] * (12 - blocks)
    assert trunk.patch.weight.requires_grad == trunk.class_token.requires_grad == (stages == 0)
    assert trunk.norm.weight.requires_grad


@torch.no_grad()
def test_a_recipe_reaches_layer_scale_and_the_factors_scale_each_branch() -> None:
    config = replace(SMALL["detr"], backbone="vit_tiny", backbone_width=0.125, layer_scale=1e-5)
    block = build("detr", config, CLASSES).backbone.transformer.blocks[0]
    tokens = torch.randn(2, 7, block.attention_norm.normalized_shape[0])
    assert (block(tokens, (2, 3)) - tokens).abs().max() < 1e-3, "a fresh block changes next to nothing"
    block.attention_scale.gamma.zero_()
    block.feedforward_scale.gamma.fill_(2.0)
    expected = tokens + 2 * block.feedforward(block.feedforward_norm(tokens))
    torch.testing.assert_close(block(tokens, (2, 3)), expected)


@torch.no_grad()
def test_a_deployed_block_has_its_factors_in_the_weights_and_adapters_merged() -> None:
    trunk = varied(VisionTransformer(DIM, HEADS, 1, layer_scale=0.5))
    adapt(trunk, ("*.q", "*.out"), rank=2, alpha=4)
    block, tokens = varied(trunk).blocks[0], torch.randn(2, 7, DIM)
    fused = block.fused()
    assert not any(isinstance(module, (LayerScale, LoraLinear)) for module in fused.modules())
    torch.testing.assert_close(fused(tokens, (2, 3)), block(tokens, (2, 3)), atol=1e-5, rtol=0)
    assert isinstance(block.attention_scale, LayerScale), "the block itself is unchanged"


def test_every_block_can_be_left_out_at_random() -> None:
    trunk = VisionTransformer(DIM, HEADS, DEPTH, layer_scale=1e-5)
    assert set_rates(trunk, 0.3, "linear") == pytest.approx((0, 0.1, 0.2, 0.3))
    assert [block.attention_path.rate for block in trunk.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert sum(isinstance(module, DropPath) for module in trunk.modules()) == 2 * DEPTH


@pytest.mark.parametrize("name", [n for n, m in FAMILY.items() if not issubclass(m.config, WindowedVitConfig)])
def test_a_member_trains_and_deploys_on_it(name: str) -> None:
    torch.manual_seed(0)
    config = replace(SMALL[name], backbone="vit_tiny", backbone_width=0.125)
    detector = build(name, config, CLASSES)
    assert isinstance(detector.backbone, VitPyramid)
    images = torch.rand(2, 3, 64, 96) * 255
    out = detector(detector.normalize(images))
    (out.logits.square().sum() + out.boxes.square().sum()).backward()
    dead = [key for key, p in detector.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert [key for key in dead if not key.endswith(".k.bias")] == []  # softmax does not see a key's bias
    detector = varied(detector)
    graph = DeployGraph(detector, 64, 96)
    assert isinstance(graph.detector.backbone.transformer.position, ConstantFolded)
    with torch.no_grad():
        expected, actual = detector(detector.normalize(images)), graph(images)
    torch.testing.assert_close(actual[0], expected.logits[-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual[1], expected.boxes[-1], atol=1e-5, rtol=2e-5)  # R-CNN's: several images wide


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: backbone("vit_tinny", (5,)), "did you mean 'vit_tiny'"),
        (lambda: backbone("resnet18", (5,), layer_scale=1e-5), "belongs to vision transformers, not to resnet18"),
        (lambda: backbone("vit_tiny", (5,), dilate_last=True), "use resnet50 or resnet101"),
        (lambda: backbone("vit_tiny", (5,), backbone_width=0.26), "50 channels with 3 heads; .*model.backbone_width"),
    ],
)
def test_what_cannot_be_built_says_why(make: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()  # type: ignore[operator]
