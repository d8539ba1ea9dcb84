"""Before a plan is deserialized: it is of this machine, whole, and built for this device and this TensorRT.

A serialized engine is executable code: whoever writes one decides what the process does that loads it. And TensorRT's
own checks come late: a Runtime on a machine without a driver ends the process. So the driver is asked first (see
cudart.probe), then the sidecar, then the digest; what is deserialized are the very bytes that were checked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from edgedetr.errors import EdgedetrError, EngineError
from edgedetr.runtime import machine
from edgedetr.runtime.tensorrt import engine_metadata as sidecars
from edgedetr.runtime.tensorrt.cudart import Device
from edgedetr.runtime.tensorrt.engine_metadata import Sidecar

LARGEST = 8 << 30  # bytes of a plan; the largest detector here has a tenth
BUILD = "build it here, from the ONNX file: edgedetr build BUNDLE"


@dataclass(frozen=True)
class CheckedPlan:
    """The bytes that may be deserialized, and what is known of them (None: a foreign plan that was trusted)."""

    data: bytes
    sidecar: Sidecar | None


def check(
    plan: Path, device: Device, tensorrt: str, *, onnx_sha256: str | None = None, trust: bool = False
) -> CheckedPlan:
    """Read a plan that may be deserialized on this device with this version of TensorRT; EngineError otherwise.

    onnx_sha256   what it must have been built from; None: whatever it was
    trust         take a plan without a sidecar, or of another machine: its author's code will run here
    """
    told = None if trust and not sidecars.beside(plan).exists() else sidecars.read(plan)
    if told is None and not trust:
        raise EngineError(
            f"{plan}: no {sidecars.beside(plan).name} beside it, so nobody knows where this plan is "
            f"from; a plan is executable code; {BUILD} (in Python, trust=True takes it all the same)"
        )
    if told is not None:
        reason = foreign(told) if not trust else ""
        reason = reason or mismatch(told, device, tensorrt, onnx_sha256)
        if reason:
            raise EngineError(f"{plan}: {reason}")
    data = read_regular(plan, LARGEST, f"expected an engine; {BUILD}", code=True)
    if not data:
        raise EngineError(f"{plan}: empty; expected an engine; {BUILD}")
    if told is not None and (len(data) != told.plan_bytes or hashlib.sha256(data).hexdigest() != told.plan_sha256):
        raise EngineError(
            f"{plan}: damaged or replaced: it has {len(data)} bytes and another sha256 than the "
            f"{told.plan_bytes} bytes {told.plan_sha256:.8} that were built; {sidecars.REBUILD}"
        )
    return CheckedPlan(data, told)


def foreign(told: Sidecar) -> str:
    """Why this plan counts as another machine's; empty when it is this one's. Ids are not shown: they are no secret
    any more once they stand in somebody's bug report."""
    here = machine.host()
    if here and told.host and secrets.compare_digest(here.encode(), told.host.encode()):
        return ""
    if not told.host:
        why = "nothing says which machine built it"
    elif not here:
        why = "this machine has no id, so nobody can tell whether it was built here"
    else:
        why = "built on another machine"
    return f"{why}; a plan is executable code; {BUILD} (--trust takes it all the same)"


def drift(told: Sidecar, device: Device) -> str:
    """What has changed under an engine that still loads: its kernels were chosen, and timed, with something else."""
    pairs = [("driver", told.driver, device.driver), ("Jetson Linux", told.jetpack, machine.jetpack())]
    changed = [
        f"{what} {before}, which is now {now}" for what, before, now in pairs if before and now and before != now
    ]
    return f"built with {' and '.join(changed)}" if changed else ""


def mismatch(told: Sidecar, device: Device, tensorrt: str, onnx_sha256: str | None = None) -> str:
    """What does not fit this place, as "found, needed, command"; empty when all fits. Reads no file."""
    pairs = [
        ("TensorRT", told.tensorrt, tensorrt),
        ("CUDA", told.cuda, device.runtime),
        ("compute capability", f"sm_{told.sm}", f"sm_{device.sm}"),
        ("device", told.device, device.name),
    ]
    if onnx_sha256 is not None:
        pairs.append((told.onnx, f"sha256 {told.onnx_sha256:.8}", f"sha256 {onnx_sha256:.8}"))
    wrong = [(what, found, needed) for what, found, needed in pairs if found != needed]
    if not wrong:
        return ""
    found = ", ".join(f"{what} {found}" for what, found, _ in wrong)
    needed = ", ".join(f"{what} {needed}" for what, _, needed in wrong)
    return f"built for {found}; needed here: {needed}; {BUILD}"


def read_regular(
    path: Path,
    largest: int,
    expected: str,
    *,
    code: bool = False,
    error: type[EdgedetrError] = EngineError,
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
