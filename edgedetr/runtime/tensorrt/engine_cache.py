"""The folders of engines and kernel timings: in the bundle, or in the user's cache where the bundle is read-only.

A file is written under a temporary name, flushed and renamed, and one process at a time builds in a folder. So eight
processes that start together build one engine, and a failure keeps the previous engine.
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
UNFINISHED = ".building"  # suffix of files that are being written; those of a killed process remain
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
LARGEST_CACHE = 256 << 20  # bytes of a timing cache; a typical one has a few million


def user_cache() -> Path:
    """The user's cache folder of edgedetr."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgedetr"


def folders(bundle: Bundle) -> tuple[Path, Path]:
    """The folders that can have engines of a bundle: its own, and the user's cache, where names identify the graph."""
    return bundle.inside(FOLDER), user_cache() / FOLDER


def plans(bundle: Bundle) -> list[Path]:
    """All plans that may belong to this bundle, of any device and version; engine_validation.check tells which fit."""
    return [plan for folder in folders(bundle) if folder.is_dir() for plan in sorted(folder.glob("*.plan"))]


def writable_folder(bundle: Bundle, needed: int = 0) -> Path:
    """The first of `folders` that is writable; it is created if it is missing.

    needed   minimum size of an engine, bytes: a full disk fails before the build, which takes minutes, and not after it
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
        f"no folder for an engine: {' and '.join(refused)} are not writable; expected one of them "
        "writable; set XDG_CACHE_HOME to a folder that is"
    )


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for other builds in this folder: they share the GPU, and builds side by side distort kernel timings."""
    import fcntl  # of Linux, which is where engines are built

    try:
        stream = open(folder / ".lock", "a", encoding="ascii")
    except OSError as error:
        raise _unwritable(folder / ".lock", error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process builds here; waiting for it to end", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        for left in folder.glob(f".*{UNFINISHED}"):  # this process has the lock
            left.unlink(missing_ok=True)
        yield  # closing the file releases the lock, also after a crash


def publish(files: Mapping[Path, bytes]) -> None:
    """Write the files of one folder: first all to disk under temporary names, then renamed in the given order."""
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
        f"{path}: cannot be written ({error.strerror}); the previous file is kept; free some space "
        "or set XDG_CACHE_HOME to another folder, then run the same command again"
    )


def timing_cache_path(device: Device, tensorrt: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")[:40]
    return user_cache() / "timing" / f"{name}-sm{device.sm}-trt{tensorrt}-cu{device.runtime}.cache"


def read_timing_cache(path: Path) -> bytes:
    """Kernel timings of earlier builds on this device; empty where there are none or they cannot be used."""
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
    """Store kernel timings for the next build; without them, it only takes longer."""
    if not data:
        return
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        log.warning("%s: the kernel timings of this build are not stored (%s)", path, error.strerror)
