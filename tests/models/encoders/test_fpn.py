"""The feature pyramid, level by level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.errors import ModelError
from edgedetr.models.encoders.fpn import FeaturePyramid, PyramidEncoder

CHANNELS, STRIDES = [4, 6, 10], [8, 16, 32]


def maps() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, 96 // s, 128 // s) for c, s in zip(CHANNELS, STRIDES)]


@torch.no_grad()
def test_every_level_is_its_lateral_and_all_coarser_ones() -> None:
    pyramid, (c3, c4, c5) = FeaturePyramid(CHANNELS, STRIDES, 8), maps()
    lateral, smooth = pyramid.lateral, pyramid.smooth

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    p5 = lateral[2](c5)
    p4 = lateral[1](c4) + twice(p5)
    p3 = lateral[0](c3) + twice(p4)
    for actual, conv, level in zip(pyramid([c3, c4, c5]), smooth, (p3, p4, p5)):
        torch.testing.assert_close(actual, F.conv2d(level, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize("extra, strides", [("none", [8, 16, 32]), ("conv", [8, 16, 32, 64, 128])])
@torch.no_grad()
def test_coarser_levels_come_from_the_coarsest(extra: str, strides: list[int]) -> None:
    pyramid = FeaturePyramid(CHANNELS, STRIDES, 8, extra)
    out = pyramid(maps())
    assert pyramid.strides == strides
    assert [level.shape[2:] for level in out] == [(-(-96 // s), -(-128 // s)) for s in strides]
    if extra == "conv":
        torch.testing.assert_close(out[3], pyramid.coarser[0](out[2]))
        torch.testing.assert_close(out[4], pyramid.coarser[1](out[3].clamp(min=0)))


def test_convolutions_start_with_the_variance_of_their_inputs() -> None:
    """Caffe2's "xavier": uniform within sqrt(3 / fan_in), no bias."""
    pyramid = FeaturePyramid([64, 128], [8, 16], 64)
    for conv, fan_in in [(pyramid.lateral[0], 64), (pyramid.lateral[1], 128), (pyramid.smooth[0], 64 * 9)]:
        bound = (3 / fan_in) ** 0.5
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not conv.bias.any()


@torch.no_grad()
def test_memory_has_the_tokens_of_all_levels_row_by_row() -> None:
    encoder = PyramidEncoder(FeaturePyramid(CHANNELS, STRIDES, 8, "conv"))
    memory, expected = encoder(maps()), encoder.pyramid(maps())
    assert memory.shapes == [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    assert memory.strides == [8, 16, 32, 64, 128]
    for actual, level in zip(memory.maps(), expected):
        torch.testing.assert_close(actual, level)


def test_padding_is_refused() -> None:
    encoder = PyramidEncoder(FeaturePyramid(CHANNELS, STRIDES, 8))
    with pytest.raises(ModelError, match="images without padding; expected one fixed size"):
        encoder(maps(), torch.zeros(2, 96, 128, dtype=torch.bool))
