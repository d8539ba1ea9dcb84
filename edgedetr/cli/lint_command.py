"""edgedetr lint: checks ONNX files for what TensorRT refuses, computes wrongly or runs slowly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgedetr.artifacts import ONNX
from edgedetr.cli._options import LazyChoice, command, json_option, open_bundle
from edgedetr.cli._output import as_json, count, say, table
from edgedetr.errors import NotWithinTolerance

if TYPE_CHECKING:
    from edgedetr.lint.rtx import RtxResult


def known_targets() -> tuple[str, ...]:
    from edgedetr.lint.lint_targets import TARGETS

    return tuple(TARGETS)


@command()
@click.argument("target", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE|FILE.onnx]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=LazyChoice(known_targets),
    help="Version of TensorRT; repeatable.  [default: all of them]",
)
@click.option("--parse", is_flag=True, help="Also parse and build with TensorRT-RTX, which needs no GPU.")
@json_option
def lint(target: Path | None, targets: tuple[str, ...], parse: bool, as_json_: bool) -> int:
    """Check ONNX files for problems with TensorRT.

    Of a bundle, the files that engines are built from. Needs no GPU. Exit code 3 if there is an error."""
    from edgedetr.lint.lint import for_tensorrt, lint_file

    if target is not None and target.suffix == ".onnx":
        files = [target]
    else:
        opened = open_bundle(target)
        files = [opened.require(name) for name in for_tensorrt(opened.manifest.files) or [ONNX.file]]
    chosen = targets or known_targets()
    reports = [lint_file(path, chosen) for path in files]
    for report in reports:
        warnings = len(report.findings) - report.errors
        say(
            f"{report.path}: {report.nodes} nodes, {count(report.errors, 'error')}, {count(warnings, 'warning')} "
            f"for {', '.join(chosen)}"
        )
        if report.findings:
            table(["severity", "rule", "for", "node", "problem"], report.rows())
            for rule, fix in report.fixes().items():
                say(f"{rule}: {fix}")
    verdicts = _parse(files) if parse else []
    if as_json_:
        found = [report.to_json() for report in reports]
        as_json([{**one, "parse": other.to_json()} for one, other in zip(found, verdicts)] if parse else found)
    failed = any(report.errors for report in reports) or not all(verdict.ok for verdict in verdicts)
    return NotWithinTolerance.exit_code if failed else 0


def _parse(files: list[Path]) -> list[RtxResult]:
    """What TensorRT-RTX's parser and builder report on each file."""
    from edgedetr.lint.rtx import check_all

    verdicts = check_all(files)
    for verdict in verdicts:
        say(str(verdict))
    return verdicts
