"""The family at micro size: one configuration per member, for every test that goes over all of them."""

from __future__ import annotations

import torch

from edgedetr.models import build
from edgedetr.models.detector import Detector
from edgedetr.models.detr import DetrConfig
from edgedetr.models.rt_detr import RtDetrConfig

CLASSES = 3
HEIGHT, WIDTH = 96, 128         # rectangular, so that a swap of x and y shows

# One entry per member: as small as it goes while every part of the member is there, at least two decoder layers where
# the member has several. Weights are random, so norms train.
SMALL: dict[str, object] = {
    "detr": DetrConfig(backbone="resnet18", backbone_width=0.25, hidden=32, heads=4, ffn=48, encoder_layers=2,
                       decoder_layers=2, queries=12, backbone_norm="trainable", frozen_stages=0),
    "rt_detr": RtDetrConfig(backbone_width=0.25, hidden=32, heads=4, encoder_ffn=48, decoder_ffn=48, decoder_layers=2,
                            queries=12, backbone_norm="trainable", points=(4, 2, 3)),
}

# Parameters without a gradient from predictions alone, per member, and why.
_FIRST_SELF_ATTENTION = tuple(f"decoder.layers.0.self_attention.{part}" for part in
                              ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight"))
UNUSED: dict[str, tuple[str, ...]] = {
    # The first self-attention among queries of zero content has equal values everywhere: weights do not matter.
    "detr": _FIRST_SELF_ATTENTION,
    # The class embedding of noised queries is used by training's denoising alone.
    "rt_detr": ("selector.denoising_class_embed.weight",),
}


@torch.no_grad()
def small(name: str) -> Detector:
    """A little detector whose weights have real variance, so that the order of the best tokens is decided."""
    torch.manual_seed(0)
    detector = build(name, SMALL[name], CLASSES)
    for parameter in detector.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return detector.eval()


def pictures(batch: int = 2) -> torch.Tensor:
    """[batch, 3, HEIGHT, WIDTH], 0..255, noise."""
    return torch.rand(batch, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) * 255
