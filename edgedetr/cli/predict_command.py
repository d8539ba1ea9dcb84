"""edgedetr predict: detects objects in images, videos and cameras."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import click

from edgedetr.artifacts import BACKENDS, GRAPHS
from edgedetr.cli._options import advanced_option, command, expect, threads_option
from edgedetr.cli._output import say, write_out


@command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", callback=expect("source"))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for copies of the images with the boxes drawn.")
@click.option("--conf", default=0.25, show_default=True, type=click.FloatRange(0, 1), help="Lowest confidence.")
@click.option("--stage", help=f"Model version: {', '.join(GRAPHS)}.  [default: the fastest that is safe here]")
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    help="Inference library.  [default: an engine for this device, else ONNX Runtime]",
)
@advanced_option("--trust", is_flag=True, help="Load an engine that another machine built; it is executable code.")
@advanced_option("--drop-late", is_flag=True, help="Skip video frames that arrive while the detector is busy.")
@threads_option
def predict(
    bundle: Path,
    sources: tuple[str, ...],
    out: Path | None,
    conf: float,
    stage: str | None,
    backend: str | None,
    trust: bool,
    drop_late: bool,
    threads: int | None,
) -> int:
    """Detect objects in images, videos, cameras and streams.

    Prints one line of JSON for each image. Stop a camera or a stream with Ctrl-C (or SIGTERM)."""
    from edgedetr.runtime import load
    from edgedetr.runtime.predict import predict as run
    from edgedetr.runtime.video import is_live

    detector = load(bundle, backend=backend, stage=stage, threads=threads, trust=trust)
    say(detector.description)
    count = 0
    try:
        with closing(run(detector, sources, out=out, confidence=conf, drop_late=drop_late)) as lines:
            for line in lines:
                write_out(line)
                count += 1
    except KeyboardInterrupt:
        say(f"stopped after {count} images")
        if not any(map(is_live, sources)):
            raise
    return 0
