"""What an engine really does, layer by layer, from the text of TensorRT's engine inspector.

A builder may answer INT8 nodes with FP16 kernels and say nothing, and spend the gain on Reformat layers. The inspector
of TensorRT 10 gives each tensor one key `Format/Datatype` and lists `Bindings`; that of 11 has `Format` and `Datatype`
and lists `I/O Tensors`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgedetr.errors import EngineError
from edgedetr.storage.reading import parse_json

# In the order of the check: a layer that takes any INT8 tensor runs as INT8.
DATATYPES = (
    ("int8", re.compile(r"\bint8\b|\bi8\b", re.I)),
    ("fp8", re.compile(r"\bfp8\b|\be4m3\b", re.I)),
    ("fp16", re.compile(r"\b(fp16|half|float16|bf16|bfloat16)\b", re.I)),
    ("fp32", re.compile(r"\b(fp32|float|float32)\b", re.I)),
)
# TensorRT 10 words an INT64 tensor so; INT8 tensors are "Row major Int8 format" (NVIDIA/TensorRT issues 4048, 4020).
INT64 = "Row major linear INT8 format"
# Layers with weights or products of matrices, where the time goes: convolutions, GEMMs, fused attention.
WEIGHTED = re.compile(r"conv|gemm|matmul|matrix.?mult|fully.?connected|\bmha|attention", re.I)
# Types that hide what is inside; `kgen` is not one: such kernels are generated for everything but products of matrices.
FUSED = ("", "myelin", "foreignnode", "caskfusion", "fusion")
# The operators among ONNX node names like /encoder/0/MatMul_7, which end such a name; folders may be called anything.
PRODUCTS = re.compile(r"/(Conv|ConvTranspose|MatMul|Gemm)(_\d+)?(?![\w/])")
NOT_COUNTED = re.compile(r"^(reformat|noop|constant|shape.?host.?to.?device|shape|signal|wait)", re.I)


@dataclass(frozen=True)
class LayerSummary:
    """Layers by the precision they run in: "int8", "fp8", "fp16" (bfloat16 too), "fp32" or "other" (integers).

    precision    all layers that compute
    weighted     those of them that are convolutions, products of matrices or attention
    reformats    layers that only change layout or type
    """

    precision: dict[str, int] = field(default_factory=dict)
    weighted: dict[str, int] = field(default_factory=dict)
    reformats: int = 0

    @property
    def layers(self) -> int:
        return sum(self.precision.values())

    def share(self, precision: str) -> float | None:
        """Share of the weighted layers that run in this precision, 0..1; None when there are none."""
        total = sum(self.weighted.values())
        return self.weighted.get(precision, 0) / total if total else None


def summarize(text: str) -> LayerSummary:
    """Count the layers of `get_engine_information(LayerInformationFormat.JSON)`."""
    try:
        layers = parse_json(text, "its JSON", EngineError)["Layers"]
        if not isinstance(layers, list):
            raise TypeError("Layers is no list")
    except (EngineError, KeyError, TypeError) as error:
        raise EngineError(
            f"the engine inspector answered something unreadable ({error}); expected JSON with Layers; "
            "build with this version's own TensorRT: edgedetr build BUNDLE --force"
        ) from error
    precision: Counter[str] = Counter()
    weighted: Counter[str] = Counter()
    reformats = 0
    for layer in layers:
        if not isinstance(layer, Mapping):  # only names: the engine was built without detailed verbosity
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


def _is_weighted(layer: Mapping[str, object], kind: str) -> bool:
    if WEIGHTED.search(kind) or WEIGHTED.search(str(layer.get("ParameterType", ""))):
        return True
    return kind.lower() in FUSED and bool(PRODUCTS.search(f"{layer.get('Name', '')} {layer.get('Metadata', '')}"))


def _precision(layer: Mapping[str, object]) -> str:
    """By the type of the weights where it is told; a residual input of a convolution may have another one."""
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Type") and weights.get("Count"):
        told = [str(weights["Type"])]
    else:
        tensors = [*_list(layer.get("Inputs")), *([] if layer.get("Inputs") else _list(layer.get("Outputs")))]
        told = [_datatype(tensor) for tensor in tensors if isinstance(tensor, Mapping)]
    for name, pattern in DATATYPES:
        if any(pattern.search(text) for text in told):
            return name
    return "other"


def _datatype(tensor: Mapping[str, object]) -> str:
    text = str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or "")
    return "" if text.startswith(INT64) else text


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
