"""Write the quantized matrix products of a Q/DQ graph in the form that ONNX Runtime's CPU kernels run in integers.

ONNX Runtime joins a MatMul and the Add of its bias to a float Gemm before it looks for Q/DQ pairs, and the float bias
then keeps the Gemm from its integer kernel: the product costs rounding and gains nothing. What it does run in integers
(QGemm, with a float result) is a two-dimensional Gemm whose bias is int32 behind a DequantizeLinear:

    before   x_q -> DQ -> MatMul -> Add -> y
    after    x_q -> Reshape -> DQ -> Gemm -> Reshape -> y

Reshapes copy nothing. A Relu that is quantized right behind the product moves in front of the second Reshape, so that
the kernel writes integers. The arithmetic stays, up to the rounding of biases to int32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgedetr.onnx_graph.graph_edit import prune, replace_nodes
from edgedetr.onnx_graph.index import GraphIndex, float_attribute, int_attribute

INT32_MAX = 2**31 - 1


def integer_products(model: ModelProto) -> ModelProto:
    """A copy of a Q/DQ graph, with every MatMul or Gemm of two dequantized tensors as a Gemm with an int32 bias.

    A product stays as it is where the sizes of its input are not known (more than the batch is open), where its weight
    is not a dequantized constant [I, O], or where what a Gemm adds is not one constant per column. The Gemm has the
    name of the product, its result that of the sum.
    """
    writer = _Writer(GraphIndex(model))
    result = ModelProto()
    result.CopyFrom(model)
    replace_nodes(result, writer.nodes())
    result.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in writer.constants.items())
    prune(result)
    return result


@dataclass(frozen=True)
class _Product:
    """A product that becomes a Gemm.

    node, add, relu     the MatMul or Gemm, the Add of its bias, the Relu behind it whose output is quantized
    data, weight        the DequantizeLinear in front of either input
    bias                [O] float32 or None
    shape               sizes of the result, -1 for the open batch
    """

    node: NodeProto
    add: NodeProto | None
    relu: NodeProto | None
    data: NodeProto
    weight: NodeProto
    bias: np.ndarray | None
    shape: list[int]

    @property
    def name(self) -> str:
        """Of the node that gives the result: the last of these nodes, or a new one behind a product alone."""
        last = self.relu or self.add
        return last.name if last is not None else f"{self.node.name}/Reshape"

    @property
    def output(self) -> str:
        return str((self.relu or self.add or self.node).output[0])


@dataclass
class _Writer:
    """Builds the new node list. rows: {quantized tensor: the same with two dimensions}."""

    graph: GraphIndex
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    def nodes(self) -> list[NodeProto]:
        products = [found for node in self.graph.nodes if (found := _product(node, self.graph)) is not None]
        ends = {found.output: found for found in products}
        inside = {id(node) for found in products for node in (found.node, found.add, found.relu) if node is not None}
        quantizers = {id(self.graph.consumers[found.output][0].node) for found in products if found.relu is not None}
        written: list[NodeProto] = []
        for node in self.graph.nodes:
            made = next((ends[name] for name in node.output if name in ends), None)
            if made is not None:
                written += self._gemm(made)
            elif id(node) not in inside and id(node) not in quantizers:
                written.append(node)
        return written

    def _gemm(self, product: _Product) -> list[NodeProto]:
        """The nodes that compute a product; where it ends in a Relu, with the QuantizeLinear behind that."""
        node, name = product.node, product.node.name
        nodes: list[NodeProto] = []
        rows = self._rows_of(product.data.input[0], self.graph.shape(product.data.input[0]) or [], nodes)
        restored = f"{name}/rows_dequantized"
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [rows, *product.data.input[1:]], [restored], f"{name}/rows_DequantizeLinear"
            )
        )
        inputs = [restored, node.input[1], *self._bias(product, nodes)]
        flat = f"{product.output}/rows"
        gemm = helper.make_node("Gemm", inputs, [flat], name)
        if node.op_type == "Gemm":
            gemm.attribute.extend(node.attribute)
        gemm.metadata_props.extend(node.metadata_props)
        nodes.append(gemm)
        if product.relu is None:
            nodes.append(self._reshape(flat, product.output, product.shape, product.name))
            return nodes
        gemm.output[0] = f"{flat}/sum"
        nodes.append(helper.make_node("Relu", [gemm.output[0]], [flat], product.name))
        quantizer = self.graph.consumers[product.output][0].node
        quantized = f"{quantizer.output[0]}/rows"
        nodes.append(
            helper.make_node("QuantizeLinear", [flat, *quantizer.input[1:]], [quantized], f"{quantizer.name}/rows")
        )
        self.rows[quantizer.output[0]] = quantized
        nodes.append(self._reshape(quantized, quantizer.output[0], product.shape, quantizer.name))
        return nodes

    def _rows_of(self, quantized: str, shape: list[int | None], nodes: list[NodeProto]) -> str:
        """The quantized tensor [..., I] as [rows, I]; one Reshape for all its readers."""
        if len(shape) == 2:
            return quantized
        if quantized not in self.rows:
            self.rows[quantized] = f"{quantized}/rows"
            nodes.append(
                self._reshape(quantized, self.rows[quantized], [-1, int(shape[-1] or 0)], f"{quantized}/rows_Reshape")
            )
        return self.rows[quantized]

    def _bias(self, product: _Product, nodes: list[NodeProto]) -> list[str]:
        """The int32 bias behind a DequantizeLinear, as the inputs that it adds to a Gemm: one or none.

        Its scale is the input's times the weight's, one per column, as in the kernel's sums.
        """
        if product.bias is None:
            return []
        scales = (self.graph.constant(one.input[1]).astype(np.float64) for one in (product.data, product.weight))
        scale = np.prod(np.broadcast_arrays(*scales), axis=0).astype(np.float32)
        names = [f"{product.node.name}.bias_{word}" for word in ("quantized", "scale", "zero_point")]
        integers = np.clip(np.rint(product.bias / scale.astype(np.float64)), -INT32_MAX, INT32_MAX)
        zeros = np.zeros(scale.shape, np.int32)
        self.constants |= dict(zip(names, (integers.astype(np.int32), scale, zeros)))
        restored, name = f"{product.node.name}.bias_dequantized", f"{product.node.name}.bias_DequantizeLinear"
        nodes.append(helper.make_node("DequantizeLinear", names, [restored], name, axis=0))
        return [restored]

    def _reshape(self, source: str, target: str, shape: list[int], name: str) -> NodeProto:
        self.constants[f"{target}/shape"] = np.array(shape, np.int64)
        return helper.make_node("Reshape", [source, f"{target}/shape"], [target], name)


def _product(node: NodeProto, graph: GraphIndex) -> _Product | None:
    """The product that a node is, with the nodes behind it that join it; None where it cannot become a Gemm."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    data, weight = (graph.producers.get(name) for name in node.input[:2])
    if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    columns, shape = _columns(node, weight, graph), graph.shape(data.input[0])
    if columns is None or not shape or shape[1:].count(None) or graph.constant(data.input[1]).size != 1:
        return None
    add, bias = None, None
    if node.op_type == "Gemm":
        if int_attribute(node, "transA", 0) or float_attribute(node, "beta", 1.0) != 1.0:
            return None
        if len(node.input) > 2 and node.input[2]:
            bias = _row(node.input[2], columns, 2, graph)
            if bias is None:
                return None
    else:
        add = graph.only_consumer(node.output[0])
        rows = (_row(name, columns, len(shape), graph) for name in add.input) if add and add.op_type == "Add" else ()
        bias = next((row for row in rows if row is not None), None)
        add = None if bias is None else add
    sizes = [-1 if size is None else size for size in shape[:-1]]
    return _Product(node, add, _quantized_relu(add or node, graph), data, weight, bias, [*sizes, columns])


