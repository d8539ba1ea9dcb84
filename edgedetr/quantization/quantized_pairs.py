"""The pairs of Q and DQ in a quantized graph, each with the tensor of the float graph that it rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from edgedetr.onnx_graph.index import GraphIndex

MOVES = ("Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class QuantizedPair:
    """A QuantizeLinear and a DequantizeLinear that reads it; `tensor` is the float graph's name of what they round."""

    tensor: str
    quantize: NodeProto
    dequantize: NodeProto


def pairs_of(graph: GraphIndex, plain: GraphIndex) -> Iterator[QuantizedPair]:
    """The pairs of a quantized graph with constant scales, one for a whole tensor.

    plain   the float graph that was quantized; its tensors have the same names

    A Concat that passes integers is between the Qs of its inputs and one DQ: they are the pair of the Concat's output.
    """
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear":
            continue
        producer = graph.producers.get(_source(graph, node.input[0], stop=("QuantizeLinear",)))
        joined = [producer]
        if producer is not None and producer.op_type == "Concat":
            joined = [graph.producers.get(_source(graph, name, stop=("QuantizeLinear",))) for name in producer.input]
        quantizers = [one for one in joined if one is not None and one.op_type == "QuantizeLinear"]
        if len(quantizers) < len(joined) or not _is_whole(*quantizers, node, graph=graph):
            continue
        read = [_float_tensor(graph, plain, one.input[0]) for one in quantizers]
        tensor = read[0] if producer is quantizers[0] else _concat_of(read, plain)
        if tensor:
            yield QuantizedPair(tensor, quantizers[0], node)


def _float_tensor(graph: GraphIndex, plain: GraphIndex, tensor: str) -> str:
    """The float graph's name of a tensor, or of the one that it was moved from; "" where it has none."""
    while tensor not in plain.producers and tensor not in plain.inputs and tensor in graph.producers:
        before = graph.producers[tensor]
        if before.op_type not in MOVES:
            break
        tensor = before.input[0]
    return tensor if tensor in plain.producers or tensor in plain.inputs else ""


def _concat_of(tensors: Sequence[str], plain: GraphIndex) -> str:
    """The output of the float graph's Concat of these tensors; "" where it has none."""
    readers = plain.consumers.get(tensors[0], [])
    concats = [one.node for one in readers if one.node.op_type == "Concat" and list(one.node.input) == list(tensors)]
    return concats[0].output[0] if concats else ""


def _is_whole(*pair: NodeProto, graph: GraphIndex) -> bool:
    """Whether scales and zero points are constants, one for the whole tensor."""
    values = [graph.value(name) for node in pair for name in node.input[1:] if name]
    return all(value is not None and value.size == 1 for value in values)


def _source(graph: GraphIndex, tensor: str, stop: Sequence[str]) -> str:
    """The tensor before the moves of elements that lead to this one."""
    while (node := graph.producers.get(tensor)) is not None and node.op_type not in stop and node.op_type in MOVES:
        tensor = node.input[0]
    return tensor
