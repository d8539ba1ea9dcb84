"""edgedetr models: lists the models of the family, and the detectors that their authors published."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import command, expect, json_option, license_option
from edgedetr.cli._output import as_json, progress_bars, say, table
from edgedetr.errors import NotWithinTolerance, UsageError


@command()
@click.option(
    "--pixels",
    type=click.IntRange(64, 4096),
    help="Side of the image for which operations are counted, a multiple of 64.  [default: 640]",
)
@click.option("--published", "list_published", is_flag=True, help="List published detectors to start a training from.")
@click.option("--check", metavar="NAME", help="Evaluate a published detector, and compare its AP.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    callback=expect("data"),
    help="For --check: folder of COCO with the val2017 images.",
)
@click.option("--split", help="For --check: split of the data set.  [default: val, else test]")
@license_option
@json_option
def models(
    pixels: int | None,
    list_published: bool,
    check: str | None,
    data: Path | None,
    split: str | None,
    accept_license: tuple[str, ...],
    as_json_: bool,
) -> None:
    """List the models (paper, size, cost, queries), or the published detectors of them."""
    if check is None and (data is not None or split is not None or accept_license):
        raise UsageError("--data, --split and --accept-license are for --check NAME; add it, or leave them out")
    if (pixels is not None) + list_published + (check is not None) > 1:
        raise UsageError("--pixels, --published and --check show different things; give one of them")
    if check is not None:
        if data is None:
            raise UsageError("--check evaluates on images; add --data DIR, a folder of COCO with val2017")
        _check(check, data, split, accept_license, as_json_)
    elif list_published:
        _published(as_json_)
    else:
        _family(pixels or 640, as_json_)


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


def _check(name: str, data: Path, split: str | None, accept_license: tuple[str, ...], as_json_: bool) -> None:
    from edgedetr.published_check import check_published

    with progress_bars() as progress:
        found = check_published(name, data, split=split, accept_license=accept_license, progress=progress)
    for note in found.notes:
        say(note)
    ap = None if found.ap is None else f"{found.ap:.2f}"
    table(
        ["name", "AP here", "AP published", "tolerance", "images", "split", "revision"],
        [[found.name, ap, f"{found.published_ap:.1f}", found.tolerance, found.images, found.split, found.revision[:8]]],
    )
    if as_json_:
        as_json(found.to_json())
    if not found.within:
        raise NotWithinTolerance(
            f"{found.name}: AP {ap or 'undefined'} on {found.images} images, {found.published_ap:.1f} as published; "
            f"expected at most {found.tolerance:g} between them on COCO val2017"
        )


def _family(pixels: int, as_json_: bool) -> None:
    from edgedetr.model_list import summaries

    members = summaries(pixels)
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
