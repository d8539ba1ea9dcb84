"""edgedetr models: lists the models of the family."""

from __future__ import annotations

import click

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, table


@command()
@click.option(
    "--pixels",
    default=640,
    show_default=True,
    type=click.IntRange(64, 4096),
    help="Side of the image for which operations are counted, a multiple of 64.",
)
@json_option
def models(pixels: int, as_json_: bool) -> None:
    """List the models: paper, size, cost, queries."""
    from edgedetr.models import FAMILY
    from edgedetr.models.catalogue import summarize

    members = [summarize(name, pixels=pixels) for name in FAMILY]
    table(
        ["name", "M parameters", f"GMACs at {pixels}", "levels (strides)", "queries", "exports to", "paper"],
        [
            [
                m.name,
                f"{m.parameters / 1e6:.1f}",
                f"{m.gmacs:.1f}",
                " ".join(str(stride) for *_, stride in m.levels),
                m.queries,
                " ".join(m.dialects),
                m.paper,
            ]
            for m in members
        ],
    )
    if as_json_:
        as_json([m.to_json() for m in members])
