"""Settings of `edgedetr verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgedetr.artifacts import RECIPE
from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError
from edgedetr.options import check
from edgedetr.storage.reading import read_toml


@dataclass(frozen=True)
class VerifyConfig:
    """An artifact passes when the one-sided upper 95 % bound of its AP drop is at most `budget`, the tolerance.

    The names are keys of recipes.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    budget: float = 1.0  # tolerance, points of AP; a common limit for the loss of INT8 detectors
    bootstrap: int = 1000  # resamples: the 95th percentile of 1000 is known to about 0.7 % in coverage
    seed: int = 0  # of the resampling; the same seed gives the same bound
    threads: int | None = None  # of one inference; None = all cores
    parity_images: int = 32  # images of the reference run (no graph optimizations) that backends are compared with

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> VerifyConfig:
        """Section [verify] of the bundle's recipe, with the bundle's tolerance; the defaults where it has no recipe."""
        if RECIPE.file not in bundle.manifest.files:
            return cls(budget=bundle.manifest.budget)
        path, fix = bundle.require(RECIPE.file), "expected the keys that edgedetr train writes"
        section = read_toml(path, BundleError, fix=fix).get("verify", {})
        if not isinstance(section, dict):
            raise BundleError(f"{path} [verify]: not a table; {fix}")
        try:
            return cls(**{**section, "budget": bundle.manifest.budget})
        except (TypeError, ValueError) as error:
            raise BundleError(f"{path} [verify]: {error}; {fix}") from error

    def __post_init__(self) -> None:
        # budget in points of AP; at least 100 resamples for a 95 % bound
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
