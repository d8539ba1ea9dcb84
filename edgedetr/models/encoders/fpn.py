"""The feature pyramid: every level of the backbone as C channels, with features of the coarser levels added.

Lin et al. 2017, "Feature Pyramid Networks for Object Detection", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models.initialization import zero_bias
from edgedetr.models.records import Memory, flatten_maps
from edgedetr.options import one_of


class FeaturePyramid(nn.Module):
    """Maps of a backbone, finest first -> as many maps of C channels, and coarser ones where asked for.

    strides  of the resulting maps
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], dim: int, extra: Literal["none", "conv"] = "none"
    ) -> None:
        """extra  "conv": two more levels by 3x3 convolutions (P6 and P7)"""
        super().__init__()
        one_of("extra", extra, ("none", "conv"))
        lateral = [nn.Conv2d(c, dim, 1) for c in channels]
        smooth = [nn.Conv2d(dim, dim, 3, padding=1) for _ in channels]
        coarser = [nn.Conv2d(dim, dim, 3, 2, 1) for _ in range(2 if extra == "conv" else 0)]
        self.extra, self.strides = extra, list(strides)
        for _ in coarser:
            self.strides.append(2 * self.strides[-1])
        for conv in (*lateral, *smooth, *coarser):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            zero_bias(conv)
        self.lateral, self.smooth, self.coarser = map(nn.ModuleList, (lateral, smooth, coarser))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One [B, C_l, H_l, W_l] per level, each twice the size of the next -> one [B, C, H_l, W_l] per level."""
        sums = [self.lateral[-1](maps[-1])]
        for lateral, level in zip(self.lateral[-2::-1], maps[-2::-1]):
            sums.append(lateral(level) + F.interpolate(sums[-1], scale_factor=2.0, mode="nearest"))
        out = [smooth(level) for smooth, level in zip(self.smooth, sums[::-1])]
        for number, conv in enumerate(self.coarser):
            out.append(conv(out[-1] if number == 0 else F.relu(out[-1])))
        return out


class PyramidEncoder(nn.Module):
    """Pyramid, then layers that work on all its levels at once; the maps become one Memory."""

    def __init__(self, pyramid: FeaturePyramid, layers: Sequence[nn.Module] = ()) -> None:
        """layers  each maps the list of maps to a list of the same shapes"""
        super().__init__()
        self.pyramid, self.layers = pyramid, nn.ModuleList(layers)

    def forward(self, maps: list[Tensor], padding: Tensor | None = None) -> Memory:
        """maps: one [B, C_l, H_l, W_l] per level, finest first -> Memory."""
        if padding is not None:
            raise ModelError(
                "members that read boxes from a pyramid take images without padding; expected one "
                "fixed size (stretch or letterbox)"
            )
        maps = self.pyramid(maps)
        for layer in self.layers:
            maps = layer(maps)
        tokens, shapes = flatten_maps(maps)
        return Memory(tokens, shapes, self.pyramid.strides)
