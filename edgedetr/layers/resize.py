"""The one resize inside a graph: frames of one fixed size to the input of a model (twin of runtime/preprocess.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgedetr.bundle import InputContract
from edgedetr.runtime.preprocess import PADDING, Geometry, averaged


class FrameResize(nn.Module):
    """uint8 frames of `source_hw` pixels -> float32 input of whole levels 0..255, by the definition in preprocess.py.

    It exports to AveragePool, Resize (linear, half_pixel), Round and Pad; `geometry` brings boxes back to the frame.
    """

    def __init__(self, contract: InputContract, source_hw: tuple[int, int]) -> None:
        super().__init__()
        self.geometry = Geometry.of(source_hw[0], source_hw[1], contract)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [B, H, W, 3] uint8, RGB -> [B, 3, height, width] float32, RGB, 0..255."""
        g = self.geometry
        pixels = frames.permute(0, 3, 1, 2).to(torch.float32)
        kernel = (averaged(g.source_height, g.content_height), averaged(g.source_width, g.content_width))
        if kernel != (1, 1):        # a pool without ceil_mode drops the same pixels at the right and bottom
            pixels = functional.avg_pool2d(pixels, kernel)
        size = (g.content_height, g.content_width)
        if (g.used_height // kernel[0], g.used_width // kernel[1]) != size:
            pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
        pixels = pixels.round()
        return functional.pad(pixels, (0, g.width - size[1], 0, g.height - size[0]), value=float(PADDING))
