"""Multi-head attention from four plain Linear projections, so that each can be quantized, adapted or loaded alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype
from edgedetr.layers.linear import Linear


class MultiHeadAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v per head, D = C / M (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels cannot be split over {heads} heads; expected a multiple")
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.dropout = dropout  # of the weights, while training
        for projection in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B, N, C], key and value [B, S, C] -> [B, N, C].

        mask  bool, broadcasts to [B, M, N, S]; True = this query must not see that key
        """
        q = self._split(self.q(query))  # [B, M, N, D]
        k, v = self._split(self.k(key)), self._split(self.v(value))  # [B, M, S, D]
        attended = attend(q, k, v, mask, self.scale, self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T) v: a weighted mean of the values for each query.

    q [B, M, N, D], k [B, M, S, D], v [B, M, S, E] -> [B, M, N, E]
    mask  bool, broadcasts to [B, M, N, S]; True = this query must not see that key
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        scores = (q * scale) @ k.transpose(-1, -2)  # [B, M, N, S]
        if mask is not None:
            # The lowest finite number, not -inf: a row that is masked everywhere stays finite.
            scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v
    if autocast_dtype(q):  # on a CPU the gradients of torch's kernel take three times as long in bfloat16 as in float32
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, scale, dropout)
    # The same in one kernel; exported graphs contain the plain products, which every runtime supports.
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, torch.finfo(q.dtype).min)
    width, needed = v.shape[-1], q.shape[-1]
    if width < needed:  # the kernel needs one width; the padding is cut off again
        v = F.pad(v, (0, needed - width))
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)[..., :width]
