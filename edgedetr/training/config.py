"""Settings of training and of augmentation, with a reason for every number.

`TrainConfig` has the keys of the recipe's section [train]. Its parts group the keys by what reads them, so that a
function can take the part that it needs; a TrainConfig is also a value of every part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from edgedetr.errors import RecipeError
from edgedetr.options import LATER, check, later, renamed

Auto = Literal["auto"]  # a number that training/fine_tuning.py chooses

INF, ALMOST_ONE = math.inf, math.nextafter(1, 0)
TRAIN_RANGES = {
    **dict.fromkeys(("epochs", "accumulate", "eval_every", "checkpoint_every"), (1, 10**9)),
    "batch": (1, 65536),
    "devices": (1, 1024),
    "nodes": (1, 1024),
    "threads": (0, 1024),
    "workers": (0, 1024),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("warmup_steps", "patience", "cache_mb", "ema_warmup", "minutes"), (0, 10**9)),
    **dict.fromkeys(("cost_class", "cost_l1", "cost_giou", "weight_class", "weight_l1", "weight_giou"), (0, INF)),
    **dict.fromkeys(("weight_fgl", "weight_ddf"), (0, INF)),
    "clip": (0, INF),
    "lr": (1e-12, 10),
    "backbone_lr_factor": (0, 1000),
    "slow_lr_factor": (0, 1000),
    "weight_decay": (0, 10),
    **dict.fromkeys(("flat", "final_lr_factor", "no_object", "focal_alpha", "vfl_alpha", "label_noise"), (0, 1)),
    "betas": (0, ALMOST_ONE),
    "ema_decay": (0, ALMOST_ONE),
    "drop_path": (0, ALMOST_ONE),
    "layer_decay": (1e-6, 1),
    "label_smoothing": (0, ALMOST_ONE),
    "step_epochs": (1, 10**9),
    "growth": (0.1, 1),
    "sizes": (0.1, 4),
    "gamma": (0, 10),
    "denoising": (0, 10000),
    "denoising_groups": (0, 1000),
    "box_noise": (0, 10),
    "lora_rank": (0, 4096),
    "lora_alpha": (1e-6, 10**6),
    **dict.fromkeys(("teacher_weight", "feature_weight", "feature_weight_last"), (0, 1000)),
    "feature_share": (0.01, 99.99),
    "teacher_score": (0.01, 1),
}
FRACTIONS = (
    "flip_horizontal",
    "flip_vertical",
    "crop",
    "min_visible",
    "zoom_out",
    "color",
    "mosaic",
    "mixup",
    "cutmix",
    "erase",
    "off_for_first",
    "mix_until",
    "off_for_last",
)
AUGMENT_RANGES = {
    **dict.fromkeys(FRACTIONS, (0, 1)),
    "magnitude": (0, 10),
    "mixup_beta": (0.01, 1000),
    "mosaic_degrees": (0, 180),
    "mosaic_shift": (0, 1),
    "mosaic_scale": (0.1, 4),
    "rand_augment": (0, 20),
    **dict.fromkeys(("scale_jitter", "brightness", "contrast", "saturation"), (0, 0.95)),
    "hue": (0, 0.5),
    "zoom_out_scale": (1, 16),
    "crop_scale": (0.05, 1.0),
    "crop_aspect": (0.1, 10.0),
}

# Class losses, and the activation of the logits that each of them is for.
CLASS_LOSSES = {"softmax_ce": "softmax", **dict.fromkeys(("focal", "vfl", "mal", "ia_bce"), "sigmoid")}


def require_loss_of(class_loss: str, activation: str) -> None:
    """Errors: RecipeError where train.class_loss does not fit the activation of a member's logits.

    Cross-entropy would take the last logit of a sigmoid member, which is a class, for "no object"; the other losses
    have no such logit.

    class_loss  "" means the member's own
    """
    if class_loss and CLASS_LOSSES[class_loss] != activation:
        fitting = [name for name, kind in CLASS_LOSSES.items() if kind == activation]
        raise RecipeError(
            f"train.class_loss is {class_loss!r}, a loss of {CLASS_LOSSES[class_loss]} logits, and this "
            f"model's are {activation}; expected {' or '.join(map(repr, fitting))}, or nothing for the "
            "model's own"
        )


def require_sides_for(config: LossConfig, model: str, has_sides: bool) -> None:
    """Errors: RecipeError where a weight of the losses of sides is given for a member without such boxes."""
    given = [name for name in ("weight_fgl", "weight_ddf") if getattr(config, name) is not None]
    if given and not has_sides:
        raise RecipeError(
            f"train.{given[0]} is {getattr(config, given[0])}, but boxes of {model} are no distributions of their "
            "sides; expected no such weight, or model.name 'd_fine'"
        )


class _Part:
    """A part of the section [train] of a recipe."""

    def __post_init__(self) -> None:
        check(self, "train", TRAIN_RANGES)


@dataclass(frozen=True)
class LengthConfig(_Part):
    """What a training starts from, and how long it is."""

    # Weights of a whole detector: a bundle, a file, a published detector or an id on the hub; "" or "none" = only the
    # backbone's, "random" = no weights.
    start: str = ""
    accept_license: tuple[str, ...] = field(default=(), metadata=LATER)  # of the weights, where its terms bind the user
    epochs: int | Auto = "auto"  # from the images and the start
    minutes: float = 0.0  # fewer epochs where they would take longer than this here; 0 = all of them
    # Images per step over all devices (RT-DETR: 4 on each of 4); "auto": as many as fit a GPU's memory, measured.
    batch: int | Auto = 16
    accumulate: int = 1  # the batch is processed in so many parts, where memory is short


@dataclass(frozen=True)
class OptimizerConfig(_Part):
    """AdamW and its learning rate."""

    lr: float | Auto = "auto"  # from the start and the batch (RT-DETR and DETR: 1e-4)
    backbone_lr_factor: float | Auto = "auto"  # 0.1 (both), 1.0 where the backbone starts from random weights
    slow_lr_factor: float = 0.1  # sampling offsets, reference points (Deformable DETR, A.4); other members: none
    weight_decay: float = 1e-4  # both; of the parameters that `decay` selects
    # The parameters with weight decay: matrices (two dimensions and more), all but norms (RT-DETR-R18), or all (DETR
    # and its successors).
    decay: Literal["matrices", "not_norms", "all"] = field(default="matrices", metadata=LATER)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW
    clip: float = 0.1  # gradient norm, both; 0 = no clipping
    warmup: Literal["linear", "exponential", "quadratic"] = "linear"  # DEIM is "quadratic"
    warmup_steps: int | Auto = "auto"  # a fraction of the steps (RT-DETR: 2000)
    # "constant" is RT-DETR's, "step" DETR's, "flat_cosine" DEIM's: the full rate, a cosine, then the last rate while
    # strong augmentation is off (augment.off_for_last).
    schedule: Literal["constant", "step", "cosine", "flat_cosine", "auto"] = "auto"
    step_epochs: tuple[int, ...] = ()  # "step": the rate falls to a tenth at these epochs (DETR: 200 of 300)
    final_lr_factor: float = 0.01  # "cosine" and "flat_cosine" end at this fraction of lr (DEIM: 0.5)
    # "flat_cosine": fraction of the epochs at the full rate (DEIM: 4 epochs more than half).
    flat: float = field(default=0.5, metadata=LATER)


@dataclass(frozen=True)
class SizeConfig(_Part):
    """The sizes of training images."""

    growth: tuple[float, ...] = ()  # progressive resizing: sides in each equal part of the epochs, as fractions of
    # the input's; [0.6, 0.8, 1.0] is twice as fast at first (Tan and Le 2021, "EfficientNetV2", section 4)
    # Sides of a batch, as fractions of the input's, rounded to multiples of 32 px (of patch times windows, for a
    # windowed ViT): one is drawn for each; () = always the input's own, as in the last epochs (augment.off_for_last)
    # in any case (RT-DETR-R50: 480 to 800 px of 640).
    # "auto": several sizes from a whole detector, else one.
    sizes: tuple[float, ...] | Auto = field(default="auto", metadata=later(as_before=()))


@dataclass(frozen=True)
class EmaConfig(_Part):
    """The moving average of the weights."""

    ema_decay: float | Auto = "auto"  # from the steps (RT-DETR: 0.9999); 0 = no moving average
    # Steps; decay grows as 1 - exp(-step / ema_warmup) (RT-DETR: 2000).
    ema_warmup: int | Auto = "auto"


@dataclass(frozen=True)
class RunConfig(_Part):
    """Evaluation, seed, devices, memory and checkpoints."""

    eval_every: int | Auto = "auto"  # epochs between evaluations on the select split; the last is always evaluated
    patience: int | Auto = "auto"  # evaluations without a better AP before training stops; 0 = never
    seed: int = 0
    precision: Literal["32", "bf16", "16", "auto"] = "auto"  # bf16 where a GPU has it, else 32
    devices: int = 1  # per machine: GPUs where there are any, else processes on the CPU
    nodes: int = 1  # machines; start with torchrun
    workers: int | Auto = "auto"  # processes that prepare images; none for training on a CPU, where 0 is the fastest
    threads: int = 0  # of torch on the CPU; 0 = torch's own choice
    cache_mb: int = 2048  # decoded training images kept in memory; the rest is decoded each epoch
    checkpoint_every: int = 500  # steps between checkpoints for --resume; also after every evaluation
    compile: bool = False  # torch.compile; off, because its gain has not been measured


@dataclass(frozen=True)
class LossConfig(_Part):
    """Matching costs and losses."""

    cost_class: float | None = None  # matcher; None: 1 for softmax (DETR), 2 for the others (Deformable DETR)
    cost_l1: float = 5.0  # DETR
    cost_giou: float = 2.0  # DETR
    weight_class: float | None = None  # loss; None: 1 for softmax and varifocal, 2 for focal (Deformable DETR)
    weight_l1: float = 5.0  # DETR
    weight_giou: float = 2.0  # DETR
    l1: Literal["cxcywh", "xyxy"] = "cxcywh"  # of center and size (DETR) or of corners (Sparse R-CNN); cost and loss
    no_object: float = 0.1  # weight of the no-object class in the softmax loss (DETR, section 3.2)
    focal_alpha: float = 0.25  # focal loss (Lin et al. 2017); varifocal uses vfl_alpha
    vfl_alpha: float = 0.75  # varifocal loss (Zhang et al. 2021)
    gamma: float = 2.0  # both
    # "" = the member's own; "mal" is DEIM's, "ia_bce" LW-DETR's
    class_loss: Literal["", "softmax_ce", "focal", "vfl", "mal", "ia_bce"] = ""
    label_smoothing: float = 0.0  # 0.1 where labels are noisy (Szegedy et al. 2016)
    # Losses of boxes by distributions of their sides, fine-grained localization and distillation from the last layer
    # (D-FINE); None: 0.15 and 1.5 (its dfine_hgnetv2.yml). Other members have none, and refuse a weight.
    weight_fgl: float | None = field(default=None, metadata=LATER)
    weight_ddf: float | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class AdaptationConfig(_Part):
    """Which weights learn, and how much: stochastic depth, layer-wise decay, frozen parts, LoRA."""

    drop_path: float = 0.0  # stochastic depth of the decoder's last block; earlier ones less, down to 0
    # in the first block of the encoder, or of the ViT (0.1 to 0.3); ResNets have none
    drop_path_schedule: Literal["linear", "exponential"] = "linear"  # from the first block to the last
    layer_decay: float = 1.0  # of the learning rate, per block of a ViT towards its input (ViTDet: 0.7-0.8)
    freeze: tuple[str, ...] = ()  # patterns of names of parameters that do not learn, for example ["backbone.*"]
    lora_rank: int = 0  # rank of low-rank adapters (LoRA: 4 to 16); 0 = all weights learn
    lora_alpha: float = 16.0  # the adapters have weight lora_alpha / lora_rank (LoRA, section 4.1)
    lora_on: tuple[str, ...] = ("*.q", "*.v")  # names of the Linears that get one (LoRA, section 4.2)
    lora_beside: tuple[str, ...] = ("*norm*", "decoder.boxes.*", "selector.score.*", "selector.box.*")  # learn as well


@dataclass(frozen=True)
class DenoisingConfig(_Part):
    """Denoising queries."""

    denoising: int = 100  # noised queries in addition to the real ones (RT-DETR); 0 = none
    denoising_mode: Literal["cdn", "dn"] = "cdn"  # with negative copies (DINO, RT-DETR), or without (DN-DETR)
    denoising_groups: int = 0  # copies of every object, whatever `denoising` is (DN-DETR: 5); 0 = from `denoising`
    label_noise: float = 0.5  # fraction of their labels that become random; "cdn": half of this fraction (RT-DETR)
    box_noise: float = 1.0  # "cdn": shift of each side in half box sizes (RT-DETR); "dn": of the center in
    # half box sizes, of width and height in box sizes


@dataclass(frozen=True)
class DistillConfig(_Part):
    """A teacher, whose detections are learned beside the objects."""

    # A bundle or a published detector, of any member, that knows some of the classes by name; "" = none.
    teacher: str = field(default="", metadata=LATER)
    # Of the distillation loss; its L1 and GIoU have weight_l1 and weight_giou, as those of objects (DETRDistill, 3.2).
    teacher_weight: float = field(default=1.0, metadata=LATER)
    # The teacher's detections from this score on are taught, each with its score as weight: most others are background.
    teacher_score: float = field(default=0.3, metadata=LATER)
    # A frozen vision transformer whose patches the encoder's coarsest map learns to resemble (RT-DETRv4), for models
    # with attention within that map: dinov2_{small,base}[_registers]; "" = none. Its weights: "auto", hub name or file.
    feature_teacher: str = field(default="", metadata=LATER)
    feature_teacher_weights: str = field(default="auto", metadata=LATER)
    feature_weight: float = field(default=5.0, metadata=LATER)  # of this loss in the first epoch (RT-DETRv4 S and M)
    # The weight follows the encoder's share of the gradient, in percent, to stay between these (S; M: [3.25, 3.75], L:
    # [1.9, 2.1], X: [1.75, 2.25]); [] = it stays.
    feature_share: tuple[float, ...] = field(default=(10.0, 12.0), metadata=LATER)
    # In the last epochs, with weak augmentation, and where no gradient reaches the encoder (S and X; M and L: 15).
    feature_weight_last: float = field(default=20.0, metadata=LATER)

    def require_share(self) -> None:
        """Errors: RecipeError where feature_share is no range."""
        if self.feature_share and not (len(self.feature_share) == 2 and self.feature_share[0] < self.feature_share[1]):
            raise RecipeError(
                f"train.feature_share is {list(self.feature_share)}; expected [least, most] percent, or [] for a "
                "weight that stays"
            )


@dataclass(frozen=True)
class TrainConfig(
    # From right to left: the order of the keys in recipe.toml, on which the fingerprints of checkpoints depend.
    DistillConfig,
    DenoisingConfig,
    AdaptationConfig,
    LossConfig,
    RunConfig,
    EmaConfig,
    SizeConfig,
    OptimizerConfig,
    LengthConfig,
):
    """How a model is trained; what is "auto" follows from the set, the start and the machine (fine_tuning.py)."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self, "train", TRAIN_RANGES)
        self.require_share()
        if self.growth and self.growth[-1] != 1:
            raise RecipeError(
                f"train.growth is {list(self.growth)}; expected fractions from 0.1 to 1, and 1 at the end"
            )
        if self.batch != "auto" and self.batch % (self.devices * self.nodes * self.accumulate):
            raise RecipeError(
                f"train.batch is {self.batch}, which does not divide into {self.nodes} machines x "
                f"{self.devices} devices x {self.accumulate} parts"
            )
        if self.batch == "auto" and self.devices * self.nodes > 1:
            raise RecipeError(
                f"train.batch is 'auto', which is measured on one device, and there are {self.nodes} machines x "
                f"{self.devices} devices; expected a number"
            )
        if self.schedule == "step" and not self.step_epochs:
            raise RecipeError("train.schedule is 'step' without step_epochs; for example --set train.step_epochs=[40]")
        if self.minutes and self.schedule == "step":
            raise RecipeError(
                f"train.minutes is {self.minutes:g}, which changes the number of epochs, and "
                f"train.step_epochs {list(self.step_epochs)} would not follow; use schedule 'cosine'"
            )
        if list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise RecipeError(f"train.step_epochs is {self.step_epochs}; expected epochs that ascend, each at least 1")


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """[train] with a number for every "auto": what the training itself reads."""

    epochs: int
    batch: int
    lr: float
    backbone_lr_factor: float
    warmup_steps: int
    schedule: Literal["constant", "step", "cosine", "flat_cosine"]
    sizes: tuple[float, ...]
    ema_decay: float
    ema_warmup: int
    eval_every: int
    patience: int
    precision: Literal["32", "bf16", "16"]
    workers: int


