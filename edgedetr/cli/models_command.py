"""edgedetr models: lists the models of the family, and the detectors that their authors published."""

from __future__ import annotations

import click

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, say, table


@command()
@click.option(
    "--pixels",
    default=640,
    show_default=True,
    type=click.IntRange(64, 4096),
    help="Side of the image for which operations are counted, a multiple of 64.",
)
@click.option("--published", "list_published", is_flag=True, help="List published detectors to start a training from.")
@json_option
def models(pixels: int, list_published: bool, as_json_: bool) -> None:
    """List the models (paper, size, cost, queries), or the published detectors of them."""
    if list_published:
        _published(as_json_)
    else:
        _family(pixels, as_json_)


def _published(as_json_: bool) -> None:
    from edgedetr.published.published_detectors import published

    rows = list(published().values())
    table(
        ["name", "model", "AP", "M parameters", "input", "license", "commercial use", "weights", "source"],
        [
            [
                row.name,
                row.member,
                f"{row.ap:.1f}",
                None if row.params is None else f"{row.params:g}",
                f"{row.input[0]}x{row.input[1]}" if row.resize == "stretch" else f"{row.input[0]} to {row.input[1]}",
                row.license.name,
                "yes" if row.license.permissive else "by its terms",
                row.where,
                row.source,
            ]
            for row in rows
        ],
    )
    say(
        "AP on COCO val2017 as their authors report it; nothing here was measured by this project. Start from one: "
        "edgedetr train --data DIR --start NAME; for a machine without a network: edgedetr fetch NAME --to DIR"
    )
    if as_json_:
        as_json([row.to_json() for row in rows])


def _family(pixels: int, as_json_: bool) -> None:
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
