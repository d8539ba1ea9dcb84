"""FP16 simulation: rewrite a graph with FP16 as a float32 graph that rounds where a GPU rounds, to be run on a CPU.

CPU libraries compute float16 graphs in float32 and round late or never, so that 300 * 300 * 1e-3 gives 90 and not
infinity. The simulation has the same nodes in float32, and a pair of Casts, to float16 and back, behind each node that
computes. Weights keep their FP16 values. INT8 stays INT8: integer kernels read the integers, so a dequantized tensor is
not rounded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedetr.errors import MissingDependency
from edgedetr.packages import missing

# Operators whose output values are input values, and so are already FP16.
MOVES = {
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "Split",
    "Slice",
    "Gather",
    "GatherND",
    "GatherElements",
    "Expand",
    "Tile",
    "Identity",
    "Relu",
    "MaxPool",
    "Pad",
    "Neg",
    "Abs",
    "Where",
    "Max",
    "Min",
    "Clip",
    "TopK",
    "ReduceMax",
    "ReduceMin",
    "DepthToSpace",
    "SpaceToDepth",
}


def simulate_fp16(path: Path, *, rounded: bool = True) -> bytes:
    """The float32 simulation of an ONNX file, serialized; a graph without float16 comes back unchanged.

    Run it without optimizations, because a library may remove the pairs of Casts as redundant.
    rounded   False: without the pairs, the same function in float32
    """
    onnx = _onnx()
    from edgedetr.onnx_graph.io import read_bundle_graph  # needs onnx, which a device that verifies engines lacks

    model = read_bundle_graph(path)
    return _Simulation(onnx, model, rounded).write() if _has_fp16(onnx, model) else model.SerializeToString()


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency(f"onnx writes the graph on which FP16 is judged; {missing('onnx', error)}") from error
    return onnx


def _has_fp16(onnx: Any, model: Any) -> bool:
    graph, fp16 = model.graph, onnx.TensorProto.FLOAT16
    return (
        any(item.data_type == fp16 for item in graph.initializer)
        or any(item.type.tensor_type.elem_type == fp16 for item in graph.input)
        or any(item.name == "to" and item.i == fp16 for node in graph.node for item in node.attribute)
    )


class _Simulation:
    """Writes the simulation, one node after the other."""

    def __init__(self, onnx: Any, model: Any, rounded: bool) -> None:
        self.onnx, self.model, self.rounded = onnx, model, rounded
        self.fp32, self.fp16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        from edgedetr.onnx_graph.infer import infer_types  # needs onnx, which this module does not until it converts

        self.fp16_tensors = {name for name, kind in infer_types(model).types.items() if kind == self.fp16}
        self.nodes: list[Any] = []

    def write(self) -> bytes:
        source = self.model.graph
        for node in source.node:
            self._node(node)
        result = self.onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        for item in source.initializer:
            if item.data_type == self.fp16:
                values = self.onnx.numpy_helper.to_array(item).astype("float32")
                item = self.onnx.numpy_helper.from_array(values, item.name)
            graph.initializer.append(item)
        for item in (*graph.input, *graph.output):
            if item.type.tensor_type.elem_type == self.fp16:
                item.type.tensor_type.elem_type = self.fp32
        return bytes(result.SerializeToString())

    def _node(self, source: Any) -> None:
        node = self.onnx.NodeProto()
        node.CopyFrom(source)
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i == self.fp16:
                item.i = self.fp32
            if item.HasField("t") and item.t.data_type == self.fp16:
                values = self.onnx.numpy_helper.to_array(item.t).astype("float32")
                item.t.CopyFrom(self.onnx.numpy_helper.from_array(values, item.t.name))
        self.nodes.append(node)
        if not self.rounded or node.op_type in MOVES or node.op_type == "DequantizeLinear":
            return
        for index, name in enumerate(source.output):
            if name not in self.fp16_tensors:
                continue
            node.output[index] = f"{name}_unrounded"
            self._cast(f"{name}_unrounded", f"{name}_rounded", self.fp16)
            self._cast(f"{name}_rounded", name, self.fp32)

    def _cast(self, source: str, result: str, kind: int) -> None:
        self.nodes.append(self.onnx.helper.make_node("Cast", [source], [result], f"{result}_pair", to=kind))
