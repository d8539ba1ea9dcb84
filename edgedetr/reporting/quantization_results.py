"""Read from a bundle what `edgedetr sensitivity` and a search under a budget have found, for page and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from edgedetr.artifacts import SEARCH, SENSITIVITY, Artifact
from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError
from edgedetr.quantization import sensitivity_state
from edgedetr.quantization.search import search_report
from edgedetr.quantization.search.search_report import SearchReport
from edgedetr.quantization.sensitivity import SensitivityResult
from edgedetr.storage.reading import read_json

LEFT_OUT = "so it is not shown"

T = TypeVar("T")


@dataclass(frozen=True)
class QuantizationResults:
    """sensitivity, search   None where the bundle has none, or one that cannot be shown
    unreadable            why, for each that cannot be shown
    """

    sensitivity: SensitivityResult | None
    search: SearchReport | None
    unreadable: tuple[str, ...] = ()


def read_quantization_results(bundle: Bundle) -> QuantizationResults:
    """Both results, of which neither has to be there."""
    unreadable: list[str] = []

    def result(read: Callable[[Bundle], T | None]) -> T | None:
        try:
            return read(bundle)
        except BundleError as error:
            unreadable.append(str(error))
            return None

    return QuantizationResults(result(read_sensitivity), result(read_search), tuple(unreadable))


def read_sensitivity(bundle: Bundle) -> SensitivityResult | None:
    """What `edgedetr sensitivity` found; None where it has not ended. Errors: BundleError if damaged or stale."""
    raw = _content(bundle, SENSITIVITY, sensitivity_state.SCHEMA, sensitivity_state.LIMIT)
    if raw is None or raw.get("result") is None:
        return None
    return _record(SensitivityResult, raw["result"], SENSITIVITY)


def read_search(bundle: Bundle) -> SearchReport | None:
    """What the last search found; None without one. Errors: BundleError if damaged or stale."""
    raw = _content(bundle, SEARCH, search_report.SCHEMA, search_report.LIMIT)
    if raw is None:
        return None
    found = _record(SearchReport, {key: value for key, value in raw.items() if key != "schema"}, SEARCH)
    if not _is_whole(found):
        raise BundleError(f"{SEARCH.file}: the outcome is not that of a listed candidate, {LEFT_OUT}")
    return found


def _is_whole(report: SearchReport) -> bool:
    """Whether every name and number that the outcome rests on is there."""
    listed = {candidate.name for candidate in report.candidates}
    if not listed >= set(report.order) or not all(0 <= look.candidate < len(report.order) for look in report.looks):
        return False
    if report.outcome == "accepted":
        return report.accepted in {report.order[look.candidate] for look in report.looks}
    return bool(listed if report.outcome == "float" else report.looks)


def _content(bundle: Bundle, artifact: Artifact, schema: int, limit: int) -> dict[str, object] | None:
    """The JSON object of a bundle's file; None where the bundle has none. Errors: BundleError."""
    if artifact.file not in bundle.manifest.files:
        return None
    raw = read_json(bundle.require(artifact.file), BundleError, limit=limit, fix=LEFT_OUT)
    if not isinstance(raw, dict) or raw.get("schema") != schema:
        raise BundleError(f"{artifact.file}: expected an object of schema {schema}, {LEFT_OUT}")
    try:
        json.dumps(raw, allow_nan=False)
    except ValueError as error:
        raise BundleError(f"{artifact.file}: a number is not finite, {LEFT_OUT}") from error
    return raw


def _record(kind: type[T], raw: object, artifact: Artifact) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{artifact.file}: {where}: {first['msg']}, {LEFT_OUT}") from error
