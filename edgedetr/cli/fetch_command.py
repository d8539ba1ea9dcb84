"""edgedetr fetch: downloads published detectors, also for a machine without a network."""

from __future__ import annotations

from pathlib import Path

import click

from edgedetr.cli._options import command, json_option, license_option
from edgedetr.cli._output import as_json, progress_bars, say


@command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to fill, for another machine.  [default: the cache of this one]",
)
@license_option
@json_option
def fetch(names: tuple[str, ...], folder: Path | None, accept_license: tuple[str, ...], as_json_: bool) -> None:
    """Download published detectors (edgedetr models --published), or models of the Hugging Face hub.

    A download that broke off goes on where it was. For a machine without a network, name a folder by --to, and copy
    what is in it into the cache of that machine."""
    from edgedetr.models.checkpoints.weight_source import WeightSource
    from edgedetr.published.hub_files import hub_cache

    records = []
    for name in names:
        with progress_bars() as progress:
            source = WeightSource(name, cache=folder, progress=progress)
            if source.published is not None:
                source.published.require_accepted(accept_license)
            source.download()
        records.append(source.record())
        license_ = source.published.license.name if source.published is not None else "not known here"
        say(f"fetched: {name}{f' at {source.revision:.8}' if source.revision else ''} (license: {license_})")
        for file, path in source.files.items():
            say(f"  {path}  sha256 {records[-1]['files'][file]}")
    if folder is not None:
        say(
            f"next: copy what is in {folder} into the cache of the other machine ({hub_cache()} here; "
            "~/.cache/huggingface/hub unless HF_HUB_CACHE or HF_HOME name another); then run there: edgedetr train "
            f"--data DIR --start {names[0]}"
        )
    if as_json_:
        as_json(records)
