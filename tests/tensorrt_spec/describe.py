"""Run in its own process: import one version of NVIDIA's bindings over stub libraries and print all their names.

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


def signature(doc: str) -> dict[str, Any]:
    """What a pybind11 docstring holds: parameters of each overload, and the class that is returned, if any.

    An overloaded function has one numbered line for each form, `2. set_input_shape(self: ..., name: str, ...) -> bool`.
    """
    lines = doc.strip().splitlines() or [""]
    forms = [line.partition(". ")[2] for line in lines if re.match(r"\d+\. \w+\(", line)] or lines[:1]
    overloads = [form for form in map(parameters, forms) if form is not None]
    returned = re.search(r"\) -> (?:\w+(?:\.|::))*(\w+)", forms[0])
    return {"parameters": overloads, "returns": returned[1] if returned else ""}


def parameters(form: str) -> list[str] | None:
    """`["self", "input", "shape=None"]` of one form; None when it does not say."""
    found = re.match(r"\w+\((.*)\)(?: -> .*)?$", form)
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
            if not any(getattr(base, name, None) is value for base in kind.__bases__):  # else it is inherited
                inside[name] = describe_class(value)
        elif callable(value) and (name == "__init__" or not name.startswith("_")):
            if name != "__init__" or type(value).__name__ != "wrapper_descriptor":
                inside[name] = {"kind": "method", **signature(value.__doc__ or "")}
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
            arguments = inspect.signature(value).parameters.values()
            found[name] = {
                "kind": "method",
                "returns": "",
                "parameters": [[p.name + ("" if p.default is p.empty else "=None") for p in arguments]],
            }
        elif callable(value) and inspect.isroutine(value):
            found[name] = {"kind": "method", **signature(value.__doc__ or "")}
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
