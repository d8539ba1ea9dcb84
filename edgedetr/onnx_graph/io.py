"""Read an ONNX file of any origin, with weights in files next to it: nothing outside its folder is opened.

Graphs of a bundle contain all their weights: `read_bundle_graph`, on top of runtime/onnx_bytes.py.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto

from edgedetr.errors import BundleError, EdgedetrError, ExportError
from edgedetr.runtime import onnx_bytes

# A protobuf message cannot be longer, and a bundle's graph is one message.
LARGEST = 2**31 - 1  # bytes, of the file and of its external data together

# Bits of one number, and the field that holds it where it is not written as raw bytes.
_FIELDS = {
    TensorProto.FLOAT: (32, "float_data"),
    TensorProto.DOUBLE: (64, "double_data"),
    TensorProto.INT64: (64, "int64_data"),
    TensorProto.UINT64: (64, "uint64_data"),
    TensorProto.UINT32: (32, "uint64_data"),
    TensorProto.INT32: (32, "int32_data"),
    TensorProto.COMPLEX64: (64, "float_data"),
    TensorProto.COMPLEX128: (128, "double_data"),
    **dict.fromkeys(
        (TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), (16, "int32_data")
    ),
    **dict.fromkeys(
        (
            TensorProto.INT8,
            TensorProto.UINT8,
            TensorProto.BOOL,
            TensorProto.FLOAT8E4M3FN,
            TensorProto.FLOAT8E4M3FNUZ,
            TensorProto.FLOAT8E5M2,
            TensorProto.FLOAT8E5M2FNUZ,
        ),
        (8, "int32_data"),
    ),
    **dict.fromkeys(
        (TensorProto.INT4, TensorProto.UINT4, getattr(TensorProto, "FLOAT4E2M1", TensorProto.INT4)), (4, "int32_data")
    ),
}


def read_bundle_graph(path: str | Path, error: type[EdgedetrError] = BundleError) -> ModelProto:
    """The graph of a bundle's ONNX file. Errors: `error`, as `onnx_bytes.read`, and for a file that is damaged."""
    data, _ = onnx_bytes.read(path, error)
    try:
        return onnx.load_model_from_string(data)
    except Exception as reason:  # protobuf's exception types differ between its versions
        raise error(f"{path}: not readable as ONNX ({reason}); {onnx_bytes.EXPECTED}") from reason


@dataclass(frozen=True)
class OnnxFile:
    """A graph and the files of its weights.

    external   names of the files next to it that hold weights
    faults     why these were not read; their tensors then have no values
    """

    path: Path
    model: ModelProto
    external: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def open_onnx(path: str | Path, *, weights: bool = True) -> OnnxFile:
    """The graph with its weights, or with the reasons why they were not read. Errors: ExportError for no ONNX file.

    weights   False: weights in other files are checked but not read
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file; expected an ONNX file, for example runs/NAME.bundle/model.onnx")
    size = path.stat().st_size
    if size > LARGEST:
        raise ExportError(
            f"{path}: {size / 1e9:.1f} GB; expected at most {LARGEST / 1e9:.1f} GB, the longest message "
            "of ONNX; export the model with external data, or a smaller one"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises types of its own, which differ between its versions
        raise ExportError(f"{path}: not readable as ONNX ({error}); expected what an exporter wrote, whole") from error
    if not model.graph.node or not model.opset_import:
        raise ExportError(f"{path}: not an ONNX model (no graph in it); expected what an exporter wrote, whole")
    outside = [tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            del tensor.external_data[:]  # meaningless where the values are in the file itself
    names = tuple(dict.fromkeys(_entry(tensor, "location") for tensor in outside))
    faults = tuple(dict.fromkeys(fault for name in names if (fault := _file_fault(path.parent, name))))
    if not faults:
        faults = _extent_faults(path.parent, outside, size)
    if not faults and weights:
        for tensor in outside:
            _load(path.parent, tensor)
    return OnnxFile(path, model, names, faults)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor in a model: initializers (sparse ones are two tensors), also those in attributes of nodes,
    subgraphs, functions and training graphs."""
    waiting: list[Any] = [model]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.message_type is None:
                continue
            for inner in value if isinstance(value, Sequence) else [value]:
                if isinstance(inner, TensorProto):
                    yield inner
                else:
                    waiting.append(inner)


