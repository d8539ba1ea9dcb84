"""results/sensitivity.json: what was measured stays there, so that an interrupted measurement goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgedetr.artifacts import ONNX, SENSITIVITY
from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError, ExportError
from edgedetr.quantization.calibration_set import CalibrationSet
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.policy import Policy
from edgedetr.storage.reading import MEBIBYTE, read_json

log = logging.getLogger(__name__)

SCHEMA = 1
LIMIT = 256 * MEBIBYTE  # bytes of results/sensitivity.json; 300 groups on 128 images take about 4 MB


@dataclass
class SensitivityState:
    """Everything measured so far with one model, policy, observer and calibration.

    key         digest of those
    ranges      {tensor: largest magnitude}
    distances   {digest of a placement: {sha256 of an image: distance}}
    result      of the last call that ended, for the report
    """

    bundle: Bundle
    key: str
    ranges: dict[str, float] = field(default_factory=dict)
    distances: dict[str, dict[str, float]] = field(default_factory=dict)
    result: Mapping[str, object] | None = None
    saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, bundle: Bundle, policy: Policy, config: QuantConfig, calibration: CalibrationSet) -> SensitivityState:
        """What the bundle has, where it was measured with the same things; otherwise nothing."""
        parts = [
            bundle.manifest.files[ONNX.file].sha256,
            policy.sha256(),
            repr((config.observer, config.observer_option)),
            *(image.sha256 for image in calibration.images),
        ]
        state = cls(bundle, hashlib.sha256("\n".join(parts).encode()).hexdigest())
        if not bundle.has(SENSITIVITY.file):
            return state
        try:
            raw = read_json(bundle.require(SENSITIVITY.file), ExportError, limit=LIMIT, fix="it is measured anew")
            found = _checked(raw)
        except (EdgedetrError, ValueError) as error:
            log.warning("%s cannot be read (%s); it is measured anew", SENSITIVITY.file, error)
            return state
        if found["key"] != state.key:
            log.warning(
                "%s was measured with another model, policy, observer or other calibration images; it is measured anew",
                SENSITIVITY.file,
            )
            return state
        state.ranges, state.distances = found["ranges"], found["distances"]
        return state

    def save(self, at_most_every: float = 0.0) -> None:
        if time.monotonic() - self.saved < at_most_every:
            return
        raw = {
            "schema": SCHEMA,
            "key": self.key,
            "result": self.result,
            "ranges": self.ranges,
            "distances": self.distances,
        }
        artifact = SENSITIVITY
        with self.bundle.add(artifact.file, stage=artifact.step, made_from=artifact.made_from) as temporary:
            temporary.write_text(json.dumps(raw, allow_nan=False) + "\n", encoding="utf-8")
        self.saved = time.monotonic()


def _checked(raw: Any) -> dict[str, Any]:
    """Errors: ValueError for what `SensitivityState.save` does not write."""
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or not isinstance(raw.get("key"), str):
        raise ValueError(f"expected schema {SCHEMA} and a key")
    tables = [raw.get("ranges"), *_values(raw.get("distances"))]
    for table in tables:
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in _values(table)):
            raise ValueError("expected finite numbers")
    return raw


def _values(table: Any) -> list[Any]:
    if not isinstance(table, dict):
        raise ValueError("expected an object")
    return list(table.values())
