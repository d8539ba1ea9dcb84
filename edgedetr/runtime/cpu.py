"""What this processor can do: with 8-bit integers, and with the libraries that multiply on it."""

from __future__ import annotations

import logging
import os
import platform
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")

# Flags of instructions that multiply 8-bit integers and add into 32 bits without an intermediate 16-bit overflow.
DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")


@lru_cache(maxsize=1)
def int8_dot_product() -> str | None:
    """Name of the 8-bit dot-product instruction of this CPU, or None.

    Without one, uint8 x int8 kernels on x86 saturate in 16 bits (VPMADDUBSW), and INT8 is neither exact nor fast.
    """
    try:
        words = set(CPUINFO.read_text(encoding="ascii", errors="ignore").split())
    except OSError:  # no Linux: Apple silicon always has the instruction, elsewhere nothing is known
        return "asimddp" if platform.machine() == "arm64" else None
    return next((flag for flag in DOT_PRODUCTS if flag in words), None)


def int8_saturates() -> bool:
    """Whether sums of two products of full-range 8-bit numbers are cut to 16 bits here: x86 without the instruction.

    ONNX Runtime is exact there with 7-bit weights; OpenVINO runs 8-bit ones and loses points on a correct graph
    (measured on Zen 3: 5.1 of 59.0 AP on the rendered set, 60.3 of 60.4 on BCCD, first at the stem's convolution).
    """
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and int8_dot_product() is None


@lru_cache(maxsize=1)
def mkl_is_narrow() -> bool:
    """Whether MKL multiplies float32 in half this CPU's width: AMD from family 26 (Zen 5) on, which has all of AVX-512.

    Measured on Zen 5, one thread: products of Linears ran at 105 GFLOP/s by MKL and at 217 to 247 by oneDNN.
    """
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return False
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    family = first.get("cpu family", "")
    return (
        first.get("vendor_id") == "AuthenticAMD"
        and family.isdigit()
        and int(family) >= 26
        and "avx512f" in first.get("flags", "").split()
    )


@lru_cache(maxsize=1)
def tiles_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (Intel's AMX), several times as fast as float32.

    Measured on a Xeon with AMX, one thread: products of Linears ran at 80 to 160 GFLOP/s in float32 and at 350 to 1300
    in bfloat16.
    """
    try:
        return "amx_bf16" in CPUINFO.read_text(encoding="ascii", errors="ignore").split()
    except OSError:
        return False


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def bounded(wanted: int | None, what: str = "threads") -> int:
    """So many threads or processes, but no more than this process has cores; 0 for None: the library's own choice.

    More are never faster, and thousands make a machine unusable. What was not done as asked is said, once.
    """
    most = cores()
    if not wanted or wanted <= most:
        return wanted or 0
    _say_bound(min(wanted, 10**9), most, what)
    return most


@lru_cache(maxsize=64)
def _say_bound(wanted: int, most: int, what: str) -> None:
    log.warning(
        "%s is %d, and this process has %d core%s: %d %s used",
        what,
        wanted,
        most,
        "s" * (most > 1),
        most,
        "are" if most > 1 else "is",
    )
