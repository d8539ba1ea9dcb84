"""Files that appear whole or not at all, and folders that no link leads out of."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgedetr.errors import BundleError
from edgedetr.storage.locks import host

# Hidden, and with its owner in the name, so that the next command can tell what a killed one left: .NAME.HOST-PID.x.tmp
TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,18})\.[^.]+\.tmp", re.DOTALL)
OLD_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp", re.DOTALL)  # of version 0.1, which named no owner
FORGOTTEN = 24 * 3600  # seconds after which no command can still be writing
NAME_BYTES = 255  # of one name, in every usual file system
_mine: set[str] = set()  # temporary files of this process


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:  # type: ignore[no-untyped-def]  # Python 3.10 has no hashlib.file_digest
    state = hashlib.sha256()
    while block := stream.read(1 << 20):
        state.update(block)
    return state.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    After an exception the temporary file is removed and `path` is as it was.
    Errors: OSError that names `path` where the disk is full or fails.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        flush(temporary)
        put(temporary, path)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in `path`'s folder, which is made; what is still there at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name.encode()[:64].decode("utf-8", "ignore")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{short}.{_host()}-{os.getpid()}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    _mine.add(name)
    try:
        yield temporary
    except Exception as error:
        fault = _write_fault(error, temporary, path)
        if fault is None:
            raise
        raise fault from error
    finally:
        temporary.unlink(missing_ok=True)
        _mine.discard(name)


def flush(temporary: Path) -> None:
    """Wait until a finished temporary file is on disk."""
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o644)


def put(temporary: Path, path: Path) -> None:
    """Rename a flushed temporary file over `path`."""
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A fault of writing that names no file (a full disk is found by a number, not by a name) gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_fault(error: Exception, temporary: Path, path: Path) -> OSError | None:
    """The same fault with the name of the file that was to be written; None for any other error."""
    number, named = None, None
    if isinstance(error, OSError):
        number, named = error.errno, error.filename
    elif found := re.search(r"Os \{ code: ([0-9]+)", str(error)):  # of libraries in Rust, like safetensors
        number = int(found[1])
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS) or named not in (
        None,
        str(temporary),
    ):
        return None
    fault = OSError(number, os.strerror(number), str(path))
    try:
        fault.written = temporary.stat().st_size  # type: ignore[attr-defined]  # bytes, for the message
    except OSError:
        return fault
    return fault


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files in a folder whose owner is gone; those of other machines when they are a day old."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if _is_leftover(entry):
                os.unlink(entry.path)
        except OSError:  # gone by now, or not ours to remove
            continue


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    if not entry.name.endswith(".tmp") or entry.path in _mine or not entry.is_file(follow_symlinks=False):
        return False
    found, age = TEMPORARY.fullmatch(entry.name), time.time() - entry.stat(follow_symlinks=False).st_mtime
    if found is None:
        return OLD_TEMPORARY.fullmatch(entry.name) is not None and age > FORGOTTEN
    if found["host"] != _host():
        return age > FORGOTTEN
    # In a container that was started again, this process may have the number of the one that was killed.
    return int(found["pid"]) == os.getpid() or not _runs(int(found["pid"])) or age > FORGOTTEN


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return pid > 0


def _host() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]


def fault_of_name(name: str) -> str:
    """What is wrong with the relative name of a file in a bundle, or ""."""
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts:
        return "points outside the bundle; expected a relative name"
    if "\0" in name or not name.isprintable() or "." in parts or "" in parts:
        return "is no plain relative name"
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"has a part of {longest} bytes; expected at most {NAME_BYTES}" if longest > NAME_BYTES else ""


def inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`, which may be a link itself; nothing below it may be one.

    Errors: BundleError for a name that leads out of the folder, and where a link stands on the way.
    """
    if fault := fault_of_name(name):
        raise BundleError(f"{root}: {name!r} {fault}")
    path = root
    for part in name.split("/"):
        path = path / part
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            break  # nothing further down can be a link
        if is_link:
            raise BundleError(
                f"{path}: a link; expected plain files and folders in a bundle, for what is behind a "
                "link is not the bundle's to read or to replace; put a copy in its place"
            )
    return root / name
