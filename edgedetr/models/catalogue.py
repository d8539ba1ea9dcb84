"""Describes each member of the family at its default configuration: paper, size, cost, settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgedetr.artifacts import DELIVERED
from edgedetr.models import FAMILY, build


@dataclass(frozen=True)
class MemberSummary:
    """One member of the family at its default configuration.

    gmacs    multiply-accumulates of one image of `pixels` x `pixels`, in 1e9: convolutions and matrix products
    levels   (height, width, stride) of each feature map that the decoder reads, at that size
    dialects ids of the graphs that it exports to (edgedetr/artifacts.py); the name is that of `models --json`
    """

    name: str
    paper: str
    parameters: int
    gmacs: float
    pixels: int
    levels: tuple[tuple[int, int, int], ...]
    queries: int
    activation: str
    dialects: tuple[str, ...] = tuple(DELIVERED)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarize(name: str, classes: int = 80, pixels: int = 640) -> MemberSummary:
    """One member; counted for 80 classes (COCO), without downloading weights."""
    member = FAMILY[name]
    config = member.config()
    if hasattr(config, "backbone_weights"):
        config = replace(config, backbone_weights="random")
    with torch.device("meta"):  # shapes only: nothing is allocated, initialized or computed
        model = build(name, config, classes).eval().requires_grad_(False)
        images = torch.empty(1, 3, pixels, pixels)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            memory = model.encode(images)
            model.decode(model.select(memory), memory, last_only=True)
    levels = tuple((h, w, stride) for (h, w), stride in zip(memory.shapes, memory.strides))
    return MemberSummary(
        name,
        member.paper,
        sum(p.numel() for p in model.parameters()),
        counter.get_total_flops() / 2e9,
        pixels,
        levels,
        config.queries,
        config.activation,
    )
