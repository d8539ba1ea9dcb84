"""The training loop: `Trainer` runs epochs, evaluates, saves and logs; `Learner` takes the optimizer steps.

Every random number is a function of the seed, the epoch and the step, so a training that was killed and resumed ends in
the same bytes as one that was not (on the CPU; GPU kernels may add in another order).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from lightning_fabric import Fabric
from torch import Tensor, nn

from edgedetr.bundle import ClassInfo, OutputContract
from edgedetr.errors import TrainingError
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.progress import TrainingProgress
from edgedetr.recipe import Recipe
from edgedetr.runtime.postprocess import Detections
from edgedetr.storage.atomic import atomic_write
from edgedetr.training.config import resolved
from edgedetr.training.criterion import Losses
from edgedetr.training.data.dataset import Batch, Splits, TrainingSet, batches, draw_sizes, epoch_order, pad
from edgedetr.training.feature_distillation import FeatureDistillation, load_feature_teacher
from edgedetr.training.fine_tuning import steps_of_an_epoch
from edgedetr.training.optimizer import BATCH_NORMS, Ema, Schedule, adamw, set_lr
from edgedetr.training.output import (
    CHECKPOINT,
    FOLDER,
    START_RECORD,
    BundleWriter,
    MetricsLog,
    TrainState,
    digest,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from edgedetr.training.start_weights import Start
from edgedetr.training.teacher import load_teacher
from edgedetr.training.training_module import TrainingModule, build_model, seed_step
from edgedetr.training.validator import Validator

log = logging.getLogger(__name__)

LOG_EVERY = 20  # steps between lines of metrics.jsonl
MAX_SKIPS = 5  # in a row: one bad image is in one batch of an epoch, damaged weights are in every one


@dataclass(frozen=True)
class StepResult:
    """What a step gave. A step with a nonfinite loss or gradient changes no weight.

    losses     [9] float32 on the CPU, in the order of Losses.NAMES
    nonfinite  what was NaN or infinite, "the loss" or "the gradient"; "" for neither
    """

    losses: Tensor
    nonfinite: str


@dataclass(frozen=True)
class Wanted:
    """What a Learner is made for.

    fabric        devices and precision; its fp16 gradient scaler is shared by all learners of a process
    load_weights  load pretrained weights; False where a checkpoint replaces all weights
    on_start      called with what was loaded of a whole detector
    """

    recipe: Recipe
    classes: tuple[ClassInfo, ...]
    fabric: Fabric
    load_weights: bool
    on_start: Callable[[Start], None] | None = None


@dataclass(frozen=True)
class Parts:
    """What a Learner trains.

    model      on the device
    module     from images, targets and the number of objects to losses, as a `TrainingModule`; it holds the model
    optimizer  of the model, and of what is trained beside it
    features   what is trained beside the model, or None
    teachers   digest of the weights of all teachers: with others a training cannot be resumed; "" = none
    """

    model: DetrModel
    module: nn.Module
    optimizer: torch.optim.AdamW
    features: FeatureDistillation | None = None
    teachers: str = ""


class TrainingKind(Protocol):
    """What is trained, and what of it becomes the bundle's weights."""

    def parts(self, wanted: Wanted) -> Parts:
        """The model that is trained, and what trains it."""
        ...

    def plain(self, model: DetrModel, folder: Path) -> DetrModel:
        """A trained model as the detector of its recipe; `folder` is for what else a later step needs of it."""
        ...


class _Detectors:
    """The detector that a recipe describes."""

    def parts(self, wanted: Wanted) -> Parts:
        recipe, classes, fabric = wanted.recipe, wanted.classes, wanted.fabric
        config = resolved(recipe.train)
        model = build_model(recipe, classes, load_weights=wanted.load_weights, on_start=wanted.on_start)
        model.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        teacher = None
        if config.teacher:
            names = [item.name for item in classes]
            teacher = load_teacher(config.teacher, names, fabric.device, config.teacher_score, config.accept_license)
        seen = load_feature_teacher(config, fabric.device)
        features = None if seen is None else FeatureDistillation(model, seen, config).to(fabric.device)
        module = TrainingModule(
            model, config, recipe.model.config.class_loss, len(classes), teacher=teacher, features=features
        )
        teachers = teacher.digest if teacher is not None else ""
        if features is not None:
            teachers += digest({}, features.teacher.model.state_dict())
        return Parts(model, module, adamw(model, config, beside=features), features, teachers)

    def plain(self, model: DetrModel, folder: Path) -> DetrModel:
        return model


