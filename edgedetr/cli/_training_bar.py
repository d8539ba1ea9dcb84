"""Draws the progress of a training on standard error: a bar with the time left and the running losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgedetr.cli._output import say

if TYPE_CHECKING:
    from rich.console import Console

    from edgedetr.progress import TrainingProgress


class RichTrainingBar:
    """One bar with steps, time left, losses and images per second, and one line for each evaluation. Needs rich."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = console or Console(stderr=True)
        whole = Column(no_wrap=True, min_width=9)  # in a narrow window the bar shrinks, the numbers do not
        columns = (
            TextColumn("[bold]train"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("left  {task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._shown = ("loss", "class", "l1", "giou") if console.width >= 100 else ("loss",)
        self._task = self._bar.add_task("train", total=None, note="")
        self._epochs = 0

    def loaded(self, text: str) -> None:
        say(text)

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, total: int, done: int, epochs: int) -> None:
        self._epochs = epochs
        self._bar.update(self._task, total=total, completed=done)
        self._bar.start()

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        parts = "  ".join(f"{name} {losses[name]:.2f}" for name in self._shown if name in losses)
        self._bar.update(self._task, completed=step, note=f"{parts}  {rate:.0f} img/s")

    def evaluated(self, epoch: int, ap: float | None, ap50: float | None, best: bool) -> None:
        self._bar.console.print(evaluation_line(epoch, self._epochs, ap, ap50, best), highlight=False)

    def finish(self) -> None:
        self._bar.stop()


class EvaluationLines:
    """One line for each evaluation, where rich is not installed."""

    def __init__(self) -> None:
        self._epochs = 0

    def loaded(self, text: str) -> None:
        say(text)

    def note(self, text: str) -> None:
        say(text)

    def start(self, total: int, done: int, epochs: int) -> None:
        self._epochs = epochs

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None: ...

    def evaluated(self, epoch: int, ap: float | None, ap50: float | None, best: bool) -> None:
        say(evaluation_line(epoch, self._epochs, ap, ap50, best))

    def finish(self) -> None: ...


def evaluation_line(epoch: int, epochs: int, ap: float | None, ap50: float | None, best: bool) -> str:
    """For example "epoch 3/72: AP 31.0  AP50 52.4  best so far"; an undefined metric is a dash."""
    shown_ap, shown_ap50 = (f"{value:.1f}" if value is not None else "-" for value in (ap, ap50))
    return f"epoch {epoch}/{epochs}: AP {shown_ap}  AP50 {shown_ap50}{'  best so far' if best else ''}"


def training_bar() -> TrainingProgress:
    """The bar, or plain lines where rich is not installed."""
    try:
        return RichTrainingBar()
    except ImportError:
        return EvaluationLines()
