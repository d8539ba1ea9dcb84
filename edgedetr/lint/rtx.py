"""A real TensorRT parser and strongly typed builder without a GPU: TensorRT-RTX builds for chips it does not see.

Version 1.7.1 has the interface of TensorRT 11; 1.4.0, in a folder of its own because the module has the same name, is
of the age of TensorRT 10.16 and serves as a parser alone. Types, shapes and operators are judged as on a
Jetson; kernels are not: a graph that builds here may be slow, wrong or without a kernel there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.errors import BundleError, ExportError, MissingDependency
from edgedetr.onnx_graph.io import open_onnx
from edgedetr.packages import TENSORRT_RTX

LIMIT = "this says nothing about speed or numerics on a Jetson"
PROCESS = Path(__file__).with_name("rtx_worker.py")
SECONDS = 600  # of one file; RT-DETR-R18 at 640 px takes 8, R101 some 30


@dataclass(frozen=True)
class RtxResult:
    """What TensorRT-RTX says of one ONNX file.

    version   of TensorRT-RTX, "" where the process died before it said
    built     None: not tried
    layers    of the network after parsing
    errors    in full, each of the parser's with the node it is about
    """

    path: str
    version: str
    parsed: bool
    built: bool | None
    layers: int
    parse_seconds: float
    build_seconds: float | None
    plan_bytes: int | None
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.parsed and self.built is not False

    def __str__(self) -> str:
        did = (
            "does not parse"
            if not self.parsed
            else {None: "parses", True: "parses and builds"}.get(self.built, "parses, but does not build")
        )
        lines = [f"{self.path} {did} in TensorRT-RTX {self.version or '(unknown)'}; {LIMIT}", *self.errors]
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok, "limit": LIMIT}


def check(onnx_path: str | Path, build: bool = True, *, packages: str | Path | None = None) -> RtxResult:
    """Parse, and with `build` build, one ONNX file.

    packages   a folder with other bindings (pip install --no-deps --target FOLDER); None = those of this environment
    """
    return check_all([onnx_path], build, packages=packages)[0]


def check_all(
    onnx_paths: Sequence[str | Path], build: bool = True, *, packages: str | Path | None = None
) -> list[RtxResult]:
    """As `check`, for several files in one process; a file at which the library crashes is told as such."""
    files = [str(path) for path in onnx_paths]
    for path in files:
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such file; expected an ONNX graph; run: edgedetr export")
    # The library opens whatever files a graph names; those that must not be opened are refused before it sees the path.
    refused = {path: faults for path in files if (faults := _faults(path))}
    sound = [path for path in files if path not in refused]
    results: list[RtxResult] = []
    while len(results) < len(sound):
        results += _run(sound[len(results) :], build, packages)
    said = iter(results)
    return [
        RtxResult(path, "", False, None, 0, 0.0, None, None, refused[path]) if path in refused else next(said)
        for path in files
    ]


def _faults(path: str) -> tuple[str, ...]:
    """Why the library must not be given a file."""
    try:
        return open_onnx(path, weights=False).faults
    except ExportError as error:
        return (str(error),)


def _run(files: list[str], build: bool, packages: str | Path | None) -> list[RtxResult]:
    """Results up to the first crash, at least one."""
    order = json.dumps({"files": files, "build": build})
    surroundings = {**os.environ, **({"PYTHONPATH": str(packages)} if packages else {})}
    try:
        done = subprocess.run(
            [sys.executable, str(PROCESS), order],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS * len(files),
            env=surroundings,
        )
        code, out, told = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, out, told = None, _text(late.stdout), f"no answer after {SECONDS * len(files)} s"
    if code == 3:
        raise MissingDependency(
            f"TensorRT-RTX is not installed (it exists for x86-64 Linux and Windows); run: pip install {TENSORRT_RTX}"
        )
    results = []
    for line in out.splitlines():
        if line.startswith("{"):  # the library itself writes to standard output too
            raw = json.loads(line)
            results.append(RtxResult(**{**raw, "errors": tuple(raw["errors"])}))
    if len(results) < len(files):
        how = told if code is None else f"TensorRT-RTX ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        results.append(
            RtxResult(
                files[len(results)],
                results[-1].version if results else "",
                False,
                None,
                0,
                0.0,
                None,
                None,
                (f"{how}: {told.strip()[-500:]}",),
            )
        )
    return results


def _text(out: bytes | str | None) -> str:
    return out.decode(errors="replace") if isinstance(out, bytes) else out or ""
