"""Commands for models made elsewhere: import them, and lint any graph for TensorRT."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.commands.choose import json_option, open_bundle
from edgedetr.commands.show import as_json, say, table
from edgedetr.errors import NotWithinTolerance

TARGETS = ("jetpack-6", "jetpack-7.2", "trt-11")


@click.command()
@click.argument("target", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE|FILE.onnx]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(TARGETS),
    help="TensorRT to check for; repeatable.  [default: all of them]",
)
@json_option
def lint(target: Path | None, targets: tuple[str, ...], as_json_: bool) -> int:
    """Say what TensorRT would refuse or get wrong.

    Of a bundle: the graphs that engines are built from. Needs no GPU. Exit 3 when there is an error."""
    from edgedetr.graph.lint import for_tensorrt, lint_file

    if target is not None and target.suffix == ".onnx":
        files = [target]
    else:
        opened = open_bundle(target)
        files = [opened.require(name) for name in for_tensorrt(opened.manifest.files) or ["model.onnx"]]
    chosen = targets or TARGETS
    reports = [lint_file(path, chosen) for path in files]
    for report in reports:
        warnings = len(report.findings) - report.errors
        say(f"{report.path}: {report.nodes} nodes, {_count(report.errors, 'error')}, {_count(warnings, 'warning')} "
            f"for {', '.join(chosen)}")
        if report.findings:
            table(["severity", "rule", "for", "node", "what", "fix"], report.rows())
    if as_json_:
        as_json([report.to_json() for report in reports])
    return NotWithinTolerance.exit_code if any(report.errors for report in reports) else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


COMMANDS = (lint,)
