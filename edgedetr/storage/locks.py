"""Locks between processes: only one at a time changes a bundle or trains into it; a killed owner blocks nobody.

The lock is a flock on a small hidden file that names its owner, so it ends with the process. The file is removed with
the lock. On a file system without locks a warning is logged, and the work goes on.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgedetr.errors import EdgedetrError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# Errors of flock on file systems without locks (some network and user-space ones).
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_open: set[int] = set()  # file descriptors; a forked worker must not keep its parent's locks alive


@contextmanager
def locked(path: Path, *, wait: float, busy: Callable[[str], EdgedetrError]) -> Iterator[None]:
    """Hold the lock file `path`.

    wait    seconds to wait for another owner; 0 = do not wait
    busy    makes the error that is raised after that, from a text for the owner ("process 1234", or with its host)

    Errors: that of `busy`; OSError where the file cannot be created (read-only, full, no such folder).
    """
    handle = _acquire(path, wait, busy)
    try:
        yield
    finally:
        if handle is not None:
            _open.discard(handle)
            path.unlink(missing_ok=True)  # while the lock is held, so that it is not another owner's file
            os.close(handle)


def _acquire(path: Path, wait: float, busy: Callable[[str], EdgedetrError]) -> int | None:
    """An open, locked file at `path`; None where there are no locks."""
    if fcntl is None:
        log.warning("%s: no locks on this system; do not run two commands on one bundle at a time", path.parent)
        return None
    end, pause = time.monotonic() + wait, 0.005
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, handle):  # otherwise its last owner removed it between opening and locking
                with suppress(OSError):  # a full disk: the lock works without the owner's name
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{os.getpid()} {host()}\n".encode(), 0)
                _open.add(handle)
                return handle
            os.close(handle)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            if time.monotonic() >= end:
                raise busy(owner) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        except OSError as error:
            os.close(handle)
            if error.errno not in WITHOUT_LOCKS:
                raise
            log.warning(
                "%s: this file system has no locks (%s); do not run two commands on one bundle at a time",
                path.parent,
                error.strerror,
            )
            path.unlink(missing_ok=True)
            return None


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    """A text for the owner of the lock."""
    pid, _, where = os.pread(handle, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    if not pid.isdecimal():
        return "another process"  # it has not written its id yet
    return f"process {pid}" + (f" on {where!r}" if where != host() else "")


def host() -> str:
    """The name of this machine."""
    return os.uname().nodename if hasattr(os, "uname") else "here"


def _close_in_child() -> None:
    """In a forked child: close the copies of the descriptors; the parent keeps its locks."""
    for handle in _open:
        try:
            os.close(handle)
        except OSError:
            continue
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
