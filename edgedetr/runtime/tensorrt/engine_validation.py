"""Checks before a plan is deserialized: built on this machine, undamaged, for this device and this TensorRT.

A plan (a serialized engine) is executable code: its author controls the process that loads it. TensorRT's own checks
come too late: a Runtime on a machine without a driver ends the process. So the driver is probed first (see gpu.probe),
then the metadata is checked, then the digest; exactly the bytes that were checked are deserialized.
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
    """The bytes that may be deserialized, and their metadata (None: a plan without metadata that was trusted)."""

    data: bytes
    metadata: EngineMetadata | None


def check(
    plan: Path, device: Device, tensorrt: str, *, onnx_sha256: str | None = None, trust: bool = False
) -> ValidatedEngine:
    """Read a plan that may be deserialized on this device with this version of TensorRT. Errors: EngineError.

    onnx_sha256   digest of the graph that it must have been built from; None: any graph
    trust         accept a plan without metadata, or from another machine: its author's code will run here
    """
    metadata = None if trust and not engine_metadata.metadata_path(plan).exists() else engine_metadata.read(plan)
    if metadata is None and not trust:
        raise EngineError(
            f"{plan}: there is no {engine_metadata.metadata_path(plan).name} next to it, so the origin of this plan is "
            f"unknown; a plan is executable code; {BUILD} (in Python, trust=True accepts it)"
        )
    if metadata is not None:
        reason = untrusted(metadata) if not trust else ""
        reason = reason or mismatch(metadata, device, tensorrt, onnx_sha256)
        if reason:
            raise EngineError(f"{plan}: {reason}")
    data = read_plain_file(plan, LARGEST, f"expected an engine; {BUILD}", code=True, error=EngineError)
    if not data:
        raise EngineError(f"{plan}: empty; expected an engine; {BUILD}")
    if metadata is not None and (
        len(data) != metadata.plan_bytes or hashlib.sha256(data).hexdigest() != metadata.plan_sha256
    ):
        raise EngineError(
            f"{plan}: damaged or replaced: it has {len(data)} bytes and another sha256 than the "
            f"{metadata.plan_bytes} bytes {metadata.plan_sha256:.8} that were built; {engine_metadata.REBUILD}"
        )
    return ValidatedEngine(data, metadata)


def untrusted(metadata: EngineMetadata) -> str:
    """Why this plan counts as built on another machine; empty where it was built on this one.

    Machine ids are not shown, because a bug report would then publish them.
    """
    here = host()
    if here and metadata.host and secrets.compare_digest(here.encode(), metadata.host.encode()):
        return ""
    if not metadata.host:
        why = "the metadata does not name the machine that built it"
    elif not here:
        why = "this machine has no id, so it is unknown whether it was built here"
    else:
        why = "built on another machine"
    return f"{why}; a plan is executable code; {BUILD} (--allow-foreign-engine accepts it)"


def drift(metadata: EngineMetadata, device: Device) -> str:
    """What has changed since an engine was built that still loads; its kernels were selected and timed before that."""
    pairs = [("driver", metadata.driver, device.driver), ("Jetson Linux", metadata.jetpack, jetson.linux_release())]
    changed = [
        f"{what} {before}, which is now {now}" for what, before, now in pairs if before and now and before != now
    ]
    return f"built with {' and '.join(changed)}" if changed else ""


def mismatch(metadata: EngineMetadata, device: Device, tensorrt: str, onnx_sha256: str | None = None) -> str:
    """What does not fit this device, as "found, needed, command"; empty where everything fits. Reads no file."""
    pairs = [
        ("TensorRT", metadata.tensorrt, tensorrt),
        ("CUDA", metadata.cuda, device.runtime),
        ("compute capability", f"sm_{metadata.sm}", f"sm_{device.sm}"),
        ("device", metadata.device, device.name),
    ]
    if onnx_sha256 is not None:
        pairs.append((metadata.onnx, f"sha256 {metadata.onnx_sha256:.8}", f"sha256 {onnx_sha256:.8}"))
    wrong = [(what, found, needed) for what, found, needed in pairs if found != needed]
    if not wrong:
        return ""
    found = ", ".join(f"{what} {found}" for what, found, _ in wrong)
    needed = ", ".join(f"{what} {needed}" for what, _, needed in wrong)
    return f"built for {found}; needed here: {needed}; {BUILD}"


def host(*, make: bool = False) -> str:
    """A digest that identifies this machine; empty where it has no id.

    The id itself is confidential (man machine-id), so only a salted digest is stored. The digest is not shown either:
    a stranger who knows it could write an engine that seems to have been built here.

    make   create an id in the user's cache where the system has none; building an engine requires one
    """
    identity = _system_id() or _own_id(make)
    return hashlib.sha256(f"edgedetr engine {identity}".encode()).hexdigest()[:16] if identity else ""


def _system_id() -> str:
    """The system's id; also empty for "uninitialized", which systemd writes into images that many machines share."""
    try:
        text = MACHINE_ID.read_text(encoding="ascii").strip().lower()
    except (OSError, ValueError):
        return ""
    return text if FORM.fullmatch(text) and set(text) != {"0"} else ""


def _own_id(make: bool) -> str:
    """The id in the user's cache, from a file that only this user or root can write."""
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
