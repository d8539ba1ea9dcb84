"""Parse and build with TensorRT-RTX, a real TensorRT parser and strongly typed builder that needs no GPU.

Version 1.7.1 has the interface of TensorRT 11. Version 1.4.0 is as old as TensorRT 10.16 and is used as a parser only;
it is installed in its own folder because the module has the same name. Types, shapes and operators are checked as on a
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
WORKER = Path(__file__).with_name("rtx_worker.py")
SECONDS = 600  # of one file; RT-DETR-R18 at 640 px takes 8, R101 some 30


@dataclass(frozen=True)
class RtxResult:
    """The result of TensorRT-RTX for one ONNX file.

    version   of TensorRT-RTX, "" where the process died before it reported one
    built     None: not tried
    layers    of the network after parsing
    errors    in full, each error of the parser with its node
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
        result = (
            "does not parse"
            if not self.parsed
            else {None: "parses", True: "parses and builds"}.get(self.built, "parses, but does not build")
        )
        lines = [f"{self.path} {result} in TensorRT-RTX {self.version or '(unknown)'}; {LIMIT}", *self.errors]
        return "\n  ".join(lines)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok, "limit": LIMIT}


def check(onnx_path: str | Path, build: bool = True, *, packages: str | Path | None = None) -> RtxResult:
    """Parse, and with `build` build, one ONNX file.

    packages   a folder with other bindings (pip install --no-deps --target FOLDER); None = this environment's
    """
    return check_all([onnx_path], build, packages=packages)[0]


def check_all(
    onnx_paths: Sequence[str | Path], build: bool = True, *, packages: str | Path | None = None
) -> list[RtxResult]:
    """As `check`, for several files in one process; a crash of the library is reported as an error of its file."""
    files = [str(path) for path in onnx_paths]
    for path in files:
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such file; expected an ONNX graph; run: edgedetr export")
    # The library opens any file that a graph names; a graph with forbidden names is refused before.
    refused = {path: faults for path in files if (faults := _faults(path))}
    sound = [path for path in files if path not in refused]
    results: list[RtxResult] = []
    while len(results) < len(sound):
        results += _run(sound[len(results) :], build, packages)
    remaining = iter(results)
    return [
        RtxResult(path, "", False, None, 0, 0.0, None, None, refused[path]) if path in refused else next(remaining)
        for path in files
    ]


def _faults(path: str) -> tuple[str, ...]:
    """Why the library must not open a file."""
    try:
        return open_onnx(path, weights=False).faults
    except ExportError as error:
        return (str(error),)


def _run(files: list[str], build: bool, packages: str | Path | None) -> list[RtxResult]:
    """Results up to the first crash, at least one."""
    request = json.dumps({"files": files, "build": build})
    environment = {**os.environ, **({"PYTHONPATH": str(packages)} if packages else {})}
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), request],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS * len(files),
            env=environment,
        )
        code, out, message = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, out, message = None, _text(late.stdout), f"no answer after {SECONDS * len(files)} s"
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
        ended = message if code is None else f"TensorRT-RTX ended with {'signal' if code < 0 else 'code'} {abs(code)}"
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
                (f"{ended}: {message.strip()[-500:]}",),
            )
        )
    return results


def _text(out: bytes | str | None) -> str:
    return out.decode(errors="replace") if isinstance(out, bytes) else out or ""
