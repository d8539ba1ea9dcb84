"""Decides everything about a training before its first step: what the recipe leaves at "auto", measured or computed."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric

from edgedetr.errors import TrainingError
from edgedetr.recipe import Recipe
from edgedetr.training import fine_tuning, time_budget
from edgedetr.training.batch_size import CudaMemory, Memory, measure_batch
from edgedetr.training.config import AugmentConfig, TrainConfig, resolved
from edgedetr.training.data.dataset import Splits, TrainingSet, scaled
from edgedetr.training.device_choice import DeviceChoice
from edgedetr.training.fine_tuning import DEFAULTS, Plan, steps_of_an_epoch
from edgedetr.training.optimizer import Schedule
from edgedetr.training.output import TrainState
from edgedetr.training.trainer import DETECTORS, Learner, TrainingKind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedTraining:
    """A recipe without "auto", and what was decided beside it.

    epochs  that train.minutes has time for; 0 where it is not set
    chosen  what was chosen for "auto", for a resume
    notes   one sentence for each number that was chosen here
    """

    recipe: Recipe
    epochs: int
    chosen: dict[str, Any]
    notes: tuple[str, ...]


def for_machine(config: TrainConfig, device: DeviceChoice, images: int, past: TrainState | None = None) -> Plan:
    """Precision and workers for the device; all that was chosen before, where a training is resumed.

    images  of the train split
    """
    if past is not None:
        return Plan(fine_tuning.as_recorded(config, past.chosen))
    gpu = device.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return fine_tuning.fit_to_machine(
        config,
        gpu=gpu,
        bf16=gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        cores=cores // config.devices,
        images=images,
    )


def plan_training(
    asked: Recipe,
    machine: Plan,
    splits: Splits,
    images: TrainingSet,
    fabric: Fabric,
    past: TrainState | None,
    begun: float,
    kind: TrainingKind = DETECTORS,
) -> PlannedTraining:
    """Batch, then epochs, then all that follows from the number of steps.

    asked    the recipe as it was given
    machine  its section [train] after `for_machine`
    past     the state of the checkpoint that is resumed: what was measured before it is not measured again
    begun    when the training began, of time.monotonic(): train.minutes counts from there
    Errors: TrainingError where no batch fits the GPU, or no epoch the time.
    """
    start, count = fine_tuning.start_of(asked), len(splits.train)

    def plan(of: Plan, epochs: int = 0) -> Plan:
        return fine_tuning.resolve(
            of.config, images=count, start=start, selects=splits.selects, epochs=epochs, width=asked.model.config.hidden
        )

    def throwaway(config: TrainConfig) -> tuple[Learner, Schedule]:
        numbers = resolved(config)
        recipe = replace(asked, train=config)
        learner = Learner(recipe, splits.train.classes, fabric, load_weights=False, kind=kind)
        return learner, Schedule(numbers, numbers.epochs, steps_of_an_epoch(count, numbers.batch), asked.augment)

    if machine.config.batch == "auto":
        trial = replace(plan(machine).config, batch=machine.config.accumulate)
        batch, most = largest_that_fits(*throwaway(trial), images, asked.augment, CudaMemory(fabric.device))
        machine = machine.choose("batch", batch, f"batch {batch}: the largest up to {most} that fits this GPU")
    whole, epochs = plan(machine), 0 if past is None else past.epochs
    if machine.config.minutes and not epochs:
        learner, schedule = throwaway(whole.config)
        spent = time.monotonic() - begun
        epochs = time_budget.choose_epochs(learner, images, schedule, select_images=len(splits.select), spent=spent)
    found = plan(machine, epochs)
    return PlannedTraining(
        replace(asked, train=found.config),
        epochs,
        fine_tuning.recorded(found.config, asked.train),
        (*fine_tuning.frozen_at_random(asked), *machine.notes, *found.notes),
    )


def largest_that_fits(
    learner: Learner, schedule: Schedule, images: TrainingSet, augment: AugmentConfig, memory: Memory
) -> tuple[int, int]:
    """The largest batch of the set's most crowded images at their largest size, and the largest that is tried.

    learner  takes steps and must not be used afterwards
    Errors: TrainingError where not even the smallest fits.
    """
    config = learner.config
    most = max(min(DEFAULTS.most_batch, len(images) // DEFAULTS.least_steps), config.accumulate)
    contract = scaled(images.contract, max(config.sizes or (1.0,)), images.multiple)
    joined = (4 if augment.mosaic else 1) * (2 if augment.mixup or augment.cutmix else 1)
    objects = joined * max(len(sample.labels) for sample in images.samples.samples)
    batch = measure_batch(learner, schedule, contract, objects=objects, most=most, memory=memory)
    if not batch:
        raise TrainingError(
            f"train.batch is 'auto', and not even {config.accumulate} images of {contract.height} x {contract.width} "
            "pixels fit the memory of this GPU; make the input smaller (--set input.height=..., input.width=...), or "
            "choose a smaller recipe"
        )
    return batch, most
