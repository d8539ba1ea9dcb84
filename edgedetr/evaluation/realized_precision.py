"""Which quantized layers of a graph a backend really runs in integers, and which it runs in floats.

A graph says with Q/DQ pairs where integers are meant. A library may still compute such a layer in floats, without a
message: then the layer has lost its accuracy and gained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.runtime import onnx_bytes
from edgedetr.runtime.backends import base
from edgedetr.runtime.kernels import Kernel
from edgedetr.runtime.onnx_bytes import GraphNode, read
from edgedetr.runtime.tensorrt import engine_layers

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# Nodes between DequantizeLinear and a layer that change the form of a tensor and not its values.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Identity")
CHAIN = 4  # nodes behind a layer that a library may fuse with it: bias, activation (two for SiLU), QuantizeLinear
MOST_NAMED = 3  # layers in one sentence


@dataclass(frozen=True)
class RealizedPrecision:
    """What became of the quantized layers of one graph on one backend.

    quantized     number of convolutions and matrix products whose two factors are quantized
    in_integers   number of those that run in integers
    in_floats     {node: the float kernel that it became, with the reason where it is known}
    unknown       nodes of whose kernel the library says nothing
    """

    quantized: int
    in_integers: int
    in_floats: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        unknown = f", {len(self.unknown)} unknown" if self.unknown else ""
        return f"{self.in_integers} of {self.quantized} quantized layers in integers{unknown}"

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "in_floats": dict(self.in_floats), "unknown": list(self.unknown)}

    def finding(self) -> str:
        """One sentence about the layers that run in floats, a few of them by name; "" where there are none."""
        if not self.in_floats:
            return ""
        by_kernel: dict[str, list[str]] = {}
        for node, kernel in self.in_floats.items():
            by_kernel.setdefault(kernel, []).append(node)
        parts = []
        for kernel, nodes in by_kernel.items():
            more = f" and {len(nodes) - MOST_NAMED} more" if len(nodes) > MOST_NAMED else ""
            parts.append(f"{', '.join(nodes[:MOST_NAMED])}{more} as {kernel}")
        return f"{len(self.in_floats)} of {self.quantized} quantized layers run in floats: {'; '.join(parts)}"


def realized_precision(
    model: str | Path | bytes, backend: str, *, threads: int | None = None
) -> RealizedPrecision | None:
    """What the quantized layers of an ONNX file run as; None for a graph without any, or a backend that cannot tell.

    model   the file, or its bytes
    Errors: BundleError where the backend cannot load it.
    """
    data = model if isinstance(model, bytes) else read(model)[0]
    layers = quantized_layers(onnx_bytes.nodes(data))
    found = base.get(backend)
    if not layers or found.kernels is None:
        return None
    return compare(layers, found.kernels(data, threads=threads), found.why_float)


def realized_by_engine(graph: Path, layers: str) -> RealizedPrecision | None:
    """As realized_precision, for a TensorRT engine.

    graph    the ONNX file that it was built from
    layers   what the engine inspector says of it, JSON
    Errors: BundleError, EngineError.
    """
    quantized = quantized_layers(onnx_bytes.nodes(read(graph)[0]))
    return compare(quantized, engine_layers.kernels(layers)) if quantized else None


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer whose two factors are quantized.

    weight   the quantized tensor of its second factor
    after    names of the layer's output, and of the nodes and tensors that follow it one by one
    """

    node: str
    weight: str
    after: tuple[str, ...]


def quantized_layers(graph: Sequence[GraphNode]) -> list[QuantizedLayer]:
    """The convolutions and matrix products of a graph that read two dequantized tensors."""
    producers = {name: node for node in graph for name in node.outputs}
    consumers: dict[str, list[GraphNode]] = {}
    for node in graph:
        for name in node.inputs:
            consumers.setdefault(name, []).append(node)
    found = []
    for node in graph:
        if node.operator in LAYERS:
            factors = [_quantized(name, producers) for name in node.inputs[:2]]
            if len(factors) == 2 and all(factors):
                found.append(QuantizedLayer(node.name, factors[1], _after(node, consumers)))
    return found


def _quantized(tensor: str, producers: Mapping[str, GraphNode]) -> str:
    """The tensor of integers that `tensor` is made of; "" where it is made of floats."""
    node = producers.get(tensor)
    while node is not None and node.operator in MOVES and node.inputs:
        node = producers.get(node.inputs[0])
    return node.inputs[0] if node is not None and node.operator == "DequantizeLinear" else ""


def _after(node: GraphNode, consumers: Mapping[str, list[GraphNode]]) -> tuple[str, ...]:
    found = [node.outputs[0]]
    for _ in range(CHAIN):
        following = {id(consumer): consumer for consumer in consumers.get(node.outputs[0], [])}
        if len(following) != 1:
            break
        node = next(iter(following.values()))
        if node.operator in LAYERS or not node.outputs:
            break
        found += [node.name, node.outputs[0]]
    return tuple(found)


def compare(
    layers: Sequence[QuantizedLayer], kernels: Sequence[Kernel], why_float: Mapping[str, str] | None = None
) -> RealizedPrecision:
    """Find each layer's kernel: by its weight, by its name, then by what follows the layer.

    why_float   {operator of a kernel: why a quantized layer became it}
    """
    by_name: dict[str, Kernel] = {}
    for kernel in kernels:
        for name in kernel.names:
            # Two kernels can share a tensor, as one's output and the other's input; integers are the stronger claim.
            if name not in by_name or kernel.integers:
                by_name[name] = kernel
    in_floats: dict[str, str] = {}
    unknown = []
    for layer in layers:
        found = next((by_name[name] for name in (layer.weight, layer.node, *layer.after) if name in by_name), None)
        if found is None:
            unknown.append(layer.node)
        elif not found.integers:
            reason = (why_float or {}).get(found.operator)
            in_floats[layer.node] = f"{found.operator} ({reason})" if reason else found.operator
    known = len(layers) - len(unknown)
    return RealizedPrecision(len(layers), known - len(in_floats), in_floats, tuple(unknown))
