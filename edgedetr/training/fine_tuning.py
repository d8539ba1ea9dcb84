"""Chooses the numbers of a training that the recipe leaves at "auto": they follow from the set, the start, the machine.

A published schedule is made for the 118,000 images of COCO. On 500 images RT-DETR's warm-up of 2,000 steps would take
most of the training, and an average over 10,000 steps would never leave the first weights. So every such number is here
a fraction of the steps, up to the published number. A recipe or `--set` that gives a number keeps it. The numbers are
chosen once: a checkpoint holds them, and a resume reads them there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgedetr.options import one_of
from edgedetr.recipe import Recipe
from edgedetr.training.config import TrainConfig

StartKind = Literal["whole", "backbone", "random"]
STARTS: dict[StartKind, str] = {
    "whole": "a whole detector",
    "backbone": "a pretrained backbone",
    "random": "random weights",
}


@dataclass(frozen=True)
class FineTuningDefaults:
    """What "auto" stands for; not tuned on sets of ours yet.

    Others take the same for every set: rf-detr 100 epochs in batches of 16 at 1e-4, without warm-up and early stop
    (its documentation, November 2026); ultralytics 100 epochs in batches of 16, a warm-up of 3 epochs, and a stop after
    100 without improvement (cfg/default.yaml).
    """

    # Images seen: 100 epochs of 500 images from a whole detector (rf-detr, ultralytics). A start that knows less sees
    # more: encoder and decoder, and then the backbone too, begin at random.
    whole_images: int = 50_000
    backbone_images: int = 100_000
    random_images: int = 200_000
    fewest_steps: int = 1_500  # few images: AdamW needs steps, however few images each of them sees
    fewest_epochs: int = 12  # many images: the shortest published training (Dai et al. 2021)
    batch: int = 16  # RT-DETR, rf-detr, ultralytics; where there is no memory to measure
    most_batch: int = 64  # of a measured one: from here on a larger batch gives fewer steps and no more speed
    least_steps: int = 8  # of an epoch, which a measured batch leaves

    warmup: float = 0.05  # of the steps
    most_warmup_steps: int = 2_000  # RT-DETR
    ema_horizon: float = 0.05  # steps that the average looks back on, 1 / (1 - ema_decay), as a fraction of all
    most_ema_horizon: int = 10_000  # RT-DETR's decay of 0.9999
    ema_warmup: float = 0.01  # of the steps: a fifth of the horizon, as RT-DETR's 2,000 of 10,000
    most_ema_warmup: int = 2_000  # RT-DETR

    evaluations: int = 40  # at most, in equal distances; each costs a third of a training epoch of as many images
    whole_patience: float = 0.3  # of the evaluations, without a better AP, before training stops
    patience: float = 0.5  # the same for other starts, whose AP may be 0 for long
    fewest_patience: int = 10  # evaluations: the AP of a small split goes up and down (rf-detr's, where it is on)

    # Learning rates for batches of `batch` images. RT-DETR and DETR train at 1e-4 from a pretrained backbone; D-FINE
    # fine-tunes a whole detector at 2.5e-4 with batches of 32 and half of it in the backbone, which is 1.8e-4 here.
    whole_lr: float = 2e-4
    backbone_lr: float = 1e-4
    random_lr: float = 2e-4
    lr_power: float = 0.5  # lr grows as this power of the batch (Malladi et al. 2022, section 4: 1/2 for Adam)
    # The rates are for as many images as stand above; a training that sees fewer takes more: the root, up to 4 times.
    # A nano RT-DETR that had learned rendered scenes, BCCD, 300 steps of 8 images, AP on test: 44.7 at 3.2e-4 and 52.5
    # at 1.3e-3, which is this rule's. Of 200 steps of 4 images without the rule, 4.3 from its backbone at 1.1e-4, and
    # 19.0 from random weights at 2.3e-4. Trainings of more images from a whole detector have not been compared; from
    # random weights, 128 epochs of recipe rtdetr-nano-bccd learn well at 4e-4, where this rule gives 6.3e-4.
    most_of_images: float = 4.0
    # The rates are of detectors of this width (`hidden`); narrower ones take more, as 1 / width (Yang et al. 2021,
    # "Tensor Programs V", table 3, Adam). DEIMv2 publishes the same for sizes of 64 to 128 channels: for batches of 16,
    # 7.1e-4, 5.7e-4, 5.7e-4 and 5.7e-4, where this rule gives 8e-4, 5.3e-4, 4.6e-4 and 4e-4.
    lr_width: int = 256
    most_of_width: float = 4.0  # 64 channels, the narrowest published detector
    most_lr_factor: float = 10.0  # of both together; 9.1 was measured
    whole_backbone_lr_factor: float = 0.5  # D-FINE's fine-tuning
    backbone_lr_factor: float = 0.1  # RT-DETR and DETR; 1 where the backbone has random weights
    schedule: Literal["constant", "cosine", "flat_cosine"] = "flat_cosine"  # DEIM, RTMDet

    # Sides of training images from a whole detector, as fractions of the input's: 480 to 800 px of 640, three times 640
    # (RT-DETR-R34 and larger, D-FINE-L; rf-detr and LW-DETR have several sizes as well). Other starts, and trainings
    # that see few images: one size, the cheapest way to learn the most at first. Measured as above, at 1.3e-3 and 2,400
    # images seen: 52.6 with these sizes, 54.8 with one. Where it turns has not been measured.
    sizes: tuple[float, ...] = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
    sizes_from: int = 12_500  # images seen

    workers: int = 8  # of a GPU's process, at most; one core is left for the process itself
    worker_steps: int = 4  # of an epoch for each worker: they are started anew in every epoch


DEFAULTS = FineTuningDefaults()


@dataclass(frozen=True)
class Plan:
    """The settings of a training without "auto", and one sentence for each that was chosen here."""

    config: TrainConfig
    notes: tuple[str, ...] = ()

    def choose(self, key: str, value: Any, note: str) -> Plan:
        """The plan with a value for a key, and what to say of it, where the key is "auto"."""
        if getattr(self.config, key) != "auto":
            return self
        return Plan(replace(self.config, **{key: value}), (*self.notes, note) if note else self.notes)


def start_of(recipe: Recipe) -> StartKind:
    """What the weights of a training come from."""
    if recipe.train.start:
        return "whole"
    return "random" if recipe.model.config.backbone_weights == "random" else "backbone"


def frozen_at_random(recipe: Recipe) -> tuple[str, ...]:
    """A sentence for each part of a backbone with random weights that does not learn."""
    if start_of(recipe) != "random":
        return ()
    config, found = recipe.model.config, []
    if stages := config.frozen_stages:
        found.append(
            f"model.frozen_stages = {stages}: the first layers of the backbone keep their random weights; to let them "
            "learn: --set model.frozen_stages=0"
        )
    has_batch_norm = config.backbone.startswith(("resnet", "hgnetv2"))
    if has_batch_norm and config.backbone_norm == "frozen":
        found.append(
            "model.backbone_norm = 'frozen': norms between random weights do not learn; to let them: "
            "--set model.backbone_norm=trainable"
        )
    return tuple(found)


def fit_to_machine(config: TrainConfig, *, gpu: bool, bf16: bool, cores: int, images: int) -> Plan:
    """Precision and workers of this machine. The batch stays "auto" on a GPU, where it is measured.

    bf16    whether the GPU computes in bfloat16
    cores   of the CPU, for each process of the training
    images  of the train split
    """
    plan = Plan(config)
    if not gpu:
        plan = plan.choose("precision", "32", "").choose("workers", 0, "")
        note = f"batch {DEFAULTS.batch}: train.batch 'auto' measures the memory of a GPU, and there is none here"
        return plan.choose("batch", DEFAULTS.batch, note)
    plan = plan.choose("precision", "bf16" if bf16 else "32", f"precision {'bf16' if bf16 else '32'}: as this GPU can")
    batch = config.batch if isinstance(config.batch, int) else DEFAULTS.batch
    workers = max(min(DEFAULTS.workers, cores - 1, images // batch // DEFAULTS.worker_steps), 0)
    return plan.choose("workers", workers, f"{workers} workers prepare images: for {cores} cores")


def resolve(
    config: TrainConfig,
    *,
    images: int,
    start: StartKind,
    selects: bool,
    epochs: int = 0,
    width: int = DEFAULTS.lr_width,
    defaults: FineTuningDefaults = DEFAULTS,
) -> Plan:
    """The numbers that follow from the steps of a training.

    config   its batch, precision and workers are given (`fit_to_machine`)
    images   of the train split
    selects  whether there is a split to select the best epoch on, and so to stop early
    epochs   that train.minutes has time for; 0 = all
    width    channels of the detector's tokens (`model.hidden`)
    """
    one_of("start", start, STARTS)
    batch = config.batch if isinstance(config.batch, int) else defaults.batch
    per_epoch = steps_of_an_epoch(images, batch)
    seen = {"whole": defaults.whole_images, "backbone": defaults.backbone_images, "random": defaults.random_images}
    asked = max(math.ceil(max(seen[start] / batch, defaults.fewest_steps) / per_epoch), defaults.fewest_epochs)
    plan = Plan(config).choose("epochs", asked, f"{asked} epochs of {per_epoch} steps: for {STARTS[start]}")
    planned = epochs or int(plan.config.epochs)
    steps = planned * per_epoch
    plan = _follow_steps(plan, steps, defaults)
    if start == "whole" and int(plan.config.warmup_steps) > max(steps * defaults.warmup, 1):
        given = f"the recipe's warm-up takes {plan.config.warmup_steps} of {steps} steps"
        plan = replace(plan, notes=(*plan.notes, f"{given}: for a set of this size, add --preset finetune"))
    patience = defaults.whole_patience if start == "whole" else defaults.patience
    plan = _evaluate(plan, planned, patience if selects else 0.0, defaults)
    rate = {"whole": defaults.whole_lr, "backbone": defaults.backbone_lr, "random": defaults.random_lr}[start]
    learned = steps * batch
    rate = _lr_of(rate, batch, learned / seen[start], width, defaults)
    note = f"learning rate {rate:g}: for {STARTS[start]}, {steps} steps of {batch} images and {width} channels"
    plan = plan.choose("lr", rate, note)
    factors = {"whole": defaults.whole_backbone_lr_factor, "backbone": defaults.backbone_lr_factor, "random": 1.0}
    plan = plan.choose("backbone_lr_factor", factors[start], "")
    sizes = defaults.sizes if start == "whole" and learned >= defaults.sizes_from else ()
    shown = (
        f"images of {min(sizes):g} to {max(sizes):g} times the input's sides, but in the last epochs" if sizes else ""
    )
    return plan.choose("sizes", sizes, shown)


def steps_of_an_epoch(images: int, batch: int) -> int:
    """Optimizer steps: an incomplete batch is left out, too few images are repeated."""
    return max(images // batch, 1)


def _follow_steps(plan: Plan, steps: int, defaults: FineTuningDefaults) -> Plan:
    """Schedule, warm-up and moving average of so many steps."""
    warmup = min(int(steps * defaults.warmup), defaults.most_warmup_steps)
    plan = plan.choose("warmup_steps", warmup, f"warm-up {warmup} steps ({_share(warmup, steps)} of {steps})")
    horizon = min(max(steps * defaults.ema_horizon, 1), defaults.most_ema_horizon)
    decay = round(1 - 1 / horizon, 6)
    note = f"average of the weights over {horizon:.0f} steps ({_share(horizon, steps)}; ema_decay {decay:g})"
    plan = plan.choose("ema_decay", decay, note)
    ramp = _average_ramp(1 / (1 - float(plan.config.ema_decay)), steps, defaults)
    plan = plan.choose("ema_warmup", ramp, "")
    return plan.choose("schedule", defaults.schedule, f"schedule {defaults.schedule}")


def _lr_of(published: float, batch: int, length: float, width: int, defaults: FineTuningDefaults) -> float:
    """A published rate for another batch, length (images seen, of those that it is for) and width, to three digits."""
    of_batch = (batch / defaults.batch) ** defaults.lr_power
    of_images = min(max(length**-0.5, 1), defaults.most_of_images)
    of_width = min(max(defaults.lr_width / width, 1), defaults.most_of_width)
    return float(f"{published * of_batch * min(of_images * of_width, defaults.most_lr_factor):.3g}")


def _average_ramp(horizon: float, steps: int, defaults: FineTuningDefaults) -> int:
    """The ema_warmup of an average that looks back on `horizon` steps.

    A horizon that was given and is long for so many steps would keep the first weights in the average. It then grows as
    exp(step / ramp) up to the fraction of the steps that it would have if it were chosen.
    """
    wanted = max(steps * defaults.ema_horizon, 1)
    if horizon <= 1.01 * wanted:
        return min(int(steps * defaults.ema_warmup), defaults.most_ema_warmup)
    return math.ceil(steps / max(math.log(wanted), 1))


def _evaluate(plan: Plan, epochs: int, patience: float, defaults: FineTuningDefaults) -> Plan:
    """How often to evaluate, and when to stop early: after a fraction of the evaluations, 0 = never."""
    every = max(math.ceil(epochs / defaults.evaluations), 1)
    plan = plan.choose("eval_every", every, f"evaluation every {every} epochs" if every > 1 else "")
    evaluations = math.ceil(epochs / int(plan.config.eval_every))
    waits = max(math.ceil(evaluations * patience), defaults.fewest_patience)
    # Before a step of the rate AP stands still, and rises after it; and a stop after the last evaluation is none.
    if not patience or plan.config.schedule == "step" or waits >= evaluations:
        return plan.choose("patience", 0, "")
    return plan.choose("patience", waits, f"early stop after {waits} evaluations without a better AP")


def _share(part: float, steps: int) -> str:
    return f"{100 * part / max(steps, 1):.2g} %"


# What version 0.1 took for each key that may be "auto". A checkpoint holds what differs from it, so that one of any
# version is resumed with its own numbers.
BEFORE: Mapping[str, Any] = {
    "epochs": 72,
    "batch": 16,
    "lr": 1e-4,
    "backbone_lr_factor": 0.1,
    "warmup_steps": 2000,
    "schedule": "constant",
    "sizes": (),
    "ema_decay": 0.9999,
    "ema_warmup": 2000,
    "eval_every": 1,
    "patience": 0,
    "precision": "32",
    "workers": 0,
}


def recorded(config: TrainConfig, asked: TrainConfig) -> dict[str, Any]:
    """For the checkpoint: what was chosen of what was asked for as "auto", where it is not what 0.1 took."""
    values = asdict(config)
    return {key: values[key] for key in BEFORE if getattr(asked, key) == "auto" and values[key] != BEFORE[key]}


def as_recorded(config: TrainConfig, chosen: Mapping[str, Any]) -> TrainConfig:
    """The settings with what the resumed training chose, for each that is "auto"."""
    plan = Plan(config)
    for key, before in BEFORE.items():
        value = chosen.get(key, before)
        plan = plan.choose(key, tuple(value) if isinstance(value, list) else value, "")
    return plan.config
