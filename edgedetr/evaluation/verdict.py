"""The verdict of `edgedetr verify`: its types, and their JSON form in results/verify.json.

AP, drops, bounds and tolerances are points, 0..100. A few JSON keys are older than the names used here (JSON_KEYS).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError
from edgedetr.evaluation.agreement import Agreement
from edgedetr.evaluation.realized_precision import RealizedPrecision
from edgedetr.storage.reading import MEBIBYTE, read_json

LARGEST_FILE = 16 * MEBIBYTE  # bytes; 80 classes and 8 artifacts take about 30 kB
MOST_ARTIFACTS = 1000
LONGEST_TEXT = 10_000  # characters of a note
LARGEST_NUMBER = 1e12  # no measurement is larger
JSON_KEYS = {  # field -> key in the file, where they differ
    "tolerance": "budget",
    "artifacts": "stages",
    "environment": "conditions",
    "agreement": "parity",
    "reference_run": "oracle",
    "reference_run_drop": "oracle_drop",
    "precision_fraction": "share",
    "rows_matched": "rows",
}
# Left out of the file where there is nothing to say: versions up to 0.2 did not have them.
OMITTED = ("integers", "quantizer")
MOST_LAYERS = 100_000
OPTIONAL_NUMBERS = ("p50_ms", "p99_ms", "size_mb", "ap75", "reference_run_drop")


@dataclass(frozen=True)
class ArtifactVerdict:
    """One artifact on one backend; the drop is measured against the reference, which is the first of a verdict.

    name                "torch", "onnx", "fp16", "int8", "int8-cpu"; "reference" is an imported ONNX file
    passed              the bound is within the tolerance, the backend computes what the graph says, and the reference
                        has AP to lose
    drop_upper95        one-sided upper 95 % bound of the drop
    drop_lower95        one-sided lower 95 % bound: above the tolerance, the loss is real and not due to a small set
    margin              drop_upper95 - drop: differences that this many images cannot resolve
    p50_ms, p99_ms      one inference of one image, without preprocessing and decoding
    size_mb             of the file
    images              number of images evaluated
    agreement           detections compared with the reference's
    reference_run       detections compared with those of the same graph in ONNX Runtime without optimizations
    reference_run_drop  AP of that run minus AP of this backend, on the images of that run
    note                what went wrong and where, or ""; of another quantizer's graph its version, and whether TensorRT
                        takes it
    quantizer           of a graph that another quantizer made: its name. Such a row has no part in the verdict
    integers            which quantized layers really run in integers; None where nothing is quantized, or the backend
                        cannot tell
    """

    name: str
    backend: str
    passed: bool
    ap: float
    ap50: float
    drop: float
    drop_upper95: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    size_mb: float | None = None
    drop_lower95: float = 0.0
    se: float = 0.0
    margin: float = 0.0
    ap75: float | None = None
    per_class: Mapping[str, float | None] | None = None
    images: int = 0
    agreement: Agreement | None = None
    reference_run: Agreement | None = None
    reference_run_drop: float | None = None
    note: str = ""
    quantizer: str = ""
    integers: RealizedPrecision | None = None

    @property
    def is_reference(self) -> bool:
        """Whether this is PyTorch, or the imported file: what the others are measured against."""
        return self.name in ("torch", "reference")

    @property
    def label(self) -> str:
        """For example "int8 (openvino)"."""
        return f"{self.name} ({self.backend})"

    def to_json(self) -> dict[str, object]:
        return _to_json(self)

    @classmethod
    def from_json(cls, raw: object, where: str = "artifact") -> ArtifactVerdict:
        """Read one artifact; an EngineVerdict where the record names an engine. Errors: ValueError."""
        record = _Record(raw, where)
        common: dict[str, Any] = {
            "name": record.text("name"),
            "backend": record.text("backend"),
            "passed": record.boolean("passed"),
            "ap": record.number("ap"),
            "ap50": record.number("ap50"),
            "drop": record.number("drop"),
            "drop_upper95": record.number("drop_upper95"),
            **{name: record.number(name, None) for name in OPTIONAL_NUMBERS},
            **{name: record.number(name, 0.0) for name in ("drop_lower95", "se", "margin")},
            "per_class": record.numbers_by_name("per_class"),
            "images": record.integer("images", 0),
            "agreement": record.agreement("agreement"),
            "reference_run": record.agreement("reference_run"),
            "note": record.text("note", ""),
            "quantizer": record.text("quantizer", ""),
            "integers": record.realized("integers"),
        }
        if "engine" not in record.raw:
            return cls(**common)
        return EngineVerdict(
            **common,
            engine=record.text("engine"),
            batch=record.integer("batch", 1),
            precision_fraction=record.number("precision_fraction", None),
            reformats=record.integer("reformats", 0),
            rows_matched=record.number("rows_matched", None),
        )


@dataclass(frozen=True)
class EngineVerdict(ArtifactVerdict):
    """Verdict on one TensorRT engine.

    engine              the plan's file name
    batch               images per timed run
    precision_fraction  of the layers with weights, 0..1: those that run in the engine's precision; None if unknown
    reformats           number of layers that only change layout or type
    rows_matched        fraction of objects that equal images of a full batch have in common, 0..1; None for batch 1
    """

    engine: str = ""
    batch: int = 1
    precision_fraction: float | None = None
    reformats: int = 0
    rows_matched: float | None = None


@dataclass(frozen=True)
class Verdict:
    """All artifacts of one run of `edgedetr verify`, the reference first.

    passed        every artifact of ours passed. Where the reference has no AP to lose (no more than the tolerance, or
                  less than 1 point), no artifact passes, including the reference
    tolerance     largest accepted AP drop
    certifiable   the smallest tolerance that our artifacts pass on these images: the largest bound
    """

    passed: bool
    tolerance: float
    certifiable: float
    artifacts: tuple[ArtifactVerdict, ...]

    @property
    def delivered(self) -> tuple[ArtifactVerdict, ...]:
        """What is judged: all artifacts but those of other quantizers."""
        return tuple(artifact for artifact in self.artifacts if not artifact.quantizer)

    def to_json(self) -> dict[str, object]:
        """The form in which the verdict is stored and printed; `from_json` reads it."""
        return _to_json(self)

    @classmethod
    def from_json(cls, raw: object) -> Verdict:
        """Read `to_json`'s form; a DeviceVerdict where the record names a device.

        Errors: ValueError that names the key, for a value that is missing, of another type or not finite.
        """
        record = _Record(raw, "verdict")
        stages = record.raw.get(JSON_KEYS["artifacts"])
        if not isinstance(stages, list) or not 0 < len(stages) <= MOST_ARTIFACTS:
            raise ValueError(f"stages is not a list of 1 to {MOST_ARTIFACTS}")
        artifacts = tuple(ArtifactVerdict.from_json(stage, f"stages[{n}]") for n, stage in enumerate(stages))
        tolerance = record.number("tolerance")
        certifiable = record.number("certifiable", max(artifact.drop_upper95 for artifact in artifacts))
        common = (record.boolean("passed"), tolerance, certifiable, artifacts)
        if "device" not in record.raw:
            return cls(*common)
        return DeviceVerdict(
            *common, *(record.text(name, "") for name in ("device", "tensorrt", "environment", "recommended"))
        )


@dataclass(frozen=True)
class DeviceVerdict(Verdict):
    """Verdict on the engines of one device.

    device, tensorrt   for example "Orin (sm_87)", "10.3.0"
    environment        power mode and clocks; "" on other devices than a Jetson
    recommended        file name of the engine to use: the fastest per image of those that passed; "" if none passed
    """

    device: str = ""
    tensorrt: str = ""
    environment: str = ""
    recommended: str = ""

    @property
    def engines(self) -> tuple[EngineVerdict, ...]:
        return tuple(artifact for artifact in self.artifacts if isinstance(artifact, EngineVerdict))


def read_verdict(path: Path, bundle: Path) -> Verdict:
    """The verdict stored at `path`. Errors: BundleError for a damaged file or one of another kind."""
    fix = f"run: edgedetr verify {bundle}"
    raw = read_json(path, BundleError, limit=LARGEST_FILE, fix=f"so it is not a verdict that can be shown; {fix}")
    try:
        return Verdict.from_json(raw)
    except ValueError as error:
        raise BundleError(f"{path}: not a verdict ({error}); {fix}") from error


def write_verdict(bundle: Bundle, name: str, verdict: Verdict, *, made_from: Sequence[str]) -> None:
    """Store the verdict as the file `name` of the bundle. Errors: OSError on read-only storage."""
    with bundle.add(name, stage="verify", made_from=made_from) as path:
        path.write_text(json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _to_json(record: Any) -> dict[str, object]:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {
        JSON_KEYS.get(name, name): _json_value(value) for name, value in values.items() if value or name not in OMITTED
    }


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, (ArtifactVerdict, Agreement, RealizedPrecision)):
        return value.to_json()
    return dict(value) if isinstance(value, Mapping) else value


REQUIRED: Any = object()


class _Record:
    """Typed access to a JSON object by field name. Errors: ValueError that names the key."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is not an object of keys and values")
        self.raw: dict[str, Any] = raw
        self.where = where

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(JSON_KEYS.get(name, name))
        return default if value is None and default is not REQUIRED else value

    def _wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}.{JSON_KEYS.get(name, name)} is not {expected}")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or len(value) > LONGEST_TEXT:
            raise self._wrong(name, f"a text of at most {LONGEST_TEXT} characters")
        return value

    def boolean(self, name: str) -> bool:
        value = self._value(name, REQUIRED)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """float, or `default` where the key is missing or null."""
        value = self._value(name, default)
        if value is None and default is None:
            return None
        return self._finite(name, value)

    def integer(self, name: str, default: int) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_NUMBER:
            raise self._wrong(name, "a whole number from 0")
        return value

    def numbers_by_name(self, name: str) -> dict[str, float | None] | None:
        value = self._value(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, "an object of numbers")
        return {key: None if number is None else self._finite(name, number) for key, number in value.items()}

    def agreement(self, name: str) -> Agreement | None:
        value = self._value(name, None)
        if value is None:
            return None
        record = _Record(value, f"{self.where}.{JSON_KEYS.get(name, name)}")
        numbers = (field.name for field in fields(Agreement) if field.name != "objects")
        return Agreement(record.integer("objects", 0), *(record.number(number, None) for number in numbers))

    def realized(self, name: str) -> RealizedPrecision | None:
        value = self._value(name, None)
        if value is None:
            return None
        record = _Record(value, f"{self.where}.{name}")
        floats, unknown = record.raw.get("in_floats"), record.raw.get("unknown")
        if not isinstance(floats, dict) or not isinstance(unknown, list):
            raise record._wrong("in_floats", "an object, or unknown no list")
        texts = [*floats, *floats.values(), *unknown]
        if len(texts) > MOST_LAYERS or not all(isinstance(text, str) and len(text) <= LONGEST_TEXT for text in texts):
            raise record._wrong("in_floats", "an object of texts, or unknown no list of texts")
        quantized, in_integers = record.integer("quantized", 0), record.integer("in_integers", 0)
        return RealizedPrecision(quantized, in_integers, floats, tuple(unknown))

    def _finite(self, name: str, value: object) -> float:
        # NaN is not smaller than any number.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST_NUMBER:
            raise self._wrong(name, "a finite number")
        return float(value)
