"""How many epochs there is time for: told by a few steps on this machine, before the first one that counts.

The steps are undone, so a training of n epochs ends in the same bytes whether n was asked for or found.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean, median
from typing import TYPE_CHECKING

import numpy as np

from edgedetr.errors import TrainingError
from edgedetr.training.config import TrainConfig
from edgedetr.training.data.dataset import batches, order, smaller
from edgedetr.training.state import Position

if TYPE_CHECKING:
    from edgedetr.training.train import Run

log = logging.getLogger(__name__)

WARM, TIMED = 4, 8  # steps of each size of image, on WARM batches in turns: those timed wait for no file
USABLE = 0.95  # of the time; the rest is for checkpoints and for steps slower than those timed
FORWARD = 1 / 3  # share of a step's time that looking at the same images takes: no backward pass


def epochs(run: Run, spent: float) -> int:
    """The epochs to train: as many as train.minutes has time for, train.epochs at most.

    run     before its first step, and in the same state afterwards
    spent   seconds of that time that have passed
    Errors: TrainingError where there is no time for one epoch.
    """
    config, begun = run.config, time.monotonic()
    shares = sorted({part * size for part in config.growth or (1.0,) for size in config.sizes or (1.0,)} | {1.0})
    steps = {share: seconds(run, share) for share in shares}
    look = len(run.selection.samples) / config.batch * steps[1.0] * FORWARD
    left = (config.minutes * 60 - spent - (time.monotonic() - begun)) * USABLE
    count = run.fabric.broadcast(fitting(config, run.per_epoch, steps, look, left))
    if not count:
        raise TrainingError(
            f"train.minutes is {config.minutes:g}, and one epoch takes about "
            f"{duration(replace(config, epochs=1), run.per_epoch, steps, look) / 60:.1f} minutes here; "
            f"allow more by --set train.minutes=N, or 0 for as long as train.epochs takes"
        )
    log.info("%d of %d epochs: as many as %g minutes have time for here", count, config.epochs, config.minutes)
    return count


def fitting(config: TrainConfig, per_epoch: int, steps: Mapping[float, float], look: float, left: float) -> int:
    """The most epochs, up to config.epochs, that end within `left` seconds; 0 where not one does."""
    return next(
        (
            count
            for count in range(config.epochs, 0, -1)
            if duration(replace(config, epochs=count), per_epoch, steps, look) <= left
        ),
        0,
    )


def duration(config: TrainConfig, per_epoch: int, steps: Mapping[float, float], look: float) -> float:
    """Seconds that all of config.epochs take.

    per_epoch   steps of an epoch
    steps       seconds of a step, by the share of the input's sides
    look        seconds of one evaluation
    """
    learning = sum(
        per_epoch * mean(steps[share] for share in config.shares_at(epoch)) for epoch in range(config.epochs)
    )
    return learning + -(-config.epochs // config.eval_every) * look


def seconds(run: Run, share: float) -> float:
    """Median time of a step with images of `share` of the input's sides; the run is left as it was."""
    config, world = run.config, run.fabric.world_size
    parts = (run.detector, run.ema.model)
    kept = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    scaler = getattr(run.fabric.strategy.precision, "scaler", None)
    scale = None if scaler is None else scaler.state_dict()
    plan = order(len(run.samples), config.batch, seed=config.seed, epoch=0)
    mine, rank = config.batch // world, run.fabric.global_rank
    plan = np.resize(plan[:WARM], (WARM + TIMED, config.batch))[:, rank * mine : (rank + 1) * mine]
    took, before = [], time.monotonic()
    try:
        for batch in batches(
            run.pictures,
            plan,
            0,
            plain=False,
            workers=config.workers,
            contracts=[smaller(run.pictures.contract, share)] * len(plan),
        ):
            run.step(batch)  # its losses come to the CPU, so that a GPU has finished
            took.append(time.monotonic() - before)
            before = time.monotonic()
    finally:
        for part, state in zip(parts, kept):
            part.load_state_dict(state)
        run.plain_optimizer.state.clear()
        run.position = Position()
        if scaler is not None:
            scaler.load_state_dict(scale)
    return median(took[WARM:])
