"""Numbers of parameters: all of them, and those that a deployed model has left."""

from __future__ import annotations

import torch

from edgedetr.layers.convolution import ConvNorm, RepVgg
from edgedetr.models.detector import DetrModel


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def deployed_parameters(ours: DetrModel) -> int:
    """What is left where norms and branches are folded into convolutions, and heads predict in the last layer alone.

    Of a member with distributions of sides, as its authors count (D-FINE, DEIMv2).
    """
    count = parameters(ours)
    for module in ours.modules():
        if isinstance(module, RepVgg):
            count -= parameters(module.narrow)
        if isinstance(module, ConvNorm):
            count -= module.conv.out_channels  # of two numbers per channel a bias is left
    heads = ours.decoder.boxes
    early = [head for part in (heads.score, heads.quality) for head in part[:-1]]
    return count - sum(map(parameters, early)) - ours.selector.denoising_class_embed.weight.numel()
