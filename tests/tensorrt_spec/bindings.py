"""TensorRT's Python interface of three versions, read from NVIDIA's own bindings, as modules to specify fakes with.

The wheels (1 MB each) are fetched at test time into .cache/ and never committed. Without their libraries they cannot
run, but over a stub library they can be imported and their names read; `module(version)` rebuilds these names as plain
Python classes whose methods have the real parameter names. `mock.create_autospec(trt.Builder, instance=True,
spec_set=True)` then refuses a name or an argument that this version does not have.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import keyword
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

WHEELS = {  # the versions of JetPack 6, JetPack 7.2 and TensorRT 11
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0": "tensorrt-cu13-bindings==11.4.0.106",
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "tensorrt-bindings" / f"cp{sys.version_info[0]}{sys.version_info[1]}"


class Unavailable(Exception):
    """Why the bindings cannot be read here: the reason of a skip."""


@functools.cache
def module(version: str) -> ModuleType:
    """A module like `tensorrt` of that version, whose classes have names, parameters and no behavior.

    It is one for all tests: a test that changes it changes a copy, or undoes what it did.
    """
    names = described()[version]
    made = ModuleType("tensorrt")
    built: dict[str, type] = {}

    def build(name: str) -> type:
        if name not in built:
            description = names[name]
            built[name] = (
                _enum(name, description)
                if description["kind"] == "enum"
                else _class(
                    name, description, tuple(build(base) for base in description["bases"] if base in names) or (object,)
                )
            )
        return built[name]

    for name, description in names.items():
        if description["kind"] in ("enum", "class"):
            setattr(made, name, build(name))
        elif description["kind"] == "method":
            setattr(made, name, _function(name, description["parameters"]))
        elif description["kind"] == "member":
            outer, *nested = description["of"].split(".")
            setattr(made, name, functools.reduce(getattr, [*nested, description["name"]], build(outer)))
        else:
            setattr(made, name, description["value"])
    return made


@functools.cache
def described() -> dict[str, dict[str, Any]]:
    """Version -> every name of that version's bindings; fetched, imported and read once."""
    missing = [version for version in WHEELS if not _description(version).is_file()]
    if missing:
        if sys.platform != "linux":
            raise Unavailable("NVIDIA's bindings are for Linux")
        with tempfile.TemporaryDirectory() as scratch:
            stubs = _stubs(Path(scratch))
            folders = fetch({version: WHEELS[version] for version in missing}, Path(scratch))
            for version, folder in folders.items():
                major = version.partition(".")[0]
                done = subprocess.run(
                    [sys.executable, "-I", str(HERE / "describe.py"), str(folder), *map(str, stubs[major])],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                )
                if done.returncode:
                    raise Unavailable(f"the bindings of TensorRT {version} cannot be imported: {done.stderr[-300:]}")
                made = Path(scratch) / f"{version}.json"
                made.write_text(done.stdout, encoding="utf-8")
                _keep(made, _description(version))
    return {version: json.loads(_description(version).read_text()) for version in WHEELS}


def _description(version: str) -> Path:
    reader = hashlib.sha256((HERE / "describe.py").read_bytes()).hexdigest()  # another reader, another description
    return CACHE / f"{version}-{reader:.8}.json"


def fetch(requirements: Mapping[str, str], scratch: Path) -> dict[str, Path]:
    """Download wheels, all at once, and unpack each; name -> folder to import from. A wheel is fetched only once."""
    wheels = {name: CACHE / f"{requirement}.whl" for name, requirement in requirements.items()}
    running = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--disable-pip-version-check",
                "--dest",
                str(scratch / name),
                requirements[name],
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, wheel in wheels.items()
        if not wheel.is_file()
    }
    failed = ""
    for name, process in running.items():
        try:
            said = process.communicate(timeout=180)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            said = "no answer in 180 s"
        found = next(iter((scratch / name).glob("*.whl")), None)
        if process.returncode == 0 and found is not None:
            _keep(found, wheels[name])
        else:
            failed = f"{requirements[name]} cannot be fetched: {said.strip()[-300:]}"
    if failed:
        raise Unavailable(failed)
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / name / "unpacked")
    return {name: scratch / name / "unpacked" for name in wheels}


def _keep(path: Path, target: Path) -> None:
    """Move a file into the cache in one step, so that a second test run never sees half of it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    half = CACHE / f".{target.name}.{os.getpid()}"
    shutil.copy(path, half)
    os.replace(half, target)


def _stubs(scratch: Path) -> dict[str, list[Path]]:
    """Stub libraries with the names that the bindings ask for; major version -> files, made by the C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no C compiler for the stub library")
    made: dict[str, list[Path]] = {}
    for version in WHEELS:
        major = version.partition(".")[0]
        if major in made:
            continue
        made[major] = [scratch / f"lib{name}.so.{major}" for name in LIBRARIES]
        for path in made[major]:
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}", "-o", str(path), str(HERE / "stub.c")],
                check=True,
                capture_output=True,
                timeout=60,
            )
    return made


class _Enum(enum.Enum):
    """Like pybind11's: has an integer, but is none, so that `1 << flag` without int() fails here as it does there."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


def _enum(name: str, description: dict[str, Any]) -> type:
    return _Enum(name, description["members"])  # type: ignore[return-value]  # the functional form of Enum


def _class(name: str, description: dict[str, Any], bases: tuple[type, ...]) -> type:
    inside: dict[str, Any] = {}
    for key, value in description["members"].items():
        if value["kind"] == "method":
            inside[key] = _function(key, value["parameters"])
        elif value["kind"] == "property":
            inside[key] = property(_no_value, _accept if value["settable"] else None)
        elif value["kind"] == "enum":
            inside[key] = _enum(key, value)
            inside.update(inside[key].__members__)  # pybind11 exports the values into the class
        else:
            inside[key] = _class(key, value, (object,))
    return type(name, bases, inside)


def _no_value(_: object) -> None:
    raise NotImplementedError("a description has no values; set one on the fake")


def _accept(_: object, value: object) -> None:
    """A settable property of a description takes anything and forgets it."""


def _function(name: str, forms: list[list[str]]) -> Any:
    """A function of these parameters that does nothing; it takes anything where it documents several forms or none."""
    parameters = forms[0] if len(forms) == 1 else ["*args", "**kwargs"]
    if any(keyword.iskeyword(word) for word in parameters):
        parameters = ["*args", "**kwargs"]
    words, optional = [], False
    for word in parameters:
        optional |= word.endswith("=None")  # pybind11 allows a parameter without a default after one with it
        words.append(word if not optional or "=" in word or "*" in word else f"{word}=None")
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(words)}): pass", scope)
    return scope[name]
