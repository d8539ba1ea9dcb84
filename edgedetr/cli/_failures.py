"""Messages for errors of the system: files, memory, signals."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# How libraries report that there is no memory, in their own errors.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "unable to allocate",
    "failed to map segment",
)
OUTPUT = "standard output"
ENDING = ("SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """A signal that ends the command like Ctrl-C does; `number` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Stopped, so that temporary files are removed; nohup keeps its effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    # A signal that is ignored (nohup) or handled already is left alone.
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _stop(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # the cleaning up must not be interrupted
    raise Stopped(number)


def _default_handlers() -> None:
    """In a forked worker: a signal ends it silently, as its parent expects."""
    for name in ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_default_handlers)


def explain(error: BaseException) -> str | None:
    """The message for an error of the system; None for an error that may be a mistake in this code."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or _names_memory(error):
        words = "" if isinstance(error, (MemoryError, OSError)) else f": {(str(error).splitlines() or [''])[0][:200]}"
        return (
            f"not enough memory{_available()}{words}; close other programs, or use less at a time (--set "
            "train.batch=..., a smaller --input, fewer --threads)"
        )
    if isinstance(error, RecursionError):
        return "a file, or a name in one, is nested too deep; run again with --debug to see which"
    if isinstance(error, UnicodeError):
        return (
            f"text that cannot be written or read here ({error}); expected UTF-8: set LC_ALL=C.UTF-8, or rename "
            "the file"
        )
    return _of_system(error) if isinstance(error, OSError) else None


def _of_system(error: OSError) -> str | None:
    path = _path(error)
    if path == OUTPUT:
        return f"{path}: {error.strerror}"
    if error.errno in FULL:
        folder = Path(path).parent if path else Path()
        return (
            f"{path or 'a file'}: the disk is full ({_written(error)}{_free(folder)} free); what was there before "
            "is kept; free some space, then run the same command again"
        )
    if error.errno is None and not path:
        return None  # raised by a library, not by the system
    why = error.strerror or str(error)
    where = path or "a file"
    if error.errno in REFUSED:
        return (
            f"{where}: {why}; expected a path that this user may read and write: change its permissions, or choose "
            "another --out"
        )
    if error.errno == errno.ENAMETOOLONG:
        return f"{path[:120]}...: {why}; expected names of at most 255 bytes"
    if error.errno == errno.EFBIG:
        return f"{where}: {why}; expected room for a larger file: see `ulimit -f`, or take another file system"
    return f"{where}: {why}"


def _path(error: OSError) -> str:
    named = error.filename if error.filename2 is None else error.filename2
    if named is None:
        return ""
    return os.fsdecode(named) if isinstance(named, (bytes, str)) else str(named)


def _written(error: OSError) -> str:
    count = getattr(error, "written", None)
    return "" if count is None else f"{count:,} bytes were written and more are needed, "


def _free(folder: Path) -> str:
    for parent in (folder, *folder.parents):
        try:
            return f"{shutil.disk_usage(parent).free:,} bytes are"
        except OSError:
            continue
    return "nothing is"


def _names_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, Exception) and any(words in text for words in NO_MEMORY)


def _available() -> str:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return f" ({int(line.split()[1]) // 1024:,} MiB are available)"
    except (OSError, ValueError, IndexError):
        return ""
    return ""


@contextmanager
def writing_out() -> Iterator[None]:
    """Put "standard output" into errors of writing to it, and write no more, or the exit of Python would fail too.

    A reader that has gone (BrokenPipeError) is not an error.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        quiet()
        raise OSError(error.errno, error.strerror, OUTPUT) from error


def quiet() -> None:
    """Write nothing more to standard output, not even at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a real file, as in tests
        return
