"""Constant folding of an exported graph: shapes that are known, and everything computed from constants alone.

The PyTorch exporter writes `x.shape` as nodes even where the size is fixed. Folding them is what leaves positions,
anchors and reshapes as plain constants.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.control_flow import branch, captured, first_line
from edgedetr.runtime.backends.onnxruntime import plain_session

# With a larger result nothing is folded: it must not inflate the file (the largest wanted are positions, S x C).
LARGEST = 1 << 23  # elements
PASSES = 12  # each pass resolves the shapes one dependency further; 3 to 5 are used in practice
_SMALL = 4096  # elements; larger weights do not take part in shape inference
_TRIED = 97, 101  # batch sizes that no other size of a graph is a multiple of by chance
_NEVER = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "If", "Loop", "Scan"}


def fold(model: ModelProto) -> ModelProto:
    """The same function with fewer nodes; names of the remaining nodes and tensors stay."""
    result = ModelProto()
    result.CopyFrom(model)
    _constants_to_initializers(result)
    for _ in range(PASSES):
        before = len(result.graph.node)
        _remove_identities(result)
        _fold_constants(result)
        settled = _fold_shapes(result)
        if not settled and len(result.graph.node) == before:
            break
    remove_unused(result)
    return result


def _constants_to_initializers(model: ModelProto) -> None:
    graph, kept = model.graph, []
    for node in graph.node:
        tensor = _constant_of(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    _replace_nodes(model, kept)


def _constant_of(node: NodeProto) -> TensorProto | None:
    """The value of a Constant as a tensor; None for text and for what is sparse."""
    tensor = TensorProto()
    for item in node.attribute:
        if item.name == "value":
            tensor.CopyFrom(item.t)
            return tensor
        if item.name in ("value_int", "value_ints"):
            value = np.array(item.ints if item.name.endswith("s") else item.i, np.int64)
            return numpy_helper.from_array(value)
        if item.name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.array(item.floats if item.name.endswith("s") else item.f, np.float32))
    return None


def _remove_identities(model: ModelProto) -> None:
    """Identity, where it is no graph output and no graph of control flow reads it."""
    outputs = {item.name for item in model.graph.output}
    outputs.update(*(captured(node) for node in model.graph.node))
    alias: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _replace_nodes(model, kept)


def _fold_constants(model: ModelProto) -> None:
    """Evaluate every node whose inputs are all constant, in one ONNX Runtime run."""
    graph = model.graph
    outputs = {item.name for item in graph.output}
    known = {tensor.name: tensor for tensor in graph.initializer}
    available, foldable, kept = set(known), [], []
    for node in graph.node:
        constant = node.op_type not in _NEVER and all(name in available for name in node.input if name)
        if constant and not any(name in outputs for name in node.output):
            foldable.append(node)
            available.update(node.output)
        else:
            kept.append(node)
    if not foldable:
        return
    read = {name for node in kept for name in [*node.input, *captured(node)]}
    wanted = read & {name for node in foldable for name in node.output}
    used = {name for node in foldable for name in node.input}
    values = _evaluate(model, foldable, [known[name] for name in sorted(used & set(known))], sorted(wanted))
    if any(value.size > LARGEST for value in values.values()):
        return
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    _replace_nodes(model, kept)


def _evaluate(
    model: ModelProto, nodes: list[NodeProto], constants: list[TensorProto], wanted: list[str]
) -> dict[str, np.ndarray]:
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    graph = helper.make_graph(nodes, "constants", [], outputs, constants)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = plain_session(part.SerializeToString(), threads=1, error=ExportError, fix="export the model again")
    try:
        return dict(zip(wanted, session.run(wanted, {}))) if wanted else {}
    except Exception as error:  # the library's exceptions share no public base class
        raise ExportError(
            f"what the graph computes from constants alone does not run in ONNX Runtime "
            f"({first_line(error)}); expected a valid graph; export the model again"
        ) from error


def _fold_shapes(model: ModelProto) -> bool:
    """Fold the Shape of a tensor whose size is known; where the batch alone is open, one known dimension of it.

    return  whether the sizes that a Reshape or an Expand goes to were settled, so that more may be known now
    """
    dims = _known_dims(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kept, settled, open_batch = [], False, _open_batch(model)
    for node in model.graph.node:
        value = None
        if node.op_type == "Shape":
            shape = dims.get(node.input[0])
            part = None if shape is None else shape[part_of(node, len(shape))]
            if part is not None and all(size is not None for size in part):
                value = np.array(part, dtype=np.int64)
        elif node.op_type == "Gather" and node.input[1] in constants:
            maker = makers.get(node.input[0])
            shape = dims.get(maker.input[0]) if maker is not None and maker.op_type == "Shape" else None
            index = numpy_helper.to_array(constants[node.input[1]])
            if shape is not None and maker is not None and index.ndim == 0:
                sizes = shape[part_of(maker, len(shape))]
                size = sizes[int(index)] if -len(sizes) <= int(index) < len(sizes) else None
                value = None if size is None else np.array(size, dtype=np.int64)
        elif node.op_type == "If" and node.input[0] in constants:
            kept += branch(model, node, bool(numpy_helper.to_array(constants[node.input[0]]).all()))
            settled = True
            continue
        elif open_batch and node.op_type == "Reshape" and node.input[1] not in constants:
            shape = dims.get(node.output[0])
            if shape is not None and shape.count(None) == 1 and 0 not in shape:
                # One open dimension is what is left of the elements; no need to compute it.
                told = np.array([-1 if size is None else size for size in shape], dtype=np.int64)
                node.input[1] = _constant(model, f"{node.output[0]}/shape", told)
                settled = True
        elif open_batch and node.op_type == "Where":
            settled |= _settle_expand(model, node, makers, constants)
        if value is None:
            kept.append(node)
        else:
            _constant(model, node.output[0], value)
    _replace_nodes(model, kept)
    return settled


def part_of(node: NodeProto, rank: int) -> slice:
    """The axes that a Shape node gives."""
    told = {item.name: item.i for item in node.attribute}
    return slice(*slice(told.get("start", 0), told.get("end", rank)).indices(rank))


def _settle_expand(
    model: ModelProto, node: NodeProto, makers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> bool:
    """Where(sizes == -1, 1, sizes), which the exporter puts before an Expand, as the sizes with 1 in place of -1."""
    equal, concat = (makers.get(node.input[index]) for index in (0, 2))
    sizes = node.input[2]
    if concat is not None and concat.op_type == "Reshape":  # to one row, which they are already
        concat = makers.get(concat.input[0])
    if equal is None or equal.op_type != "Equal" or concat is None or concat.op_type != "Concat":
        return False
    compared = [constants.get(name) for name in (equal.input[1], node.input[1])]
    if equal.input[0] != sizes or any(
        tensor is None or not np.all(numpy_helper.to_array(tensor) == wanted)
        for tensor, wanted in zip(compared, (-1, 1))
    ):
        return False
    parts = []
    for number, name in enumerate(concat.input):
        if name in constants:
            value = numpy_helper.to_array(constants[name])
            parts.append(_constant(model, f"{node.output[0]}/part{number}", np.where(value == -1, 1, value)))
        elif name in makers and makers[name].op_type in ("Unsqueeze", "Slice"):  # of a shape: never -1
            parts.append(name)
        else:
            return False
    node.CopyFrom(helper.make_node("Concat", parts, list(node.output), node.name, axis=0))
    return True


def _constant(model: ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _known_dims(model: ModelProto) -> dict[str, list[int | None]]:
    """Sizes by tensor, None for a dimension that is open.

    Where the batch is open, those sizes are known that are the same for two batch sizes: ONNX's inference cannot tell
    what -1 in a Reshape stands for as long as one other size is open.
    """
    if not _open_batch(model):
        return _inferred(model, 1)
    one, other = (_inferred(model, size) for size in _TRIED)
    return {
        name: [size if size == second else None for size, second in zip(one[name], other[name])]
        for name in one.keys() & other.keys()
        if len(one[name]) == len(other[name])
    }


def _open_batch(model: ModelProto) -> bool:
    return any(dim.HasField("dim_param") for item in model.graph.input for dim in item.type.tensor_type.shape.dim)


def _inferred(model: ModelProto, batch: int) -> dict[str, list[int | None]]:
    """Inferred sizes by tensor, with named dimensions at `batch`; large weights enter as inputs, to stay fast."""
    light = ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.graph.name = "shapes"
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    for item in light.graph.input:
        for dim in item.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = batch
    light.graph.output.extend(helper.make_empty_tensor_value_info(item.name) for item in model.graph.output)
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = shape_inference.infer_shapes(light, data_prop=True)
    except Exception as error:  # RuntimeError and kinds of its own, which differ between versions
        raise ExportError(
            f"the sizes of the graph's tensors do not fit each other ({first_line(error)}); expected a "
            "valid graph; export the model again"
        ) from error
    return {
        item.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in item.type.tensor_type.shape.dim]
        for item in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
        if item.type.tensor_type.HasField("shape")
    }


def remove_unused(model: ModelProto) -> None:
    """Drop nodes and constants that no output comes from, and what is only said about inner tensors."""
    needed = {item.name for item in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input, captured(node))
    _replace_nodes(model, kept[::-1])
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    del model.graph.value_info[:], model.graph.quantization_annotation[:]
    del model.functions[:], model.training_info[:]


def _replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(copies)
