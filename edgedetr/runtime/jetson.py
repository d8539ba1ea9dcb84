"""A Jetson's release, power mode, clocks, memory and temperature, read from files; nothing is changed or executed.

Latencies depend on them: the same engine is several times slower in a 7 W mode, and varies from run to run while the
clocks follow the load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Start of the Jetson Linux release -> JetPack. 36.4 is in two versions of JetPack.
JETPACKS = {
    "35.": "5",
    "36.2": "6.0 preview",
    "36.3": "6.0",
    "36.4": "6.1 or 6.2",
    "36.5": "6.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
GPU_NAMES = re.compile(r"gpu|gv11b|gp10b|ga10b|gb10b", re.I)
MEMORY_TO_BUILD = 1 << 30  # bytes; with less free memory, building an engine is likely to fail
HOT = 85.0  # degrees Celsius; throttling begins about ten degrees above


@dataclass(frozen=True)
class Clock:
    """MHz; `fixed`: minimum and maximum are equal, as after jetson_clocks."""

    now: int
    least: int
    most: int

    @property
    def fixed(self) -> bool:
        return self.least == self.most


@dataclass(frozen=True)
class Board:
    """The values in the files; None or empty where a file is missing.

    model        "NVIDIA Jetson Orin Nano Developer Kit"
    release      of Jetson Linux, "36.4.3"
    power_mode   name and number, "15W (0)"
    memory       total and available bytes, shared by CPU and GPU
    celsius      the hottest sensor
    """

    model: str
    release: str
    power_mode: str
    gpu: Clock | None
    cpu: Clock | None
    memory: tuple[int, int] | None
    celsius: float | None

    @property
    def is_jetson(self) -> bool:
        return bool(self.release)

    @property
    def jetpack(self) -> str:
        """Version of JetPack for this release of Jetson Linux; empty where it is unknown."""
        return next((name for start, name in JETPACKS.items() if self.release.startswith(start)), "")

    @property
    def clocks_fixed(self) -> bool | None:
        """Whether the clock is fixed, so that latencies of different runs can be compared; None where it is unknown."""
        return None if self.gpu is None else self.gpu.fixed

    def conditions(self) -> str:
        """Power mode, clocks and temperature in one line, for a table of latencies; empty where this is no Jetson."""
        if not self.is_jetson:
            return ""
        parts = [f"power mode {self.power_mode or 'unknown'}"]
        for what, clock in (("GPU", self.gpu), ("CPU", self.cpu)):
            if clock is not None:
                parts.append(f"{what} {clock.most} MHz" if clock.fixed else f"{what} {clock.least}..{clock.most} MHz")
        if self.celsius is not None:
            parts.append(f"{self.celsius:.0f} C")
        return ", ".join([*parts, "clocks fixed" if self.clocks_fixed else "clocks follow the load"])

    def rows(self) -> list[list[object]]:
        """Lines of `edgedetr doctor`."""
        if not self.is_jetson:
            return []
        rows: list[list[object]] = [
            ["board", self.model or "NVIDIA Jetson"],
            ["jetpack", f"{self.jetpack or 'unknown'} (Jetson Linux {self.release})"],
            ["power mode", self.power_mode or "unknown"],
        ]
        for what, clock in (("gpu clock", self.gpu), ("cpu clock", self.cpu)):
            if clock is not None:
                held = "fixed" if clock.fixed else f"follows the load, {clock.least} to {clock.most} MHz"
                rows.append([what, f"{clock.now} MHz, {held}"])
        if self.celsius is not None:
            rows.append(["temperature", f"{self.celsius:.0f} C"])
        return rows

    def advice(self) -> list[str]:
        """Recommendations, one sentence each."""
        if not self.is_jetson:
            return []
        lines = []
        if self.clocks_fixed is False:
            lines.append("clocks follow the load, so latencies vary; before measuring run: sudo jetson_clocks")
        if self.power_mode and "maxn" not in self.power_mode.lower():
            lines.append(
                f"power mode {self.power_mode} limits the clocks; list the modes: "
                "grep POWER_MODEL /etc/nvpmodel.conf, select one: sudo nvpmodel -m ID"
            )
        if self.memory is not None and self.memory[1] < MEMORY_TO_BUILD:
            lines.append(
                f"only {self.memory[1] / 1e9:.1f} GB of memory are free; before building engines close the "
                "desktop (sudo systemctl isolate multi-user.target) and add swap"
            )
        if self.celsius is not None and self.celsius >= HOT:
            lines.append(f"{self.celsius:.0f} C: the board is close to throttling; check its fan")
        return lines


def read(root: Path = Path("/")) -> Board:
    """Read the files below `root`, the root of the file system."""
    return Board(
        model=_text(root / "proc/device-tree/model").rstrip("\0\n"),
        release=linux_release(root).removeprefix("R"),
        power_mode=_power_mode(root),
        gpu=_gpu(root),
        cpu=_cpu(root),
        memory=_memory(root),
        celsius=_celsius(root),
    )


def linux_release(root: Path = Path("/")) -> str:
    """The release of Jetson Linux, "R36.4.3"; empty where this is no Jetson."""
    found = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return f"R{found[1]}.{found[2]}" if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # missing, or readable by root only
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _power_mode(root: Path) -> str:
    """Name and number of the mode: nvpmodel has the number in a status file, the names in its configuration."""
    now = re.search(r"pmode:\s*(\d+)", _text(root / "var/lib/nvpmodel/status"))
    configuration = _text(root / "etc/nvpmodel.conf")
    default = re.search(r"PM_CONFIG\s+DEFAULT=(\d+)", configuration)
    found = now or default
    if found is None:
        return ""
    number = int(found[1])
    name = re.search(rf"POWER_MODEL\s+ID={number}\s+NAME=(\S+)", configuration)
    return f"{name[1] if name else 'mode'} ({number})"


def _gpu(root: Path) -> Clock | None:
    folder = root / "sys/class/devfreq"
    try:
        devices = sorted(path for path in folder.iterdir() if GPU_NAMES.search(path.name))
    except OSError:
        return None
    return next(
        (
            clock
            for path in devices
            if (clock := _clock(*(path / name for name in ("cur_freq", "min_freq", "max_freq")), hertz=1)) is not None
        ),
        None,
    )


def _cpu(root: Path) -> Clock | None:
    """Clock of the fastest core that is online."""
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    clocks = [
        _clock(*(path / f"scaling_{name}_freq" for name in ("cur", "min", "max")), hertz=1000) for path in policies
    ]
    return max((clock for clock in clocks if clock is not None), key=lambda clock: clock.most, default=None)


def _clock(*paths: Path, hertz: int) -> Clock | None:
    """Clock from three files with numbers in units of `hertz` Hz."""
    values = [_number(path) for path in paths]
    if any(value is None for value in values):
        return None
    now, least, most = (round(value * hertz / 1e6) for value in values if value is not None)
    return Clock(now, least, most)


def _memory(root: Path) -> tuple[int, int] | None:
    text = _text(root / "proc/meminfo")
    total, available = (re.search(rf"^{name}:\s+(\d+) kB", text, re.M) for name in ("MemTotal", "MemAvailable"))
    return None if total is None or available is None else (int(total[1]) * 1024, int(available[1]) * 1024)


def _celsius(root: Path) -> float | None:
    """The hottest thermal zone; zones that are switched off give errors or absurd values."""
    zones = (_number(path / "temp") for path in sorted((root / "sys/class/thermal").glob("thermal_zone*")))
    return max((zone / 1000 for zone in zones if zone is not None and 0 < zone < 150_000), default=None)
