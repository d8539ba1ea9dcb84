"""edgedetr predict: detects objects in images, videos and cameras."""

from __future__ import annotations

import glob
from contextlib import closing
from pathlib import Path

import click

from edgedetr.api import RUNS
from edgedetr.artifacts import BACKENDS, DELIVERED
from edgedetr.cli._options import Graph, advanced_option, command, expect, once, open_bundle, threads_option
from edgedetr.cli._output import say, write_out
from edgedetr.errors import UsageError

SAVED = RUNS / "predict"  # where --save puts copies without --out


@command()
@click.argument("given", nargs=-1, required=True, metavar="[BUNDLE] SOURCE...")
@click.option("--save", is_flag=True, help=f"Save copies of the images with the boxes drawn, in {SAVED} or --out.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for these copies; it needs no --save.")
@click.option("--show", is_flag=True, help="Show them in a window; a key goes on, q ends.")
@click.option("--conf", default=0.25, show_default=True, type=click.FloatRange(0, 1), help="Lowest confidence.")
@click.option(
    "--stage",
    "--precision",
    "stage",
    multiple=True,
    type=Graph(),
    callback=once(),
    metavar="VERSION",
    help=f"Model version: {', '.join(DELIVERED)} (onnx is also called fp32).  [default: the fastest that is safe here]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="Inference library.  [default: an engine for this device, else ONNX Runtime]",
)
@click.option(
    "--latest-frame",
    "--drop-late",
    "drop_late",
    is_flag=True,
    help="Take the latest frame of a camera or video: skip those that arrive while the detector is busy.",
)
@advanced_option(
    "--allow-foreign-engine",
    "--trust",
    "trust",
    is_flag=True,
    help="Load an engine that another machine built; it is executable code.",
)
@threads_option
@click.pass_context
def predict(
    ctx: click.Context,
    given: tuple[str, ...],
    save: bool,
    out: Path | None,
    show: bool,
    conf: float,
    stage: str | None,
    backend: str | None,
    drop_late: bool,
    trust: bool,
    threads: int | None,
) -> int:
    """Detect objects in images, videos, cameras and streams.

    Without a bundle, the newest one under runs/ or in this folder is used. Prints one line of JSON for each image. Stop
    a camera or a stream with Ctrl-C (or SIGTERM)."""
    from edgedetr.runtime import load
    from edgedetr.runtime.predict import predict as run
    from edgedetr.runtime.video import is_live

    bundle, sources = bundle_and_sources(given)
    expect("source")(ctx, ctx.command.params[0], sources)
    opened = open_bundle(bundle)
    detector = load(opened, backend=backend, stage=stage, threads=threads, trust=trust)
    say(detector.description)
    out = SAVED if save and out is None else out
    if out is not None:
        say(f"images with boxes: {out}")
    count = 0
    try:
        with closing(run(detector, sources, out=out, confidence=conf, drop_late=drop_late, show=show)) as lines:
            for line in lines:
                write_out(line)
                count += 1
    except KeyboardInterrupt:
        say(f"stopped after {count} images")
        if not any(map(is_live, sources)):
            raise
    return 0


def bundle_and_sources(given: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """The bundle, or None for the newest one, and the sources. Errors: UsageError for a bundle alone."""
    if _is_source(given[0], alone=len(given) == 1):
        return None, given
    if len(given) == 1:
        raise UsageError(f"{given[0]}: a bundle and no image; run: edgedetr predict {given[0]} photo.jpg")
    return Path(given[0]), given[1:]


def _is_source(text: str, *, alone: bool) -> bool:
    """Whether the first argument is a source; else it is a bundle, or what was meant to be one.

    alone   it is the only argument: what is nothing known is then a source
    """
    from edgedetr.runtime.video import VIDEOS, is_live
    from edgedetr.storage.file_kinds import BUNDLE, EXPECTED, recognize

    path, kind = Path(text), recognize(text)
    if kind is not None:
        return kind.name in EXPECTED["source"][0] or (alone and kind is not BUNDLE)
    if is_live(text) or glob.has_magic(text) or (alone and path.suffix != ".bundle"):
        return True
    from edgedetr.data.images import is_image

    return path.suffix.lower() in VIDEOS or is_image(path)
