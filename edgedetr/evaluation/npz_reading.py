"""Read .npz files that may come from strangers: only known arrays, whose type and size are checked before reading."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from edgedetr.errors import BundleError

MEBIBYTE = 1 << 20
LARGEST_FILE = 512 * MEBIBYTE
LARGEST = 1024 * MEBIBYTE  # all arrays together
# The arrays may take FREE bytes plus RATIO times the size of the file: real sets compress 5 to 15 times.
FREE, RATIO = 64 * MEBIBYTE, 32
DIRECTORY = 64 << 10  # bytes of the list of members of a zip file; ours takes about 1 kB
LONGEST_TEXT = 4096  # characters of a name or a path
# The header that numpy writes before the values, format 1.0; no other form is read.
HEADER = re.compile(
    rb"\{'descr': '([<>|=])([a-zA-Z])([0-9]{0,6})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,15}, ?)*(?:[0-9]{1,15})?)\), \} *\n"
)
FAULTS = (
    ValueError,
    KeyError,
    OSError,
    EOFError,
    RuntimeError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Column:
    """The expected type (numpy kind "i", "f", "b" or "U") and shape (-1 = any length) of an array."""

    kind: str
    shape: tuple[int, ...]


def read(path: str | Path, columns: Mapping[str, Column], *, fix: str) -> dict[str, np.ndarray]:
    """The arrays `columns` of a .npz file; other arrays in it are not read.

    fix     the command that makes the file again, for the message

    Errors: BundleError for a file that is missing, damaged or of another kind, and for one whose arrays would take far
    more memory than the file.
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would block forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file; run: {fix}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: cannot be read ({why}); run: {fix}") from error
    try:
        with os.fdopen(handle, "rb") as stream:
            return _read(stream, columns)
    except FAULTS as error:
        raise BundleError(
            f"{path}: damaged or of another kind ({error}); expected arrays written by edgedetr; run: {fix}"
        ) from error


def _read(stream: BinaryIO, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    about = os.fstat(stream.fileno())
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("not a plain file")
    if about.st_size > LARGEST_FILE:
        raise ValueError(f"{about.st_size / MEBIBYTE:.0f} MiB; at most {LARGEST_FILE // MEBIBYTE} are read")
    _check_directory(stream, about.st_size)
    with zipfile.ZipFile(stream) as archive:
        members = {name: _member(archive, name) for name in columns}
        total, most = sum(member.file_size for member in members.values()), min(LARGEST, FREE + RATIO * about.st_size)
        if total > most:
            raise ValueError(
                f"its arrays would take {total / MEBIBYTE:.0f} MiB, more than the "
                f"{most / MEBIBYTE:.0f} that a file of this size may hold"
            )
        return {name: _array(archive, member, name, columns[name]) for name, member in members.items()}


def _check_directory(stream: BinaryIO, size: int) -> None:
    """Check that the list of members is short, before zipfile reads it."""
    stream.seek(max(0, size - (1 << 16) - 22))
    tail = stream.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("no end of a zip file")
    length = struct.unpack_from("<I", tail, end + 12)[0]
    if length > DIRECTORY or tail[max(0, end - 20) : end].startswith(b"PK\x06\x07"):
        raise ValueError(f"a list of {length} bytes of members; at most {DIRECTORY} are read")
    stream.seek(0)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"no array {name!r}") from None


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, column: Column) -> np.ndarray:
    """One array; its type and shape are checked against `column` before its numbers are read."""
    with archive.open(member) as stream:
        start = stream.read(10)
        if start[:8] != b"\x93NUMPY\x01\x00":
            raise ValueError(f"{name} is not an array of numpy's format 1.0")
        length = struct.unpack("<H", start[8:])[0]
        found = HEADER.fullmatch(stream.read(length))
        if found is None:
            raise ValueError(f"{name} is not a plain array")
        order, kind, width, fortran, shape = (part.decode() for part in found.groups())
        if kind == "O":
            raise ValueError(f"{name} holds Python objects, which are never read (allow_pickle is off)")
        if not width:
            raise ValueError(f"{name} is not a plain array")
        dims = tuple(int(dim) for dim in shape.replace(" ", "").split(",") if dim)
        dtype = np.dtype(f"{order}{kind}{width}")
        wanted = len(dims) == len(column.shape) and all(w in (-1, d) for d, w in zip(dims, column.shape))
        if not wanted or dtype.kind != column.kind:
            raise ValueError(
                f"{name} is {dtype} {list(dims)}, expected kind {column.kind!r} "
                f"{[dim if dim >= 0 else '?' for dim in column.shape]}"
            )
        if dtype.kind == "U" and dtype.itemsize > 4 * LONGEST_TEXT:
            raise ValueError(f"{name} holds text of {dtype.itemsize // 4} characters, at most {LONGEST_TEXT} are read")
        count = dtype.itemsize
        for dim in dims:
            count *= dim
        if member.file_size != 10 + length + count:
            raise ValueError(f"{name} has {member.file_size} bytes, expected {10 + length + count}")
        data = bytearray(count)
        # The stub has IO[bytes], which lacks readinto; it is a zipfile.ZipExtFile.
        if cast(io.BufferedIOBase, stream).readinto(data) != count or stream.read(1):
            raise ValueError(f"{name} is cut short")
    values = np.frombuffer(data, dtype) if count else np.zeros(dims, dtype)
    return values.reshape(dims, order="F" if fortran == "True" else "C")
