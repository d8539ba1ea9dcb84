"""edgedetr doctor: what this machine has and what is missing."""

from __future__ import annotations

import click

from edgedetr.cli._options import json_option
from edgedetr.cli._output import as_json, say, table


@click.command()
@json_option
def doctor(as_json_: bool) -> None:
    """Say what this machine has and what is missing."""
    from edgedetr.doctor import examine

    found = examine()
    table(["", ""], found.machine_rows())
    table(["package", "version", "needed for", "state"], found.package_rows())
    for advice in found.advice():
        say(advice)
    if as_json_:
        as_json(found.to_json())
