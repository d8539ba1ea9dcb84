"""edgedetr inspect: shows what a bundle or an ONNX file contains."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import command, json_option, open_bundle
from edgedetr.cli._output import as_json, table


@command()
@click.argument("target", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE|FILE.onnx]")
@json_option
def inspect(target: Path | None, as_json_: bool) -> None:
    """Show what a bundle or an ONNX file contains.

    A bundle: files, sizes, what is out of date. An ONNX file: inputs, outputs, operators, Q/DQ pairs."""
    if target is not None and target.suffix == ".onnx":
        from edgedetr.onnx_graph.summary import inspect_onnx

        graph = inspect_onnx(target)
        table(["property", "value"], graph.rows())
        by_count = sorted(graph.operators.items(), key=lambda item: (-item[1], item[0]))
        table(["operator", "count"], [[name, count] for name, count in by_count])
        result = graph.to_json()
    else:
        from edgedetr.reporting.contents import inspect_bundle

        contents = inspect_bundle(open_bundle(target))
        table(["property", "value"], contents.rows())
        table(["file", "MB", "made by", "state"], contents.file_rows())
        result = contents.to_json()
    if as_json_:
        as_json(result)
