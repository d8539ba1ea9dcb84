"""Examines this machine: Python, CPU, GPU, packages; what is missing, and the command that installs it."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgedetr.errors import DeviceError, MissingDependency
from edgedetr.packages import PACKAGES, install
from edgedetr.runtime import cpu
from edgedetr.runtime import jetson as board
from edgedetr.runtime.backends.base import backends, reference
from edgedetr.runtime.jetson import Board
from edgedetr.runtime.tensorrt import gpu
from edgedetr.runtime.tensorrt.gpu import Device

COMPARED = ("peers",)  # extras of what is only compared with
ON_DEVICE = ("runtime", "verify")  # the extras of a board, which neither trains nor exports
OPTIONAL = ("cv2", "numba", "tensorboard")  # and all backends but the reference


@dataclass(frozen=True)
class Package:
    """One package that some command needs; `version` None where it is not installed."""

    name: str
    extra: str
    purpose: str
    version: str | None


@dataclass(frozen=True)
class Gpu:
    """The GPU and TensorRT.

    device      None: `no_device` has the reason
    tensorrt    version; None: `no_tensorrt` has the reason
    """

    device: Device | None
    no_device: str
    tensorrt: str | None
    no_tensorrt: str

    def rows(self) -> list[list[object]]:
        found = self.device
        rows: list[list[object]] = [["gpu", f"none: {self.no_device}"]]
        if found is not None:
            shared = " shared with the CPU" if found.integrated else ""
            rows = [
                ["gpu", f"{found.name} (sm_{found.sm}), {found.total_bytes / 2**30:.1f} GiB{shared}"],
                ["cuda", f"{found.runtime}; the driver runs up to {found.driver}"],
            ]
        return [*rows, ["tensorrt", self.tensorrt or f"none: {self.no_tensorrt.partition(';')[0]}"]]

    def advice(self, on_jetson: bool) -> list[str]:
        """What is missing to build and run engines; nothing on a machine without NVIDIA GPU and TensorRT."""
        if self.device and self.tensorrt:
            return ["engines can be built and run here: edgedetr build BUNDLE; check TensorRT with: edgedetr selftest"]
        if not (on_jetson or self.device or self.tensorrt):
            return []
        missing = [self.no_device] * (self.device is None) + [self.no_tensorrt] * (self.tensorrt is None)
        if on_jetson:
            missing.append("JetPack's packages contain both: sudo apt install nvidia-jetpack")
        return missing


@dataclass(frozen=True)
class Examination:
    """The result. `instructions` are those of the CPU that decide the speed of INT8, e.g. avx512_vnni."""

    edgedetr: str
    python: str
    system: str
    cpu: str
    cores: int
    instructions: tuple[str, ...]
    gpu: Gpu
    board: Board
    packages: tuple[Package, ...]

    @property
    def has_vnni(self) -> bool:
        """Whether the CPU (x86) sums int8 products without 16-bit saturation, which full-range INT8 needs."""
        return any("vnni" in name for name in self.instructions)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "has_vnni": self.has_vnni}

    def machine_rows(self) -> list[list[object]]:
        memory: list[list[object]] = []
        if self.board.memory:
            total, free = (size / 2**30 for size in self.board.memory)
            memory = [["memory", f"{total:.1f} GiB, {free:.1f} GiB free"]]
        return [
            ["edgedetr", self.edgedetr],
            ["python", self.python],
            ["system", self.system],
            ["cpu", f"{self.cpu}, {self.cores} cores usable"],
            ["int8 instructions", ", ".join(self.instructions) or "none known"],
            *memory,
            *self.board.rows(),
            *self.gpu.rows(),
        ]

    def package_rows(self) -> list[list[object]]:
        return [[p.name, p.version, p.purpose, _state(p)] for p in self.packages]

    def advice(self) -> list[str]:
        """What to do next, one sentence each."""
        optional = {*OPTIONAL, *(one.library for one in backends() if one.library != reference().library)}
        missing = [
            p
            for p in self.packages
            if p.version is None
            and _import_name(p.name) not in optional
            and p.extra not in COMPARED
            and (p.extra in ON_DEVICE or not self.board.is_jetson)
        ]
        lines = []
        if missing:
            lines.append(f"missing: {', '.join(p.name for p in missing)}; run: {install(p.name for p in missing)}")
        else:
            what = "running and verification" if self.board.is_jetson else "training, export, verification and reports"
            lines.append(f"everything for {what} is installed")
        if platform.machine() in ("x86_64", "AMD64") and not self.has_vnni:
            lines.append("this CPU has no VNNI: INT8 is slower than on newer CPUs, and full-range weights can saturate")
        return [*lines, *self.gpu.advice(self.board.is_jetson), *self.board.advice()]


def examine(root: Path = Path("/")) -> Examination:
    """Examine this machine. Of the heavy packages only TensorRT is imported. `root` is the root of a Jetson's files."""
    packages = tuple(Package(name, extra, purpose, _version(name)) for name, extra, purpose in _packages().values())
    return Examination(
        edgedetr=_version("edgedetr") or "checkout, not installed",
        python=f"{platform.python_version()} at {sys.executable}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu.model_name(),
        cores=cpu.cores(),
        instructions=cpu.instructions(),
        gpu=_gpu(),
        board=board.read(root),
        packages=packages,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _state(package: Package) -> str:
    """`ok`, or how to install it; for TensorRT that depends on the machine, see `advice`."""
    if package.version:
        return "ok"
    return "missing" if package.name == "tensorrt" else f"missing; pip install {package.name}"


def _import_name(package: str) -> str:
    return next(name for name, (known, _, _) in _packages().items() if known == package)


def _packages() -> dict[str, tuple[str, str, str]]:
    """PACKAGES, and the libraries of backends that are not among them."""
    others = [one for one in backends() if one.library not in PACKAGES]
    return {**PACKAGES, **{one.library: (one.library, "runtime", f"backend {one.name}") for one in others}}


def _gpu() -> Gpu:
    device, no_device, tensorrt, no_tensorrt = None, "", None, ""
    try:
        device = gpu.probe()
    except DeviceError as reason:
        no_device = str(reason).removesuffix(f"; {gpu.DOCTOR}")
    try:
        tensorrt = str(gpu.tensorrt().__version__)
    except MissingDependency as reason:
        no_tensorrt = str(reason)
    return Gpu(device, no_device, tensorrt, no_tensorrt)
