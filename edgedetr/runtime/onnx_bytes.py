"""The one reader of a bundle's ONNX files: plain files that contain all their weights, read without the onnx package.

A graph can store its weights in another file and name any file of this machine; inference libraries open it, with few
checks or none. So a library gets no path: it gets bytes that were read and checked here. Files that other people
exported, with weights in files next to them, are read by onnx_graph/io.py.

This check must read the graph itself, because whoever made a bundle also wrote its bundle.json. So the other facts that
the device needs (opset, inputs, outputs, operators) are read here too, and are not repeated in bundle.json.

An ONNX file is one protobuf message. Only lengths and a few fields are read, and weights are skipped. The field numbers
are those of onnx.proto3, which cannot change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgedetr.errors import BundleError, EdgedetrError, EngineError
from edgedetr.storage.reading import read_plain_file

LARGEST = (1 << 31) - 1  # bytes; a protobuf message cannot be longer
# First bytes of a ModelProto: a field number from 1 to 25 with one of its wire types.
FIRST_BYTES = frozenset(field << 3 | kind for field in range(1, 26) for kind in (0, 2) if field << 3 < 128) | {
    field << 3 & 0x7F | 0x80 | kind for field in range(16, 26) for kind in (0, 2)
}
DEEPEST = 32  # nesting of subgraphs
EXPECTED = "expected an ONNX graph written by edgedetr export or edgedetr import"

# Field numbers. ModelProto: graph, opset_import. GraphProto: node, initializer, sparse_initializer, input, output.
MODEL_GRAPH, MODEL_OPSET, MODEL_METADATA, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 8, 14, 20, 25
NODE, INITIALIZER, SPARSE_INITIALIZER, INPUT, OUTPUT = 1, 5, 15, 11, 12
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE = 1, 2, 3, 4, 5
FUNCTION_NODE, FUNCTION_ATTRIBUTE = 7, 11
TRAINING_GRAPHS = 1, 2  # of TrainingInfoProto: initialization, algorithm
ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 5, 6, 10, 11
ATTRIBUTE_SPARSE, ATTRIBUTE_SPARSES = 22, 23
TENSOR_NAME, TENSOR_EXTERNAL, TENSOR_LOCATION, EXTERNAL = 8, 13, 14, 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxFacts:
    """Opset of the standard domain, shapes of inputs and outputs (a dynamic size is its name), operators of all graphs.

    external   paths of tensors that are stored in other files
    """

    opset: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    operators: frozenset[str]
    external: tuple[str, ...]


@dataclass(frozen=True)
class GraphNode:
    """A node of the main graph, without its attributes."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read(path: str | Path, error: type[EdgedetrError] = BundleError) -> tuple[bytes, OnnxFacts]:
    """The bytes of a graph that a library may load, and the facts in them.

    Errors: `error` for a link or another special file, a file that is too large or no ONNX graph, and external weights.
    """
    path = Path(path)
    data = read_plain_file(path, LARGEST, EXPECTED, error=error, begins=FIRST_BYTES)
    found = facts(data, str(path), error)
    _refuse_external(found, str(path), error)
    return data, found


def require_whole(data: bytes, what: str = "the graph", error: type[EdgedetrError] = BundleError) -> bytes:
    """`data` unchanged. Errors: `error` where it is no serialized graph, or has external weights."""
    _refuse_external(parse(data, what, error), what, error)
    return data


def _refuse_external(found: OnnxFacts, what: str, error: type[EdgedetrError]) -> None:
    if found.external:
        raise error(
            f"{what}: keeps weights in another file ({found.external[0]!r}), and such a name can point "
            f"anywhere; {EXPECTED}, which has everything in one file; edgedetr import FILE.onnx --out BUNDLE "
            "puts external weights into it"
        )


def facts(data: bytes, what: str = "the graph", error: type[EdgedetrError] = EngineError) -> OnnxFacts:
    """The facts of a serialized ONNX model. Errors: `error` for anything else, or missing inputs or outputs."""
    found = parse(data, what, error)
    if not found.opset or not found.inputs or not found.outputs:
        raise error(f"{what}: no ONNX graph with inputs and outputs ({len(data)} bytes); {EXPECTED}")
    return found


def parse(data: bytes, what: str = "the graph", error: type[EdgedetrError] = EngineError) -> OnnxFacts:
    """As `facts`, but also for a graph without inputs, as constant folding leaves one."""
    opset, graphs, training, functions = 0, [], [], []
    try:
        for number, value in _fields(memoryview(data)):
            if number == MODEL_GRAPH:
                graphs.append(_bytes(value))
            elif number == MODEL_FUNCTIONS:
                functions.append(_bytes(value))
            elif number == MODEL_TRAINING:
                training += [_bytes(v) for n, v in _fields(_bytes(value)) if n in TRAINING_GRAPHS]
            elif number == MODEL_OPSET:
                opset = _standard_opset(_bytes(value)) or opset
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        inputs, outputs = (
            dict(_value(_bytes(v)) for n, v in _fields(graphs[0]) if n == field) for field in (INPUT, OUTPUT)
        )
        operators: set[str] = set()
        external: list[str] = []
        for graph in (graphs[0], *training):
            _walk(graph, NODE, operators, external, 0)
        for function in functions:
            _walk(function, FUNCTION_NODE, operators, external, 0)
            for number, value in _fields(function):
                if number == FUNCTION_ATTRIBUTE:
                    _attribute(_bytes(value), operators, external, 0)
    except (ValueError, IndexError) as reason:  # also UnicodeDecodeError
        raise error(f"{what}: not an ONNX file, or cut off ({reason}); {EXPECTED}") from reason
    return OnnxFacts(opset, inputs, outputs, frozenset(operators), tuple(external))


