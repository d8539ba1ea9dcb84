"""The hybrid encoders of D-FINE and DEIMv2 and the lite encoder against those of transformers at random weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.convolution import ConvNorm, RepVgg
from edgedetr.layers.feedforward import FeedForward
from edgedetr.models.checkpoints import hybrid_names, transformers_names
from edgedetr.models.checkpoints.rename_rules import RenameRule, rename
from edgedetr.models.encoders.dense import EncoderLayer
from edgedetr.models.encoders.hybrid import (
    FusionParts,
    HybridEncoder,
    RepElan,
    d_fine_fusion,
    elan_width,
    rt_detr_fusion,
)
from edgedetr.models.encoders.lite import LiteEncoder
from edgedetr.models.records import Memory

DIM, HEADS, FFN = 32, 4, 48
CHANNELS, STRIDES = [16, 24, 40], [8, 16, 32]

# From the names that transformers gives to those of the authors (src/zoo/dfine/hybrid_encoder.py).
BLOCK = r"((?:fpn|pan)_blocks?(?:\.\d)?)"
AS_AUTHORS: list[RenameRule] = [
    (r"(downsample_convs\.\d)\.conv([12])\.", r"\1.0.cv\2."),
    (r"input_proj\.(\d)\.0\.", r"input_proj.\1.conv."),
    (r"input_proj\.(\d)\.1\.", r"input_proj.\1.norm."),
    (BLOCK + r"\.conv1\.", r"\1.cv1."),
    (r"\.mlp\.layers\.([01])\.", lambda m: f".fc{int(m[1]) + 1}."),  # what is not under test keeps transformers' names
]
AS_D_FINE: list[RenameRule] = [
    *AS_AUTHORS,
    (BLOCK + r"\.csp_rep([12])\.", lambda m: f"{m[1]}.cv{int(m[2]) + 1}.0."),
    (BLOCK + r"\.conv([23])\.", r"\1.cv\2.1."),
    (BLOCK + r"\.conv4\.", r"\1.cv4."),
]
AS_DEIMV2: list[RenameRule] = [
    *AS_AUTHORS,
    (BLOCK + r"\.csp_rep([12])\.conv2\.", lambda m: f"{m[1]}.cv{int(m[2]) + 1}.1."),
    (BLOCK + r"\.csp_rep([12])\.", lambda m: f"{m[1]}.cv{int(m[2]) + 1}.0."),
    (BLOCK + r"\.conv2\.", r"\1.cv4."),
    (r"down_conv([12])\.conv\.", r"down_sample\1.1."),
    (r"down_conv([12])\.norm\.", r"down_sample\1.2."),
    (r"bi_fusion_conv\.", "bi_fusion.cv."),
]


@torch.no_grad()
def varied(model: nn.Module) -> nn.Module:
    """Random weights that keep the size of what passes, with statistics that no wrong tensor can hide behind."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_((torch.rand(tensor.shape, generator=generator) - 0.5) * 0.6)
        elif tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / tensor[0].numel()) ** 0.5)
    return model.eval()


