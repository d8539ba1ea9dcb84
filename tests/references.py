"""Reference models of transformers, small, with random weights whose outputs depend on the input."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the reference implementation of these tests")


@torch.no_grad()
def with_spread(model: torch.nn.Module, deviation: float = 0.08) -> torch.nn.Module:
    """Weights with real variance, so that the order of the best tokens is decided and not a matter of rounding."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, deviation)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.weight.copy_(torch.rand_like(module.weight) + 0.5)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def reference_resnet(depth: int, stages: tuple[int, ...] = (4,), width: float = 1.0) -> object:
    """Configuration of a ResNet whose feature maps are those of `stages`, 1..4."""
    kind, depths = ("basic", [2, 2, 2, 2]) if depth == 18 else ("bottleneck", [3, 4, 6, 3])
    base = int(64 * width)
    sizes = [base * 2**stage * (1 if depth == 18 else 4) for stage in range(4)]
    return transformers.ResNetConfig(
        embedding_size=base,
        hidden_sizes=sizes,
        depths=depths,
        layer_type=kind,
        out_features=[f"stage{stage}" for stage in stages],
    )
