"""Weighted sums of rows of a table: what sampling from a feature map comes down to, and the most of its cost.

In an exported graph, on a GPU and in half precision this is a Gather and a matrix product. On a CPU in float32 the rows
are never copied out: forward is torch's embedding bag, and the gradient of the table a product with a sparse matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.autograd.function import once_differentiable


def quick(tensor: Tensor) -> bool:
    """Whether sums of a tensor's rows are made without copying rows: on a CPU, in float32, and not for a graph."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return not traced and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum over k of weight[..., k] * table[index[..., k]].

    table   [R, D]
    index   [..., K] int64, 0 .. R-1
    weight  [..., K]
    return  [..., D]
    """
    if not (quick(table) and quick(weight)):
        return (weight.unsqueeze(-2) @ F.embedding(index, table)).squeeze(-2)
    bags = index.shape[-1]
    summed = _WeightedRows.apply(table, index.reshape(-1, bags), weight.reshape(-1, bags))
    return summed.unflatten(0, index.shape[:-1])


class _WeightedRows(torch.autograd.Function):
    """table [R, D], index [N, K], weight [N, K] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table, index, weight)
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        table, index, weight = ctx.saved_tensors
        of_table = of_weight = None
        if ctx.needs_input_grad[0]:
            bags, width = index.shape
            ends = np.arange(0, bags * width + 1, width, dtype=np.int32)
            samples = csr_matrix((weight.flatten().numpy(), index.flatten().int().numpy(), ends),
                                 shape=(bags, len(table)))
            of_table = torch.from_numpy(samples.T @ gradient.contiguous().numpy())
        if ctx.needs_input_grad[2]:
            with torch.enable_grad():
                again = weight.detach().requires_grad_()
                summed = F.embedding_bag(index, table.detach(), per_sample_weights=again, mode="sum")
            (of_weight,) = torch.autograd.grad(summed, again, gradient.contiguous())
        return of_table, None, of_weight
