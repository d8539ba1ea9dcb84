"""The metadata of an engine, a JSON file next to its plan: its graph, arguments, device, versions and layers.

The plan itself has no header, so that trtexec, Triton and DeepStream can open it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedetr.artifacts import ENGINE_GRAPHS
from edgedetr.errors import EngineError
from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
from edgedetr.runtime.tensorrt.gpu import Device
from edgedetr.storage.reading import read_json

SCHEMA = 1
LARGEST = 1 << 20  # bytes of the metadata; a real file has some thousand
LONGEST = 2000  # characters of a string in it
REBUILD = "run: edgedetr build BUNDLE --force"


@dataclass(frozen=True)
class BuildArguments:
    """The build settings of an engine, besides its ONNX file and the device.

    batch    minimum, optimum and maximum batch size; three equal numbers: one fixed batch size
    typing   "strong", "weak", or "auto": strong, and weak where that fails on TensorRT 10
    """

    precision: str
    batch: tuple[int, int, int]
    workspace_mb: int
    optimization_level: int
    typing: str

    @property
    def batch_name(self) -> str:
        return str(self.batch[1]) if len(set(self.batch)) == 1 else ".".join(map(str, self.batch))


@dataclass(frozen=True)
class EngineMetadata:
    """The metadata of one plan.

    host       digest of the id of the machine that built it (see engine_validation.py); empty where that has none
    typing     of the network that was built: "strong" or "weak"
    warnings   known issues of TensorRT that may affect this engine
    """

    plan: str
    plan_sha256: str
    plan_bytes: int
    onnx: str
    onnx_sha256: str
    tensorrt: str
    cuda: str
    driver: str
    jetpack: str
    device: str
    sm: int
    host: str
    arguments: BuildArguments
    typing: str
    seconds: float
    layers: LayerSummary
    warnings: tuple[str, ...] = ()
    schema: int = field(default=SCHEMA)


def metadata_path(plan: Path) -> Path:
    """The path of the metadata of an engine: `<name>.json` next to `<name>.plan`."""
    return plan.with_suffix(".json")


def engine_name(arguments: BuildArguments, device: Device, tensorrt: str, onnx_sha256: str) -> str:
    """`int8-b1-sm87-trt10.3.0-cu12.6-orin-1a2b3c4d-5e6f7a8b`, the same for the same graph, device and settings."""
    settings = json.dumps(asdict(arguments), sort_keys=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") or "gpu"
    return (
        f"{arguments.precision}-b{arguments.batch_name}-sm{device.sm}-trt{tensorrt}-cu{device.runtime}-{name[:40]}-"
        f"{onnx_sha256:.8}-{hashlib.sha256(settings.encode()).hexdigest():.8}"
    )


def to_bytes(metadata: EngineMetadata) -> bytes:
    """The content of the metadata file."""
    return (json.dumps(asdict(metadata), indent=1) + "\n").encode()


def read(plan: Path) -> EngineMetadata | None:
    """The metadata of `plan`; None where the file is missing. Errors: EngineError for a damaged file."""
    path = metadata_path(plan)
    if not os.path.lexists(path):
        return None
    raw = read_json(path, EngineError, limit=LARGEST, fix=REBUILD)
    try:
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = repr(raw.get("schema"))[:40] if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"schema is {found}, this version reads {SCHEMA}")
        arguments, summary = (_mapping(raw, name) for name in ("arguments", "layers"))
        metadata = EngineMetadata(
            **{
                **raw,
                "arguments": BuildArguments(**{**arguments, "batch": tuple(arguments["batch"])}),
                "layers": LayerSummary(**summary),
                "warnings": tuple(raw["warnings"]),
            }
        )
        _require_types(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: damaged or of another kind ({error}); expected the metadata that edgedetr build writes next "
            f"to an engine; {REBUILD}"
        ) from error
    return metadata


def _mapping(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise TypeError(f"{name} is no object")
    return value


def _require_types(metadata: EngineMetadata) -> None:
    texts = {
        name: getattr(metadata, name)
        for name in ("plan plan_sha256 onnx onnx_sha256 tensorrt cuda driver jetpack device host typing").split()
    }
    texts |= {"precision": metadata.arguments.precision, "requested typing": metadata.arguments.typing}
    for name, text in [*texts.items(), *(("a warning", warning) for warning in metadata.warnings)]:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise TypeError(f"{name} is no text of at most {LONGEST} characters")
    if metadata.arguments.precision not in ENGINE_GRAPHS:
        raise ValueError(f"precision is {metadata.arguments.precision[:20]!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", metadata.plan_sha256) or not re.fullmatch(
        r"[0-9a-f]{64}", metadata.onnx_sha256
    ):
        raise ValueError("a digest is not 64 hexadecimal digits")
    counts = [metadata.layers.reformats]
    for counted in (metadata.layers.precision, metadata.layers.weighted):
        if not isinstance(counted, dict):
            raise TypeError("a count of layers is no object")
        counts += counted.values()
    for number in (
        metadata.plan_bytes,
        metadata.sm,
        *metadata.arguments.batch,
        metadata.arguments.workspace_mb,
        metadata.arguments.optimization_level,
        *counts,
    ):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 63:
            raise TypeError(f"{str(number)[:20]!r} is no whole number")
    if (
        isinstance(metadata.seconds, bool)
        or not isinstance(metadata.seconds, (int, float))
        or not 0 <= metadata.seconds < 1e9
    ):
        raise TypeError("seconds is no number")
    if len(metadata.arguments.batch) != 3 or not 1 <= min(metadata.arguments.batch):
        raise ValueError("batch is not three numbers")