def _columns(node: NodeProto, weight: NodeProto, graph: GraphIndex) -> int | None:
    """Outputs O of a product, where its weight is a dequantized constant with one scale, or one per output."""
    values = graph.initializers.get(weight.input[0])
    if values is None or len(values.dims) != 2 or weight.input[1] not in graph.initializers:
        return None
    axis = 0 if int_attribute(node, "transB", 0) else 1
    scales = int(np.prod(graph.initializers[weight.input[1]].dims, dtype=np.int64))
    per_output = scales == values.dims[axis] and int_attribute(weight, "axis", 1) == axis
    return int(values.dims[axis]) if per_output or scales == 1 else None


def _row(name: str, columns: int, rank: int, graph: GraphIndex) -> np.ndarray | None:
    """A constant with one number per column and at most `rank` axes, as [O]; None for anything else."""
    tensor = graph.initializers.get(name)
    if tensor is None or not 0 < len(tensor.dims) <= rank:
        return None
    if tensor.dims[-1] != columns or np.prod(tensor.dims) != columns:
        return None
    return graph.constant(name).astype(np.float32).reshape(-1)


def _quantized_relu(node: NodeProto, graph: GraphIndex) -> NodeProto | None:
    """The Relu behind a node, where each of the two is read by one node and the Relu's output is quantized."""
    relu = graph.only_consumer(node.output[0])
    if relu is None or relu.op_type != "Relu":
        return None
    quantizer = graph.only_consumer(relu.output[0])
    return relu if quantizer is not None and quantizer.op_type == "QuantizeLinear" else None
