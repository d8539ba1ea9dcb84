"""Where engines and timings of kernels are kept: in the bundle, or in the user's cache where that is read-only.

Everything is written beside its place, flushed and renamed, and one process at a time builds in a folder: eight that
are started together make one engine, and whatever fails leaves the engine that was there.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgedetr.bundle import Bundle
from edgedetr.errors import EngineError
from edgedetr.runtime.tensorrt.gpu import Device
from edgedetr.storage.atomic import atomic_write
from edgedetr.storage.reading import read_plain_file

log = logging.getLogger(__name__)

FOLDER = "engines"
UNFINISHED = ".building"  # ending of files that are being written; those of a process that was killed stay
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
LARGEST_CACHE = 256 << 20  # bytes of a timing cache; a real one has a few million


def user_cache() -> Path:
    """The user's cache folder of edgedetr."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgedetr"


def folders(bundle: Bundle) -> tuple[Path, Path]:
    """Where engines of a bundle may lie: in it, and in the user's cache. The names of engines tell graphs apart."""
    return bundle.inside(FOLDER), user_cache() / FOLDER


def plans(bundle: Bundle) -> list[Path]:
    """All plans that may be this bundle's, of any device and version; guards.check says which fit."""
    return [plan for folder in folders(bundle) if folder.is_dir() for plan in sorted(folder.glob("*.plan"))]


def writable_folder(bundle: Bundle, needed: int = 0) -> Path:
    """The first of `folders` that can be written to, made if it is not there.

    needed   bytes that an engine takes at the least: better to fail before the minutes of a build than after them
    """
    refused = []
    for folder in folders(bundle):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if shutil.disk_usage(folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return folder
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise _unwritable(folder, error) from error
            refused.append(f"{folder} ({error.strerror})")
    raise EngineError(
        f"no place for an engine: {' and '.join(refused)} cannot be written to; expected one of them "
        "writable; set XDG_CACHE_HOME to a folder that is"
    )


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other builds in this folder: they share the GPU, and would disturb each other's timing of kernels."""
    import fcntl  # of Linux, which is where engines are built

    try:
        stream = open(folder / ".lock", "a", encoding="ascii")
    except OSError as error:
        raise _unwritable(folder / ".lock", error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process builds here; waiting for it", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        for left in folder.glob(f".*{UNFINISHED}"):  # nobody else writes here now
            left.unlink(missing_ok=True)
        yield  # closing the file opens the lock, also after a crash


def publish(files: Mapping[Path, bytes]) -> None:
    """Write files of one folder so that all are on disk before the first one takes its place, in the given order."""
    staged: list[tuple[Path, Path]] = []
    target = Path()
    try:
        for target, data in files.items():
            handle, name = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=UNFINISHED, dir=target.parent)
            staged.append((Path(name), target))
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(0o644)
        for temporary, target in staged:
            os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> EngineError:
    return EngineError(
        f"{path}: cannot be written ({error.strerror}); what was there before is kept; free some space "
        "or set XDG_CACHE_HOME to another place, then run the same command again"
    )


def timing_cache_path(device: Device, tensorrt: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")[:40]
    return user_cache() / "timing" / f"{name}-sm{device.sm}-trt{tensorrt}-cu{device.runtime}.cache"


def read_timing_cache(path: Path) -> bytes:
    """Timings of earlier builds on this device; empty when there are none or they cannot be used."""
    if not path.exists():
        return b""
    try:
        return read_plain_file(
            path, LARGEST_CACHE, "expected the timings of earlier builds", code=True, error=EngineError
        )
    except EngineError as error:
        log.warning("building without the timings of earlier builds: %s", error)
        return b""


def write_timing_cache(path: Path, data: bytes) -> None:
    """Keep timings for the next build; that they cannot be kept only costs time."""
    if not data:
        return
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        log.warning("%s: the timings of this build are not kept (%s)", path, error.strerror)
