"""Convert a float32 graph to FP16 under strong typing: each node computes in one type, with Casts between the types.

FP16 has 11 bits and ends at 65504, so some nodes stay float32: those that compute indices, boxes and ranks, those whose
tensors were observed near the end of the range, and those that the caller names. Inputs and outputs stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import copy_without
from edgedetr.onnx_graph.hardware_limits import SMALLEST_FP16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.session import GraphSession

MAX_ABSMAX = 3e4  # a tensor that was observed larger stays float32: half of 65504, since other images exceed it
FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16

# Where features begin or end: a chain of coordinates is not followed through these.
_FEATURES = {
    "Conv",
    "ConvTranspose",
    "MatMul",
    "Gemm",
    "Einsum",
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "BatchNormalization",
    "Softmax",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Resize",
    "QuantizeLinear",
    "DequantizeLinear",
}
# Small differences of the argument matter, or the result is larger than the argument by orders of magnitude.
_STEEP = {"Exp", "Log", "Pow", "Reciprocal", "Sqrt", "Sin", "Cos", "Floor", "Ceil", "Round", "Mod", "CumSum", "Range"}
_NORMS = {"LayerNormalization", "GroupNormalization", "InstanceNormalization"}
_ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}  # inputs whose type ONNX fixes


@dataclass(frozen=True)
class Fp16Graph:
    """A converted graph, and {name of a node that stays float32: reason}."""

    model: ModelProto
    fp32_nodes: dict[str, str]


def convert_to_fp16(
    model: ModelProto, absmax: Mapping[str, float], keep_fp32: Mapping[str, str] | None = None
) -> Fp16Graph:
    """The same graph with FP16 inside; float32 inputs and outputs; names of nodes and tensors stay.

    absmax      largest magnitude observed of each float tensor; Q/DQ pairs need none of their own
    keep_fp32   {name of a node that must stay float32: reason}, beside those that the graph itself requires
    """
    return _Fp16Converter(model, absmax, keep_fp32 or {}).convert()


def float_tensors(graph: GraphIndex) -> set[str]:
    """Names of all float32 tensors that are no initializers."""
    return {name for name, kind in _types(graph).items() if kind == FP32} - graph.initializers.keys()


def activation_absmax(graph: GraphIndex, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """{float32 tensor: largest magnitude over the batches}. Errors: ExportError that names a NaN or infinite tensor.

    batches   [B, 3, H, W] float32, as the graph takes them

    The maxima are computed inside the graph, each behind the node that makes the tensor, so that no tensor is kept: an
    RT-DETR-R18 of 640 x 640 px takes 0.54 GB, and 1.14 GB with all maxima at the end.
    """
    names = sorted(float_tensors(graph))
    outputs = [f"{name}_{suffix}" for suffix in ("largest", "sum") for name in names]
    # Only a few images: to optimize a graph in which every tensor is an output takes longer than it saves.
    data = _with_magnitudes(graph, names, outputs).SerializeToString()  # only the bytes stay in memory
    session = GraphSession(data, outputs, lean=True, in_order=True)
    found = dict.fromkeys(names, 0.0)
    for batch in batches:
        values = session.run({"images": batch})
        for name in names:
            largest, total = values[f"{name}_largest"], values[f"{name}_sum"]
            if not np.isfinite(total):
                raise ExportError(
                    f"tensor {name!r} is {float(total)} on an image; expected finite activations; "
                    "train again from the last good checkpoint: edgedetr train --data DIR --resume"
                )
            if largest > -np.inf:  # -inf is the maximum of an empty tensor
                found[name] = max(found[name], float(largest))
    return found


def _with_magnitudes(graph: GraphIndex, names: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    """The graph with the magnitude of each of these tensors, behind the node that makes it; and these outputs."""
    probe, wanted = copy_without(graph.model, "node", "output"), set(names)
    body = probe.graph
    body.node.extend(part for name in names if name not in graph.producers for part in _magnitudes(name))
    for node in graph.nodes:
        body.node.append(node)
        body.node.extend(part for name in node.output if name in wanted for part in _magnitudes(name))
    body.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return probe


def _magnitudes(name: str) -> list[NodeProto]:
    """Nodes for the largest magnitude of a tensor and for their sum: ReduceMax can ignore NaN, ReduceSum cannot."""
    magnitude = f"{name}_magnitude"
    return [
        helper.make_node("Abs", [name], [magnitude]),
        helper.make_node("ReduceMax", [magnitude], [f"{name}_largest"], keepdims=0),
        helper.make_node("ReduceSum", [magnitude], [f"{name}_sum"], keepdims=0),
    ]


class _Fp16Converter:
    """Decides for every node, then writes the graph."""

    def __init__(self, model: ModelProto, absmax: Mapping[str, float], keep_fp32: Mapping[str, str]) -> None:
        self.model = _simplified(model)
        self.absmax, self.keep_fp32 = absmax, keep_fp32
        self.graph = GraphIndex(self.model)
        self.nodes = self.graph.nodes
        self.floats = {name for name, kind in _types(self.graph).items() if kind == FP32}
        self.position = {name: number for number, node in enumerate(self.nodes) for name in node.output}
        self.coordinates = self._coordinates()
        self.fp32 = self._fp32_nodes()

    # Which nodes stay float32.

    def _float_inputs(self, node: NodeProto) -> list[str]:
        """Float tensors and constants that a node computes with."""
        return [
            name for i, name in enumerate(node.input) if name in self.floats and (node.op_type, i) not in _ALWAYS_FLOAT
        ]

    def _is_feature(self, node: NodeProto) -> bool:
        """Whether chains of coordinates end at this node: it is a layer, or the bias of one."""
        if node.op_type in _FEATURES:
            return True
        if node.op_type != "Add":
            return False
        producers = [self.graph.producers.get(name) for name in node.input]
        return any(
            producer is not None and producer.op_type == "MatMul" and other in self.graph.initializers
            for producer, other in zip(producers, reversed(node.input))
        )

    def _coordinates(self) -> dict[int, str]:
        """Nodes before an index, a rank or a box, and nodes that compute with nothing but such values."""
        found: dict[int, str] = {}
        pending: list[tuple[str, str]] = [("boxes", "boxes are computed here")]
        for number, node in enumerate(self.nodes):
            floats = [name for name in node.input if name in self.floats]
            has_float_output = any(name in self.floats for name in node.output)
            if node.op_type == "TopK":
                found[number] = "ranks decide which queries there are"
                pending.append((node.input[0], found[number]))
            elif node.op_type == "GridSample":
                found[number] = "sampling locations"
                pending.append((node.input[1], found[number]))
            elif node.op_type in ("Cast", "ArgMax", "ArgMin", "NonZero") and floats and not has_float_output:
                found[number] = "an index is computed here"
                pending.append((floats[0], found[number]))
        while pending:
            tensor, reason = pending.pop()
            number = self.position.get(tensor, -1)
            if number < 0 or number in found or tensor not in self.floats or self._is_feature(self.nodes[number]):
                continue
            found[number] = reason
            pending += [(name, reason) for name in self._float_inputs(self.nodes[number])]
        inputs = {item.name for item in self.model.graph.input}
        for number, node in enumerate(self.nodes):  # in the order of the graph: producers come first
            if number in found or self._is_feature(node) or not any(name in self.floats for name in node.output):
                continue
            read = [name for name in self._float_inputs(node) if name not in self.graph.initializers]
            exact = [name in inputs or self.position.get(name, -1) in found for name in read]
            if node.op_type in _STEEP:
                found[number] = f"{node.op_type} is steep or unbounded"
            elif read and all(exact):
                found[number] = "computed from float32 values alone"
            elif node.op_type == "Div" and read[-1] == node.input[1] and exact[-1]:
                found[number] = "the divisor is a coordinate, which may be small"
        return found

    def _fp32_nodes(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for number, node in enumerate(self.nodes):
            reason = self.coordinates.get(number) or self._too_large(node) or self.keep_fp32.get(node.name)
            if reason and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                found[number] = reason
        for number in range(len(self.nodes) - 1, -1, -1):  # a pair has the type of the layer that reads it
            node = self.nodes[number]
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                readers = [self.position[reader.node.output[0]] for reader in self.graph.consumers[node.output[0]]]
                if any(
                    r in found and self.nodes[r].op_type in ("Conv", "MatMul", "Gemm", "DequantizeLinear")
                    for r in readers
                ):
                    found[number] = "its layer is float32"
        return found

    def _too_large(self, node: NodeProto) -> str:
        for name in [*self._float_inputs(node), *node.output]:
            if name in self.graph.initializers:
                values = self.graph.constant(name)
                absmax = float(np.abs(values).max()) if values.size else 0.0
                bias = name in node.input[2:] if node.op_type in _FEATURES else self._is_feature(node)
                if 0 < absmax < SMALLEST_FP16 and not bias:
                    return f"the constant {name} is {absmax:.2g}, below the smallest normal FP16 number"
            else:
                absmax = self._absmax(name)
            if not absmax <= MAX_ABSMAX:
                return f"{name} reaches {absmax:.3g}, FP16 ends at 65504"
        if node.op_type in _NORMS and self._absmax(node.input[0]) ** 2 > MAX_ABSMAX:
            return f"{node.input[0]} reaches {self._absmax(node.input[0]):.3g}, and its square would leave FP16"
        return ""

    def _absmax(self, name: str) -> float:
        """Largest magnitude seen; behind a pair, that of the tensor in front of it."""
        for _ in range(2):
            producer = self.graph.producers.get(name)
            if name not in self.absmax and producer and producer.op_type in ("QuantizeLinear", "DequantizeLinear"):
                name = producer.input[0]
        return self.absmax.get(name, 0.0)

    # Write the graph.

    def convert(self) -> Fp16Graph:
        self.made: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.types = {item.name: FP32 for item in self.model.graph.input if item.name in self.floats}
        self.casts: set[str] = set()
        outputs = {item.name for item in self.model.graph.output}
        for number, source in enumerate(self.nodes):
            kind = FP32 if number in self.fp32 else FP16
            node = NodeProto.FromString(source.SerializeToString())
            for i, name in enumerate(source.input):
                if name in self.floats:
                    node.input[i] = self._typed(name, FP32 if (node.op_type, i) in _ALWAYS_FLOAT else kind, node)
                elif name in self.graph.initializers:
                    self.constants[name] = self.graph.initializers[name]
            self._retype(node, kind)
            self.made.append(node)
            for i, name in enumerate(source.output):
                if name not in self.floats:
                    continue
                self.types[name] = kind
                if name in outputs and kind == FP16:
                    node.output[i] = f"{name}_half"
                    self.made.append(_cast(node.output[i], name, FP32))
                    self.types[name] = FP32
        result = copy_without(self.model, "node", "initializer", "value_info")
        graph = result.graph
        graph.node.extend(self.made)
        graph.initializer.extend(self.constants.values())
        return Fp16Graph(result, {self.nodes[number].name: reason for number, reason in self.fp32.items()})

    def _typed(self, name: str, kind: int, node: NodeProto) -> str:
        """Name of a float tensor in this type; adds a Cast or a converted constant where there is none yet."""
        if name in self.graph.initializers:
            if kind == FP32:
                self.constants[name] = self.graph.initializers[name]
                return name
            other = f"{name}_half"
            if other not in self.constants:
                values = self.graph.constant(name)
                rounded = values.astype(np.float16)
                scale = node.op_type in ("QuantizeLinear", "DequantizeLinear")
                if scale and not (np.array_equal(rounded, values) and (values >= SMALLEST_FP16).all()):
                    raise ExportError(
                        f"{name}: a scale is no normal FP16 number; expected scales of the TensorRT "
                        "target; quantize again: edgedetr export BUNDLE --int8"
                    )
                self.constants[other] = numpy_helper.from_array(rounded, other)
            return other
        if self.types[name] == kind:
            return name
        other = f"{name}_{'half' if kind == FP16 else 'float'}"
        if other not in self.casts:
            self.casts.add(other)
            self.made.append(_cast(name, other, kind))
        return other

    @staticmethod
    def _retype(node: NodeProto, kind: int) -> None:
        """Change the types in a node's attributes."""
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i == FP32:
                item.i = kind
            if node.op_type == "ConstantOfShape" and item.name == "value" and item.t.data_type == FP32:
                values = numpy_helper.to_array(item.t)
                item.t.CopyFrom(numpy_helper.from_array(values.astype(np.float16) if kind == FP16 else values))


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}_Cast", to=kind)


