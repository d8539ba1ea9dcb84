"""Which module of a DetrModel made a node of its exported graph: nodes are named by the path of their module."""

from __future__ import annotations

import re
from collections.abc import Collection


def module_path(node: str, modules: Collection[str]) -> str:
    """The dotted path of the module that made a node; "" for a node of the DetrModel itself.

    node      its name: "/detector/encoder/layers.0/attention/q/MatMul" is of encoder.layers.0.attention.q
    modules   paths of all modules of the DetrModel

    The exporter abbreviates: containers are repeated (blocks.1.0 is "blocks.1/blocks.1.0"), the second call of a module
    has the suffix "_1", and a module whose method is called, not itself, is left out (decoder.boxes.score is
    "decoder/score").
    """
    path, parent, previous = "", "", ""
    for part in node.strip("/").split("/")[1:-1]:  # without "detector" and the operator
        names = [part, re.sub(r"_\d+$", "", part)]
        start = parent if previous and part.startswith(f"{previous}.") else path
        found = next((step for name in names if (step := f"{start}.{name}".lstrip(".")) in modules), "")
        if not found:
            inside = [
                module for module in modules if module.startswith(f"{start}.") and module.endswith(f".{names[1]}")
            ]
            if len(inside) != 1:
                return start
            found = inside[0]
        path, parent, previous = found, start, names[1]
    return path