def resolved(config: TrainConfig) -> ResolvedTrainConfig:
    """The same settings, where all are given. Errors: RecipeError that names one that is still "auto"."""
    if isinstance(config, ResolvedTrainConfig):
        return config
    return ResolvedTrainConfig(**{item.name: getattr(config, item.name) for item in fields(config)})


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are augmented; the defaults follow RT-DETR, with milder crops."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    flip_horizontal: float = 0.5  # probability
    flip_vertical: float = 0.0  # probability; for images without an up (microscopes, from above)
    crop: float = 0.5  # probability of a random crop; by `crop_kind`
    # "iou": SSD's, by crop_scale and crop_aspect; "size": DETR's, 384 to 600 px of an image of 400, 500 or 600 px.
    crop_kind: Literal["iou", "size"] = field(default="iou", metadata=LATER)
    crop_scale: tuple[float, float] = (0.3, 1.0)  # side of the crop, as a fraction of the image's (SSD)
    crop_aspect: tuple[float, float] = (0.5, 2.0)  # width to height of the crop, relative to the image's (SSD)
    min_visible: float = 0.4  # a box is dropped when a smaller fraction of its area is left
    zoom_out: float = 0.3  # probability of placing the image in a larger gray field
    zoom_out_scale: float = 2.0  # largest side of that field, in images (SSD: 4)
    scale_jitter: float = 0.1  # the crop grows or shrinks by up to this fraction
    color: float = field(default=0.8, metadata=renamed("colour"))  # probability of changing the colors
    brightness: float = 0.2  # largest change, as a fraction
    contrast: float = 0.2
    saturation: float = 0.3
    hue: float = 0.03  # turns of the color wheel
    mosaic: float = 0.0  # probability of four images in one (DEIM: 0.5)
    # "corners": four augmented images that meet anywhere (YOLOv4); "affine": DEIM's, four whole images that are turned,
    # shifted and scaled as one.
    mosaic_kind: Literal["corners", "affine"] = field(default="corners", metadata=LATER)
    mosaic_degrees: float = field(default=10.0, metadata=LATER)  # largest turn of "affine" (DEIM)
    mosaic_shift: float = field(default=0.1, metadata=LATER)  # its largest shift, as a fraction of the side (DEIM)
    mosaic_scale: tuple[float, float] = field(default=(0.5, 1.5), metadata=LATER)  # its scale (DEIM)
    mixup: float = 0.0  # probability of blending in a second image (DEIM: 0.5)
    mixup_beta: float = 1.5  # its weight is drawn from Beta(b, b): the larger b, the nearer to one half (DEIM: 150)
    cutmix: float = 0.0  # probability of pasting in a part of a second image
    rand_augment: int = 0  # operations of RandAugment on each image (Cubuk et al. 2020: 2)
    magnitude: float = 9.0  # their strength, 0..10 (the same: 9)
    erase: float = 0.0  # probability of a rectangle of noise (Zhong et al. 2020: 0.5; DeiT: 0.25)
    off_for_last: float = 0.1  # fraction of the epochs, at the end, with flips only (RT-DETR: the last epochs)
    # Fraction of the epochs, at the beginning, with flips only (DEIM: 4 epochs).
    off_for_first: float = field(default=0.0, metadata=LATER)
    # Mosaic, mixup and cutmix are used before this fraction of the epochs (DEIM: 4 epochs more than half).
    mix_until: float = field(default=1.0, metadata=LATER)

    def __post_init__(self) -> None:
        check(self, "augment", AUGMENT_RANGES)
        for name in ("crop_scale", "crop_aspect", "mosaic_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise RecipeError(f"augment.{name} is {[low, high]}; expected [low, high]")

    def last_epochs_from(self, epochs: int) -> int:
        """The first of the last epochs, which have flips only, of so many in all; counted from 0."""
        return math.ceil(epochs * (1 - self.off_for_last))

    def is_strong(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch (counted from 0) of so many has more than flips."""
        return round(epochs * self.off_for_first) <= epoch < self.last_epochs_from(epochs)

    def mixes(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch (counted from 0) of so many may join several images in one."""
        return epoch < round(epochs * self.mix_until)