def _simplified(model: ModelProto) -> ModelProto:
    """A copy without Constant nodes and without Casts of float32 to float32."""
    result = ModelProto()
    result.CopyFrom(model)
    types = _types(GraphIndex(result))
    outputs = {item.name for item in result.graph.output}
    alias: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in result.graph.node:
        if any(item.HasField("g") for item in node.attribute):
            raise ExportError(
                f"{node.name}: {node.op_type} contains a subgraph; expected a graph without "
                "branches and loops; export it at a fixed size"
            )
        for i, name in enumerate(node.input):
            node.input[i] = alias.get(name, name)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = result.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        elif (
            node.op_type == "Cast"
            and types.get(node.input[0]) == types.get(node.output[0]) == FP32
            and (node.output[0] not in outputs)
        ):
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(NodeProto.FromString(node.SerializeToString()))
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def _types(graph: GraphIndex) -> dict[str, int]:
    """Element type of every tensor. Errors: ExportError where one cannot be inferred."""
    types = {name: tensor.data_type for name, tensor in graph.initializers.items()} | graph.types
    unknown = [name for node in graph.nodes for name in node.output if name and not types.get(name)]
    if unknown:
        raise ExportError(
            f"the type of tensor {unknown[0]!r} cannot be inferred; expected operators of the standard "
            "domain; lint the file: edgedetr lint FILE"
        )
    return types