def pyramid(channels: list[int], finest: tuple[int, int] = (12, 16)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    height, width = finest
    sizes = [(count, height >> level, width >> level) for level, count in enumerate(channels)]
    return [torch.randn(2, *size, generator=generator) for size in sizes]


def maps_of(memory: Memory) -> list[Tensor]:
    parts = memory.tokens.split([height * width for height, width in memory.shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, memory.shapes)]


def hybrid(channels: list[int], parts: FusionParts) -> HybridEncoder:
    layer = EncoderLayer(MultiHeadAttention(DIM, HEADS), FeedForward(DIM, FFN, "gelu"), DIM)
    return HybridEncoder(channels, STRIDES[-len(channels) :], DIM, [layer], parts, None).eval()


def projections(channels: list[int]) -> nn.ModuleList:
    """A 1x1 convolution and a norm per level, which transformers has outside of its encoders."""
    return nn.ModuleList(nn.Sequential(nn.Conv2d(count, DIM, 1, bias=False), nn.BatchNorm2d(DIM)) for count in channels)


def load(module: nn.Module, weights: dict[str, Tensor], rules: Sequence[RenameRule]) -> None:
    """`weights` by the rules of the importer; every tensor must find its place, and every place its tensor."""
    shared: list[RenameRule] = [
        (r"^encoder\.(?:aifi|encoder)\.0\.layers\.", "encoder.attention."),
        (r"^encoder\.input_proj\.(\d)\.(?:0|conv)\.", r"encoder.project.\1.conv."),
        (r"^encoder\.input_proj\.(\d)\.(?:1|norm)\.", r"encoder.project.\1.norm."),
        (r"^encoder\.project\.0\.", "encoder.project." if isinstance(module, LiteEncoder) else "encoder.project.0."),
    ]
    renamed = hybrid_names.split_pairs(rename(weights, [*shared, *rules, *transformers_names.PARTS]))
    renamed = {name.removeprefix("encoder."): tensor for name, tensor in renamed.items()}
    assert {name for name in module.state_dict() if "num_batches" not in name} == set(renamed)
    module.load_state_dict(renamed, strict=False)


def weights_of(encoder: nn.Module, inputs: nn.Module | None = None) -> dict[str, Tensor]:
    named = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    if inputs is not None:
        named |= {f"encoder.input_proj.{name}": tensor for name, tensor in inputs.state_dict().items()}
    return named


def renamed_as(weights: dict[str, Tensor], rules: Sequence[RenameRule]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Rounding of float32 reaches 2.3e-5 behind sums of 300 products, and would hide small differences."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same(ours: Memory, theirs: list[Tensor]) -> None:
    mine = maps_of(ours)
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs):
        assert other.std() > 0.05, "the reference says something"
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0, check_dtype=False)  # float64; positions are float32


def options(levels: int, depth: float, expansion: float) -> dict[str, Any]:
    return {
        "encoder_hidden_dim": DIM,
        "encoder_in_channels": CHANNELS[-levels:],
        "feat_strides": STRIDES[-levels:],
        "encoder_ffn_dim": FFN,
        "encoder_attention_heads": HEADS,
        "encode_proj_layers": [levels - 1],
        "depth_mult": depth,
        "hidden_expansion": expansion,
    }


@pytest.mark.parametrize("levels, depth, expansion", [(3, 1.0, 1.0), (2, 0.5, 0.34)], ids=["l", "n"])
@torch.no_grad()
def test_d_fines_encoder_computes_what_transformers_does(levels: int, depth: float, expansion: float) -> None:
    """With the weights under the names of transformers and of the authors."""
    theirs = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
    reference = varied(theirs.DFineHybridEncoder(theirs.DFineConfig(**options(levels, depth, expansion))))
    channels = CHANNELS[-levels:]
    inputs = varied(projections(channels))
    images = pyramid(channels)
    expected = reference(inputs_embeds=[project(level) for project, level in zip(inputs, images)]).last_hidden_state
    weights = weights_of(reference, inputs)
    blocks = round(3 * depth)
    for named, rules in (
        (weights, hybrid_names.D_FINE_HUB),
        (renamed_as(weights, AS_D_FINE), hybrid_names.D_FINE_AUTHORS),
    ):
        ours = hybrid(channels, d_fine_fusion(DIM, expansion, blocks, "silu"))
        load(ours, named, rules)
        same(ours(images), expected)


