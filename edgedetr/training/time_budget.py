"""Chooses the number of epochs that train.minutes has time for, from a few timed steps of a model that is thrown away.

The steps change a second `Learner`, never the one that trains, so a training of n epochs ends in the same bytes whether
n was asked for or chosen here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median

import numpy as np

from edgedetr.errors import TrainingError
from edgedetr.training.data.dataset import TrainingSet, batches, epoch_order, scaled
from edgedetr.training.optimizer import Schedule
from edgedetr.training.trainer import Learner

log = logging.getLogger(__name__)

# Steps at the smallest, the input's and the largest image size, over WARMUP different batches in rotation: the timed
# ones find their images in the cache.
WARMUP, TIMED = 4, 8
USABLE = 0.95  # of the time; the rest is for checkpoints, and for steps slower than the timed ones
FORWARD = 1 / 3  # an evaluation of one image takes this fraction of a training step's time for it: no backward pass


def choose_epochs(
    learner: Learner, images: TrainingSet, schedule: Schedule, *, select_images: int, spent: float
) -> int:
    """The number of epochs that train.minutes has time for, at most `schedule.epochs`; the same in every process.

    learner        takes the timed steps and must not be used afterwards; the gradient scaler that it shares with other
                   learners is put back
    select_images  images of the select split, which every evaluation runs on
    spent          seconds of the time budget that have passed
    Errors: TrainingError where there is no time for one epoch.
    """
    config, begun = schedule.config, time.monotonic()
    fractions = sorted({part * size for part in config.growth or (1.0,) for size in (*config.sizes, 1.0)} | {1.0})
    precision = learner.fabric.strategy.precision
    scaler = precision.state_dict()
    timed = sorted({fractions[0], 1.0, fractions[-1]})
    measured = [time_step(learner, images, schedule, fraction) for fraction in timed]
    step_seconds = by_area(fractions, dict(zip(timed, measured)))
    precision.load_state_dict(scaler)
    evaluation = select_images / config.batch * step_seconds[1.0] * FORWARD
    left = (config.minutes * 60 - spent - (time.monotonic() - begun)) * USABLE
    epochs = learner.fabric.broadcast(most_epochs(schedule, step_seconds, evaluation, left))
    if not epochs:
        one = duration(replace(schedule, epochs=1), step_seconds, evaluation) / 60
        raise TrainingError(
            f"train.minutes is {config.minutes:g}, and one epoch takes about {one:.1f} minutes here; "
            f"allow more by --set train.minutes=N, or 0 for as long as train.epochs takes"
        )
    log.info("training %d of %d epochs: %g minutes have time for so many", epochs, schedule.epochs, config.minutes)
    return epochs


def by_area(fractions: Sequence[float], measured: Mapping[float, float]) -> dict[float, float]:
    """Seconds of a step at each size, on a line between measured sizes: a step takes time for itself and its pixels.

    fractions  image sizes as fractions of the input's sides, none outside of the measured ones
    measured   seconds of a step at some of them, ascending
    """
    areas = [fraction**2 for fraction in measured]
    seconds = np.interp([fraction**2 for fraction in fractions], areas, list(measured.values()))
    return dict(zip(fractions, seconds.tolist()))


def most_epochs(schedule: Schedule, step_seconds: Mapping[float, float], evaluation: float, left: float) -> int:
    """The most epochs, up to schedule.epochs, that end within `left` seconds; 0 where not even one does."""
    # A small set is asked for thousands of epochs; no more than these fit if all steps are as quick as the quickest.
    quickest = schedule.steps_per_epoch * min(step_seconds.values())
    most = min(schedule.epochs, int(max(left, 0) / quickest) + 1)
    return next(
        (
            epochs
            for epochs in range(most, 0, -1)
            if duration(replace(schedule, epochs=epochs), step_seconds, evaluation) <= left
        ),
        0,
    )


def duration(schedule: Schedule, step_seconds: Mapping[float, float], evaluation: float) -> float:
    """Seconds that a training takes.

    step_seconds  of a step, by the image size as a fraction of the input's sides
    evaluation    seconds of one evaluation
    """
    steps = sum(
        schedule.steps_per_epoch * mean(step_seconds[fraction] for fraction in schedule.size_fractions(epoch))
        for epoch in range(schedule.epochs)
    )
    return steps + -(-schedule.epochs // schedule.config.eval_every) * evaluation


def time_step(learner: Learner, images: TrainingSet, schedule: Schedule, fraction: float) -> float:
    """Median seconds of a step with images of `fraction` of the input's sides, loading included."""
    config, fabric = schedule.config, learner.fabric
    rows = epoch_order(len(images), config.batch, seed=config.seed, epoch=0)
    per_process = config.batch // fabric.world_size
    first = fabric.global_rank * per_process
    rows = np.resize(rows[:WARMUP], (WARMUP + TIMED, config.batch))[:, first : first + per_process]
    seconds, before = [], time.monotonic()
    contracts = [scaled(images.contract, fraction, images.multiple)] * len(rows)
    for number, batch in enumerate(batches(images, rows, 0, workers=config.workers, contracts=contracts)):
        learner.step(batch, number, schedule)  # copies its losses to the CPU, and so waits for a GPU
        seconds.append(time.monotonic() - before)
        before = time.monotonic()
    return median(seconds[WARMUP:])
