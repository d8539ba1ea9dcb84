"""Settings of calibration and quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class QuantConfig:
    """Part D fills this in; recipe.py imports this class from here."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}
