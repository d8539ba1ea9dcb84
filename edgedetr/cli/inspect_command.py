"""edgedetr inspect: shows what a bundle or an ONNX file contains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgedetr.cli._options import command, json_option, open_bundle
from edgedetr.cli._output import as_json, table

if TYPE_CHECKING:
    from edgedetr.evaluation.realized_precision import RealizedPrecision

CANNOT = "cannot load this file"


@command()
@click.argument("target", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE|FILE.onnx]")
@json_option
def inspect(target: Path | None, as_json_: bool) -> None:
    """Show what a bundle or an ONNX file contains.

    A bundle: files, sizes, what is out of date. An ONNX file: inputs, outputs, operators, Q/DQ pairs, and how many
    quantized layers the libraries on this machine run in integers."""
    if target is not None and target.suffix == ".onnx":
        from edgedetr.onnx_graph.summary import inspect_onnx

        graph = inspect_onnx(target)
        integers = integers_of(target) if graph.quantized and not graph.faults else {}
        rows = [[f"in {name}", found.finding() or found if found else CANNOT] for name, found in integers.items()]
        table(["property", "value"], [*graph.rows(), *rows])
        by_count = sorted(graph.operators.items(), key=lambda item: (-item[1], item[0]))
        table(["operator", "count"], [[name, count] for name, count in by_count])
        result = {**graph.to_json(), "integers": {name: found.to_json() for name, found in integers.items() if found}}
    else:
        from edgedetr.reporting.contents import inspect_bundle

        contents = inspect_bundle(open_bundle(target))
        table(["property", "value"], contents.rows())
        table(["file", "MB", "made by", "state"], contents.file_rows())
        result = contents.to_json()
    if as_json_:
        as_json(result)


def integers_of(path: Path) -> dict[str, RealizedPrecision | None]:
    """What the quantized layers of an ONNX file run as, by library: those that are meant for it, or else all here.

    None where the library cannot load the file.
    """
    from edgedetr.artifacts import BY_FILE
    from edgedetr.errors import EdgedetrError
    from edgedetr.evaluation.realized_precision import realized_precision
    from edgedetr.runtime.backends import base

    known = BY_FILE.get(path.name)
    found: dict[str, RealizedPrecision | None] = {}
    for backend in base.backends():
        meant = known is None or backend.name in known.benched
        if meant and backend.kernels is not None and not backend.unavailable():
            try:
                found[backend.name] = realized_precision(path, backend.name)
            except EdgedetrError:
                found[backend.name] = None
    return found
