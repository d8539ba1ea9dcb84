"""The encoder of Dynamic DETR against loops over cells, taps and levels; its decoder reuses layers with own tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.models import FAMILY
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.encoders.dynamic import GROUPS, DynamicPyramidLayer
from edgedetr.models.members.dynamic_detr import DynamicDetrConfig, dynamic_detr

DIM = GROUPS


def deformed(
    conv: torch.nn.Module, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, stride: int
) -> torch.Tensor:
    """One image, cell by cell and tap by tap: x [C, H, W], offset [18, h, w], mask [9, h, w] -> [C, h, w]."""
    _, height, width = x.shape
    kernel = conv.weight.reshape(DIM, 9, DIM)
    out = torch.zeros(DIM, *offset.shape[1:], dtype=x.dtype)
    for i in range(offset.shape[1]):
        for j in range(offset.shape[2]):
            total = conv.bias.clone()
            for tap in range(9):
                y = i * stride + tap // 3 - 1 + offset[2 * tap, i, j].item()
                c = j * stride + tap % 3 - 1 + offset[2 * tap + 1, i, j].item()
                y0, c0 = int(y // 1), int(c // 1)
                value = torch.zeros(DIM, dtype=x.dtype)
                for row in (y0, y0 + 1):
                    for column in (c0, c0 + 1):
                        if 0 <= row < height and 0 <= column < width:
                            value += x[:, row, column] * (1 - abs(y - row)) * (1 - abs(c - column))
                total = total + kernel[:, tap] @ value * mask[tap, i, j]
            out[:, i, j] = total
    return out


@pytest.mark.parametrize("dynamic_relu, scale_attention", [(True, "scalar"), (False, "scalar"), (True, "channel")])
@torch.no_grad()
def test_levels_flow_into_each_other_as_the_middle_one_asks(dynamic_relu: bool, scale_attention: str) -> None:
    torch.manual_seed(0)
    layer = DynamicPyramidLayer(DIM, dynamic_relu, scale_attention=scale_attention).double()
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    maps = [torch.randn(1, DIM, *shape, dtype=torch.float64) for shape in ((6, 8), (3, 4), (2, 2))]
    actual = layer(maps)
    for level, features in enumerate(maps):
        predicted = F.conv2d(features, layer.offset.weight, layer.offset.bias, padding=1)[0]
        offset, mask = predicted[:18], predicted[18:].sigmoid()
        sources = [(layer.same, layer.same_norm, features[0], 1)]
        if level > 0:
            sources.append((layer.finer, layer.finer_norm, maps[level - 1][0], 2))
        if level < 2:
            large = F.interpolate(maps[level + 1], size=tuple(features.shape[2:]), mode="bilinear")
            sources.append((layer.coarser, layer.coarser_norm, large[0], 1))
        total = torch.zeros_like(features[0])
        for conv, norm, source, stride in sources:
            part = deformed(conv, source, offset, mask, stride)
            part = F.group_norm(part[None], GROUPS, norm.weight, norm.bias)[0]
            mean = part.mean((1, 2))
            if scale_attention == "channel":
                squeeze, excite = layer.scale.squeeze, layer.scale.excite
                hidden = F.relu(squeeze.weight @ mean + squeeze.bias)
                total += part * torch.sigmoid(excite.weight @ hidden + excite.bias)[:, None, None]
            else:
                score = layer.scale.score.weight.flatten() @ mean + layer.scale.score.bias[0]
                total += part * torch.clamp(F.relu(score) + 3, max=6) / 6
        expected = total[None] / len(sources)
        if dynamic_relu:
            expected = layer.activation([expected.flatten(2)])[0].view_as(expected)
        else:
            expected = F.relu(expected)
        torch.testing.assert_close(actual[level], expected, atol=1e-10, rtol=0)  # float64


def test_weights_say_which_attention_over_scales_they_have() -> None:
    small = {
        "backbone": "resnet18",
        "backbone_width": 0.25,
        "hidden": 2 * GROUPS,
        "ffn": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "queries": 5,
    }
    for form in ("scalar", "channel"):
        config = DynamicDetrConfig(**small, scale_attention=form)
        found = config_from_state_dict(FAMILY["dynamic_detr"], dynamic_detr(config, 3).state_dict())
        assert DynamicDetrConfig(**{**small, **found}).scale_attention == form


@pytest.mark.parametrize("layers, pairs", [(1, [(256, 256)]), (2, [(256, 64), (64, 256)])])
def test_a_query_predicts_one_full_product_or_two_narrow_ones(layers: int, pairs: list[tuple[int, int]]) -> None:
    with torch.device("meta"):
        detector = dynamic_detr(DynamicDetrConfig(dynamic_layers=layers), 80)
    assert detector.decoder.layers[0].cross_attention.interaction.pairs == pairs
    assert detector.encoder.pyramid.strides == [8, 16, 32, 64, 128]


@torch.no_grad()
def test_every_layer_of_a_fresh_model_reads_the_whole_image() -> None:
    """A box that is thrown out of the image by random heads has nothing to read, so later layers would learn late."""
    torch.manual_seed(0)
    detector = dynamic_detr(
        DynamicDetrConfig(
            backbone="resnet18", backbone_width=0.25, hidden=2 * GROUPS, ffn=32, encoder_layers=1, queries=5
        ),
        3,
    ).eval()
    boxes = detector(torch.randn(2, 3, 64, 96)).boxes
    assert boxes.shape == (6, 2, 5, 4)
    torch.testing.assert_close(boxes, torch.tensor([0.5, 0.5, 1.0, 1.0]).expand_as(boxes), atol=0, rtol=0)
