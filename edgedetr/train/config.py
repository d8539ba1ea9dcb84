"""Settings of training and of augmentation, with a reason per number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class TrainConfig:
    """Fields and checks: see part C's brief; recipe.py imports this class from here."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}


@dataclass(frozen=True)
class AugmentConfig:
    """Fields and checks: see part C's brief; recipe.py imports this class from here."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}
