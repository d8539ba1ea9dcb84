"""Defines how long-running functions report their progress to a caller; the commands draw bars from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

# Called after every unit of work with: the name of the step, units done, units in all (0 where that is unknown).
Progress = Callable[[str, int, int], None]


class TrainingProgress(Protocol):
    """What `train` calls on the main process. A class may inherit from `SilentTraining` and override one method."""

    def loaded(self, text: str) -> None:
        """Before anything else: which weights the training starts from, what stays and what starts anew, in some lines.

        It is not called where a training is resumed, or starts from a backbone's weights alone.
        """

    def note(self, text: str) -> None:
        """What the training chose or decided, one sentence: before `start`, or after an evaluation."""

    def start(self, total: int, done: int, epochs: int) -> None:
        """Before the first step: steps in all, steps done before a resume, epochs in all."""

    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None:
        """After every step: steps done, running means of the losses by name, images per second."""

    def evaluated(self, epoch: int, ap: float | None, ap50: float | None, best: bool) -> None:
        """After an evaluation: epochs done, AP and AP50 on the select split in points, whether AP is the best so far.

        ap, ap50  None where the metric is undefined
        """

    def finish(self) -> None:
        """After the last call of the other methods, also when the training ends with an error."""


class SilentTraining:
    """Reports nothing: the default of `train`."""

    def loaded(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def start(self, total: int, done: int, epochs: int) -> None: ...
    def step(self, step: int, losses: Mapping[str, float], rate: float) -> None: ...
    def evaluated(self, epoch: int, ap: float | None, ap50: float | None, best: bool) -> None: ...
    def finish(self) -> None: ...
