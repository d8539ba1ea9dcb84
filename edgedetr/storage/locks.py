"""Locks between processes: one at a time changes a bundle or trains into it; a killed owner blocks nobody.

The lock is the system's (flock) on a small hidden file that names its owner, so that it ends with the process, however
that ends. The file is taken away with the lock. Where the file system has no locks, that is said and work goes on.
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

# What flock says on file systems that have no locks (some network and user-space ones).
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_open: set[int] = set()  # a forked worker must not keep its parent's locks alive


@contextmanager
def locked(path: Path, *, wait: float, busy: Callable[[str], EdgedetrError]) -> Iterator[None]:
    """Hold the lock file `path`.

    wait    seconds to wait for another owner; 0 = none
    busy    makes the error to raise then, from words for the owner ("process 1234", or with its host)

    Errors: what `busy` makes; OSError where the file cannot be made (read-only, full, no such folder).
    """
    handle = _take(path, wait, busy)
    try:
        yield
    finally:
        if handle is not None:
            _open.discard(handle)
            path.unlink(missing_ok=True)  # while it is still ours, so that nobody else's is taken away
            os.close(handle)


def _take(path: Path, wait: float, busy: Callable[[str], EdgedetrError]) -> int | None:
    """An open, locked file at `path`; None where there are no locks."""
    if fcntl is None:
        log.warning("%s: no locks on this system; do not run two commands on one bundle at a time", path.parent)
        return None
    end, pause = time.monotonic() + wait, 0.005
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, handle):  # else its last owner took it away between opening and locking
                with suppress(OSError):  # a full disk: then the lock holds without a name
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
    """Words for who holds the lock."""
    pid, _, where = os.pread(handle, 300, 0).decode("utf-8", "replace").strip().partition(" ")
    if not pid.isdecimal():
        return "another process"  # it has not written its number yet
    return f"process {pid}" + (f" on {where!r}" if where != host() else "")


def host() -> str:
    """The name of this machine."""
    return os.uname().nodename if hasattr(os, "uname") else "here"


def _forget() -> None:
    """In a forked child: closing the copies leaves the parent's locks as they are."""
    for handle in _open:
        try:
            os.close(handle)
        except OSError:
            continue
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
