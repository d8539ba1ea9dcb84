"""edgedetr recipes: lists the shipped recipes, or prints one."""

from __future__ import annotations

import click

from edgedetr.cli._options import command, json_option
from edgedetr.cli._output import as_json, say, table, write_out


@command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, as_json_: bool) -> None:
    """List the recipes for `train --model`, or print one.

    A recipe is a TOML file with what a training changes of the defaults. `edgedetr recipes NAME > mine.toml` is a
    start for your own."""
    from edgedetr.recipe_list import summaries, summarize

    if name is not None:
        from edgedetr.recipe import find  # imports torch, which the list needs not

        path = find(name)
        if as_json_:
            as_json(summarize(path.stem, path).to_json())
        else:
            write_out(path.read_text(encoding="utf-8").rstrip())
        return
    found = summaries()
    table(
        ["name", "model", "input", "M parameters", "--model starts from", "what it is"],
        [
            [
                one.name,
                one.model,
                f"{one.height}x{one.width}",
                f"{one.parameters / 1e6:.1f}",
                one.model_start,
                one.about.partition(":")[0],  # the whole line is in the file, and in --json
            ]
            for one in found
        ],
    )
    say(
        "fine-tune one: edgedetr train --data DIR --model NAME; train as it is written: --recipe NAME; print one: "
        "edgedetr recipes NAME"
    )
    if as_json_:
        as_json([one.to_json() for one in found])
