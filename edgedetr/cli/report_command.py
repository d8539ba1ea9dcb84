"""edgedetr report: writes one HTML page about a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import bundle_argument, command, data_option, open_bundle
from edgedetr.cli._output import say


@command()
@bundle_argument
@data_option
@click.option("--open", "open_it", is_flag=True, help="Open the page in the browser.")
def report(bundle: Path | None, data: Path | None, open_it: bool) -> None:
    """Write one HTML page with the results of verify.

    It measures nothing: run `edgedetr verify` first."""
    import edgedetr

    page = edgedetr.report(open_bundle(bundle), data=data).path
    say(f"report: {page}")
    if open_it:
        click.launch(str(page))
