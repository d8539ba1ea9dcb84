"""Whether a tensor of the graph and one of PyTorch are the same: their values on an image of noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession

CLOSE = 1e-3  # largest difference of a tensor in PyTorch and in ONNX Runtime, of its largest magnitude
REORDERED = 0.02  # of a tensor's values may differ more: queries of equal score change places


def graph_values(
    graph: GraphIndex, tensors: Sequence[str], size: tuple[int, int]
) -> tuple[dict[str, np.ndarray], Tensor]:
    """{tensor: value} in ONNX Runtime on an image of noise, and that image [1, 3, H, W]."""
    image = np.random.default_rng(0).integers(0, 256, (1, 3, *size)).astype(np.float32)
    session = GraphSession(graph.model, [name for name in tensors if name != "images"], threads=1)
    return {"images": image, **session.run({"images": image})}, torch.from_numpy(image)


def difference(wanted: np.ndarray, actual: Tensor) -> float:
    """The fraction of values in which two tensors differ; 1 where their shapes do not fit.

    A branch of a Concat that the graph convolves before its nearest-neighbor Resize has fewer pixels there.
    """
    one = torch.from_numpy(wanted)
    if one.dim() == actual.dim() == 4 and one.shape != actual.shape:
        one = F.interpolate(one, actual.shape[-2:])
    if one.numel() != actual.numel():
        return 1.0
    one, other = one.reshape(-1), actual.detach().reshape(-1).cpu()
    return float(((one - other).abs() > CLOSE * max(float(one.abs().max()), 1e-6)).float().mean())
