"""DEIMv2's transformer with turned queries and keys, and its adapter, against transformers' and by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from members import CLASSES, SMALL, small
from torch import nn

from edgedetr.errors import ModelError
from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.layers.convolution import ConvNorm
from edgedetr.layers.rotary_attention import RotaryAttention, RotaryPosition, turned
from edgedetr.models import build
from edgedetr.models.backbones.backbone import BackboneConfig, make_backbone
from edgedetr.models.backbones.dinov3 import RotaryVit, SpatialTuning
from edgedetr.models.backbones.vit_designs import ROTARY_DESIGNS, RotaryDesign
from edgedetr.models.checkpoints.backbone_names import rename_tuned_vit, rename_vit
from edgedetr.models.checkpoints.config_from_state_dict import StateDict, _backbone
from edgedetr.models.checkpoints.pretrained import load_backbone, load_weights
from edgedetr.models.deploy import ConstantFolded, DeployGraph

DIM, HEADS = 24, 3
MAPS = (0, 2, 3)


def design(name: str) -> RotaryDesign:
    return replace(ROTARY_DESIGNS[name], dim=DIM, heads=HEADS, maps=MAPS)


@torch.no_grad()
def varied(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * (0.5 if "running_var" in name else 0.1))
    return model.eval()


def transformers_config(
    name: str, layers: int = 4, dim: int = DIM, heads: int = HEADS, maps: tuple[int, ...] = MAPS
) -> object:
    """Of transformers' DINOv3 for one of our designs; the authors gate with SiLU."""
    transformers = pytest.importorskip("transformers")
    own = ROTARY_DESIGNS[name]
    return transformers.DINOv3ViTConfig(
        hidden_size=dim,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=4 * dim,
        num_register_tokens=4 if own.pretrained else 0,
        layer_norm_eps=1e-5 if own.pretrained else 1e-6,
        key_bias=not own.pretrained,
        apply_layernorm=own.pretrained,
        use_gated_mlp=own.gated,
        hidden_act="silu" if own.gated else "gelu",
        pos_embed_rescale=None,
        out_indices=[number + 1 for number in maps],
    )


@pytest.mark.parametrize("name", ["dinov3_tiny", "dinov3_small", "dinov3_small_plus"])
@pytest.mark.parametrize("height, width", [(64, 64), (32, 96)])
@torch.no_grad()
def test_it_computes_what_transformers_dinov3_does(name: str, height: int, width: int) -> None:
    """With a fifth block where ours has none: transformers normalizes the last one's map in any case."""
    transformers = pytest.importorskip("transformers")
    pretrained = ROTARY_DESIGNS[name].pretrained
    reference = varied(transformers.DINOv3ViTBackbone(transformers_config(name, 4 if pretrained else 5)))
    ours = RotaryVit(design(name)).eval()
    weights = rename_vit(reference.state_dict())
    if not pretrained:  # what transformers' class has and the authors' transformer of this size has not
        unread = ("blocks.4.", "norm.", "register_tokens")
        assert not reference.embeddings.register_tokens.numel()
        for block in reference.model.layer:
            block.layer_scale1.lambda1.fill_(1.0)
            block.layer_scale2.lambda1.fill_(1.0)
        weights = {key: w for key, w in weights.items() if not key.startswith(unread) and "_scale." not in key}
    load_weights(ours, weights, "test")
    images = torch.randn(2, 3, height, width)
    for own, theirs in zip(ours(images), reference(images).feature_maps, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=0)  # float32; measured 2e-5


@torch.no_grad()
def test_the_adapter_is_that_of_transformers_deimv2() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deimv2.modeling_deimv2 import Deimv2DINOv3ConvEncoder

    config = transformers.Deimv2Config(
        backbone_config=transformers_config("dinov3_small"), encoder_hidden_dim=20, spatial_tuning_adapter_inplanes=6
    )
    reference = varied(Deimv2DINOv3ConvEncoder(config))
    ours = SpatialTuning(RotaryVit(design("dinov3_small")), 6, 20, (3, 4, 5)).eval()
    load_weights(ours, rename_tuned_vit(reference.state_dict()), "test")
    images = torch.randn(2, 3, 64, 96)
    for own, theirs in zip(ours(images), reference(images), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=0)  # float32; measured 1e-5
    assert ours.strides == [8, 16, 32] and ours.channels == [20] * 3


