"""The stage table and what it means, as rows of text: the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = ("stage", "backend", "AP", "AP50", "drop", "drop, upper 95 %", "p50 ms", "p99 ms", "MB", "verdict")
NOTHING = "nothing to lose"


def stage_rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Head and rows of the stage table from a verdict's JSON form; None where nothing was measured."""
    rows: list[list[str | None]] = []
    nothing = nothing_to_lose(result) is not None
    for stage in result["stages"]:
        rows.append(
            [
                stage["name"],
                stage["backend"],
                _points(stage.get("ap")),
                _points(stage.get("ap50")),
                *(
                    2 * [None]
                    if is_reference(stage)
                    else [_points(stage.get(key), signed=True) for key in ("drop", "drop_upper95")]
                ),
                _decimal(stage.get("p50_ms")),
                _decimal(stage.get("p99_ms")),
                _decimal(stage.get("size_mb")),
                NOTHING if nothing else verdict_word(stage, result["budget"]),
            ]
        )
    return HEAD, rows


def is_reference(stage: Mapping[str, Any]) -> bool:
    """Whether this is PyTorch, or the imported file, which the others are measured against."""
    return stage["name"] in ("torch", "reference") or stage.get("drop") is None


def nothing_to_lose(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The reference, where it finds so little that no stage can lose anything that counts; else None."""
    return next((stage for stage in result["stages"] if is_reference(stage) and not stage["passed"]), None)


def verdict_word(stage: Mapping[str, Any], budget: float) -> str:
    """reference, within, not certified (the point drop is within, its bound is not) or beyond."""
    if is_reference(stage):
        return "reference"
    if stage["passed"]:
        return "within"
    return "not certified" if stage["drop"] <= budget else "beyond"


def verdict_sentence(result: Mapping[str, Any]) -> str:
    """One sentence that says what the table amounts to."""
    budget, certifiable = result["budget"], result.get("certifiable")
    if (empty := nothing_to_lose(result)) is not None:
        return (
            f"NOT PASSED, NOTHING TO LOSE: the model itself reaches AP {empty.get('ap') or 0:.2f}, and the budget is "
            f"{budget:g}; no verdict can be given on what others lose of it. Look at the data (edgedetr data check "
            f"DIR) and train it further, or name a smaller budget by --max-drop."
        )
    if result["passed"]:
        imported = any(s["name"] == "reference" for s in result["stages"])
        worst = max((_upper(s) for s in result["stages"] if not is_reference(s)), default=0.0)
        return (
            f"PASSED: no delivered stage loses more than {max(worst, 0):.2f} AP against "
            f"{'the imported file' if imported else 'PyTorch'} (upper 95 % bound); "
            f"the budget is {budget:g}."
        )
    failed = [s for s in result["stages"] if not is_reference(s) and not s["passed"]]
    if any(s["drop"] > budget for s in failed):
        worst_stage = max(failed, key=lambda s: s["drop"])
        return (
            f"NOT PASSED: {worst_stage['name']} on {worst_stage['backend']} loses {worst_stage['drop']:.2f} AP; "
            f"the budget is {budget:g}."
        )
    return f"NOT PASSED: the drops are within the budget of {budget:g}, but this set is too small to certify it" + (
        f"; the smallest budget it can certify is {certifiable:.2f}." if certifiable is not None else "."
    )


def _upper(stage: Mapping[str, Any]) -> float:
    return float(stage["drop"] if stage.get("drop_upper95") is None else stage["drop_upper95"])


def _points(value: float | None, *, signed: bool = False) -> str | None:
    if value is None:
        return None
    value = round(value, 2) + 0.0  # no "-0.00"
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
