"""What this processor can do, by /proc/cpuinfo: 8-bit dot products, wide float32, bfloat16 tiles; and its cores."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")

# Flags of instructions that multiply 8-bit integers and add into 32 bits without an intermediate 16-bit overflow.
DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")


# Those that `edgedetr doctor` shows; amx_bf16 is for training.
SHOWN = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


@lru_cache(maxsize=1)
def fields() -> Mapping[str, str]:
    """Keys and values of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}


def flags() -> frozenset[str]:
    """Instruction sets, by the names of Linux: "avx512_vnni" on x86, "asimddp" on ARM."""
    return frozenset((fields().get("flags") or fields().get("Features", "")).split())


def model_name() -> str:
    """ "Intel(R) Xeon(R) ..."; the architecture where the processor has no name."""
    return fields().get("model name") or platform.processor() or platform.machine()


def instructions() -> tuple[str, ...]:
    """The instructions that decide how fast INT8 and bfloat16 are."""
    return tuple(name for name in SHOWN if name in flags())


@lru_cache(maxsize=1)
def int8_dot_product() -> str | None:
    """Name of the 8-bit dot-product instruction of this CPU, or None.

    Without one, uint8 x int8 kernels on x86 saturate in 16 bits (VPMADDUBSW), and INT8 is neither exact nor fast.
    """
    if not fields():  # no Linux: Apple silicon always has the instruction, elsewhere nothing is known
        return "asimddp" if platform.machine() == "arm64" else None
    return next((flag for flag in DOT_PRODUCTS if flag in flags()), None)


def int8_saturates() -> bool:
    """Whether sums of two products of full-range 8-bit numbers are cut to 16 bits here: x86 without the instruction.

    ONNX Runtime is exact there with 7-bit weights; OpenVINO runs 8-bit ones and loses points on a correct graph
    (measured on Zen 3: 5.1 of 59.0 AP on the rendered set, 60.3 of 60.4 on BCCD, first at the stem's convolution).
    """
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and int8_dot_product() is None


@lru_cache(maxsize=1)
def mkl_is_narrow() -> bool:
    """Whether MKL multiplies float32 in half this CPU's width: AMD from family 26 (Zen 5) on, which has all of AVX-512.

    Measurement on Zen 5, one thread: products of Linears ran at 105 GFLOP/s by MKL and at 217 to 247 by oneDNN.
    """
    first = fields()
    family = first.get("cpu family", "")
    return first.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26 and "avx512f" in flags()


@lru_cache(maxsize=1)
def tiles_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (Intel's AMX), several times as fast as float32.

    Measured on a Xeon with AMX, one thread: products of Linears ran at 80 to 160 GFLOP/s in float32 and at 350 to 1300
    in bfloat16.
    """
    return "amx_bf16" in flags()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def bounded(wanted: int | None, what: str = "threads") -> int:
    """`wanted` threads or processes, at most the number of cores; 0 for None: the library chooses.

    More are never faster, and thousands make a machine unusable. A number that was lowered is logged, once.
    """
    most = cores()
    if not wanted or wanted <= most:
        return wanted or 0
    _warn_bound(min(wanted, 10**9), most, what)
    return most


@lru_cache(maxsize=64)
def _warn_bound(wanted: int, most: int, what: str) -> None:
    log.warning(
        "%s is %d, and this process has %d core%s: %d %s used",
        what,
        wanted,
        most,
        "s" * (most > 1),
        most,
        "are" if most > 1 else "is",
    )
