"""SHA-256 digests of files, each computed once while the file stays as it is."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import BinaryIO

# Nanoseconds. A file that changed less than this before it was read may change again without a new time stamp, whose
# steps are up to 10 ms on Linux; its digest is not kept.
SETTLED = 100_000_000
BLOCK = 1 << 20  # bytes read at a time


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return _digest(stream)


def _digest(stream: BinaryIO) -> str:
    state = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    while block := stream.read(BLOCK):
        state.update(block)
    return state.hexdigest()


class DigestCache:
    """Digests by path and by everything that a change of a file changes: device, inode, size, and both time stamps.

    A program that writes into a file cannot set its change time (ctime) back, so an edited file is always read again.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def digest(self, path: Path) -> str:
        """SHA-256 of the file as it is now."""
        before = _identity(path)
        known = self._known.get(str(path))
        if known is not None and known[0] == before:
            return known[1]
        began = time.time_ns()
        found = digest(path)
        if _identity(path) == before and began - max(before[-2:]) > SETTLED:
            self._known[str(path)] = before, found
        return found


def _identity(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
