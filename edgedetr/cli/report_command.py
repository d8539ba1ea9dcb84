"""edgedetr report: writes one HTML page about a bundle, or tables of the verdicts and searches of several."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import command, data_option, open_bundle
from edgedetr.cli._output import say, write_out
from edgedetr.errors import UsageError


@command()
@click.argument("bundles", required=False, nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLE]...")
@data_option
@click.option("--open", "open_it", is_flag=True, help="Open the page in the browser.")
@click.option("--table", "as_table", is_flag=True, help="Print Markdown tables instead; takes several bundles.")
def report(bundles: tuple[Path, ...], data: Path | None, open_it: bool, as_table: bool) -> None:
    """Write one HTML page with the results of verify.

    It measures nothing: run `edgedetr verify` first."""
    opened = [open_bundle(path) for path in bundles or (None,)]
    if as_table:
        if data is not None or open_it:
            raise UsageError("--table prints the stored verdicts: it needs no --data and opens no page")
        from edgedetr.reporting.markdown import markdown_table, search_table

        verdicts, searches = markdown_table(opened), search_table(opened)
        write_out((f"{verdicts}\n{searches}" if searches else verdicts).removesuffix("\n"))
        return
    if len(opened) > 1:
        raise UsageError(f"{len(opened)} bundles: a page is about one; for one table of all add --table")
    import edgedetr

    page = edgedetr.report(opened[0], data=data).path
    say(f"report: {page}")
    if open_it:
        click.launch(str(page))