@torch.no_grad()
def test_a_pair_of_channels_turns_by_the_angle_of_its_frequency() -> None:
    """By complex numbers: channel c and c + D/2 are one number; the first quarter turns along y, the second along x."""
    height, width, wide = 2, 3, 8
    cosine, sine = RotaryPosition(wide, before=2)((height, width))
    x = torch.randn(2 + height * width, wide)
    actual = turned(x, cosine, sine, wide)
    assert torch.equal(actual[:2], x[:2]), "tokens that are no patches do not turn"
    for row in range(height):
        for column in range(width):
            token = 2 + row * width + column
            centers = ((row + 0.5) / height * 2 - 1, (column + 0.5) / width * 2 - 1)
            for channel in range(wide // 2):
                axis, frequency = divmod(channel, wide // 4)
                angle = 2 * math.pi * centers[axis] * 100 ** -(frequency / (wide // 4))
                before = complex(x[token, channel], x[token, channel + wide // 2])
                after = before * complex(math.cos(angle), math.sin(angle))
                assert actual[token, channel] == pytest.approx(after.real, abs=1e-5)
                assert actual[token, channel + wide // 2] == pytest.approx(after.imag, abs=1e-5)


@torch.no_grad()
def test_attention_depends_on_the_distance_between_patches_alone() -> None:
    """The property that RoPE is made for: equal steps on an evenly spaced grid turn by equal angles."""
    torch.manual_seed(0)
    attention = RotaryAttention(8, 1)
    cosine, sine = RotaryPosition(8, before=0)((1, 6))
    q, k = torch.randn(8), torch.randn(8)
    scores = turned(q.expand(6, 8), cosine, sine, 8) @ turned(k.expand(6, 8), cosine, sine, 8).T
    for step in range(-5, 6):
        diagonal = scores.diagonal(step)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert attention(torch.randn(2, 6, 8), cosine, sine).shape == (2, 6, 8)


@torch.no_grad()
def test_the_authors_files_are_read() -> None:
    """Their names written out: q, k, v in one matrix, the keys' bias masked, SwiGLU as w1, w2, w3."""
    source = varied(SpatialTuning(RotaryVit(design("dinov3_small_plus")), 6, 20, (3, 4, 5)))
    ours, theirs = source.state_dict(), {}
    for name, tensor in ours.items():
        if any(f".attention.{part}." in name for part in "qkv"):
            continue
        for part, other in (
            ("transformer.", "dinov3."),
            ("patch.", "patch_embed.proj."),
            ("class_token", "cls_token"),
            ("register_tokens", "storage_tokens"),
            ("attention_norm", "norm1"),
            ("feedforward_norm", "norm2"),
            ("attention_scale.", "ls1."),
            ("feedforward_scale.", "ls2."),
            ("feedforward.gate", "mlp.w1"),
            ("feedforward.up", "mlp.w2"),
            ("feedforward.down", "mlp.w3"),
            ("attention.out", "attn.proj"),
            ("prior.stem.conv.", "sta.stem.0."),
            ("prior.stem.norm.", "sta.stem.1."),
            ("prior.down.0.conv.", "sta.conv2.0."),
            ("prior.down.0.norm.", "sta.conv2.1."),
            ("prior.down.1.conv.", "sta.conv3.1."),
            ("prior.down.1.norm.", "sta.conv3.2."),
            ("prior.down.2.conv.", "sta.conv4.1."),
            ("prior.down.2.norm.", "sta.conv4.2."),
        ):
            name = name.replace(part, other)
        for level in range(3):
            name = name.replace(f"fuse.{level}.conv.", f"convs.{level}.").replace(
                f"fuse.{level}.norm.", f"norms.{level}."
            )
        theirs[name] = tensor
    for block in range(4):
        own, attn = f"transformer.blocks.{block}.attention.", f"dinov3.blocks.{block}.attn.qkv."
        theirs[f"{attn}weight"] = torch.cat([ours[f"{own}{part}.weight"] for part in "qkv"])
        theirs[f"{attn}bias"] = torch.cat([ours[f"{own}q.bias"], torch.randn(DIM), ours[f"{own}v.bias"]])
        theirs[f"{attn}bias_mask"] = torch.cat([torch.ones(DIM), torch.zeros(DIM), torch.ones(DIM)])
    theirs |= {"dinov3.rope_embed.periods": torch.ones(2), "dinov3.mask_token": torch.zeros(1, DIM)}
    target = SpatialTuning(RotaryVit(design("dinov3_small_plus")), 6, 20, (3, 4, 5))
    load_weights(target, rename_tuned_vit(theirs), "test")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("name", ROTARY_DESIGNS)
def test_sizes_are_those_of_transformers(name: str) -> None:
    """Less what the authors' do not have: the token for hidden patches, and in the two smaller a norm and scales."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deimv2.modeling_deimv2 import Deimv2DINOv3ConvEncoder

    own = ROTARY_DESIGNS[name]
    config = transformers.Deimv2Config(
        backbone_config=transformers_config(name, 12, own.dim, own.heads, own.maps),
        encoder_hidden_dim=own.outputs,
        spatial_tuning_adapter_inplanes=own.prior,
    )
    with torch.device("meta"):
        expected = sum(p.numel() for p in Deimv2DINOv3ConvEncoder(config).parameters()) - own.dim
        net = make_backbone(BackboneConfig(backbone=name), (3, 4, 5))
    if not own.pretrained:
        expected -= (2 + 12 * 2) * own.dim
    assert sum(p.numel() for p in net.parameters()) == expected
    found = _backbone(StateDict({f"backbone.{key}": tensor for key, tensor in net.state_dict().items()}))
    assert found == {"backbone": name, "backbone_width": 1.0}
    # frozen_stages is 2 by default: embeddings and the first quarter of the blocks.
    blocks = net.transformer.blocks
    assert [block.attention.q.weight.requires_grad for block in blocks] == [False] * 3 + [True] * 9
    exponents = [net.layers_above(f"transformer.{part}") for part in ("patch.weight", "blocks.11.attention.q.weight")]
    assert exponents == [13, 1] and net.layers_above("prior.stem.conv.weight") == 0


@torch.no_grad()
def test_it_deploys_to_onnx_with_constant_angles(tmp_path: Path) -> None:
    """In place of rt_detr's ResNet."""
    detector = copy.deepcopy(small("rt_detr"))
    detector.backbone = varied(SpatialTuning(RotaryVit(design("dinov3_small_plus")), 6, 20, (3, 4, 5)))
    detector.encoder.project = varied(nn.ModuleList(ConvNorm(20, SMALL["rt_detr"].hidden) for _ in range(3)))
    graph = DeployGraph(detector, 64, 96)
    assert isinstance(graph.detector.backbone.transformer.position, ConstantFolded)
    write_onnx(graph, tmp_path / "x.onnx", batch=None)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for batch in (1, 3):
        images = torch.rand(batch, 3, 64, 96) * 255
        expected = detector(detector.normalize(images), last_only=True)
        logits, boxes = session.run(["logits", "boxes"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected.logits[0], atol=1e-4)
        np.testing.assert_allclose(boxes, expected.boxes[0], atol=1e-4)


@torch.no_grad()
def test_weights_of_a_transformer_alone_start_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    dim = 192
    reference = varied(transformers.DINOv3ViTModel(transformers_config("dinov3_small", 12, dim, 3)))
    reference.save_pretrained(tmp_path)
    source = str(tmp_path / "model.safetensors")
    ours = replace(SMALL["rt_detr"], backbone="dinov3_small", backbone_width=0.5, backbone_weights=source)
    detector = build("rt_detr", ours, CLASSES)
    loaded = load_backbone(detector, ours)
    assert loaded is not None and loaded.tensors == len(detector.backbone.transformer.state_dict())
    assert torch.equal(detector.backbone.transformer.register_tokens, reference.embeddings.register_tokens)
    assert detector.member.role_of("backbone.transformer.patch") == "patch_embedding"
    assert detector.member.role_of("backbone.transformer.blocks.0.attention.q") is None
    with pytest.raises(ModelError, match="no weights of dinov3_small are downloaded unasked: .* license of their own"):
        load_backbone(detector, replace(ours, backbone_weights="auto"))


@pytest.mark.parametrize(
    "name, levels, changes, message",
    [
        ("dinov3_tiny", (2, 3), {}, "levels of strides 8, 16 and 32; this model reads strides 4, 8"),
        ("dinov3_tiny", (5,), {"backbone_width": 0.13}, "25 channels with 3 heads; expected a multiple of 12"),
        ("dinov3_tinny", (5,), {}, "did you mean 'dinov3_tiny'"),
    ],
)
def test_what_cannot_be_built_says_why(
    name: str, levels: tuple[int, ...], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_backbone(BackboneConfig(backbone=name, **changes), levels)
