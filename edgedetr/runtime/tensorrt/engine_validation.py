"""Before a plan is deserialized: it is of this machine, whole, and built for this device and this TensorRT.

A serialized engine is executable code: whoever writes one decides what the process does that loads it. And TensorRT's
own checks come late: a Runtime on a machine without a driver ends the process. So the driver is asked first (see
gpu.probe), then the metadata, then the digest; what is deserialized are the very bytes that were checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from edgedetr.errors import EngineError
from edgedetr.runtime import jetson
from edgedetr.runtime.tensorrt import engine_metadata
from edgedetr.runtime.tensorrt.engine_cache import user_cache
from edgedetr.runtime.tensorrt.engine_metadata import EngineMetadata
from edgedetr.runtime.tensorrt.gpu import Device
from edgedetr.storage.reading import read_plain_file

LARGEST = 8 << 30  # bytes of a plan; the largest detector here has a tenth
MACHINE_ID = Path("/etc/machine-id")
OWN_ID = "machine-id"  # in the user's cache, where the system has none: in most containers
FORM = re.compile(r"[0-9a-f]{32}")
BUILD = "build it here, from the ONNX file: edgedetr build BUNDLE"


@dataclass(frozen=True)
class ValidatedEngine:
    """The bytes that may be deserialized, and what is known of them (None: a foreign plan that was trusted)."""

    data: bytes
    metadata: EngineMetadata | None


def check(
    plan: Path, device: Device, tensorrt: str, *, onnx_sha256: str | None = None, trust: bool = False
) -> ValidatedEngine:
    """Read a plan that may be deserialized on this device with this version of TensorRT; EngineError otherwise.

    onnx_sha256   what it must have been built from; None: whatever it was
    trust         take a plan without metadata, or of another machine: its author's code will run here
    """
    told = None if trust and not engine_metadata.metadata_path(plan).exists() else engine_metadata.read(plan)
    if told is None and not trust:
        raise EngineError(
            f"{plan}: no {engine_metadata.metadata_path(plan).name} beside it, so nobody knows where this plan is "
            f"from; a plan is executable code; {BUILD} (in Python, trust=True takes it all the same)"
        )
    if told is not None:
        reason = untrusted(told) if not trust else ""
        reason = reason or mismatch(told, device, tensorrt, onnx_sha256)
        if reason:
            raise EngineError(f"{plan}: {reason}")
    data = read_plain_file(plan, LARGEST, f"expected an engine; {BUILD}", code=True, error=EngineError)
    if not data:
        raise EngineError(f"{plan}: empty; expected an engine; {BUILD}")
    if told is not None and (len(data) != told.plan_bytes or hashlib.sha256(data).hexdigest() != told.plan_sha256):
        raise EngineError(
            f"{plan}: damaged or replaced: it has {len(data)} bytes and another sha256 than the "
            f"{told.plan_bytes} bytes {told.plan_sha256:.8} that were built; {engine_metadata.REBUILD}"
        )
    return ValidatedEngine(data, told)


def untrusted(told: EngineMetadata) -> str:
    """Why this plan counts as another machine's; empty when it is this one's. Ids are not shown: they are no secret
    any more once they stand in somebody's bug report."""
    here = host()
    if here and told.host and secrets.compare_digest(here.encode(), told.host.encode()):
        return ""
    if not told.host:
        why = "nothing says which machine built it"
    elif not here:
        why = "this machine has no id, so nobody can tell whether it was built here"
    else:
        why = "built on another machine"
    return f"{why}; a plan is executable code; {BUILD} (--trust takes it all the same)"


def drift(told: EngineMetadata, device: Device) -> str:
    """What has changed under an engine that still loads: its kernels were chosen, and timed, with something else."""
    pairs = [("driver", told.driver, device.driver), ("Jetson Linux", told.jetpack, jetson.linux_release())]
    changed = [
        f"{what} {before}, which is now {now}" for what, before, now in pairs if before and now and before != now
    ]
    return f"built with {' and '.join(changed)}" if changed else ""


def mismatch(told: EngineMetadata, device: Device, tensorrt: str, onnx_sha256: str | None = None) -> str:
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


def host(*, make: bool = False) -> str:
    """A digest that is this machine's own; empty where it has no id.

    The id itself is confidential (man machine-id), so only a digest with a word of our own is kept, and not even that
    is shown: with it, a stranger could write an engine that seems to have been built here.

    make   give the machine an id in the user's cache where the system has none: whoever builds an engine needs one
    """
    identity = _system_id() or _own_id(make)
    return hashlib.sha256(f"edgedetr engine {identity}".encode()).hexdigest()[:16] if identity else ""


def _system_id() -> str:
    """Empty too where it is no id: systemd writes "uninitialized" into images, which all their machines would share."""
    try:
        text = MACHINE_ID.read_text(encoding="ascii").strip().lower()
    except (OSError, ValueError):
        return ""
    return text if FORM.fullmatch(text) and set(text) != {"0"} else ""


def _own_id(make: bool) -> str:
    """The id in the user's cache: a file that nobody else can have written."""
    try:
        path = user_cache() / OWN_ID
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(16))
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o022 or about.st_uid not in (0, os.geteuid()):
                return ""
            text = stream.read(64).decode("ascii").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory can be found
        return ""
    return text if FORM.fullmatch(text) else ""
