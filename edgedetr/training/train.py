"""The training loop: one function from a recipe and a data set to a bundle.

Whatever is random follows from the seed, the epoch and the step, so a training that was killed and resumed ends in the
same bytes as one that was not (on the CPU; GPU kernels may add in another order).
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from lightning_fabric import Fabric

from edgedetr.bundle import Bundle, OutputContract
from edgedetr.data import layouts
from edgedetr.data.detection_set import DataConfig, DetectionSet, without_empty_classes
from edgedetr.evaluation.coco_metrics import Metrics
from edgedetr.models.deploy import DeployGraph
from edgedetr.progress import SilentTraining, TrainingProgress
from edgedetr.recipe import Recipe
from edgedetr.training import optimizer, prepare, skipped_steps, time_budget
from edgedetr.training import state as checkpoint
from edgedetr.training.criterion import Losses
from edgedetr.training.data.dataset import Batch, TrainingSet, batches, drawn, order
from edgedetr.training.delivery import Delivery
from edgedetr.training.distributed import launch
from edgedetr.training.ema import Ema
from edgedetr.training.ground_truth import pad
from edgedetr.training.metrics_log import Record
from edgedetr.training.skipped_steps import SKIPS, Statistics
from edgedetr.training.state import Position
from edgedetr.training.step import Trainee, seed_step
from edgedetr.training.validator import Selection

log = logging.getLogger(__name__)

FOLDER = "train"  # inside the bundle; not needed on the device
CHECKPOINT = "last.safetensors"
RECORD_EVERY = 20  # steps between lines of metrics.jsonl


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    progress: TrainingProgress | None = None,
    strict: bool = False,
) -> Bundle:
    """Train the recipe's model on a data set and write the bundle: recipe.toml and weights.safetensors.

    out       the bundle's directory; its folder train/ holds the checkpoint, metrics.jsonl and TensorBoard's files
    resume    go on from the last checkpoint in `out` (from the beginning where nothing is there yet); on several
              machines `out` and `data` must be the same place for all
    Errors: DataError, TrainingError (NaN, unusable checkpoint, `out` taken or being trained into), ModelError.
    """
    first = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"  # of the processes of this training
    with Bundle.training(out) if first else nullcontext():
        return _train(recipe, Path(data), Path(out), resume, progress, strict)


def _train(
    recipe: Recipe, data: Path, out: Path, resume: bool, progress: TrainingProgress | None, strict: bool
) -> Bundle:
    begun, saved = time.monotonic(), out / FOLDER / CHECKPOINT
    prepare.require_place(out, saved, resume)
    place = recipe.data.resolve(layouts.splits(data))
    place = replace(place, strict=strict or place.strict)
    samples = layouts.load(data, place.train_split, strict=place.strict)
    samples = without_empty_classes(samples) if place.drop_empty_classes else samples
    chosen = layouts.load(data, place.select_split, strict=place.strict, classes=samples.classes, whose=samples.name)
    prepare.check(samples, chosen)
    prepare.warn_of_crowds(samples, recipe)
    fabric = launch(recipe.train)
    teller = progress if progress and fabric.is_global_zero else SilentTraining()
    run = Run(recipe, fabric, place, samples, chosen, data, out, teller)
    if not run.fresh:
        run.load(saved)
    try:
        run.plan(time.monotonic() - begun)
        run.go()
    finally:
        run.progress.finish()
    fabric.barrier()
    return Bundle.open(out)


class Run:
    """One training in this process: model, moving average, optimizer, data and how far it is."""

    def __init__(
        self,
        recipe: Recipe,
        fabric: Fabric,
        place: DataConfig,
        samples: DetectionSet,
        chosen: DetectionSet,
        data: Path,
        out: Path,
        progress: TrainingProgress,
    ) -> None:
        config = recipe.train
        self.recipe, self.config, self.fabric, self.place = recipe, config, fabric, place
        self.samples, self.data, self.out, self.progress = samples, data, out, progress
        self.saved = out / FOLDER / CHECKPOINT
        self.fresh = not self.saved.exists()  # asked before any process can have written one
        # Where only the verify split is there to look at, nothing is chosen by it: the last weights are delivered.
        self.chooses = place.select_split != place.verify_split
        if config.patience and not self.chooses:
            log.warning(
                "train.patience is ignored: only the verify split (%s) is there to look at, and nothing is "
                "chosen by it",
                place.verify_split,
            )
        prepare.use_threads(config.threads)
        seed_step(config.seed, 0, 0)  # the same start weights in every process
        model_config = recipe.model.config
        self.detector = prepare.detector(recipe, samples.classes, fresh=self.fresh)
        self.detector.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        trainee = Trainee(self.detector, config, model_config.class_loss, len(samples.classes))
        self.ema = Ema(self.detector, config.ema_decay, config.ema_warmup)
        self.statistics = Statistics(self.detector)
        self.delivery = Delivery(out, recipe, place, data, samples.classes, self.ema.model)
        self.record: Record | None = None
        self.plain_optimizer = optimizer.adamw(self.detector, config)
        self.trainee, self.optimizer = fabric.setup(trainee, self.plain_optimizer)
        contract = recipe.input.contract()
        DeployGraph(self.detector, contract.height, contract.width)  # what cannot be deployed fails now, not later
        self.output = OutputContract(model_config.activation)
        self.pictures = TrainingSet(
            samples, contract, recipe.augment, seed=config.seed, strict=place.strict, cache_mb=config.cache_mb
        )
        self.selection = Selection(
            chosen, contract, self.output, batch=min(config.batch, 16), cache_mb=config.cache_mb // 2
        )
        self.position = Position()
        self.fingerprint = checkpoint.fingerprint(recipe, samples)
        self.per_epoch = max(len(samples) // config.batch, 1)
        self.total = self.per_epoch * config.epochs

    def load(self, path: Path) -> None:
        """Everything as the checkpoint has it."""
        self.position = checkpoint.load(path, self.fingerprint, self.detector, self.ema, self.plain_optimizer)
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and self.position.scale:
            saved = {"scale": self.position.scale, "_growth_tracker": self.position.growth}
            scaler.load_state_dict({**scaler.state_dict(), **saved})
        log.info("going on at step %d of %d", self.position.step, self.total)

    def plan(self, spent: float) -> None:
        """Settle the number of epochs, where train.minutes limits it, of which `spent` seconds have passed."""
        if self.config.minutes and not self.position.epochs:
            self.position.epochs = time_budget.epochs(self, spent)
        self.config = replace(self.config, epochs=self.position.epochs or self.config.epochs)
        self.total = self.per_epoch * self.config.epochs

    def go(self) -> None:
        """All epochs that are left; then the bundle has the recipe as it is now, also where nothing was left."""
        main = self.fabric.is_global_zero
        if not self.position.done:
            self._rest(main)
        if main:
            self.delivery.finish()

    def _rest(self, main: bool) -> None:
        if self.fresh:
            self._save()  # from here on a resume never has to start over
        self.record = Record(self.saved.parent, self.position.step) if main else None
        if self.record is not None and self.position.epochs and not self.position.step:
            self.record.write("plan", 0, {"epochs": self.position.epochs, "minutes": self.config.minutes})
        if self.config.workers:
            self.pictures.fill()
        self.progress.start(self.total, self.position.step, self.config.epochs)
        try:
            for epoch in range(self.position.step // self.per_epoch, self.config.epochs):
                self._epoch(epoch)
                done = epoch + 1
                if done % self.config.eval_every == 0 or done == self.config.epochs:
                    self._evaluate(done)
                    self._save()
                    if self.position.done:
                        break
        finally:
            if self.record is not None:
                self.record.close()

    def _epoch(self, epoch: int) -> None:
        config, fabric, position = self.config, self.fabric, self.position
        mine = config.batch // fabric.world_size
        plan = order(len(self.samples), config.batch, seed=config.seed, epoch=epoch)
        plan = plan[position.step % self.per_epoch :, fabric.global_rank * mine : (fabric.global_rank + 1) * mine]
        plain = epoch >= config.epochs * (1 - self.recipe.augment.off_for_last)
        seen, begun = 0, time.monotonic()
        shares = [config.growth_at(epoch)] if plain else config.shares_at(epoch)
        contracts = drawn(self.pictures.contract, shares, self.per_epoch, seed=config.seed, epoch=epoch)[-len(plan) :]
        for batch in batches(self.pictures, plan, epoch, plain=plain, workers=config.workers, contracts=contracts):
            losses = self.step(batch).tolist()
            if not position.in_row:
                position.sums = [a + b for a, b in zip(position.sums, losses)] if position.summed else losses
                position.summed += 1
            seen += config.batch
            step = position.step
            self.progress.step(step, self._means(position.sums), seen / max(time.monotonic() - begun, 1e-9))
            if step % RECORD_EVERY == 0 or step % self.per_epoch == 0:
                self._write()
                seen, begun = 0, time.monotonic()
            # At the end of an epoch the checkpoint follows the evaluation, so that a resume never leaves one out.
            if step % config.checkpoint_every == 0 and step % self.per_epoch and not position.in_row:
                self._save()

    def _means(self, sums: list[float]) -> dict[str, float]:
        return {name: value / max(self.position.summed, 1) for name, value in zip(Losses.NAMES, sums)}

    def _write(self) -> None:
        """Mean losses since the last time, over all processes, to the record."""
        position = self.position
        if not position.summed:  # all of them were skipped, on every process alike
            return
        sums = self._over_all(torch.tensor(position.sums, dtype=torch.float64)) / self.fabric.world_size
        if self.record is not None:
            rate = self.plain_optimizer.param_groups[-1]["lr"]
            about = {"epoch": position.step / self.per_epoch, "lr": rate}
            self.record.write("train", position.step, {**about, **self._means(sums.tolist())})
        position.sums, position.summed = [], 0

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; losses [7] on the CPU."""
        config, fabric, position = self.config, self.fabric, self.position
        seed_step(config.seed, position.step + 1, fabric.global_rank)
        optimizer.set_rate(self.plain_optimizer, optimizer.rate(config, position.step, self.per_epoch))
        self.detector.progress(position.step / max(self.total - 1, 1))
        objects = float(self._over_all(torch.tensor(float(sum(map(len, batch.targets)))))) / fabric.world_size
        parts, size = config.accumulate, len(batch.targets) // config.accumulate
        losses = torch.zeros(len(Losses.NAMES), device=fabric.device)
        self.statistics.keep()
        for part in range(parts):
            chunk = slice(part * size, (part + 1) * size)
            padded = pad(batch.targets[chunk]).to(fabric.device)
            images = batch.images[chunk].to(fabric.device, non_blocking=True)
            with fabric.no_backward_sync(self.trainee, enabled=fabric.world_size > 1 and part < parts - 1):
                result = self.trainee(images, lambda padded=padded: padded, max(objects / parts, 1.0))
                fabric.backward(result[0] / parts)
            losses += result.detach() / parts
        # All processes skip together: NaN and infinity survive a sum.
        bad = "" if math.isfinite(float(self._over_all(losses[0]))) else "the loss"
        if not bad and (config.clip or config.precision != "16"):  # without clipping the norm still says NaN
            norm = fabric.clip_gradients(
                self.trainee, self.optimizer, max_norm=config.clip or math.inf, error_if_nonfinite=False
            )
            if config.precision != "16" and norm is not None and not torch.isfinite(norm):
                bad = "the gradient"
        if bad:
            self._skip(bad, batch)
        else:
            self.optimizer.step()
            position.in_row = 0
            self.ema.update(position.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        position.step += 1
        return losses.float().cpu()

    def _skip(self, what: str, batch: Batch) -> None:
        """Leave the weights as they are after a batch that would spoil them; TrainingError at SKIPS in a row."""
        self.statistics.restore()
        self.position.skipped, self.position.in_row = self.position.skipped + 1, self.position.in_row + 1
        names = ", ".join(str(self.samples.samples[index].path) for index in batch.indices)
        step = self.position.step + 1
        if self.position.in_row >= SKIPS:
            raise skipped_steps.too_many(what, step, names, self.saved, self.data, self.config.lr)
        skipped_steps.tell(what, step, names, self.position.skipped)
        if self.record is not None:
            self.record.write("skip", step, {"what": what, "images": names, "skipped": self.position.skipped})

    def _over_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        if self.fabric.world_size > 1:
            values = values.to(self.fabric.device, copy=True)
            torch.distributed.all_reduce(values)
        return values

    def _evaluate(self, epoch: int) -> None:
        """AP of the moving average; the bundle gets the weights when they are the best, or when nothing chooses."""
        fabric, position = self.fabric, self.position
        if fabric.world_size > 1:  # statistics of BatchNorm are each process's own
            for buffer in self.ema.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        found = self.selection.detect(self.ema.model, rank=fabric.global_rank, world=fabric.world_size)
        if fabric.world_size > 1:
            shares: list[dict] = [{} for _ in range(fabric.world_size)]
            torch.distributed.all_gather_object(shares, found)
            found = {image: detections for share in shares for image, detections in share.items()}
        metrics: Metrics = self.selection.measure(found)
        best = metrics.ap is not None and metrics.ap > position.best  # an undefined AP is never the best
        if metrics.ap is not None and best:
            position.best, position.best_epoch, position.stale = metrics.ap, epoch, 0
        else:
            position.stale += 1
        stop = self.chooses and 0 < self.config.patience <= position.stale
        position.done = stop or epoch == self.config.epochs
        if fabric.is_global_zero:
            if best or not self.chooses or (position.done and position.best < 0):
                self.delivery.write()
            if self.record is not None:
                numbers = {name: value for name, value in metrics.to_json().items() if name != "per_class"}
                self.record.write("eval", position.step, {"epoch": epoch, "split": self.place.select_split, **numbers})
        self.progress.evaluated(epoch, metrics.ap, metrics.ap50, best)

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            scaler = getattr(self.fabric.strategy.precision, "scaler", None)
            if scaler is not None:
                state = scaler.state_dict()
                self.position.scale, self.position.growth = float(state["scale"]), int(state["_growth_tracker"])
            checkpoint.save(self.saved, self.position, self.fingerprint, self.detector, self.ema, self.plain_optimizer)
        self.fabric.barrier()
