"""Trains a model: one function from a recipe and a data set to a bundle."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import Bundle
from edgedetr.errors import TrainingError
from edgedetr.progress import SilentTraining, TrainingProgress
from edgedetr.recipe import Recipe
from edgedetr.runtime.cpu import bounded, tiles_bfloat16
from edgedetr.training.config import RunConfig
from edgedetr.training.data.dataset import open_splits, warn_of_crowded_images
from edgedetr.training.device_choice import ANY_DEVICE, DeviceChoice
from edgedetr.training.output import CHECKPOINT, FOLDER, read_state
from edgedetr.training.planning import for_machine, plan_training
from edgedetr.training.trainer import DETECTORS, Trainer, TrainingKind, training_set

log = logging.getLogger(__name__)

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}  # Fabric's words


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    device: DeviceChoice = ANY_DEVICE,
    resume: bool = False,
    progress: TrainingProgress | None = None,
    strict: bool = False,
    kind: TrainingKind = DETECTORS,
) -> Bundle:
    """Train the recipe's model on a data set and write the bundle: recipe.toml and weights.safetensors.

    data      a folder in COCO, YOLO or VOC layout
    out       the folder of the bundle; its subfolder train/ holds the checkpoint, metrics.jsonl and TensorBoard's files
    device    where to train; it is no part of the recipe, so a resume may choose another
    resume    continue from the last checkpoint in `out` (from the beginning where there is none); on several
              machines, `data` and `out` must be the same folders for all
    progress  called on the main process
    strict    an unreadable image or annotation is an error; otherwise it is left out with a warning
    kind      what is trained in place of the recipe's detector

    Sets torch's threads and the C library's memory options for the whole process, see `start_devices`.
    Errors: DataError, TrainingError (NaN, unusable checkpoint, `out` in use), ModelError.
    """
    data, out = Path(data), Path(out)
    main = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"  # of the processes of this training
    with Bundle.training(out) if main else nullcontext():
        begun = time.monotonic()
        require_no_overwrite(out, resume=resume)
        splits = open_splits(data, replace(recipe.data, strict=strict or recipe.data.strict))
        warn_of_crowded_images(splits.train, recipe.model.config.queries)
        checkpoint = out / FOLDER / CHECKPOINT
        past = read_state(checkpoint) if checkpoint.exists() else None  # before any process can have written one
        machine = for_machine(recipe.train, device, len(splits.train), past)
        fabric = start_devices(machine.config, device)
        if progress is None or not fabric.is_global_zero:
            progress = SilentTraining()
        images = training_set(recipe, splits)
        planned = plan_training(recipe, machine, splits, images, fabric, past, begun, kind)
        trainer = Trainer(planned.recipe, splits, out, fabric, progress, images, kind)
        trainer.begin(planned.epochs, planned.chosen)
        try:
            for note in planned.notes:
                progress.note(note)
            trainer.fit()
        finally:
            progress.finish()
        fabric.barrier()
        return Bundle.open(out)


def require_no_overwrite(out: Path, *, resume: bool) -> None:
    """Errors: TrainingError where a training from the beginning would overwrite weights, or `resume` was forgotten."""
    weights, checkpoint = out / WEIGHTS.file, out / FOLDER / CHECKPOINT
    if resume and weights.exists() and not checkpoint.exists():
        raise TrainingError(
            f"{out} holds trained weights but no {FOLDER}/{CHECKPOINT}, so there is nothing to resume from, and a "
            "start from the beginning would overwrite them; restore that folder from a copy, or train into another "
            f"--out (from these weights: --set train.start={out})"
        )
    if not resume and (checkpoint.exists() or weights.exists()):
        raise TrainingError(f"{out} holds a training already; continue it with --resume, or name another --out")


def start_devices(config: RunConfig, device: DeviceChoice = ANY_DEVICE) -> Fabric:
    """Start the processes of a training, in its precision. Further devices of this machine are started from here.

    For several machines, run on each: torchrun --nnodes N --nproc-per-node D --rdzv-endpoint HOST:PORT
    -m edgedetr train ... --set train.nodes=N --set train.devices=D

    What it sets for the whole process, once: torch's CPU threads (where train.threads is not 0), and on a CPU the C
    library's memory options (`keep_freed_memory`).
    """
    several = config.devices * config.nodes > 1
    # Without objects in a batch, the denoising embedding gets no gradient, which DDP allows only with this option.
    strategy = DDPStrategy(find_unused_parameters=True) if several else "auto"
    fabric = Fabric(
        accelerator=device.accelerator,
        devices=device.of_fabric(config),
        num_nodes=config.nodes,
        strategy=strategy,
        precision=PRECISIONS[config.precision],
    )
    fabric.launch()
    if config.threads:
        torch.set_num_threads(bounded(config.threads, "train.threads"))
    if fabric.device.type == "cpu":
        keep_freed_memory()
        if fabric.is_global_zero and config.precision == "32" and tiles_bfloat16():
            log.info(
                "this CPU multiplies bfloat16 in tiles (AMX): with --set train.precision=bf16 a step takes 0.5 "
                "to 0.7 of the time (docs/training.md)"
            )
    return fabric


# mallopt's parameters from <malloc.h>, and their values: M_MMAP_THRESHOLD, the size from which a block is mapped
# separately; M_TRIM_THRESHOLD, the free memory from which it is returned to the system; M_TOP_PAD, the step in which
# memory is requested.
MALLOPT = {-3: 1 << 30, -1: 2**31 - 1, -2: 1 << 26}


def keep_freed_memory() -> bool:
    """Make the C library of this process keep freed memory for the next step; False where it cannot (only glibc can).

    Otherwise every large tensor is mapped again in every operation, and the system clears its pages one by one. A step
    of `deformable_detr` at 320 px takes 2.9 instead of 3.5 s, with the same peak of memory (docs/benchmarks.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no such handle
        return False
    accepted = [mallopt(name, value) for name, value in MALLOPT.items()]
    return all(accepted)
