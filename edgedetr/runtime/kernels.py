"""What a library says about the kernels that it runs: convolutions and matrix products, in integers or in floats."""

from __future__ import annotations

import re
from dataclasses import dataclass

# A kernel with weights or a matrix product, by what a library calls it: QLinearConv, FusedMatMul, FullyConnected.
PRODUCT = re.compile(r"conv|gemm|matmul|matrix.?mult|fully.?connected|attention|\bmha", re.I)


@dataclass(frozen=True)
class Kernel:
    """One convolution or matrix product as a library runs it; it may stand for several nodes of the graph.

    operator   the library's name for it
    integers   whether its products are of integers
    names      the graph's names of its nodes, and where the library tells them of its tensors
    """

    operator: str
    integers: bool
    names: frozenset[str]
