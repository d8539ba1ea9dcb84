"""What a running training tells: a protocol, a silent one, and a bar with the time left and the running losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from edgedetr.evaluation.coco_metrics import Metrics


class Progress(Protocol):
    """Called by `train` on the first process only."""

    def start(self, total: int, done: int, epochs: int) -> None:
        """Steps in all, steps done already (a resume), epochs in all."""

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """After every step: steps done, running means of the losses, images per second."""

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
    """One bar: steps, time left, loss and images per second; one line for each evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        whole = Column(no_wrap=True, min_width=9)  # in a narrow window the bar shrinks, the numbers do not
        columns = (
            TextColumn("[bold]train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("left  {task.fields[note]}"),
        )
        self._bar = Bar(*columns, console=console)
        self._shown = ("loss", "class", "l1", "giou") if console.width >= 100 else ("loss",)
        self._task = self._bar.add_task("train", total=None, note="")
        self._epochs = 0

    def start(self, total: int, done: int, epochs: int) -> None:
        self._epochs = epochs
        self._bar.update(self._task, total=total, completed=done)
        self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        parts = "  ".join(f"{name} {losses[name]:.2f}" for name in self._shown if name in losses)
        self._bar.update(self._task, completed=step, note=f"{parts}  {rate:.0f} img/s")

    def evaluated(self, epoch: int, metrics: Metrics, best: bool) -> None:
        ap, ap50 = (f"{value:.1f}" if value is not None else "-" for value in (metrics.ap, metrics.ap50))
        self._bar.console.print(
            f"epoch {epoch}/{self._epochs}: AP {ap}  AP50 {ap50}{'  best so far' if best else ''}", highlight=False
        )

    def finish(self) -> None:
        self._bar.stop()
