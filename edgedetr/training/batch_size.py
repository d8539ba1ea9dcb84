"""Chooses the largest batch that fits a GPU's memory, by training steps of a model that is thrown away.

The steps change a second `Learner`, never the one that trains. Afterwards its memory is free again, and the gradient
scaler that learners share is as before.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from edgedetr.bundle import InputContract
from edgedetr.training.data.dataset import Batch, Target
from edgedetr.training.optimizer import Schedule
from edgedetr.training.trainer import Learner

log = logging.getLogger(__name__)

USABLE = 0.85  # of the memory: other images of the set have other shapes of padding, and the validator needs some
STEPS = 2  # the first allocates the optimizer's state
STEP_OF_SEARCH = 8  # the search ends where the largest that fits is within an eighth of the smallest that does not


class Memory(Protocol):
    """The memory of the device that trains."""

    def peak(self) -> float:
        """The largest use since `release`, as a fraction of all."""
        ...

    def release(self) -> None:
        """Give back what no tensor holds, and count the peak anew."""
        ...


class CudaMemory:
    """The memory of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self) -> float:
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)  # other processes, and CUDA itself
        return (torch.cuda.max_memory_reserved(self._device) + others) / total

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


def largest_batch(fits: Callable[[int], bool], *, unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` for which `fits` holds, within an eighth; 0 where not even one unit.

    Doubled until one does not fit, then halved between. `fits` must hold for all batches below one that fits.
    """
    good, bad = 0, 0
    while not bad and good < most // unit:
        tried = min(max(2 * good, 1), most // unit)
        if fits(tried * unit):
            good = tried
        else:
            bad = tried
    while bad - good > max(good // STEP_OF_SEARCH, 1):
        tried = (good + bad) // 2
        if fits(tried * unit):
            good = tried
        else:
            bad = tried
    return good * unit


def measure_batch(
    learner: Learner, schedule: Schedule, contract: InputContract, *, objects: int, most: int, memory: Memory
) -> int:
    """The largest batch up to `most` whose steps fit `memory`, backward pass and optimizer included; 0: none does.

    learner   takes the steps and must not be used afterwards
    contract  the largest input of the training
    objects   in an image, at most: they decide the number of noised queries
    """
    precision = learner.fabric.strategy.precision
    scaler = precision.state_dict()

    def fits(images: int) -> bool:
        memory.release()
        try:
            batch = example_batch(images, objects, contract)
            for step in range(STEPS):
                learner.step(batch, step, schedule)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            learner.optimizer.zero_grad(set_to_none=True)
        used = memory.peak()
        log.debug("a batch of %d images takes %.0f %% of the memory", images, 100 * used)
        return used <= USABLE

    found = largest_batch(fits, unit=learner.config.accumulate, most=most)
    precision.load_state_dict(scaler)
    memory.release()
    return found


def example_batch(images: int, objects: int, contract: InputContract) -> Batch:
    """So many gray images with as many equal objects each: memory depends on sizes alone."""
    pixels = torch.full((images, 3, contract.height, contract.width), 128, dtype=torch.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.3]]).repeat(objects, 1)
    return Batch(pixels, [Target(torch.zeros(objects, dtype=torch.int64), boxes)] * images, list(range(images)))
