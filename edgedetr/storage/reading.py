"""Reads files of unknown origin: plain files only, limited in size and depth, with one error message that has the path.

JSON and TOML that are nested too deep, contain numbers of thousands of digits or are not text make Python raise many
different errors. Every such file is read here, so that a user always gets one message.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from edgedetr.errors import EdgedetrError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MEBIBYTE = 1 << 20
TOML_LIMIT = 4 * MEBIBYTE  # bytes; the largest recipe of this package has 6 kB
JSON_LIMIT = 64 * MEBIBYTE  # bytes; annotation files may be larger, and say so
# UTF-32 before UTF-16, because its mark begins with the same two bytes.
MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


def read_bytes(path: str | Path, error: type[EdgedetrError], *, limit: int = JSON_LIMIT, fix: str = "") -> bytes:
    """The content of a plain file of at most `limit` bytes.

    error   the kind of error to raise, with `fix` (what to do next) at the end of its message

    Errors: `error` where the file is missing, unreadable, a folder, a pipe or a device, or larger than `limit`.
    """
    path, fix = Path(path), f"; {fix}" if fix else ""
    try:
        # Opened without blocking: a pipe without a writer would block forever.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte in the name
        raise error(f"{path}: cannot be read ({getattr(reason, 'strerror', None) or reason}){fix}") from reason
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise error(f"{path}: not a plain file; expected a file, not a folder, pipe or device{fix}")
        if about.st_size > limit:
            raise error(f"{path}: {about.st_size / MEBIBYTE:.1f} MiB; expected at most {limit / MEBIBYTE:g} MiB{fix}")
        with os.fdopen(os.dup(handle), "rb") as stream:
            return stream.read()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}){fix}") from reason
    finally:
        os.close(handle)


def read_text(path: str | Path, error: type[EdgedetrError], *, limit: int = JSON_LIMIT, fix: str = "") -> str:
    """The text of a UTF-8 file, or of a UTF-16 or UTF-32 file that begins with a byte order mark.

    Errors: as `read_bytes`, and `error` with the advice to save the file as UTF-8 for any other encoding.
    """
    raw = read_bytes(path, error, limit=limit, fix=fix)
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
        if "\0" in text:  # UTF-16 without its mark is often valid UTF-8 full of zeros
            raise error(
                f"{path}: contains zero bytes, like a binary file or UTF-16 without its byte order mark; "
                f"save it as UTF-8{f'; {fix}' if fix else ''}"
            )
        return text
    except UnicodeDecodeError as reason:
        shown = encoding.upper().removesuffix("-SIG")
        raise error(
            f"{path}: not {shown} text (byte {reason.start} is 0x{raw[reason.start]:02x}); "
            f"save it as UTF-8{f'; {fix}' if fix else ''}"
        ) from reason


def read_json(path: str | Path, error: type[EdgedetrError], *, limit: int = JSON_LIMIT, fix: str = "") -> Any:
    """The value in a JSON file. Errors: as `read_text`, and `error` for what is not JSON or nested too deep."""
    text = read_text(path, error, limit=limit, fix=fix)
    return _parsed(json.loads, text, str(path), "JSON", error, fix)


def read_toml(path: str | Path, error: type[EdgedetrError], *, fix: str = "") -> dict[str, Any]:
    """The table in a TOML file. Errors: as `read_text`, and `error` for what is not TOML or nested too deep."""
    text = read_text(path, error, limit=TOML_LIMIT, fix=fix)
    return parse_toml(text, str(path), error, fix=fix)


def parse_json(text: str | bytes, where: str, error: type[EdgedetrError], *, fix: str = "") -> Any:
    """The value of JSON text; `where` opens the message. Errors: `error`."""
    return _parsed(json.loads, text, where, "JSON", error, fix)


def parse_toml(text: str, where: str, error: type[EdgedetrError], *, fix: str = "") -> dict[str, Any]:
    """The table of TOML text; `where` opens the message. Errors: `error`."""
    return _parsed(tomllib.loads, text, where, "TOML", error, fix)


def _parsed(parse: Any, text: str | bytes, where: str, kind: str, error: type[EdgedetrError], fix: str) -> Any:
    try:
        return parse(text)
    except RecursionError as reason:
        raise error(f"{where}: nested too deep to be read as {kind}{f'; {fix}' if fix else ''}") from reason
    except ValueError as reason:  # also UnicodeDecodeError, and whole numbers of more than 4300 digits
        raise error(f"{where}: not readable as {kind} ({reason}){f'; {fix}' if fix else ''}") from reason


def read_plain_file(
    path: Path,
    largest: int,
    expected: str,
    *,
    code: bool = False,
    error: type[EdgedetrError],
    begins: frozenset[int] | None = None,
) -> bytes:
    """The bytes of a plain file with one name: no link, and what is `code` must not be writable by everyone.

    error    the kind of error to raise
    begins   first bytes that such a file can have: anything else is not read whole
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as reason:
        raise error(f"{path}: no such file; {expected}") from reason
    except (OSError, ValueError) as reason:  # ValueError: a NUL byte in the name
        linked = isinstance(reason, OSError) and reason.errno == errno.ELOOP
        said = "a symbolic link, which may lead anywhere" if linked else getattr(reason, "strerror", None) or reason
        raise error(f"{path}: cannot be opened: {said}; {expected}") from reason
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: not a plain file; {expected}")
        if found.st_nlink > 1:
            raise error(
                f"{path}: has {found.st_nlink} names (a hard link), so it can change from elsewhere; "
                f"copy it to a file of its own; {expected}"
            )
        if code and found.st_mode & stat.S_IWOTH:
            raise error(f"{path}: everyone may write to it; run: chmod o-w {path}; {expected}")
        if found.st_size > largest:
            raise error(f"{path}: {found.st_size} bytes, more than the {largest} that are accepted; {expected}")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            first = stream.peek(1)[:1]
            if begins is not None and first and first[0] not in begins:
                raise error(f"{path}: not an ONNX file (it begins with 0x{first[0]:02x}); {expected}")
            return stream.read()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror}); {expected}") from reason
    finally:
        os.close(handle)