def nodes(data: bytes, what: str = "the graph", error: type[EdgedetrError] = BundleError) -> list[GraphNode]:
    """The nodes of the main graph, in its order. Errors: `error` for what is no ONNX graph."""
    try:
        return [_node(node) for node in _inside(memoryview(data), MODEL_GRAPH, NODE)]
    except (ValueError, IndexError) as reason:  # also UnicodeDecodeError
        raise error(f"{what}: not an ONNX file, or cut off ({reason}); {EXPECTED}") from reason


def _node(message: memoryview) -> GraphNode:
    texts: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_NAME: [""], NODE_OP: [""]}
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(_text(value))
    return GraphNode(texts[NODE_OP][-1], texts[NODE_NAME][-1], tuple(texts[NODE_INPUT]), tuple(texts[NODE_OUTPUT]))


def metadata(data: bytes, what: str = "the graph", error: type[EdgedetrError] = BundleError) -> dict[str, str]:
    """The metadata of a serialized ONNX model, by key. Errors: `error` for what is no ONNX model."""
    entries = []
    try:
        for number, value in _fields(memoryview(data)):
            if number == MODEL_METADATA:
                entries.append({n: _text(v) for n, v in _fields(_bytes(value)) if n in (1, 2)})
    except (ValueError, IndexError) as reason:  # also UnicodeDecodeError
        raise error(f"{what}: not an ONNX file, or cut off ({reason}); {EXPECTED}") from reason
    return {entry.get(1, ""): entry.get(2, "") for entry in entries}


def _standard_opset(message: memoryview) -> int:
    """The version in an OperatorSetIdProto of the standard domain; 0 for another domain."""
    parts = dict(_fields(message))
    domain = bytes(_bytes(parts.get(1, memoryview(b""))))
    return _int(parts.get(2, 0)) if domain in (b"", b"ai.onnx") else 0


def _walk(graph: memoryview, node_field: int, operators: set[str], external: list[str], depth: int) -> None:
    """Collect the operators and the external tensors of a graph and its subgraphs."""
    if depth > DEEPEST:
        raise ValueError(f"graphs nested more than {DEEPEST} deep")
    for number, value in _fields(graph):
        if number == node_field:
            for inner, parts in _fields(_bytes(value)):
                if inner == NODE_OP:
                    operators.add(_text(parts))
                elif inner == NODE_ATTRIBUTE:
                    _attribute(_bytes(parts), operators, external, depth)
        elif number == INITIALIZER and node_field == NODE:
            external += _outside(_bytes(value))
        elif number == SPARSE_INITIALIZER and node_field == NODE:
            external += _sparse(_bytes(value))


def _attribute(attribute: memoryview, operators: set[str], external: list[str], depth: int) -> None:
    for number, value in _fields(attribute):
        if number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
            external += _outside(_bytes(value))
        elif number in (ATTRIBUTE_SPARSE, ATTRIBUTE_SPARSES):
            external += _sparse(_bytes(value))
        elif number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
            _walk(_bytes(value), NODE, operators, external, depth + 1)


def _sparse(tensor: memoryview) -> list[str]:
    """A sparse tensor is two tensors: values and indices."""
    return [where for number, value in _fields(tensor) if number in (1, 2) for where in _outside(_bytes(value))]


def _outside(tensor: memoryview) -> list[str]:
    """`[location]` of a tensor whose values are in another file, else `[]`."""
    location, is_outside = "", False
    for number, value in _fields(tensor):
        if number == TENSOR_EXTERNAL:
            is_outside = True
            entry = {n: _text(v) for n, v in _fields(_bytes(value)) if n in (1, 2)}
            location = entry.get(2, "") if entry.get(1) == "location" else location
        elif number == TENSOR_LOCATION:
            is_outside |= _int(value) == EXTERNAL
    return [location] if is_outside else []


def _value(info: memoryview) -> tuple[str, tuple[int | str, ...]]:
    """Name and shape of a ValueInfoProto (name=1, type=2 > tensor=1 > shape=2 > dim=1, which is value=1 or name=2)."""
    name, shape = "", []
    for number, value in _fields(info):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for dimension in _inside(_bytes(value), 1, 2, 1):
                parts = dict(_fields(dimension))
                shape.append(_int(parts[1]) if 1 in parts else _text(parts.get(2, memoryview(b""))) or "?")
    return name, tuple(shape)


def _inside(message: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at a path of field numbers."""
    for number, value in _fields(message):
        if number == path[0]:
            if len(path) == 1:
                yield _bytes(value)
            else:
                yield from _inside(_bytes(value), *path[1:])


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Field numbers and values of a protobuf message: integers, or the bytes of anything with a length."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("a field with number 0")
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > end:
            raise ValueError(f"a field of {length} bytes where {end - at} are left")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _int(value: memoryview | int) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number belongs")
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(value: memoryview | int) -> str:
    return bytes(_bytes(value)).decode("utf-8")
