"""Times of every layer of two engines, FP16 and all of INT8, as `edgedetr build --profile` measures them on the device.

The device knows the layers and the ONNX nodes that they come from. Which group of a search a node belongs to is found
where the search runs (quantization/search/device_costs.py), so the file holds layers and no groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.artifacts import PROFILE
from edgedetr.errors import BundleError, EngineError
from edgedetr.runtime.latency import error_of_median
from edgedetr.runtime.tensorrt.engine_layers import InspectedLayer, inspected_layers
from edgedetr.storage.reading import MEBIBYTE, read_json

SCHEMA = 1
LIMIT = 16 * MEBIBYTE  # bytes of the file; 1,000 layers take about 500 kB
LONGEST = 20_000  # characters of a name: a fused layer's holds the names of all its nodes
FIX = f"run on the device: {PROFILE.command.format(path='BUNDLE')}"


@dataclass(frozen=True)
class LayerTime:
    """One layer of an engine.

    name       TensorRT's name for it
    kind       its type, as the engine inspector gives it; "" for a layer that the inspector does not list
    nodes      ONNX nodes that it stands for; of a reformat, those of the layer that it converts for
    reformats  whether it only changes the layout or the type of a tensor
    source, target   precision of its first input and of its first output: "int8", "fp16", "fp32", "other"
    tensor, elements   name and number of elements of its first input; "" and 0 where they are not known
    ms         median over the runs
    error_ms   standard error of the median
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    reformats: bool
    source: str
    target: str
    tensor: str
    elements: int
    ms: float
    error_ms: float


@dataclass(frozen=True)
class EngineTimes:
    """The layers of one engine.

    onnx, onnx_sha256   the graph that it was built from
    typing              of the network: "strong" or "weak"
    """

    onnx: str
    onnx_sha256: str
    typing: str
    layers: tuple[LayerTime, ...]

    @property
    def ms(self) -> float:
        """Sum of the layers' medians."""
        return sum(layer.ms for layer in self.layers)

    @property
    def reformat_ms(self) -> float:
        return sum(layer.ms for layer in self.layers if layer.reformats)


@dataclass(frozen=True)
class LayerProfile:
    """What `edgedetr build --profile` measured: both engines in turns, `runs` times each.

    device, sm, tensorrt, cuda   what they ran on
    conditions   power mode, clocks and temperature of a Jetson; "" elsewhere
    float, int8  the engine of model.fp16.onnx, and of the graph with every group in INT8
    """

    device: str
    sm: int
    tensorrt: str
    cuda: str
    conditions: str
    runs: int
    float: EngineTimes
    int8: EngineTimes

    def to_json(self) -> dict[str, object]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LayerProfile:
        """Errors: BundleError for a file that is damaged or of another kind."""
        raw = read_json(path, BundleError, limit=LIMIT, fix=FIX)
        try:
            if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
                raise ValueError(f"expected the schema {SCHEMA}")
            profile = cls(**{**raw, **{name: _engine(raw[name]) for name in ("float", "int8")}})
            _check(profile)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{path}: damaged or of another kind ({error}); expected the profile that edgedetr build --profile "
                f"writes; {FIX}"
            ) from error
        return profile


def layer_times(inspector: str, runs: Sequence[Mapping[str, float]]) -> tuple[LayerTime, ...]:
    """The layers of an engine with their times.

    inspector   `get_engine_information(LayerInformationFormat.JSON)` of an engine with detailed verbosity
    runs        {layer: milliseconds} of each run, as TensorRT's profiler reports them

    Errors: EngineError where the two do not speak of the same layers.
    """
    known = {layer.name: layer for layer in inspected_layers(inspector)}
    timed = list(dict.fromkeys(name for run in runs for name in run))
    if not timed or not any(name in known for name in timed):
        example = f", such as {timed[0][:80]!r}" if timed else ""
        raise EngineError(
            f"the profiler reported {len(timed)} layers{example}, none of which the engine inspector lists "
            f"({len(known)} layers); expected an engine with detailed verbosity; run: edgedetr build BUNDLE --profile "
            "--force"
        )
    found = []
    for name in timed:
        ms = np.array([run.get(name, 0.0) for run in runs])
        layer = known.get(name) or InspectedLayer(name, "", (), False, "other", "other", "", 0)
        # TensorRT names a reformat after the layer for which it converts.
        wanted = known.get(layer.converts_for, layer) if layer.reformats and not layer.nodes else layer
        found.append(
            LayerTime(
                name,
                layer.kind,
                wanted.nodes,
                layer.reformats,
                layer.source,
                layer.target,
                layer.tensor,
                layer.elements,
                float(np.median(ms)),
                error_of_median(ms),
            )
        )
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------- reading


def _engine(raw: Mapping[str, Any]) -> EngineTimes:
    layers = tuple(LayerTime(**{**layer, "nodes": tuple(layer["nodes"])}) for layer in raw["layers"])
    return EngineTimes(**{**raw, "layers": layers})


def _check(profile: LayerProfile) -> None:
    """Errors: ValueError, TypeError for a value of another kind than `save` writes."""
    _texts(profile.device, profile.tensorrt, profile.cuda, profile.conditions)
    _numbers(profile.sm, profile.runs)
    for engine in (profile.float, profile.int8):
        _texts(engine.onnx, engine.onnx_sha256, engine.typing)
        if not engine.layers:
            raise ValueError(f"no layer of {engine.onnx[:80]}")
        for layer in engine.layers:
            _texts(layer.name, layer.kind, layer.source, layer.target, layer.tensor, *layer.nodes)
            _numbers(layer.elements, layer.ms, layer.error_ms)
            if not isinstance(layer.reformats, bool):
                raise TypeError("reformats is no truth value")


def _texts(*values: object) -> None:
    if any(not isinstance(value, str) or len(value) > LONGEST for value in values):
        raise TypeError(f"a name is no text of at most {LONGEST} characters")


def _numbers(*values: object) -> None:
    for value in values:
        whole_or_real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not whole_or_real or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
            raise TypeError(f"{str(value)[:20]!r} is no number of at least 0")
