"""Weighted sums of rows of a table: the core of sampling from a feature map, and most of its cost.

In an exported graph, on a GPU and in half precision this is a Gather and a matrix product. On a CPU in float32 no row
is copied: forward is torch's embedding bag, the gradient of the table is a product with a sparse matrix, and the
gradient of the weights is a matrix product of which only the needed entries are computed (feature_atlas.py has times).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgedetr.layers.cpu_kernels.dispatch import autocast_dtype, is_eager_fp32


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum over k of weight[..., k] * table[index[..., k]].

    table   [R, D]
    index   [..., K] int64, 0 .. R-1
    weight  [..., K]
    return  [..., D]
    """
    if autocast_dtype(table):
        table, weight = table.float(), weight.float()  # the kernels without copies are float32 only
    if not (is_eager_fp32(table) and is_eager_fp32(weight)):
        return (weight.unsqueeze(-2) @ F.embedding(index, table)).squeeze(-2)
    bags = index.shape[-1]
    summed = _WeightedRows.apply(table, index.reshape(-1, bags).int(), weight.reshape(-1, bags))
    return summed.unflatten(0, index.shape[:-1])


class _WeightedRows(torch.autograd.Function):
    """table [R, D], index [N, K] int32, weight [N, K] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(table, index, weight)
        return sum_rows(table, index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, index, weight = ctx.saved_tensors
        of_table = of_weight = None
        if ctx.needs_input_grad[0]:
            of_table = table_gradient(index, weight, gradient, len(table))
        if ctx.needs_input_grad[2]:
            of_weight = weight_gradient(index, table, gradient)
        return of_table, None, of_weight


def sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """table [R, D], index [N, K] int32, weight [N, K] -> [N, D], float32 on a CPU; without gradients."""
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def table_gradient(index: Tensor, weight: Tensor, gradient: Tensor, rows: int) -> Tensor:
    """The gradient [R, D] of the table, given that of the sums [N, D]; index [N, K] int32, weight [N, K]."""
    sums, width = index.shape
    cells, weights, seeds = (tensor.numpy() for tensor in (index, weight, gradient.contiguous()))
    ends = np.arange(0, sums * width + 1, width, dtype=np.int32)
    samples = csr_matrix((weights.ravel(), cells.ravel(), ends), shape=(sums, rows))
    return torch.from_numpy(samples.T @ seeds)


def weight_gradient(index: Tensor, table: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [N, K] of the weights, given that of the sums [N, D]: gradient[n] . table[index[n, k]]."""
    bags, width = index.shape
    ends = torch.arange(0, bags * width + 1, width, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        wanted = torch.sparse_csr_tensor(
            ends, index.flatten(), table.new_zeros(bags * width), (bags, len(table)), check_invariants=False
        )
    torch.sparse.sampled_addmm(wanted, gradient.contiguous(), table.t(), beta=0.0, out=wanted)  # out: else a copy
    return wanted.values().view(bags, width)