@pytest.mark.parametrize("smooth", [True, False], ids=["hgnetv2", "vit"])
@torch.no_grad()
def test_deimv2s_encoder_computes_what_transformers_does(smooth: bool) -> None:
    """Neighbors are added, and the sizes on vision transformers have no 3x3 convolution after each CspRep."""
    theirs = pytest.importorskip("transformers.models.deimv2.modeling_deimv2")
    config = theirs.Deimv2Config(**options(3, 0.67, 0.34), encoder_has_trailing_conv=smooth)
    reference, inputs, images = (
        varied(theirs.Deimv2HybridEncoder(config)),
        varied(projections(CHANNELS)),
        pyramid(CHANNELS),
    )
    expected = reference(inputs_embeds=[project(level) for project, level in zip(inputs, images)]).feature_maps
    weights = weights_of(reference, inputs)
    for named, rules in (
        (weights, hybrid_names.DEIMV2_HUB),
        (renamed_as(weights, AS_DEIMV2), hybrid_names.DEIMV2_AUTHORS),
    ):
        ours = hybrid(CHANNELS, d_fine_fusion(DIM, 0.34, 2, "silu", summed=True, smooth=smooth))
        load(ours, named, rules)
        same(ours(images), expected)


@torch.no_grad()
def test_the_lite_encoder_computes_what_transformers_does() -> None:
    theirs = pytest.importorskip("transformers.models.deimv2.modeling_deimv2")
    config = theirs.Deimv2Config(**{**options(1, 0.5, 0.34), "encoder_in_channels": [40], "encoder_type": "lite"})
    reference, images = varied(theirs.Deimv2LiteEncoder(config)), pyramid([40])
    expected = reference(inputs_embeds=images).feature_maps
    weights = weights_of(reference)
    for named, rules in (
        (weights, hybrid_names.DEIMV2_HUB),
        (renamed_as(weights, AS_DEIMV2), hybrid_names.DEIMV2_AUTHORS),
    ):
        ours = LiteEncoder(40, 16, DIM, 0.34, 2, "silu").eval()
        load(ours, named, rules)
        memory = ours(images)
        assert memory.strides == [16, 32] and memory.shapes == [(12, 16), (6, 8)]
        same(memory, expected)


@pytest.mark.parametrize(
    # D-FINE's N, S, M, L, X and DEIMv2's Atto: round(expansion * hidden_dim // 2), by hand.
    "dim, expansion, width",
    [(128, 0.34, 21), (256, 0.5, 64), (256, 1.0, 128), (384, 1.0, 192), (64, 0.34, 10)],
)
def test_the_width_inside_a_fusion_block_is_the_authors(dim: int, expansion: float, width: int) -> None:
    assert elan_width(dim, expansion) == width


class _SparseGradients(TorchDispatchMode):
    """Collects the shapes of gradients with gaps that reach BatchNorm's backward, which then takes 8 times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.shapes = 0, list[tuple[int, ...]]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.native_batch_norm_backward.default:
            self.seen += 1
            if not args[0].is_contiguous(memory_format=torch.channels_last):
                self.shapes.append(tuple(args[0].shape))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "parts", [rt_detr_fusion(DIM, 1.0, 1, "silu"), d_fine_fusion(DIM, 0.5, 1, "silu")], ids=["rt_detr", "d_fine"]
)
def test_no_gradient_with_gaps_reaches_a_batch_norm(parts: FusionParts) -> None:
    encoder = hybrid(CHANNELS, parts).train().to(memory_format=torch.channels_last)
    maps = [level.to(memory_format=torch.channels_last) for level in pyramid(CHANNELS)]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    with _SparseGradients() as gradients:
        encoder(maps).tokens.square().sum().backward()
    assert (gradients.seen, gradients.shapes) == (norms, [])


@torch.no_grad()
def test_a_fusion_block_folds_to_convolutions_alone() -> None:
    block = varied(RepElan(16, 8, 6, 2, "silu", smooth=True))
    x = torch.randn(2, 16, 6, 8)
    expected = block(x)
    for name, module in list(block.named_modules()):
        if isinstance(module, RepVgg) or (
            isinstance(module, ConvNorm) and ".wide" not in name and ".narrow" not in name
        ):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, module.fused())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)
