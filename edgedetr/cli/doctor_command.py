"""edgedetr doctor: shows what this machine has and what is missing."""

from __future__ import annotations

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, say, table


@command()
@json_option
def doctor(as_json_: bool) -> None:
    """Show what this machine has, and what is missing."""
    from edgedetr.doctor import examine

    found = examine()
    table(["", ""], found.machine_rows())
    table(["package", "version", "needed for", "state"], found.package_rows())
    for advice in found.advice():
        say(advice)
    if as_json_:
        as_json(found.to_json())
