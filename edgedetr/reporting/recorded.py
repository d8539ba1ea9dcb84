"""A recorded verdict (results/verify.json), read strictly: what the tables, figures and sentences rely on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedetr.errors import BundleError
from edgedetr.storage.reading import MEBIBYTE, read_json

LIMIT = 16 * MEBIBYTE  # bytes; 80 classes and 8 stages take about 30 kB
MOST_STAGES = 1000
LONGEST = 10_000  # characters of a note
NUMBERS = ("ap", "ap50", "drop", "drop_upper95", "p50_ms", "p99_ms", "size_mb")


def read_verdict(path: Path, bundle: Path) -> Mapping[str, Any]:
    """The verdict at `path` in the form of Verdict.to_json; BundleError where it is damaged or of another kind."""
    raw = read_json(
        path, BundleError, limit=LIMIT, fix=f"so it is not a verdict that can be shown; run: edgedetr verify {bundle}"
    )
    try:
        _check(raw)
    except ValueError as error:
        raise BundleError(f"{path}: not a verdict ({error}); run: edgedetr verify {bundle}") from error
    return dict(raw)


def _check(raw: Any) -> None:
    if not isinstance(raw, dict):
        raise ValueError("no object of keys and values")
    _boolean(raw, "passed", "it")
    if _number(raw, "budget", "it") is None:
        raise ValueError("no budget")
    _number(raw, "certifiable", "it")
    stages = raw.get("stages")
    if not isinstance(stages, list) or not 0 < len(stages) <= MOST_STAGES:
        raise ValueError(f"stages is no list of 1 to {MOST_STAGES}")
    for number, stage in enumerate(stages):
        where = f"stages[{number}]"
        if not isinstance(stage, dict):
            raise ValueError(f"{where} is no object of keys and values")
        for key, needed in (("name", True), ("backend", True), ("note", False)):
            text = stage.get(key)
            if not (isinstance(text, str) and len(text) <= LONGEST) and (needed or text is not None):
                raise ValueError(f"{where}.{key} is no text of at most {LONGEST} characters")
        _boolean(stage, "passed", where)
        for key in NUMBERS:
            _number(stage, key, where)


def _boolean(raw: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(raw.get(key), bool):
        raise ValueError(f"{key} of {where} is neither true nor false")


def _number(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12 or math.isnan(value):
        raise ValueError(f"{key} of {where} is no number of a size that can be")
    return float(value)