DETECTORS: TrainingKind = _Detectors()


class Learner:
    """A model in training with its optimizer and its moving average; `step` changes them, nothing else does.

    Arguments: see `Wanted`.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: tuple[ClassInfo, ...],
        fabric: Fabric,
        *,
        load_weights: bool,
        on_start: Callable[[Start], None] | None = None,
        kind: TrainingKind = DETECTORS,
    ) -> None:
        self.config, self.fabric = resolved(recipe.train), fabric
        seed_step(self.config.seed, 0, 0)  # the same initial weights in every process
        parts = kind.parts(Wanted(recipe, classes, fabric, load_weights, on_start))
        self.model, self.features, self.teachers = parts.model, parts.features, parts.teachers
        self.ema = Ema(self.model, self.config.ema_decay, self.config.ema_warmup)
        module, self.optimizer = parts.module, parts.optimizer
        self._statistics = BatchNormBackup(self.model)
        self._module, self._fabric_optimizer = fabric.setup(module, self.optimizer)

    def step(self, batch: Batch, step: int, schedule: Schedule) -> StepResult:
        """One optimizer step, number `step` (counted from 0) of the schedule, on this process's part of a batch."""
        config, fabric = self.config, self.fabric
        seed_step(config.seed, step + 1, fabric.global_rank)
        set_lr(self.optimizer, schedule.lr_factor(step))
        self.model.progress(step / max(schedule.steps - 1, 1))
        self._statistics.store()
        losses = self._backward(batch)
        # All processes skip together: NaN and infinity survive a sum.
        nonfinite = "" if math.isfinite(float(sum_over_processes(fabric, losses[0]))) else "the loss"
        if not nonfinite and (config.clip or config.precision != "16"):  # without clipping, the norm still finds NaN
            norm = fabric.clip_gradients(
                self._module, self._fabric_optimizer, max_norm=config.clip or math.inf, error_if_nonfinite=False
            )
            if config.precision != "16" and norm is not None and not torch.isfinite(norm):
                nonfinite = "the gradient"
        if nonfinite:
            self._statistics.restore()
        else:
            if self.features is not None:
                self.features.count(self._module.parameters())
            self._fabric_optimizer.step()
            self.ema.update(step + 1)
        self._fabric_optimizer.zero_grad(set_to_none=True)
        return StepResult(losses.float().cpu(), nonfinite)

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of a batch, in train.accumulate parts; losses [9] on the device."""
        fabric, parts = self.fabric, self.config.accumulate
        size = len(batch.targets) // parts
        objects = torch.tensor(float(sum(map(len, batch.targets))))
        per_process = float(sum_over_processes(fabric, objects)) / fabric.world_size
        losses = torch.zeros(len(Losses.NAMES), device=fabric.device)
        for part in range(parts):
            chunk = slice(part * size, (part + 1) * size)
            padded = pad(batch.targets[chunk]).to(fabric.device)
            images = batch.images[chunk].to(fabric.device, non_blocking=True)
            with fabric.no_backward_sync(self._module, enabled=fabric.world_size > 1 and part < parts - 1):
                result = self._module(images, lambda padded=padded: padded, max(per_process / parts, 1.0))
                fabric.backward(result[0] / parts)
            losses += result.detach() / parts
        return losses


class BatchNormBackup:
    """Running statistics of BatchNorm from before a step: the forward pass of a bad batch would leave a NaN in them."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
        self._live = [buffer for norm in norms for buffer in norm.buffers()]
        self._stored = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def store(self) -> None:
        for stored, live in zip(self._stored, self._live):
            stored.copy_(live)

    @torch.no_grad()
    def restore(self) -> None:
        for stored, live in zip(self._stored, self._live):
            live.copy_(stored)


