"""The metadata of an engine, a JSON file next to its plan: its graph, arguments, device, versions and layers.

The plan itself has no header, so that trtexec, Triton and DeepStream can open it. The layers are read from TensorRT's
engine inspector. A builder may run INT8 nodes with FP16 kernels without a message, and lose the gain to Reformat
layers. The inspector of TensorRT 10 gives each tensor one key `Format/Datatype` and lists `Bindings`; that of 11 has
`Format` and `Datatype` and lists `I/O Tensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedetr.artifacts import ENGINE_GRAPHS
from edgedetr.errors import EngineError
from edgedetr.runtime.kernels import Kernel
from edgedetr.runtime.tensorrt.gpu import Device
from edgedetr.storage.reading import parse_json, read_json

SCHEMA = 1
LARGEST = 1 << 20  # bytes of the metadata; a real file has some thousand
LONGEST = 2000  # characters of a string in it
REBUILD = "run: edgedetr build BUNDLE --force"

# Checked in this order: a layer with any INT8 input runs as INT8.
DATATYPES = (
    ("int8", re.compile(r"\bint8\b|\bi8\b", re.I)),
    ("fp8", re.compile(r"\bfp8\b|\be4m3\b", re.I)),
    ("fp16", re.compile(r"\b(fp16|half|float16|bf16|bfloat16)\b", re.I)),
    ("fp32", re.compile(r"\b(fp32|float|float32)\b", re.I)),
)
# TensorRT 10 describes INT64 tensors like this; INT8 tensors are "Row major Int8 format" (TensorRT issues 4048, 4020).
INT64 = "Row major linear INT8 format"
# Layers with weights or matrix products, which take most of the time: convolutions, GEMMs, fused attention.
WEIGHTED = re.compile(r"conv|gemm|matmul|matrix.?mult|fully.?connected|\bmha|attention", re.I)
# Layer types whose name does not tell their content. Not `kgen`: such kernels are never matrix products.
FUSED = ("", "myelin", "foreignnode", "caskfusion", "fusion")
# The operator at the end of an ONNX node name such as /encoder/0/MatMul_7; the parts before it can be anything.
PRODUCTS = re.compile(r"/(Conv|ConvTranspose|MatMul|Gemm)(_\d+)?(?![\w/])")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
NOT_COUNTED = re.compile(r"^(reformat|noop|constant|shape.?host.?to.?device|shape|signal|wait)", re.I)


@dataclass(frozen=True)
class LayerSummary:
    """Layers by the precision they run in: "int8", "fp8", "fp16" (bfloat16 too), "fp32" or "other" (integers).

    precision    all layers that compute
    weighted     the convolutions, matrix products and attention layers among them
    reformats    layers that only change layout or type
    """

    precision: dict[str, int] = field(default_factory=dict)
    weighted: dict[str, int] = field(default_factory=dict)
    reformats: int = 0

    @property
    def layers(self) -> int:
        return sum(self.precision.values())

    def fraction(self, precision: str) -> float | None:
        """Fraction of the weighted layers that run in this precision, 0..1; None where there are none."""
        total = sum(self.weighted.values())
        return self.weighted.get(precision, 0) / total if total else None


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


def summarize_layers(text: str) -> LayerSummary:
    """Count the layers of `get_engine_information(LayerInformationFormat.JSON)`."""
    layers = _layers(text)
    precision: Counter[str] = Counter()
    weighted: Counter[str] = Counter()
    reformats = 0
    for layer in layers:
        if not isinstance(layer, Mapping):  # the engine was built without detailed verbosity, which gives only names
            precision["unknown"] += 1
            continue
        kind = str(layer.get("LayerType", ""))
        if kind.lower().startswith("reformat"):
            reformats += 1
        elif not NOT_COUNTED.match(kind):
            found = _precision(layer)
            precision[found] += 1
            weighted[found] += _is_weighted(layer, kind)
    return LayerSummary(dict(precision), {name: count for name, count in weighted.items() if count}, reformats)


def kernels(text: str) -> list[Kernel]:
    """The layers with weights or matrix products of `get_engine_information(LayerInformationFormat.JSON)`."""
    found = []
    for layer in _layers(text):
        if isinstance(layer, Mapping):
            kind = str(layer.get("LayerType", ""))
            if not NOT_COUNTED.match(kind) and _is_weighted(layer, kind):
                found.append(Kernel(kind, _precision(layer) == "int8", _node_names(layer)))
    return found


def _node_names(layer: Mapping[str, object]) -> frozenset[str]:
    """The ONNX nodes of a layer: from its metadata, or else from its name, in which they are joined by " + "."""
    texts = [str(layer.get(key, "")) for key in ("Metadata", "Name")]
    named = [name for text in texts for name in ONNX_LAYER.findall(text)]
    return frozenset(named or texts[1].split(" + ")) - {""}


def _layers(text: str) -> list[object]:
    try:
        layers = parse_json(text, "its JSON", EngineError)["Layers"]
        if not isinstance(layers, list):
            raise TypeError("Layers is no list")
    except (EngineError, KeyError, TypeError) as error:
        raise EngineError(
            f"the engine inspector answered something unreadable ({error}); expected JSON with Layers; "
            "build with this version's own TensorRT: edgedetr build BUNDLE --force"
        ) from error
    return layers


def _is_weighted(layer: Mapping[str, object], kind: str) -> bool:
    if WEIGHTED.search(kind) or WEIGHTED.search(str(layer.get("ParameterType", ""))):
        return True
    return kind.lower() in FUSED and bool(PRODUCTS.search(f"{layer.get('Name', '')} {layer.get('Metadata', '')}"))


def _precision(layer: Mapping[str, object]) -> str:
    """By the type of the weights, where the inspector gives it: a residual input may have another type."""
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Type") and weights.get("Count"):
        types = [str(weights["Type"])]
    else:
        tensors = [*_list(layer.get("Inputs")), *([] if layer.get("Inputs") else _list(layer.get("Outputs")))]
        types = [_datatype(tensor) for tensor in tensors if isinstance(tensor, Mapping)]
    for name, pattern in DATATYPES:
        if any(pattern.search(text) for text in types):
            return name
    return "other"


def _datatype(tensor: Mapping[str, object]) -> str:
    text = str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    return "" if text.startswith(INT64) else text


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
