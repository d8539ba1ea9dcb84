"""What a running training tells: a protocol, a silent one, and a bar with the time left and the running losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from edgedetr.evaluation.evaluate import Metrics


class Progress(Protocol):
    """Called by `train` on the first process only."""

    def start(self, total: int, done: int, epochs: int) -> None:
        """Steps in all, steps done already (a resume), epochs in all."""

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """After every step: steps done, running means of the losses, pictures per second."""

    def evaluated(self, epoch: int, metrics: Metrics, best: bool) -> None:
        """Epochs done, metrics on the select split, whether they are the best so far."""

    def finish(self) -> None:
        """Nothing more will come, also after an error."""


class Silent:
    """Tells nothing."""

    def start(self, total: int, done: int, epochs: int) -> None: ...
    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None: ...
    def evaluated(self, epoch: int, metrics: Metrics, best: bool) -> None: ...
    def finish(self) -> None: ...


class RichProgress:
    """One bar: steps, time left, loss and pictures per second; one line for each evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = Bar(TextColumn("[bold]train"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
                        TextColumn("left"), TextColumn("{task.fields[note]}"), console=console or Console(stderr=True))
        self._task = self._bar.add_task("train", total=None, note="")
        self._epochs = 0

    def start(self, total: int, done: int, epochs: int) -> None:
        self._epochs = epochs
        self._bar.update(self._task, total=total, completed=done)
        self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        parts = "  ".join(f"{name} {losses[name]:.3f}" for name in ("loss", "class", "l1", "giou") if name in losses)
        self._bar.update(self._task, completed=step, note=f"{parts}  {rate:.0f} img/s")

    def evaluated(self, epoch: int, metrics: Metrics, best: bool) -> None:
        ap, ap50 = (f"{value:.1f}" if value is not None else "-" for value in (metrics.ap, metrics.ap50))
        self._bar.console.print(f"epoch {epoch}/{self._epochs}: AP {ap}  AP50 {ap50}{'  best so far' if best else ''}",
                                highlight=False)

    def finish(self) -> None:
        self._bar.stop()
