"""The family as a table: each member's paper, size and settings at its default configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from edgedetr.models import FAMILY, build


@dataclass(frozen=True)
class Entry:
    """One member of the family at its default configuration."""

    name: str
    paper: str
    parameters: int
    queries: int
    activation: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def describe(name: str, classes: int = 80) -> Entry:
    """One member; parameters counted for 80 classes (COCO), without downloading weights."""
    member = FAMILY[name]
    config = member.config()
    if hasattr(config, "backbone_weights"):
        config = replace(config, backbone_weights="random")
    with torch.device("meta"):      # shapes only: nothing is allocated or initialised
        model = build(name, config, classes)
    return Entry(name, member.paper, sum(p.numel() for p in model.parameters()), config.queries, config.activation)
