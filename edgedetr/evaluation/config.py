"""Settings of the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgedetr.options import check


@dataclass(frozen=True)
class VerifyConfig:
    """The gate. A stage passes when the one-sided upper 95 % bound of its AP drop is within the budget."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    budget: float = 1.0  # points of AP; what INT8 detectors are commonly allowed to lose
    bootstrap: int = 1000  # resamples: the 95th percentile of 1000 is known to about 0.7 % in coverage
    seed: int = 0  # of the resampling; the same seed gives the same bound
    threads: int | None = None  # of one inference; None = all cores
    parity_images: int = 32  # images also run without optimizations, to see who departs from the arithmetic

    def __post_init__(self) -> None:
        # Points of AP; at least 100 resamples for a 95 % bound.
        check(
            self,
            "verify",
            {
                "budget": (0, 100),
                "bootstrap": (100, 10**7),
                "seed": (0, 2**63 - 1),
                "threads": (1, 1024),
                "parity_images": (0, 10**7),
            },
        )
