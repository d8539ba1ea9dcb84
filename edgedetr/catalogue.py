"""The family as a table: each member's paper, size and settings at its default configuration."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgedetr.models import FAMILY, build


def describe(name: str, classes: int = 80) -> dict[str, object]:
    """One member of the family; parameters counted for 80 classes (COCO), without downloading weights."""
    member = FAMILY[name]
    config = member.config()
    if hasattr(config, "weights"):
        config = replace(config, weights="random")
    with torch.device("meta"):  # shapes only: nothing is allocated or initialised
        model = build(name, config, classes)
    return {
        "name": name,
        "paper": member.paper,
        "parameters": sum(p.numel() for p in model.parameters()),
        "queries": config.queries,
        "activation": config.activation,
    }
