"""What a search found: candidates, looks and the outcome, as results/search.json holds it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edgedetr.artifacts import FP16, ONNX, TENSORRT
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.search.costs import Costs
from edgedetr.quantization.search.sequential import LookResult

HEAD = ("placement", "INT8", "ms", "of float", "distance", "images", "drop", "bound", "")
SCHEMA = 1
LIMIT = 64 << 20  # bytes of results/search.json; 300 groups and 12 candidates take about 1 MB
SIGMAS = 2.0  # a candidate is faster where its gain exceeds so many standard errors

Outcome = Literal["accepted", "float", "none", "open"]


@dataclass(frozen=True)
class Candidate:
    """One placement.

    name                "front 3": the third of the front, the safest first; "policy": what the policy chooses
    predicted_ms        time relative to the float graph by the costs of its groups, milliseconds
    predicted_distance  sum of the distances of its groups
    distance            measured on the search images
    search_drop         AP lost on the search images, points
    float_ms, int8_ms   of one image, measured in turns; predicted where the target is not here, from a device's profile
                        or, with 0 for the float graph, from a model
    error_ms            standard error of int8_ms - float_ms
    """

    name: str
    placement: Placement
    predicted_ms: float
    predicted_distance: float
    distance: float | None = None
    search_drop: float | None = None
    float_ms: float = 0.0
    int8_ms: float = 0.0
    error_ms: float = 0.0

    @property
    def faster(self) -> bool:
        """Whether it is faster than the float graph beyond noise."""
        return bool(self.placement.int8) and self.int8_ms + SIGMAS * self.error_ms < self.float_ms


@dataclass(frozen=True)
class SearchReport:
    """outcome           "accepted": one is faster and certified; "float": none is faster; "none": none is certified
    images            how many images each of the three sets has
    image_sets        digest over the digests of all of them
    rank_correlation  of summed and measured distances (Spearman): whether distances of single groups add up
    order             names of the candidates in the order of verification, the safest first
    looks             their `candidate` is a position in `order`
    certifiable       the smallest budget that was certified or would have been, points
    """

    target: str
    budget: float
    images: Mapping[str, int]
    image_sets: str
    reference_ap: float
    costs: Costs
    distances: Mapping[str, float]
    rank_correlation: float | None
    candidates: tuple[Candidate, ...]
    order: tuple[str, ...] = ()
    looks: tuple[LookResult, ...] = ()
    certifiable: float | None = None
    outcome: Outcome = "open"
    accepted: str = ""

    def sentence(self) -> str:
        """The outcome in one or two sentences, with its figures."""
        measured = self._about_latency()
        if self.outcome == "accepted" and (found := self.accepted_candidate) is not None:
            look = self.last_look(found)
            return (
                f"{found.name}: {_groups(found)}, {_ratio(found)} on {self.target}{measured}; it loses {look.drop:.2f} "
                f"points on {look.images} verify images, and at most {look.upper:.2f}, within the budget of "
                f"{self.budget:g} (wrong in at most 5 % of such searches)"
            )
        if self.outcome == "float":
            best = min(self.candidates, key=lambda c: (c.int8_ms - c.float_ms) / (c.float_ms or 1.0))
            float_file, precision = (FP16.file, "FP16") if self.target == TENSORRT else (ONNX.file, "float32")
            return (
                f"ship {precision}: no INT8 placement is faster than the float graph on {self.target} beyond noise; "
                f"the fastest of {len(self.candidates)}, {best.name}, takes {best.int8_ms:.2f} ms "
                f"(+- {best.error_ms:.2f}) for {best.float_ms:.2f} ms{measured}; use {float_file}"
            )
        look = min(self.looks, key=lambda one: one.upper)
        return (
            f"no INT8 placement for {self.target} is proved to lose at most {self.budget:g} points of AP on "
            f"{self.images['verify']} verify images; the best, {self.order[look.candidate]}, loses {look.drop:.2f} "
            f"on {look.images} of them, and at most {look.upper:.2f}: the smallest budget that these images certify is "
            f"{self.smallest_budget:g}"
        )

    def _about_latency(self) -> str:
        """How the latency was found, where candidates were not timed."""
        if self.target != TENSORRT:
            return ""
        return f" (latency is {'predicted from ' if self.costs.measured else ''}{self.costs.source})"

    @property
    def smallest_budget(self) -> float | None:
        """`certifiable`, rounded up to two digits after the point."""
        return None if self.certifiable is None else math.ceil(100 * max(0.0, self.certifiable)) / 100

    def last_look(self, candidate: Candidate) -> LookResult:
        return [look for look in self.looks if self.order[look.candidate] == candidate.name][-1]

    def looked_at(self, candidate: Candidate) -> bool:
        """Whether it was judged on verify images."""
        return any(self.order[look.candidate] == candidate.name for look in self.looks)

    def rows(self) -> list[list[object]]:
        """One row a candidate: name, groups in INT8, ms, ratio to float, distance, images, drop, bound, outcome."""
        rows: list[list[object]] = []
        for found in self.candidates:
            look = self.last_look(found) if self.looked_at(found) else None
            about: list[object] = [None, None, None, "" if found.faster else "not faster"]
            if look is not None:
                about = [look.images, f"{look.drop:.2f}", f"{look.upper:.2f}", look.outcome]
            ratio = f"{found.int8_ms / found.float_ms:.2f}" if found.float_ms else None
            distance = None if found.distance is None else f"{found.distance:.4f}"
            rows.append([found.name, len(found.placement.int8), f"{found.int8_ms:.2f}", ratio, distance, *about])
        return rows

    @property
    def placement(self) -> Placement | None:
        """The accepted placement."""
        found = self.accepted_candidate
        return None if found is None else found.placement

    @property
    def accepted_candidate(self) -> Candidate | None:
        return next((c for c in self.candidates if c.name == self.accepted), None)

    def to_json(self) -> dict[str, object]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _groups(candidate: Candidate) -> str:
    count = len(candidate.placement.int8)
    return f"{count} {'group' if count == 1 else 'groups'} in INT8"


def _ratio(candidate: Candidate) -> str:
    if not candidate.float_ms:
        return "no latency"
    return f"{candidate.int8_ms:.2f} ms, {candidate.int8_ms / candidate.float_ms:.2f} of float's"
