"""Multi-scale deformable attention: each query samples a few points around its reference in every level.

Zhu et al. 2021, "Deformable DETR", section 4.1, eq. 3; the discrete form is RT-DETRv2's (Lv et al. 2024, section 3.2).
Two forms give the same numbers: `gather` (gathers of rows: the form of exported graphs) and `grid_sample` (torch's own
operator); `auto` takes the faster one. On a CPU in float32, training uses kernels of `gather` that copy no rows:
`weighted_rows`, and for many samples `bilinear_sum`. cpu_kernels/feature_atlas.py has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.batched_gather import bilinear_corners
from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager, is_eager_fp32
from edgedetr.layers.cpu_kernels.feature_atlas import FeatureAtlas, bilinear_sum, compiled_here
from edgedetr.layers.cpu_kernels.weighted_rows import weighted_rows
from edgedetr.layers.linear import Linear
from edgedetr.options import one_of

Shapes = Sequence[tuple[int, int]]

SAMPLINGS = ("auto", "gather", "grid_sample")
METHODS = ("default", "discrete")
LARGE = 1 << 19  # samples x channels from which compiling the loops is worth its seconds


class DeformableAttention(nn.Module):
    """Offsets and weights from the query, values from the memory; one weighted sum over all points of all levels."""

    def __init__(
        self,
        dim: int,
        heads: int,
        points: Sequence[int],
        sampling: str = "gather",
        method: str = "default",
        offset_scale: float = 0.5,
        project: bool = True,
    ) -> None:
        """points  per level; offset_scale: fraction of the box side that an offset of `points` covers
        project  values are a projection of the tokens, and so is the output of the sum; without, they are used as they
                 are (D-FINE)
        """
        super().__init__()
        one_of("model.sampling", sampling, SAMPLINGS)
        one_of("model.method", method, METHODS)
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be split over {heads} heads; expected a multiple")
        self.heads, self.points, self.sampling, self.method = heads, list(points), sampling, method
        self.offset_scale, self.total = offset_scale, sum(points)
        self.offsets = Linear(dim, heads * self.total * 2)
        self.weights = Linear(dim, heads * self.total)
        self.value = Linear(dim, dim) if project else nn.Identity()
        self.out = Linear(dim, dim) if project else nn.Identity()
        per_point = torch.tensor([1 / count for count in points for _ in range(count)])
        self.register_buffer("per_point", per_point[:, None], persistent=False)
        self._initialize()

    per_point: Tensor  # [P, 1] 1 / points of that level

    @torch.no_grad()
    def _initialize(self) -> None:
        """Head m looks along angle 2 pi m / M, its points on squares of radius 1, 2, ... around the reference."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # [M, 2] on the unit square
        radius = torch.tensor([float(p + 1) for count in self.points for p in range(count)])
        self.offsets.bias.copy_((direction[:, None] * radius[:, None]).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)
        for projection in (self.value, self.out):
            if isinstance(projection, Linear):
                nn.init.zeros_(projection.bias)
                nn.init.xavier_uniform_(projection.weight)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        tokens: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """One sum of sampled values per query.

        query      [B, N, C]     content + position
        reference  [1 or B, N, 2|4]  cx, cy(, w, h) in 0..1 of the image
        tokens     [B, S, C]     memory, level after level, row by row; shapes [(H_l, W_l)]
        padding    [B, S] bool   True = read as zero
        valid      [B, L, 2]     fraction of each level's width and height that is image; None: all of it
        return     [B, N, C]
        """
        kind = autocast_dtype(query)
        if kind is not None:
            query = query.to(kind)  # cast once for both Linears
        value = self.value(tokens if kind is None else tokens.to(kind))
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        sampling_offsets = self.offsets(query).unflatten(-1, (self.heads, self.total, 2))  # [B, N, M, P, 2]
        attention_weights = self.weights(query).unflatten(-1, (self.heads, self.total)).softmax(-1)
        if kind is not None:  # the kernels without copies are float32 only
            sampling_offsets, attention_weights = sampling_offsets.float(), attention_weights.float()
        reference = reference[:, :, None, None]  # [B, N, 1, 1, 2|4]
        if valid is not None:
            parts = [valid[:, level : level + 1].expand(-1, count, -1) for level, count in enumerate(self.points)]
            fraction = torch.cat(parts, dim=1)[:, None, None]  # [B, 1, 1, P, 2]
            reference = reference * torch.cat([fraction] * (reference.shape[-1] // 2), dim=-1)
        if reference.shape[-1] == 4:
            reach = reference[..., 2:] * (self.per_point * self.offset_scale)
        else:
            reach = self._per_point([(1 / w, 1 / h) for h, w in shapes], sampling_offsets)
        on_cpu = (
            self.method == "default"
            and self.sampling != "grid_sample"
            and is_eager(value)
            and is_eager_fp32(attention_weights)
        )
        if on_cpu and compiled_here() and attention_weights.numel() * value.shape[-1] >= LARGE * self.heads:
            summed = self._bilinear_sum(value, reference[..., :2], sampling_offsets, reach, attention_weights, shapes)
            return self.out(summed.to(kind or summed.dtype).flatten(2))
        location = reference[..., :2] + sampling_offsets * reach  # 0..1 of the map, x then y
        if self.method == "default" and self.sampling != "gather" and not on_cpu:
            sampled = self._grid_sample(value, location, attention_weights, shapes)
        else:
            sampled = self._gather(value, location, attention_weights, shapes)
        return self.out(sampled)

    def _per_point(self, per_level: Sequence[tuple[float, float]], like: Tensor) -> Tensor:
        """One pair per level -> [P, 2], repeated for the points of that level."""
        pairs = [pair for pair, count in zip(per_level, self.points) for _ in range(count)]
        return torch.tensor(pairs, device=like.device, dtype=like.dtype)

    def _bilinear_sum(
        self, value: Tensor, reference: Tensor, offset: Tensor, reach: Tensor, weight: Tensor, shapes: Shapes
    ) -> Tensor:
        """`_gather` in float32 on a CPU, without a copy of the samples: [B, N, M, D]."""
        atlas = FeatureAtlas.of(shapes, self.points, offset)
        size = self._per_point([(w, h) for h, w in shapes], offset)
        base, scale = reference * size + (atlas.corner - 0.5), reach * size  # in cells, [1 or B, N, 1, P, 2]
        moved = zip(base.unbind(-1), offset.unbind(-1), scale.unbind(-1))
        x, y = (torch.addcmul(start, by, cells) for start, by, cells in moved)
        return bilinear_sum(value, x, y, weight, atlas)

    def _grid_sample(self, value: Tensor, location: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        batch, queries = location.shape[:2]
        levels = value.split([h * w for h, w in shapes], dim=1)
        grids = (2 * location - 1).transpose(1, 2).flatten(0, 1).split(self.points, dim=2)  # [B*M, N, P_l, 2]
        samples = []
        for level, grid, (height, width) in zip(levels, grids, shapes):
            maps = level.transpose(1, 2).reshape(batch * self.heads, -1, height, width)
            samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        weight = weight.transpose(1, 2).flatten(0, 1)[:, None]  # [B*M, 1, N, P]
        summed = (torch.cat(samples, dim=-1) * weight).sum(-1)  # [B*M, D, N]
        return summed.reshape(batch, -1, queries).transpose(1, 2)

    def _gather(self, value: Tensor, location: Tensor, weight: Tensor, shapes: Shapes) -> Tensor:
        """The weighted sum of the rows of `value` that the points sample."""
        batch, queries = location.shape[:2]
        tokens = value.shape[1]
        size = self._per_point([(float(w), float(h)) for h, w in shapes], location)  # [P, 2]
        starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
        start, row = self._per_point([(float(s), float(w)) for s, (_, w) in zip(starts, shapes)], location).unbind(-1)
        last = size - 1
        if self.method == "discrete":
            # RT-DETRv2 rounds location * size, half a cell right of and below the centers; its weights know that.
            cell = torch.minimum((location * size + 0.5).floor().clamp(min=0), last).detach()
            rows, weights = [start + cell[..., 1] * row + cell[..., 0]], [weight]
        else:
            low, high, weight_low, weight_high = bilinear_corners(location * size - 0.5, size)
            (x0, y0), (x1, y1) = low.unbind(-1), high.unbind(-1)
            (wx0, wy0), (wx1, wy1) = weight_low.unbind(-1), weight_high.unbind(-1)
            rows = [start + y * row + x for y in (y0, y1) for x in (x0, x1)]
            weights = [weight * (wy * wx) for wy in (wy0, wy1) for wx in (wx0, wx1)]
        head = torch.arange(self.heads, device=value.device)[:, None]
        first = torch.arange(batch, device=value.device)[:, None, None, None] * tokens
        index = (torch.cat(rows, dim=-1).long() + first) * self.heads + head  # [B, N, M, 4P]
        table = value.reshape(batch * tokens * self.heads, -1)  # one row per token and head
        weight = torch.cat(weights, dim=-1)  # [B, N, M, 4P]
        return weighted_rows(table, index, weight).reshape(batch, queries, -1)
