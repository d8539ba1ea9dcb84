"""Constant folding: sizes that are known, and everything that is computed from constants only.

The PyTorch exporter writes `x.shape` as nodes even where the size is fixed. Folding turns positions, anchors and the
sizes of reshapes into plain constants.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.graph_edit import inline_branch, prune, replace_nodes
from edgedetr.onnx_graph.graph_walk import captured
from edgedetr.onnx_graph.index import constant_tensor, int_attribute
from edgedetr.onnx_graph.infer import infer_types
from edgedetr.onnx_graph.session import EXPORT_AGAIN, GraphSession, shapes_by_running

# Larger results are not folded, so that the file does not grow (the largest wanted are positions, S x C).
LARGEST = 1 << 23  # elements
PASSES = 12  # each pass resolves the shapes one dependency further; 3 to 5 are used in practice
_TRIED = 97, 101  # batch sizes that no other size of a graph is a multiple of by chance
_NEVER = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "If", "Loop", "Scan"}
Shape = list[int | None]


def fold(model: ModelProto) -> ModelProto:
    """The same function with fewer nodes; names of the remaining nodes and tensors stay."""
    result = ModelProto()
    result.CopyFrom(model)
    _constants_to_initializers(result)
    for _ in range(PASSES):
        before = len(result.graph.node)
        _remove_identities(result)
        _fold_constants(result)
        changed = _fold_shapes(result)
        if not changed and len(result.graph.node) == before:
            break
    prune(result)
    return result


def fold_at_fixed_size(model: ModelProto) -> ModelProto:
    """As `fold`, for a graph with fixed inputs: sizes that shape inference cannot follow are taken from a run."""
    result = fold(model)
    left = [node for node in result.graph.node if node.op_type in ("Shape", "Size")]
    shapes = shapes_by_running(result, [node.input[0] for node in left])
    found = False
    for node in left:
        shape = shapes.get(node.input[0])
        if shape is not None:
            value = shape[_axes(node, len(shape))] if node.op_type == "Shape" else int(np.prod(shape))
            _add_constant(result, node.output[0], np.asarray(value, np.int64))
            result.graph.node.remove(node)
            found = True
    return fold(result) if found else result


def _constants_to_initializers(model: ModelProto) -> None:
    kept = []
    for node in model.graph.node:
        tensor = constant_tensor(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            stored = TensorProto.FromString(tensor.SerializeToString())
            stored.name = node.output[0]
            model.graph.initializer.append(stored)
    replace_nodes(model, kept)


def _remove_identities(model: ModelProto) -> None:
    """Remove each Identity whose output is no graph output and is not read by an inner graph."""
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
    replace_nodes(model, kept)


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
    wanted = sorted(read & {name for node in foldable for name in node.output})
    used = {name for node in foldable for name in node.input}
    values = _evaluate(model, foldable, [known[name] for name in sorted(used & set(known))], wanted)
    if any(value.size > LARGEST for value in values.values()):
        return
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    replace_nodes(model, kept)


def _evaluate(
    model: ModelProto, nodes: list[NodeProto], constants: list[TensorProto], wanted: list[str]
) -> dict[str, np.ndarray]:
    """Values of the wanted tensors, which follow from constants only."""
    if not wanted:
        return {}
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    graph = helper.make_graph(nodes, "constants", [], outputs, constants)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    fix = f"what it computes from constants only is not valid; {EXPORT_AGAIN}"
    return GraphSession(part, threads=1, fix=fix).run({})


def _fold_shapes(model: ModelProto) -> bool:
    """Fold the Shape of a tensor whose size is known; where only the batch is open, one known dimension of it.

    return  whether the target sizes of a Reshape or an Expand became constants, so that more may be known now
    """
    shapes = _known_shapes(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    open_batch = _has_open_batch(model)
    kept, changed = [], False
    for node in model.graph.node:
        if node.op_type == "If" and node.input[0] in constants:
            kept += inline_branch(model, node, bool(numpy_helper.to_array(constants[node.input[0]]).all()))
            changed = True
            continue
        value = _known_size(node, shapes, producers, constants)
        if value is not None:
            _add_constant(model, node.output[0], value)
            continue
        kept.append(node)
        if open_batch and node.op_type == "Reshape" and node.input[1] not in constants:
            changed |= _fix_reshape(model, node, shapes)
        elif open_batch and node.op_type == "Where":
            changed |= _fix_expand(model, node, producers, constants)
    replace_nodes(model, kept)
    return changed


def _known_size(
    node: NodeProto, shapes: dict[str, Shape], producers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> np.ndarray | None:
    """Value of a Shape node, or of a Gather of one dimension from a Shape, where the sizes are known."""
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        sizes = None if shape is None else shape[_axes(node, len(shape))]
        return None if sizes is None or None in sizes else np.array(sizes, dtype=np.int64)
    if node.op_type == "Gather" and node.input[1] in constants:
        producer = producers.get(node.input[0])
        shape = shapes.get(producer.input[0]) if producer is not None and producer.op_type == "Shape" else None
        index = numpy_helper.to_array(constants[node.input[1]])
        if shape is not None and producer is not None and index.ndim == 0:
            sizes = shape[_axes(producer, len(shape))]
            size = sizes[int(index)] if -len(sizes) <= int(index) < len(sizes) else None
            return None if size is None else np.array(size, dtype=np.int64)
    return None


def _axes(shape: NodeProto, rank: int) -> slice:
    """The axes whose sizes a Shape node gives."""
    return slice(*slice(int_attribute(shape, "start", 0), int_attribute(shape, "end", rank)).indices(rank))


def _fix_reshape(model: ModelProto, node: NodeProto, shapes: dict[str, Shape]) -> bool:
    """Make the target of a Reshape constant where one size is open: -1 there is what is left of the elements."""
    shape = shapes.get(node.output[0])
    if shape is None or shape.count(None) != 1 or 0 in shape:
        return False
    sizes = np.array([-1 if size is None else size for size in shape], dtype=np.int64)
    node.input[1] = _add_constant(model, f"{node.output[0]}/shape", sizes)
    return True


def _fix_expand(
    model: ModelProto, node: NodeProto, producers: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> bool:
    """Where(sizes == -1, 1, sizes), which the exporter puts before an Expand, as the sizes with 1 in place of -1."""
    equal, concat = (producers.get(node.input[index]) for index in (0, 2))
    sizes = node.input[2]
    if concat is not None and concat.op_type == "Reshape":  # to one row, which they are already
        concat = producers.get(concat.input[0])
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
            parts.append(_add_constant(model, f"{node.output[0]}/part{number}", np.where(value == -1, 1, value)))
        elif name in producers and producers[name].op_type in ("Unsqueeze", "Slice"):  # of a shape: never -1
            parts.append(name)
        else:
            return False
    node.CopyFrom(helper.make_node("Concat", parts, list(node.output), node.name, axis=0))
    return True


def _add_constant(model: ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _known_shapes(model: ModelProto) -> dict[str, Shape]:
    """Sizes by tensor, None for a dimension that is open.

    Where the batch is open, a size is known if it is the same at two batch sizes: ONNX's inference cannot resolve a -1
    in a Reshape as long as another size is open.
    """
    if not _has_open_batch(model):
        return _shapes_at(model, 1)
    one, other = (_shapes_at(model, size) for size in _TRIED)
    return {
        name: [size if size == second else None for size, second in zip(one[name], other[name])]
        for name in one.keys() & other.keys()
        if len(one[name]) == len(other[name])
    }


def _has_open_batch(model: ModelProto) -> bool:
    return any(dim.HasField("dim_param") for item in model.graph.input for dim in item.type.tensor_type.shape.dim)


def _shapes_at(model: ModelProto, batch: int) -> dict[str, Shape]:
    """Inferred sizes by tensor, with named dimensions at `batch`."""
    found = infer_types(model, open_size=batch)
    if found.failed:
        raise ExportError(
            f"the sizes of the graph's tensors do not fit each other ({found.error}); expected a valid graph; "
            f"{EXPORT_AGAIN}"
        )
    return found.shapes
