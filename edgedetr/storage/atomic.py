"""Writes files completely or not at all, and keeps names inside a folder: no "..", no links."""

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

# .NAME.HOST-PID.x.tmp: hidden, with its owner in the name, so that a later command can tell what a killed one left.
TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,18})\.[^.]+\.tmp", re.DOTALL)
OLD_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp", re.DOTALL)  # of version 0.1, without the owner
ABANDONED_AFTER = 24 * 3600  # seconds; no command writes one file for so long
NAME_BYTES = 255  # of one name, in every usual file system
_own_files: set[str] = set()  # temporary files that this process writes now


class WriteError(OSError):
    """A file could not be written because of the disk; `written` is the number of bytes until then, None = unknown."""

    def __init__(self, number: int, message: str, path: Path, written: int | None) -> None:
        super().__init__(number, message, str(path))
        self.written = written


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success flush it to disk and rename it over `path`.

    After an exception the temporary file is removed and `path` is unchanged.
    Errors: OSError that names `path`, where the disk is full or fails.
    """
    with temporary_file_for(path) as temporary:
        yield temporary
        flush_to_disk(temporary)
        move_into_place(temporary, path)


@contextmanager
def temporary_file_for(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `path`, which is created; it is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name.encode()[:64].decode("utf-8", "ignore")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{short}.{_host()}-{os.getpid()}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    temporary = Path(name)
    _own_files.add(name)
    try:
        yield temporary
    except Exception as error:
        fault = _write_fault(error, temporary, path)
        if fault is None:
            raise
        raise fault from error
    finally:
        temporary.unlink(missing_ok=True)
        _own_files.discard(name)


def flush_to_disk(temporary: Path) -> None:
    """Wait until a finished temporary file is on disk."""
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o644)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a flushed temporary file over `path`."""
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def with_path_in_errors(path: Path) -> Iterator[None]:
    """Put `path` into an OSError that names no file: errors of a file descriptor, such as a full disk, do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_fault(error: Exception, temporary: Path, path: Path) -> OSError | None:
    """The same error with the name of the file to be written, for errors of the disk; None for any other error."""
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
    try:
        written = temporary.stat().st_size
    except OSError:
        written = None
    return WriteError(number, os.strerror(number), path, written)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder whose process has ended; those of other machines after a day."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            if _is_leftover(entry):
                os.unlink(entry.path)
        except OSError:  # already gone, or no permission
            continue


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    if not entry.name.endswith(".tmp") or entry.path in _own_files or not entry.is_file(follow_symlinks=False):
        return False
    found, age = TEMPORARY.fullmatch(entry.name), time.time() - entry.stat(follow_symlinks=False).st_mtime
    if found is None:
        return OLD_TEMPORARY.fullmatch(entry.name) is not None and age > ABANDONED_AFTER
    if found["host"] != _host():
        return age > ABANDONED_AFTER
    # In a restarted container, this process may have the number of the one that was killed.
    return int(found["pid"]) == os.getpid() or not _is_running(int(found["pid"])) or age > ABANDONED_AFTER


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return pid > 0


def _host() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]


def name_problem(name: str) -> str:
    """What is wrong with a relative file name in a bundle; "" for a good one."""
    parts = name.split("/")
    if not name or name.startswith("/") or ".." in parts:
        return "points outside the bundle; expected a relative name"
    if "\0" in name or not name.isprintable() or "." in parts or "" in parts:
        return "is not a plain relative name"
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return f"has a part of {longest} bytes; expected at most {NAME_BYTES}" if longest > NAME_BYTES else ""


def path_inside(root: Path, name: str) -> Path:
    """The path of `name` below `root`. `root` may be a link; nothing below it may be one.

    Errors: BundleError for a name that leads out of the folder, and for a link on the path.
    """
    if problem := name_problem(name):
        raise BundleError(f"{root}: {name!r} {problem}")
    path = root
    for part in name.split("/"):
        path = path / part
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            break  # nothing further down can be a link
        if is_link:
            raise BundleError(
                f"{path}: a link; expected plain files and folders in a bundle, because a command must not read or "
                "replace files outside of it; put a copy in its place"
            )
    return root / name