def training_set(recipe: Recipe, splits: Splits) -> TrainingSet:
    """The augmented images of the train split."""
    return TrainingSet(
        splits.train,
        recipe.input.contract(),
        recipe.augment,
        seed=recipe.train.seed,
        strict=splits.config.strict,
        cache_mb=recipe.train.cache_mb,
        multiple=recipe.model.config.size_multiple,
    )


class Trainer:
    """One training in this process: `fit` trains from `state` on and writes the bundle at `out`.

    Call `begin` first.

    recipe  without "auto" (`fine_tuning.resolve`)
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        out: Path,
        fabric: Fabric,
        progress: TrainingProgress,
        images: TrainingSet | None = None,
        kind: TrainingKind = DETECTORS,
    ) -> None:
        """images  those of `training_set`, where they were made before"""
        config = resolved(recipe.train)
        self.recipe, self.config, self.splits, self.fabric, self.progress = recipe, config, splits, fabric, progress
        self.checkpoint = out / FOLDER / CHECKPOINT
        self.fresh = not self.checkpoint.exists()  # read before any process can have written one
        if config.patience and not splits.selects:
            log.warning(
                "train.patience is ignored: the only split to evaluate on is the verify split (%s), and no epoch is "
                "selected by it",
                splits.config.verify_split,
            )
        classes = splits.train.classes
        self.learner = Learner(recipe, classes, fabric, load_weights=self.fresh, on_start=self._loaded, kind=kind)
        contract, output = recipe.input.contract(), OutputContract(recipe.model.config.activation)
        DeployGraph(self.learner.model, contract.height, contract.width)  # a model that cannot be deployed fails now
        self.images = images or training_set(recipe, splits)
        self.validator = Validator(
            splits.select, contract, output, batch=min(config.batch, 16), cache_mb=config.cache_mb // 2
        )
        average = self.learner.ema.model
        self.writer = BundleWriter(
            out, recipe, splits.config, splits.folder, classes, lambda: kind.plain(average, out / FOLDER)
        )
        self.metrics: MetricsLog | None = None  # of the main process, while `fit` runs
        self.fingerprint = fingerprint(recipe, splits.train, self.learner.teachers)
        steps = steps_of_an_epoch(len(splits.train), config.batch)
        self.schedule = Schedule(config, config.epochs, steps, recipe.augment)
        self.state = TrainState()

    def _loaded(self, start: Start) -> None:
        """Say what was loaded, and record it beside the checkpoint for the bundle."""
        if self.fabric.is_global_zero:
            self.progress.loaded(start.describe())
            with atomic_write(self.checkpoint.parent / START_RECORD) as path:
                start.write(path)

    def resume(self) -> None:
        """Load the checkpoint. Errors: TrainingError."""
        learner = self.learner
        self.state = load_checkpoint(
            self.checkpoint, self.fingerprint, learner.model, learner.ema.model, learner.optimizer, learner.features
        )
        self._apply_epochs()
        precision = self.fabric.strategy.precision
        if self.state.gradient_scale:
            stored = {"scale": self.state.gradient_scale, "_growth_tracker": self.state.gradient_scale_growth}
            precision.load_state_dict({**precision.state_dict(), **stored})
        log.info("resuming at step %d of %d", self.state.step, self.schedule.steps)

    def begin(self, epochs: int = 0, chosen: Mapping[str, Any] | None = None) -> None:
        """Load the checkpoint where there is one, else start at the first step. Errors: TrainingError.

        epochs  to train instead of train.epochs, which a resume keeps to; 0 = all
        chosen  what was chosen for "auto", for the checkpoint
        """
        if self.fresh:
            self.state = TrainState(chosen=dict(chosen or {}))
        else:
            self.resume()
        self.state.epochs = self.state.epochs or epochs
        self._apply_epochs()

    def _apply_epochs(self) -> None:
        self.schedule = replace(self.schedule, epochs=self.state.epochs or self.config.epochs)

    def fit(self) -> None:
        """Train all epochs that are left, then write today's recipe into the bundle, also where no epoch was left."""
        if not self.state.done:
            self._train()
        if self.fabric.is_global_zero:
            self.writer.finish()

    def _train(self) -> None:
        if self.fresh:
            self._save()  # so that a resume never has to start over
        state, schedule = self.state, self.schedule
        if self.fabric.is_global_zero:
            self.metrics = MetricsLog(self.checkpoint.parent, state.step)
            if state.epochs and not state.step:
                self.metrics.write("plan", 0, {"epochs": state.epochs, "minutes": self.config.minutes})
        if self.config.workers:
            self.images.fill_cache()
        self.progress.start(schedule.steps, state.step, schedule.epochs)
        try:
            for epoch in range(state.step // schedule.steps_per_epoch, schedule.epochs):
                self._train_epoch(epoch)
                done = epoch + 1
                if self.learner.features is not None:
                    self.learner.features.adapt(last=epoch >= self.recipe.augment.last_epochs_from(schedule.epochs))
                if done % self.config.eval_every == 0 or done == schedule.epochs:
                    self._evaluate(done)
                    self._save()
                    if state.done:
                        break
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch (counted from 0) that are left."""
        config, state, steps_per_epoch = self.config, self.state, self.schedule.steps_per_epoch
        images, begun = 0, time.monotonic()
        for batch in self._batches(epoch):
            result = self.learner.step(batch, state.step, self.schedule)
            state.step += 1
            self._count(result, batch)
            images += config.batch
            self.progress.step(
                state.step, self._mean_losses(state.loss_sums), images / max(time.monotonic() - begun, 1e-9)
            )
            if state.step % LOG_EVERY == 0 or state.step % steps_per_epoch == 0:
                self._log_losses()
                images, begun = 0, time.monotonic()
            # At the end of an epoch, the checkpoint follows the evaluation, so that a resume never omits one.
            if (
                state.step % config.checkpoint_every == 0
                and state.step % steps_per_epoch
                and not state.skipped_in_a_row
            ):
                self._save()

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch that are left, this process's part of each."""
        config, fabric, steps_per_epoch = self.config, self.fabric, self.schedule.steps_per_epoch
        per_process = config.batch // fabric.world_size
        first = fabric.global_rank * per_process
        rows = epoch_order(len(self.images), config.batch, seed=config.seed, epoch=epoch)
        rows = rows[self.state.step % steps_per_epoch :, first : first + per_process]
        augment, epochs = self.recipe.augment, self.schedule.epochs
        fractions = self.schedule.size_fractions(epoch)
        contracts = draw_sizes(
            self.images.contract,
            fractions,
            steps_per_epoch,
            multiple=self.images.multiple,
            seed=config.seed,
            epoch=epoch,
        )
        return batches(
            self.images,
            rows,
            epoch,
            strong=augment.is_strong(epoch, epochs),
            mixes=augment.mixes(epoch, epochs),
            workers=config.workers,
            contracts=contracts[-len(rows) :],
        )

    def _count(self, result: StepResult, batch: Batch) -> None:
        """Add the losses of a step to their sums, or count it as skipped; TrainingError after MAX_SKIPS in a row."""
        state = self.state
        if not result.nonfinite:
            state.skipped_in_a_row = 0
            losses = result.losses.tolist()
            state.loss_sums = [a + b for a, b in zip(state.loss_sums, losses)] if state.summed_steps else losses
            state.summed_steps += 1
            return
        state.skipped += 1
        state.skipped_in_a_row += 1
        names = ", ".join(str(self.splits.train.samples[index].path) for index in batch.indices)
        if state.skipped_in_a_row >= MAX_SKIPS:
            kept = f"{self.checkpoint} is unchanged since" if self.checkpoint.exists() else "no checkpoint was written"
            raise TrainingError(
                f"{result.nonfinite} became NaN or infinite at step {state.step}, on {names}, as in the "
                f"{MAX_SKIPS - 1} steps before; {kept}. Look at these images (edgedetr data check "
                f"{self.splits.folder}), or lower --set train.lr (now {self.config.lr}) or set train.precision=32, "
                "and train into another --out"
            )
        log.warning(
            "step %d is skipped: %s became NaN or infinite on %s (%d skipped so far; %d in a row end the training)",
            state.step,
            result.nonfinite,
            names,
            state.skipped,
            MAX_SKIPS,
        )
        if self.metrics is not None:
            values = {"what": result.nonfinite, "images": names, "skipped": state.skipped}
            self.metrics.write("skip", state.step, values)

    def _mean_losses(self, sums: list[float]) -> dict[str, float]:
        return {name: value / max(self.state.summed_steps, 1) for name, value in zip(Losses.NAMES, sums)}

    def _log_losses(self) -> None:
        """Write the mean losses since the last call, over all processes, to the metrics log."""
        state = self.state
        if not state.summed_steps:  # all steps were skipped, in every process alike
            return
        sums = sum_over_processes(self.fabric, torch.tensor(state.loss_sums, dtype=torch.float64))
        if self.metrics is not None:
            lr = self.learner.optimizer.param_groups[-1]["lr"]
            losses = self._mean_losses((sums / self.fabric.world_size).tolist())
            epoch = state.step / self.schedule.steps_per_epoch
            self.metrics.write("train", state.step, {"epoch": epoch, "lr": lr, **losses})
        state.loss_sums, state.summed_steps = [], 0

    def _evaluate(self, epoch: int) -> None:
        """Evaluate the moving average after `epoch` epochs; write it to the bundle if it is the best so far.

        Where no epoch may be selected, it is always written.
        """
        state, fabric = self.state, self.fabric
        metrics = self.validator.measure(self._detect())
        best = metrics.ap is not None and metrics.ap > state.best  # an undefined AP is never the best
        if metrics.ap is not None and best:
            state.best, state.best_epoch, state.epochs_without_improvement = metrics.ap, epoch, 0
        else:
            state.epochs_without_improvement += 1
        stop = self.splits.selects and 0 < self.config.patience <= state.epochs_without_improvement
        state.done = stop or epoch == self.schedule.epochs
        if fabric.is_global_zero and (best or not self.splits.selects or (state.done and state.best < 0)):
            self.writer.write()
        if self.metrics is not None:
            numbers = {name: value for name, value in metrics.to_json().items() if name != "per_class"}
            self.metrics.write("eval", state.step, {"epoch": epoch, "split": self.splits.select.name, **numbers})
        self.progress.evaluated(epoch, metrics.ap, metrics.ap50, best)
        if stop and epoch < self.schedule.epochs:
            self.progress.note(
                f"stopped after epoch {epoch} of {self.schedule.epochs}: no better AP in {self.config.patience} "
                f"evaluations (train.patience); the weights of epoch {state.best_epoch}, AP {state.best:.1f}, are kept"
            )

    def _detect(self) -> dict[int, Detections]:
        """Detections of the moving average on the select split by image id; each process takes a part of the images."""
        model, fabric = self.learner.ema.model, self.fabric
        if fabric.world_size == 1:
            return self.validator.detect(model)
        for buffer in model.buffers():  # each process has its own statistics of BatchNorm
            torch.distributed.broadcast(buffer, 0)
        found = self.validator.detect(model, rank=fabric.global_rank, world=fabric.world_size)
        parts: list[dict[int, Detections]] = [{} for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(parts, found)
        return {image: detections for part in parts for image, detections in part.items()}

    def _save(self) -> None:
        """Write the checkpoint, on the main process; all processes wait for it."""
        if self.fabric.is_global_zero:
            scaler = self.fabric.strategy.precision.state_dict()
            if scaler:
                self.state.gradient_scale = float(scaler["scale"])
                self.state.gradient_scale_growth = int(scaler["_growth_tracker"])
            learner = self.learner
            save_checkpoint(
                self.checkpoint,
                self.state,
                self.fingerprint,
                learner.model,
                learner.ema.model,
                learner.optimizer,
                learner.features,
            )
        self.fabric.barrier()


def sum_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    """Sum over all processes; `values` itself where there is one."""
    if fabric.world_size > 1:
        values = values.to(fabric.device, copy=True)
        torch.distributed.all_reduce(values)
    return values
