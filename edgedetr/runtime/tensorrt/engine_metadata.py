"""The JSON file beside a plan: what the engine was built from, with what, for which device, and what it became.

The plan itself stays raw, so that trtexec, Triton and DeepStream can open it.
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
from edgedetr.runtime.tensorrt.cudart import Device
from edgedetr.runtime.tensorrt.inspector import LayerSummary
from edgedetr.storage.reading import read_json

SCHEMA = 1
LARGEST = 1 << 20  # bytes of a sidecar; a real one has some thousand
LONGEST = 2000  # characters of a text in it
REBUILD = "run: edgedetr build BUNDLE --force"


@dataclass(frozen=True)
class BuildArguments:
    """What decides about an engine besides its ONNX file and the device.

    batch    least, usual and largest number of images of a run; three equal numbers: one batch size
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
class Sidecar:
    """Everything that is known of one plan.

    host       digest of the id of the machine that built it (see machine.py); empty where that has none
    typing     what the network was in the end: "strong" or "weak"
    warnings   known defects that may concern this engine
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


def beside(plan: Path) -> Path:
    """The sidecar's path."""
    return plan.with_suffix(".json")


def stem(arguments: BuildArguments, device: Device, tensorrt: str, onnx_sha256: str) -> str:
    """`int8-b1-sm87-trt10.3.0-cu12.6-orin-1a2b3c4d-5e6f7a8b`: equal for equal engines, different for different ones."""
    told = json.dumps(asdict(arguments), sort_keys=True)
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") or "gpu"
    return (
        f"{arguments.precision}-b{arguments.batch_name}-sm{device.sm}-trt{tensorrt}-cu{device.runtime}-{name[:40]}-"
        f"{onnx_sha256:.8}-{hashlib.sha256(told.encode()).hexdigest():.8}"
    )


def to_bytes(sidecar: Sidecar) -> bytes:
    """What stands in the file."""
    return (json.dumps(asdict(sidecar), indent=1) + "\n").encode()


def read(plan: Path) -> Sidecar | None:
    """The sidecar of `plan`; None when there is none, EngineError when it is damaged or of another kind."""
    path = beside(plan)
    if not os.path.lexists(path):
        return None
    raw = read_json(path, EngineError, limit=LARGEST, fix=REBUILD)
    try:
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = repr(raw.get("schema"))[:40] if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"schema is {found}, this version reads {SCHEMA}")
        arguments, summary = (_mapping(raw, name) for name in ("arguments", "layers"))
        made = Sidecar(
            **{
                **raw,
                "arguments": BuildArguments(**{**arguments, "batch": tuple(arguments["batch"])}),
                "layers": LayerSummary(**summary),
                "warnings": tuple(raw["warnings"]),
            }
        )
        _require_types(made)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: damaged or of another kind ({error}); expected what edgedetr build writes beside "
            f"an engine; {REBUILD}"
        ) from error
    return made


def _mapping(raw: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(raw.get(name), dict):
        raise TypeError(f"{name} is no object")
    return raw[name]  # type: ignore[no-any-return]  # checked above


def _require_types(made: Sidecar) -> None:
    texts = {
        name: getattr(made, name)
        for name in ("plan plan_sha256 onnx onnx_sha256 tensorrt cuda driver jetpack device host typing").split()
    }
    texts |= {"precision": made.arguments.precision, "typing asked for": made.arguments.typing}
    for name, text in [*texts.items(), *(("a warning", warning) for warning in made.warnings)]:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise TypeError(f"{name} is no text of at most {LONGEST} characters")
    if made.arguments.precision not in ENGINE_GRAPHS:
        raise ValueError(f"precision is {made.arguments.precision[:20]!r}")
    if not re.fullmatch(r"[0-9a-f]{64}", made.plan_sha256) or not re.fullmatch(r"[0-9a-f]{64}", made.onnx_sha256):
        raise ValueError("a digest is not 64 hexadecimal digits")
    counts = [made.layers.reformats]
    for counted in (made.layers.precision, made.layers.weighted):
        if not isinstance(counted, dict):
            raise TypeError("a count of layers is no object")
        counts += counted.values()
    for number in (
        made.plan_bytes,
        made.sm,
        *made.arguments.batch,
        made.arguments.workspace_mb,
        made.arguments.optimization_level,
        *counts,
    ):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 63:
            raise TypeError(f"{str(number)[:20]!r} is no whole number")
    if isinstance(made.seconds, bool) or not isinstance(made.seconds, (int, float)) or not 0 <= made.seconds < 1e9:
        raise TypeError("seconds is no number")
    if len(made.arguments.batch) != 3 or not 1 <= min(made.arguments.batch):
        raise ValueError("batch is not three numbers")
