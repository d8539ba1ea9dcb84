"""Run in a process of its own: import one version of NVIDIA's bindings over stub libraries and print all their names.

Two versions cannot share a process (both register the same C++ types), and nothing of TensorRT may leak into the tests.
Usage: describe.py BINDINGS_FOLDER STUB_LIBRARY...
"""

from __future__ import annotations

import ctypes
import inspect
import json
import re
import sys
from typing import Any


def parameters(doc: str) -> list[str] | None:
    """`["self", "input", "shape=None"]` of the first line of a pybind11 docstring; None for an overloaded function."""
    found = re.match(r"\w+\((.*)\)(?: -> .*)?$", doc.strip().partition("\n")[0])
    if not found or found[1].startswith("*args"):
        return None
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(found[1] + ","):
        depth += (letter in "([{<") - (letter in ")]}>" and found[1][i - 1] != "-")
        if letter == "," and depth == 0:
            parts.append(found[1][start:i].strip())
            start = i + 1
    return [re.split(r"[:=]", part)[0].strip() + ("=None" if "=" in part else "") for part in parts if part]


def describe_class(kind: type) -> dict[str, Any]:
    members = getattr(kind, "__members__", None)
    if members is not None:
        return {"kind": "enum", "members": {name: int(value) for name, value in members.items()}}
    inside: dict[str, Any] = {}
    for name, value in vars(kind).items():
        if isinstance(value, property):
            inside[name] = {"kind": "property", "settable": value.fset is not None}
        elif isinstance(value, type):
            if not any(getattr(base, name, None) is value for base in kind.__bases__):      # else it is inherited
                inside[name] = describe_class(value)
        elif callable(value) and (name == "__init__" or not name.startswith("_")):
            if name != "__init__" or type(value).__name__ != "wrapper_descriptor":
                inside[name] = {"kind": "method", "parameters": parameters(value.__doc__ or "")}
    bases = [base.__name__ for base in kind.__bases__ if base.__module__.startswith("tensorrt")]
    return {"kind": "class", "bases": bases, "members": inside}


def describe(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dir(module):
        value = getattr(module, name)
        if inspect.ismodule(value) or (name.startswith("_") and name != "__version__"):
            continue
        if isinstance(value, type):
            found[name] = describe_class(value)
        elif inspect.isfunction(value):
            told = inspect.signature(value).parameters.values()
            found[name] = {"kind": "method", "parameters": [
                p.name + ("" if p.default is p.empty else "=None") for p in told]}
        elif callable(value) and inspect.isroutine(value):
            found[name] = {"kind": "method", "parameters": parameters(value.__doc__ or "")}
        elif hasattr(type(value), "__members__"):
            found[name] = {"kind": "member", "of": type(value).__qualname__, "name": value.name}
        elif isinstance(value, (str, int, float)):
            found[name] = {"kind": "value", "value": value}
    return found


if __name__ == "__main__":
    for library in sys.argv[2:]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, sys.argv[1])
    import tensorrt_bindings

    print(json.dumps(describe(tensorrt_bindings), indent=0))