def tensor_error(tensor: TensorProto) -> str:
    """Why the values of a tensor do not match its type and sizes, or an empty string."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return "its values are in another file"
    if any(size < 0 for size in tensor.dims):
        return f"it has sizes {list(tensor.dims)}"
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return "" if len(tensor.string_data) == count else f"it has {len(tensor.string_data)} texts, not {count}"
    if tensor.data_type not in _FIELDS:
        return f"its type is {tensor.data_type}, which is not known"
    bits, field = _FIELDS[tensor.data_type]
    if tensor.HasField("raw_data"):
        wanted = -(-count * bits // 8)
        found = len(tensor.raw_data)
        return "" if found == wanted else f"it has {found} bytes; its sizes need {wanted}"
    # One entry holds two numbers of 4 bits; a complex number takes two entries.
    is_complex = tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
    wanted, found = (-(-count // 2) if bits == 4 else count * (1 + is_complex)), len(getattr(tensor, field))
    return "" if found == wanted else f"it has {found} numbers; its sizes need {wanted}"


def _entry(tensor: TensorProto, key: str) -> str:
    return next((item.value for item in tensor.external_data if item.key == key), "")


def _file_fault(folder: Path, name: str) -> str:
    """Why a file with weights may not be opened, or an empty string."""
    if not name:
        return "weights outside the file, without saying where"
    if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name or "\0" in name:
        return f"weights in {name!r}, outside the folder of the model"
    path = folder
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink():
            return f"weights in {name!r}, which is a symbolic link"
    try:
        found = os.lstat(folder / name)
    except OSError:
        return f"weights in {name!r}, which is not there"
    if not stat.S_ISREG(found.st_mode):
        return f"weights in {name!r}, which is no plain file"
    if found.st_nlink > 1:
        return f"weights in {name!r}, which is a hard link to another file"
    if found.st_size > LARGEST:
        return f"weights in {name!r}, of {found.st_size / 1e9:.1f} GB; at most {LARGEST / 1e9:.1f} GB are read"
    return ""


def _extent_faults(folder: Path, outside: list[TensorProto], size: int) -> tuple[str, ...]:
    """Tensors that extend beyond their file, or hold more bytes in total than one graph may."""
    total = size
    for tensor in outside:
        name = _entry(tensor, "location")
        start, length = _extent(folder, tensor)
        end = (folder / name).stat().st_size
        if start < 0 or length < 0 or start + length > end:
            return (f"tensor {tensor.name!r} at bytes {start}..{start + length} of {name!r}, which has {end}",)
        total += length
    return (f"{total / 1e9:.1f} GB of weights; at most {LARGEST / 1e9:.1f} GB are read",) if total > LARGEST else ()


def _extent(folder: Path, tensor: TensorProto) -> tuple[int, int]:
    """First byte and number of bytes of a tensor; (-1, 0) where the file gives no numbers."""
    offset, length = _entry(tensor, "offset") or "0", _entry(tensor, "length")
    if not offset.isdecimal() or not (length or "0").isdecimal():
        return -1, 0
    whole = (folder / _entry(tensor, "location")).stat().st_size
    return int(offset), int(length) if length else whole - int(offset)


def _load(folder: Path, tensor: TensorProto) -> None:
    start, length = _extent(folder, tensor)
    # Not followed if it has become a link since it was checked.
    handle = os.open(folder / _entry(tensor, "location"), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as stream:
        stream.seek(start)
        tensor.raw_data = stream.read(length)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT
