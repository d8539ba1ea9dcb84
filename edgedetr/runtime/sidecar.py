"""The JSON file beside a plan: what the engine was built from, with what, for which device, and what it became.

The plan itself stays raw, so that trtexec, Triton and DeepStream can open it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgedetr.errors import EngineError
from edgedetr.runtime.cudart import Device
from edgedetr.runtime.layers import LayerSummary

SCHEMA = 1
LARGEST = 1 << 20               # bytes of a sidecar; a real one has some thousand
REBUILD = "run: edgedetr build BUNDLE --force"
MACHINE_ID = Path("/etc/machine-id")
L4T_RELEASE = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class BuildArguments:
    """What decides about an engine besides its ONNX file and the device.

    batch    least, usual and largest number of pictures of a run; three equal numbers: one batch size
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

    host       digest of this machine's id; empty where the machine has none
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
    return (f"{arguments.precision}-b{arguments.batch_name}-sm{device.sm}-trt{tensorrt}-cu{device.runtime}-{name[:40]}-"
            f"{onnx_sha256:.8}-{hashlib.sha256(told.encode()).hexdigest():.8}")


def to_bytes(sidecar: Sidecar) -> bytes:
    """What stands in the file."""
    return (json.dumps(asdict(sidecar), indent=1) + "\n").encode()


def read(plan: Path) -> Sidecar | None:
    """The sidecar of `plan`; None when there is none, EngineError when it is damaged or of another kind."""
    path = beside(plan)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"schema is {raw.get('schema')!r}, this version reads {SCHEMA}")
        arguments = BuildArguments(**{**raw["arguments"], "batch": tuple(raw["arguments"]["batch"])})
        made = Sidecar(**{**raw, "arguments": arguments, "layers": LayerSummary(**raw["layers"]),
                          "warnings": tuple(raw["warnings"])})
        _require_types(made)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(f"{path}: damaged or of another kind ({error}); expected what edgedetr build writes beside "
                          f"an engine; {REBUILD}") from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror}); {REBUILD}") from error
    return made


def _require_types(made: Sidecar) -> None:
    texts = "plan plan_sha256 onnx onnx_sha256 tensorrt cuda driver jetpack device host typing"
    for name in texts.split():
        if not isinstance(getattr(made, name), str):
            raise TypeError(f"{name} is no text")
    if not re.fullmatch(r"[0-9a-f]{64}", made.plan_sha256) or not re.fullmatch(r"[0-9a-f]{64}", made.onnx_sha256):
        raise ValueError("a digest is not 64 hexadecimal digits")
    for number in (made.plan_bytes, made.sm, *made.arguments.batch):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{number!r} is no whole number")
    if len(made.arguments.batch) != 3:
        raise ValueError("batch is not three numbers")


def host() -> str:
    """A digest that is this machine's own, so that a plan that came from elsewhere is recognised; empty if unknown.

    The id itself is confidential (man machine-id), so only a digest with a word of our own is kept.
    """
    try:
        identity = MACHINE_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(f"edgedetr engine {identity}".encode()).hexdigest()[:16] if identity else ""


def jetpack() -> str:
    """The release of Jetson Linux, "R36.4.3" (JetPack 6.2); empty where this is no Jetson."""
    try:
        found = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", L4T_RELEASE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ""
    return f"R{found[1]}.{found[2]}" if found else ""
