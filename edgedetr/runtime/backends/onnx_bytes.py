"""The one reader of ONNX files of a bundle: everything is in the file itself, and nothing elsewhere is opened.

A graph may say that its weights lie in another file, and name any file of this machine; inference libraries open it,
each with checks of its own or none. So a library never sees a path: it is given bytes that were read and checked here,
without the onnx package. Files that other people exported, with weights beside them, are read by onnx_graph/io.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedetr.errors import BundleError, EdgedetrError, MissingDependency
from edgedetr.packages import missing
from edgedetr.runtime.onnx_facts import EXPECTED, OnnxFacts, facts, parse
from edgedetr.runtime.tensorrt.engine_validation import read_regular

LARGEST = (1 << 31) - 1  # bytes; a protobuf message cannot be longer
# Beginnings of a ModelProto: a field with a number of 1 to 25 and one of the wire types in use.
FIRST_BYTES = frozenset(field << 3 | kind for field in range(1, 26) for kind in (0, 2) if field << 3 < 128) | {
    field << 3 & 0x7F | 0x80 | kind for field in range(16, 26) for kind in (0, 2)
}


def read(path: str | Path, error: type[EdgedetrError] = BundleError) -> tuple[bytes, OnnxFacts]:
    """The bytes of a graph that may go to a library, and what they say.

    Errors: `error` for what is no plain file (a link), is too large, no ONNX graph, or keeps weights elsewhere.
    """
    path = Path(path)
    data = read_regular(path, LARGEST, EXPECTED, error=error, begins=FIRST_BYTES)
    found = facts(data, str(path), error)
    _refuse_external(found, str(path), error)
    return data, found


def require_whole(data: bytes, what: str = "the graph", error: type[EdgedetrError] = BundleError) -> bytes:
    """The serialized graph `data` itself; `error` where it is none, or keeps weights in a file."""
    _refuse_external(parse(data, what, error), what, error)
    return data


def load(path: str | Path, error: type[EdgedetrError] = BundleError) -> Any:
    """The ModelProto of a bundle's graph. Errors: as `read`, and MissingDependency without the onnx package."""
    try:
        import onnx
    except ImportError as reason:
        raise MissingDependency(missing("onnx", reason)) from reason
    data, _ = read(path, error)
    try:
        return onnx.load_model_from_string(data)
    except Exception as reason:  # protobuf raises types of its own, which differ between its versions
        raise error(f"{path}: not readable as ONNX ({reason}); {EXPECTED}") from reason


def _refuse_external(found: OnnxFacts, what: str, error: type[EdgedetrError]) -> None:
    if found.external:
        raise error(
            f"{what}: keeps weights in another file ({found.external[0]!r}), and such a name can point "
            f"anywhere; {EXPECTED}, which holds everything in one file; edgedetr import FILE.onnx --out BUNDLE "
            "puts weights beside a file into it"
        )
