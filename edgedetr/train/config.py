"""Settings of training and of augmentation, with a reason per number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgedetr.errors import RecipeError


@dataclass(frozen=True)
class TrainConfig:
    """How a detector is trained; the defaults fine-tune RT-DETR on a set of some thousand pictures."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    start: str = ""                     # weights of a whole detector: a bundle, file or hub name; "" = the backbone's
    epochs: int = 72                    # RT-DETR, 6x schedule
    minutes: float = 0.0                # fewer epochs where they would take longer than this here; 0 = all of them
    batch: int = 16                     # pictures per step over all devices (RT-DETR: 4 on each of 4)
    accumulate: int = 1                 # the batch goes through in this many parts, where memory is short
    lr: float = 1e-4                    # RT-DETR and DETR
    backbone_lr_factor: float = 0.1     # both; 1.0 where the backbone starts from random weights
    slow_lr_factor: float = 0.1         # sampling offsets, reference points (Deformable DETR, A.4); other members: none
    weight_decay: float = 1e-4          # both; not on norms and biases
    betas: tuple[float, float] = (0.9, 0.999)   # AdamW
    clip: float = 0.1                   # gradient norm, both; 0 = no clipping
    warmup: Literal["linear", "exponential"] = "linear"
    warmup_steps: int = 2000            # RT-DETR
    schedule: Literal["constant", "step", "cosine"] = "constant"    # RT-DETR; DETR is "step"
    step_epochs: tuple[int, ...] = ()   # "step": the rate falls to a tenth at these epochs (DETR: 200 of 300)
    final_lr_factor: float = 0.01       # "cosine" ends at this share of lr
    growth: tuple[float, ...] = ()      # sides in each equal part of the epochs, share of the input's; [0.6, 0.8, 1.0]
                                        # is twice as fast at first (Tan and Le 2021, "EfficientNetV2", section 4)
    ema_decay: float = 0.9999           # RT-DETR; 0 = no moving average
    ema_warmup: int = 2000              # steps; decay grows as 1 - exp(-step / ema_warmup) (RT-DETR)
    eval_every: int = 1                 # epochs between evaluations on the select split; the last is always evaluated
    patience: int = 0                   # evaluations without a better AP before training stops; 0 = never
    seed: int = 0
    precision: Literal["32", "bf16", "16"] = "32"
    devices: int = 1                    # per machine: GPUs where there are any, else processes on the CPU
    nodes: int = 1                      # machines; start with torchrun
    workers: int = 0                    # processes that prepare pictures; 0 is fastest beside CPU training
    threads: int = 0                    # of torch on the CPU; 0 = torch's own choice
    cache_mb: int = 2048                # decoded training pictures kept in memory; the rest is decoded each epoch
    checkpoint_every: int = 500         # steps between checkpoints for --resume; also after every evaluation
    compile: bool = False               # torch.compile; its gain has not been measured
    cost_class: float | None = None     # matcher; None: 1 for softmax (DETR), 2 for the others (Deformable DETR)
    cost_l1: float = 5.0                # DETR
    cost_giou: float = 2.0              # DETR
    weight_class: float | None = None   # loss; None: 1 for softmax and varifocal, 2 for focal (Deformable DETR)
    weight_l1: float = 5.0              # DETR
    weight_giou: float = 2.0            # DETR
    l1: Literal["cxcywh", "xyxy"] = "cxcywh"    # of centre and size (DETR) or of corners (Sparse R-CNN); cost and loss
    no_object: float = 0.1              # weight of the no-object class in the softmax loss (DETR, section 3.2)
    focal_alpha: float = 0.25           # focal loss (Lin et al. 2017); varifocal uses vfl_alpha
    vfl_alpha: float = 0.75             # varifocal loss (Zhang et al. 2021)
    gamma: float = 2.0                  # both
    class_loss: Literal["", "softmax_ce", "focal", "vfl", "mal"] = ""   # "" = the member's own; "mal" is DEIM's
    label_smoothing: float = 0.0        # 0.1 where labels are noisy (Szegedy et al. 2016); softmax and focal losses
    drop_path: float = 0.0              # stochastic depth of the last block; earlier ones less (ViT: 0.1 to 0.3)
    drop_path_schedule: Literal["linear", "exponential"] = "linear"     # from the first block to the last
    layer_decay: float = 1.0            # of the rate from block to block of a ViT towards its input (ViTDet: 0.7-0.8)
    freeze: tuple[str, ...] = ()        # patterns of parameter names that do not learn, for example ["backbone.*"]
    lora_rank: int = 0                  # rank of low-rank adapters (LoRA: 4 to 16); 0 = all weights learn
    lora_alpha: float = 16.0            # their weight is lora_alpha / lora_rank (LoRA, section 4.1)
    lora_on: tuple[str, ...] = ("*.q", "*.v")               # names of the Linears that get one (LoRA, section 4.2)
    lora_beside: tuple[str, ...] = ("*norm*", "decoder.boxes.*", "selector.score.*", "selector.box.*")  # learn as well
    denoising: int = 100                # noised queries beside the real ones (RT-DETR); 0 = none
    denoising_mode: Literal["cdn", "dn"] = "cdn"    # with negative copies (DINO, RT-DETR), or without (DN-DETR)
    denoising_groups: int = 0           # copies of every object, whatever `denoising` says (DN-DETR: 5); 0 = that many
    label_noise: float = 0.5            # share of their labels drawn anew; "cdn": half of this share (RT-DETR)
    box_noise: float = 1.0              # "cdn": shift of each side in half box sizes (RT-DETR); "dn": of the centre in
                                        # half box sizes, of width and height in box sizes

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "eval_every", "devices", "nodes", "checkpoint_every"):
            _at_least(self, "train", name, 1)
        for name in ("warmup_steps", "patience", "workers", "threads", "cache_mb", "denoising", "clip", "weight_decay",
                     "backbone_lr_factor", "slow_lr_factor", "ema_warmup", "cost_l1", "cost_giou", "weight_l1",
                     "weight_giou", "gamma", "box_noise", "denoising_groups", "seed", "lora_rank", "minutes"):
            _at_least(self, "train", name, 0)
        for name in ("cost_class", "weight_class"):
            if getattr(self, name) is not None:
                _at_least(self, "train", name, 0)
        for name in ("final_lr_factor", "no_object", "focal_alpha", "vfl_alpha", "label_noise", "drop_path",
                     "label_smoothing"):
            _within(self, "train", name, 0, 1)
        if not 0 < self.layer_decay <= 1 or self.drop_path == 1 or self.lora_alpha <= 0:
            raise RecipeError(f"train.layer_decay is {self.layer_decay}, drop_path {self.drop_path}, lora_alpha "
                              f"{self.lora_alpha}; expected more than 0 to 1, 0 to less than 1, and more than 0")
        if not 0 < self.lr < 10 or not math.isfinite(self.lr):
            raise RecipeError(f"train.lr is {self.lr}; expected more than 0, for example 1e-4")
        if not 0 <= self.ema_decay < 1:
            raise RecipeError(f"train.ema_decay is {self.ema_decay}; expected 0 (none) up to less than 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"train.betas is {self.betas}; expected two numbers from 0 up to less than 1")
        if any(not 0.1 <= share <= 1 for share in self.growth) or (self.growth and self.growth[-1] != 1):
            raise RecipeError(f"train.growth is {list(self.growth)}; expected shares from 0.1 to 1, and 1 at the end")
        if self.batch % (self.devices * self.nodes * self.accumulate):
            raise RecipeError(f"train.batch is {self.batch}, which does not divide into {self.nodes} machines x "
                              f"{self.devices} devices x {self.accumulate} parts")
        if self.schedule == "step" and not self.step_epochs:
            raise RecipeError("train.schedule is 'step' without step_epochs; for example --set train.step_epochs=[40]")
        if self.minutes and self.schedule == "step":
            raise RecipeError(f"train.minutes is {self.minutes:g}, which changes the number of epochs, and "
                              f"train.step_epochs {list(self.step_epochs)} would not follow; use schedule 'cosine'")
        if list(self.step_epochs) != sorted(set(self.step_epochs)) or any(epoch < 1 for epoch in self.step_epochs):
            raise RecipeError(f"train.step_epochs is {self.step_epochs}; expected epochs that ascend, each at least 1")

    def growth_at(self, epoch: int) -> float:
        """Share of the input's sides that an epoch (counted from 0) trains at."""
        return self.growth[min(epoch * len(self.growth) // self.epochs, len(self.growth) - 1)] if self.growth else 1.0


@dataclass(frozen=True)
class AugmentConfig:
    """How training pictures are varied; the defaults follow RT-DETR, with milder crops."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    flip_horizontal: float = 0.5        # probability
    flip_vertical: float = 0.0          # probability; for pictures without an up (microscopes, from above)
    crop: float = 0.5                   # probability of a random crop that keeps some box by at least an IoU
    crop_scale: tuple[float, float] = (0.3, 1.0)    # side of the crop, share of the picture's (SSD)
    crop_aspect: tuple[float, float] = (0.5, 2.0)   # width to height of the crop, relative to the picture's (SSD)
    min_visible: float = 0.4            # boxes of which less than this share of the area is left are dropped
    zoom_out: float = 0.3               # probability of placing the picture in a larger grey field
    zoom_out_scale: float = 2.0         # largest side of that field, in pictures (SSD: 4)
    scale_jitter: float = 0.1           # the seen window grows or shrinks by up to this share
    colour: float = 0.8                 # probability of changing the colours
    brightness: float = 0.2             # largest change, share
    contrast: float = 0.2
    saturation: float = 0.3
    hue: float = 0.03                   # turns of the colour wheel
    mosaic: float = 0.0                 # probability of four pictures in one (DEIM: 0.5 and more)
    mixup: float = 0.0                  # probability of a second picture laid over (DEIM: 0.5)
    mixup_beta: float = 1.5             # its share is drawn from Beta(b, b): 1.5 keeps it near one half
    cutmix: float = 0.0                 # probability of a part of a second picture pasted in
    rand_augment: int = 0               # operations of RandAugment on each picture (Cubuk et al. 2020: 2)
    magnitude: float = 9.0              # their strength, 0..10 (the same: 9)
    erase: float = 0.0                  # probability of a rectangle of noise (Zhong et al. 2020: 0.5; DeiT: 0.25)
    off_for_last: float = 0.1           # share of the epochs, at the end, with flips only (RT-DETR: the last epochs)

    def __post_init__(self) -> None:
        for name in ("flip_horizontal", "flip_vertical", "crop", "min_visible", "zoom_out", "colour", "mosaic", "mixup",
                     "cutmix", "erase", "off_for_last"):
            _within(self, "augment", name, 0, 1)
        _within(self, "augment", "magnitude", 0, 10)
        _within(self, "augment", "mixup_beta", 0.01, 100)
        _within(self, "augment", "rand_augment", 0, 20)
        for name in ("scale_jitter", "brightness", "contrast", "saturation"):
            _within(self, "augment", name, 0, 0.95)
        _within(self, "augment", "hue", 0, 0.5)
        _within(self, "augment", "zoom_out_scale", 1, 16)
        for name, low, high in (("crop_scale", 0.05, 1.0), ("crop_aspect", 0.1, 10.0)):
            value = getattr(self, name)
            if not low <= value[0] <= value[1] <= high:
                raise RecipeError(f"augment.{name} is {list(value)}; expected [low, high] within {low} and {high}")


def _at_least(config: object, section: str, name: str, least: float) -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value >= least):
        raise RecipeError(f"{section}.{name} is {value}; expected at least {least}")


def _within(config: object, section: str, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise RecipeError(f"{section}.{name} is {value}; expected {low} to {high}")
