"""The layers of an engine as TensorRT's engine inspector describes them, in the form of TensorRT 10 and of 11.

A builder may run INT8 nodes with FP16 kernels without a message, and lose the gain to Reformat layers. The inspector of
TensorRT 10 gives each tensor one key `Format/Datatype` and lists `Bindings`; that of 11 has `Format` and `Datatype` and
lists `I/O Tensors`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from edgedetr.errors import EngineError
from edgedetr.runtime.kernels import Kernel
from edgedetr.storage.reading import parse_json

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
JOINED = re.compile(r" (?:\+|\|\|) ")  # nodes of a layer: one after the other, or side by side
REFORMAT_OF = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to (.+)", re.S)
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
class InspectedLayer:
    """One layer as the engine inspector describes it.

    nodes       ONNX nodes that it stands for, in its order
    reformats   whether it only changes the layout or the type of a tensor
    source, target   precision of its first input and of its first output; "other" where there is none
    tensor, elements   name and number of elements of its first input; "" and 0 where there is none
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    reformats: bool
    source: str
    target: str
    tensor: str
    elements: int

    @property
    def converts_for(self) -> str:
        """Of "Reformatting CopyNode for Input Tensor 0 to LAYER": the layer; "" for other names."""
        found = REFORMAT_OF.match(self.name)
        return found[1] if found else ""


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
                found.append(Kernel(kind, _precision(layer) == "int8", frozenset(_node_names(layer))))
    return found


def inspected_layers(text: str) -> list[InspectedLayer]:
    """Every layer of `get_engine_information(LayerInformationFormat.JSON)` that is described in detail."""
    found = []
    for layer in _layers(text):
        if isinstance(layer, Mapping):
            kind = str(layer.get("LayerType", ""))
            reformats = kind.lower().startswith("reformat")
            # The name of a reformat is no list of nodes.
            nodes = _node_names({"Metadata": layer.get("Metadata", "")} if reformats else layer)
            first, last = (next(iter(_list(layer.get(side))), None) for side in ("Inputs", "Outputs"))
            source, target = (_tensor_precision(tensor) for tensor in (first, last))
            name, elements = _tensor_size(first)
            found.append(
                InspectedLayer(str(layer.get("Name", "")), kind, nodes, reformats, source, target, name, elements)
            )
    return found


def _tensor_precision(tensor: object) -> str:
    text = _datatype(tensor) if isinstance(tensor, Mapping) else ""
    return next((name for name, pattern in DATATYPES if pattern.search(text)), "other")


def _tensor_size(tensor: object) -> tuple[str, int]:
    """Name and number of elements of a tensor; an open dimension counts as 1."""
    if not isinstance(tensor, Mapping):
        return "", 0
    sizes = [size for size in _list(tensor.get("Dimensions")) if isinstance(size, int)]
    return str(tensor.get("Name", "")), prod(max(1, size) for size in sizes) if sizes else 0


def _node_names(layer: Mapping[str, object]) -> tuple[str, ...]:
    """The ONNX nodes of a layer: from its metadata, or else from its name."""
    texts = [str(layer.get(key, "")) for key in ("Metadata", "Name")]
    named = [name for text in texts for name in ONNX_LAYER.findall(text)]
    return tuple(dict.fromkeys(filter(None, named or JOINED.split(texts[1]))))


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
