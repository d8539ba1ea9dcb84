"""Settings of the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgedetr.errors import RecipeError


@dataclass(frozen=True)
class VerifyConfig:
    """The gate. A stage passes when the one-sided upper 95 % bound of its AP drop is within the budget."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    budget: float = 1.0             # points of AP; what INT8 detectors are commonly allowed to lose
    bootstrap: int = 1000           # resamples: the 95th percentile of 1000 is known to about 0.7 % in coverage
    seed: int = 0                   # of the resampling; the same seed gives the same bound
    threads: int | None = None      # of one inference; None = all cores
    parity_images: int = 32         # pictures also run without optimisations, to see who departs from the arithmetic

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 100:
            raise RecipeError(f"verify.budget is {self.budget}; expected points of AP from 0 to 100")
        if self.bootstrap < 100:
            raise RecipeError(f"verify.bootstrap is {self.bootstrap}; expected at least 100 for a 95 % bound")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"verify.threads is {self.threads}; expected at least 1, or nothing for all cores")
        if self.parity_images < 0:
            raise RecipeError(f"verify.parity_images is {self.parity_images}; expected 0 or more")
