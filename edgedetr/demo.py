"""The demo: renders a data set, trains, exports, quantizes, verifies and reports, everything in one bundle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedetr.api import export, train, verify
from edgedetr.data.synthetic import render
from edgedetr.errors import UsageError
from edgedetr.evaluation.verdict import Verdict
from edgedetr.progress import Progress, TrainingProgress
from edgedetr.recipe import Recipe
from edgedetr.reporting.report import write_report

log = logging.getLogger(__name__)

RECIPE = "demo"
DATA = "data"  # inside the bundle, so that the demo is one folder


@dataclass(frozen=True)
class Scenes:
    """How many images are rendered, of how many pixels a side."""

    train: int = 1600  # enough for AP above 50 after some minutes on two cores
    val: int = 100  # the best epoch is chosen on these
    verify: int = 800  # so many that a drop within one point can be certified
    size: int = 160  # a little more than the network's input
    classes: tuple[str, ...] = ("circle", "ring", "star")  # what a very small network tells apart in minutes
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result: seconds of each step, the verdict, the report's path."""

    seconds: Mapping[str, float]
    verdict: Verdict
    report: Path


def run(
    out: Path,
    *,
    recipe: Recipe | None = None,
    scenes: Scenes | None = None,
    training: TrainingProgress | None = None,
    bars: Callable[[], Any] | None = None,
) -> Outcome:
    """Run all steps; a run that was stopped goes on where it stopped.

    recipe    the shipped recipe "demo" by default
    training  called while the training runs
    bars      makes a context manager that yields a progress callback (what, done, total), one for each other step
    """
    recipe, scenes = recipe or Recipe.load(RECIPE), scenes or Scenes()
    if out.exists() and any(out.iterdir()) and not (out / DATA).is_dir():
        raise UsageError(f"{out} holds other files than a demo; choose another folder with --out")
    bars = bars or _silent
    seconds: dict[str, float] = {}
    with _timed(seconds, "render"), bars() as progress:
        data = render(
            out / DATA,
            train=scenes.train,
            val=scenes.val,
            verify=scenes.verify,
            classes=scenes.classes,
            size=scenes.size,
            seed=scenes.seed,
            progress=lambda done, total: progress("render", done, total),
        )
    with _timed(seconds, "train"):
        bundle = train(data, out, recipe=recipe, resume=True, progress=training)
        bundle.update(synthetic=True)
    with _timed(seconds, "export and quantize"), bars() as progress:
        export(bundle, int8=True, fp16=True, progress=progress)
    with _timed(seconds, "verify"), bars() as progress:
        verdict = verify(bundle, config=recipe.verify, progress=progress)
    with _timed(seconds, "report"):
        page = write_report(bundle).path
    return Outcome(seconds, verdict, page)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begun
    log.info("%s took %.1f s", step, seconds[step])


@contextmanager
def _silent() -> Iterator[Progress]:
    yield lambda what, done, total: None
