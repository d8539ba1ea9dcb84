"""A graph with FP16 in it as a float32 graph that rounds like FP16: what a CPU has to run to show what a GPU would do.

CPU libraries compute float16 graphs in float32 and round late or never, so that 300 * 300 * 1e-3 gives 90 and not
infinity. The twin has the same nodes in float32, and behind each that computes a pair of Casts, to float16 and back.
Weights keep their FP16 values. INT8 stays INT8: kernels read the integers, so what is dequantized is not rounded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedetr.errors import MissingDependency
from edgedetr.packages import missing
from edgedetr.runtime.backends.onnx_bytes import load

# They give values that they read, so what they give is FP16 already.
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
    """The float32 twin of an ONNX file, serialized; a graph without float16 comes back as it is.

    To be run without optimizations: a library may take the pairs for something that can be left out.
    rounded   False: without the pairs, the same function in float32
    """
    onnx = _onnx()
    model = load(path)
    return _Twin(onnx, model, rounded).write() if _half(onnx, model) else model.SerializeToString()


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency(f"FP16 is judged on a graph made with onnx; {missing('onnx', error)}") from error
    return onnx


def _half(onnx: Any, model: Any) -> bool:
    graph, half = model.graph, onnx.TensorProto.FLOAT16
    return (
        any(item.data_type == half for item in graph.initializer)
        or any(item.type.tensor_type.elem_type == half for item in graph.input)
        or any(item.name == "to" and item.i == half for node in graph.node for item in node.attribute)
    )


class _Twin:
    """Writes the twin, one node after the other."""

    def __init__(self, onnx: Any, model: Any, rounded: bool) -> None:
        self.onnx, self.model, self.rounded = onnx, model, rounded
        self.float, self.half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.halves = {
            item.name
            for item in (*inferred.value_info, *inferred.output, *inferred.input)
            if item.type.tensor_type.elem_type == self.half
        }
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
            if item.data_type == self.half:
                values = self.onnx.numpy_helper.to_array(item).astype("float32")
                item = self.onnx.numpy_helper.from_array(values, item.name)
            graph.initializer.append(item)
        for item in (*graph.input, *graph.output):
            if item.type.tensor_type.elem_type == self.half:
                item.type.tensor_type.elem_type = self.float
        return bytes(result.SerializeToString())

    def _node(self, source: Any) -> None:
        node = self.onnx.NodeProto()
        node.CopyFrom(source)
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to" and item.i == self.half:
                item.i = self.float
            if item.HasField("t") and item.t.data_type == self.half:
                values = self.onnx.numpy_helper.to_array(item.t).astype("float32")
                item.t.CopyFrom(self.onnx.numpy_helper.from_array(values, item.t.name))
        self.nodes.append(node)
        if not self.rounded or node.op_type in MOVES or node.op_type == "DequantizeLinear":
            return
        for index, name in enumerate(source.output):
            if name not in self.halves:
                continue
            node.output[index] = f"{name}_unrounded"
            for kind, read, given in (
                (self.half, f"{name}_unrounded", f"{name}_rounded"),
                (self.float, f"{name}_rounded", name),
            ):
                self.nodes.append(self.onnx.helper.make_node("Cast", [read], [given], f"{given}_pair", to=kind))
