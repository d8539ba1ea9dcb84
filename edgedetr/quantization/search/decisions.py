"""What a search decides from its measurements: placements with observers, their order, where verification begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgedetr.quantization.placement import Placement
from edgedetr.quantization.search.costs import Costs
from edgedetr.quantization.search.search_report import Candidate

EXPECTED_SHARE = 0.5  # verification begins at the fastest placement expected to lose no more of the budget than this


def placed(int8: tuple[str, ...], observers: Mapping[str, str], smooth: Mapping[str, float]) -> Placement:
    """A placement of these groups, with the observers and the alphas that are named for them."""
    return Placement(
        int8,
        {name: observers[name] for name in int8 if name in observers},
        {name: smooth[name] for name in int8 if name in smooth},
    )


def predicted_latency(placement: Placement, costs: Costs) -> dict[str, float]:
    """Latency on a target that is not here; a model of costs gives no time of the float graph, which is then 0."""
    change = costs.change(placement.int8)
    float_ms = costs.float_ms if costs.measured else 0.0
    return {"float_ms": float_ms, "int8_ms": float_ms + change.ms, "error_ms": change.error_ms}


def in_order_of_risk(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are faster than every one with less distance, the least distance first."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.distance or 0.0, c.int8_ms)):
        if not kept or candidate.int8_ms < kept[-1].int8_ms:
            kept.append(candidate)
    return kept


def expected_start(order: Sequence[Candidate], budget: float, slope: float) -> int:
    """Position of the fastest candidate that is expected to lose at most EXPECTED_SHARE of the budget; 0 if none."""
    fitting = [n for n, c in enumerate(order) if slope * (c.distance or 0.0) <= EXPECTED_SHARE * budget]
    return max(fitting, default=0)
