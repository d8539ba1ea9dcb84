"""Read the headers of a video container: whether the file is complete, and how reliable its frame count is.

At the end of a file OpenCV reports only that there is no further frame. The headers tell whether the end is missing: a
truncated file is shorter than the sizes in its boxes, chunks or segments. Only the headers are read, some bytes each.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MOST_BOXES = 100_000  # per level; usual files have about ten, fragmented ones two per second
DEEPEST = 8
LARGEST_BOX = 1 << 20  # bytes of a box that is read completely
NEST = (b"moov", b"trak", b"mdia", b"edts")
ISO = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
# `ftyp` of still images, which Pillow and its plugins read.
STILL_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
EBML, SEGMENT = 0x1A45DFA3, 0x18538067


@dataclass(frozen=True)
class Container:
    """The headers of a video file.

    kind        "mp4", "avi", "mkv", another kind of video, or "" where the kind is unknown
    truncated   what is missing, as text; empty where nothing is known to be missing
    exact       whether the frame count in the header was counted, and not estimated from the duration
    shown       fraction of the frames that players show: less than 1 in trimmed files
    """

    kind: str
    truncated: str = ""
    exact: bool = False
    shown: float = 1.0


def read_container(path: str | Path) -> Container:
    """Read the headers of a file; Container("text") and Container("empty") for files that are certainly no video.

    Errors: OSError where it cannot be read, or is no plain file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path}: not a plain file")
        size = os.fstat(handle).st_size
        head = stream.read(1024)
        kind = kind_of(head)
        if kind == "mp4":
            return _iso(stream, size)
        if kind == "avi":
            return _riff(stream, size)
        if kind == "mkv":
            return _matroska(stream, size)
        return Container(kind)


def kind_of(head: bytes) -> str:
    """The kind of a file by its first bytes (up to a kilobyte)."""
    if not head:
        return "empty"
    if head[4:8] in ISO:
        return "image" if head[4:8] == b"ftyp" and head[8:12] in STILL_BRANDS else "mp4"
    if head[:4] == b"RIFF":
        return "avi" if head[8:12] == b"AVI " else "image" if head[8:12] == b"WEBP" else ""
    for kind, start in (
        ("mkv", struct.pack(">I", EBML)),
        ("flv", b"FLV"),
        ("ogg", b"OggS"),
        ("gif", b"GIF8"),
        ("wmv", b"\x30\x26\xb2\x75"),
        ("mpeg", b"\x00\x00\x01"),
        ("mpeg", b"\x00\x00\x00\x01"),
    ):
        if head.startswith(start):
            return kind
    if len(head) > 376 and any(head[at] == head[at + step] == 0x47 for at, step in ((0, 188), (4, 192))):
        return "mpeg"
    # FFmpeg accepts lists of files and addresses (HLS, concat, SDP, DASH) as videos, whatever their name, and opens the
    # files in them. Such lists are text; videos never are.
    text = head.removeprefix(b"\xef\xbb\xbf")
    return "text" if all(byte >= 32 or byte in b"\t\r\n\f" for byte in text) else ""


def _iso(stream: BinaryIO, size: int) -> Container:
    truncated, top = "", set()
    for name, _start, end in _boxes(stream, 0, size):
        top.add(name)
        if end > size:
            truncated = f"its {name.decode('latin-1')} box ends {end - size} bytes after the end of the file"
            break
    if not truncated and not top & {b"moov", b"moof"}:
        truncated = "it has no index (moov), which is written last: the recording was not finished"
    try:
        return Container("mp4", truncated, b"moof" not in top, _shown(stream, size))
    except (struct.error, ValueError):
        return Container("mp4", truncated)


def _boxes(stream: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte of the content, and end of each box, according to its header."""
    for _ in range(MOST_BOXES):
        if at + 8 > end:
            return
        stream.seek(at)
        head = stream.read(16)
        length, name, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1 and len(head) == 16:
            length, header = int.from_bytes(head[8:], "big"), 16
        elif length == 0:  # to the end of the file
            length = end - at
        if length < header or not name.isascii():
            return
        yield name, at + header, at + length
        at += length


def _shown(stream: BinaryIO, size: int) -> float:
    """Of the video track: the duration in its edit list, as a fraction of the duration in the file."""
    scale, tracks = 0, list[dict[str, float]]()
    for name, start, end in _inside(stream, 0, size, 0):
        if name == b"trak":
            tracks.append({})
        if end > size or end - start > LARGEST_BOX or name not in (b"mvhd", b"mdhd", b"elst", b"hdlr"):
            continue
        stream.seek(start)
        data = stream.read(end - start)
        wide = data[:1] == b"\1"
        if name != b"mvhd" and not tracks:
            continue
        if name == b"hdlr":
            tracks[-1]["video"] = data[8:12] == b"vide"
        elif name == b"elst":
            (count,) = struct.unpack_from(">I", data, 4)
            rows = struct.iter_unpack(">QqI" if wide else ">IiI", data[8 : 8 + min(count, 1000) * (20 if wide else 12)])
            tracks[-1]["edit"] = sum(length for length, first, _ in rows if first >= 0)
        else:
            unit, length = struct.unpack_from(">IQ" if wide else ">II", data, 20 if wide else 12)
            if name == b"mvhd":
                scale = unit
            else:
                tracks[-1] |= {"unit": unit, "length": length}
    for track in tracks:
        if track.get("video") and "edit" in track and scale and track.get("unit") and track.get("length"):
            return min(1.0, track["edit"] / scale / (track["length"] / track["unit"]))
    return 1.0


def _inside(stream: BinaryIO, at: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    for name, start, stop in _boxes(stream, at, end):
        yield name, start, stop
        if name in NEST and depth < DEEPEST:
            yield from _inside(stream, start, min(stop, end), depth + 1)


def _riff(stream: BinaryIO, size: int) -> Container:
    at = 0
    for _ in range(MOST_BOXES):  # files of more than 1 GB have several RIFF chunks
        stream.seek(at)
        head = stream.read(12)
        if len(head) < 12 or head[:4] != b"RIFF":
            break
        length = int.from_bytes(head[4:8], "little")
        if not length:
            return Container("avi", "its length was never written: the recording was not finished", True)
        at += 8 + length + length % 2
        if at > size + 1:
            return Container("avi", f"its header has {at} bytes, the file {size}", True)
    return Container("avi", "", True)


def _matroska(stream: BinaryIO, size: int) -> Container:
    at = 0
    for _ in range(4):  # the header, sometimes a Void element, the segment
        stream.seek(at)
        head = stream.read(16)
        identity, length = _vint(head, 0, keep=True)
        size_field, more = _vint(head, length)
        if not length or not more:
            return Container("mkv")
        unknown = size_field == (1 << 7 * more) - 1  # as in live recordings
        at += length + more + (0 if unknown else size_field)
        if identity == SEGMENT:
            missing = 0 if unknown else at - size
            return Container(
                "mkv", f"its segment ends {missing} bytes after the end of the file" if missing > 0 else ""
            )
        if unknown:
            break
    return Container("mkv")


def _vint(data: bytes, at: int, keep: bool = False) -> tuple[int, int]:
    """A variable-length integer of EBML and its size in bytes; size 0 where there is none."""
    if at >= len(data) or not data[at]:
        return 0, 0
    length = 9 - data[at].bit_length()
    if at + length > len(data):
        return 0, 0
    value = int.from_bytes(data[at : at + length], "big")
    return value if keep else value & ((1 << 7 * length) - 1), length
