"""Settings that have no effect beside the others of a recipe, so that nothing given by --set is ignored silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """What settings need to have an effect.

    keys    their names, `section.key`
    needed  for messages
    met     whether a recipe has it
    """

    keys: frozenset[str]
    needed: str
    met: Callable[[Any], bool]

    @classmethod
    def of(cls, section: str, keys: str, needed: str, met: Callable[[Any], bool]) -> Need:
        return cls(frozenset(f"{section}.{key}" for key in keys.split()), needed, met)


def _class_loss(recipe: Any) -> str:
    return str(recipe.train.class_loss or recipe.model.config.class_loss)


def _is_qat(recipe: Any) -> bool:
    return bool(recipe.quant.observer == "learned")


NEEDS = (
    Need.of("train", "step_epochs", "train.schedule = 'step'", lambda r: r.train.schedule == "step"),
    Need.of("train", "flat", "train.schedule = 'flat_cosine'", lambda r: r.train.schedule in ("flat_cosine", "auto")),
    Need.of(
        "train",
        "final_lr_factor",
        "train.schedule = 'cosine' or 'flat_cosine'",
        lambda r: r.train.schedule in ("cosine", "flat_cosine", "auto"),
    ),
    Need.of("train", "ema_warmup", "train.ema_decay above 0", lambda r: r.train.ema_decay != 0),
    Need.of("train", "lora_alpha lora_on lora_beside", "train.lora_rank above 0", lambda r: r.train.lora_rank > 0),
    Need.of("train", "drop_path_schedule", "train.drop_path above 0", lambda r: r.train.drop_path > 0),
    Need.of(
        "train",
        "denoising denoising_mode denoising_groups label_noise box_noise",
        "model.denoising = true, of a model that has it",
        lambda r: bool(getattr(r.model.config, "denoising", False)),
    ),
    Need.of(
        "train",
        "denoising_mode denoising_groups label_noise box_noise",
        "train.denoising above 0",
        lambda r: r.train.denoising > 0,
    ),
    Need.of("train", "teacher_weight", "train.teacher", lambda r: bool(r.train.teacher) or _is_qat(r)),
    Need.of("train", "teacher_score", "train.teacher", lambda r: bool(r.train.teacher)),
    Need.of(
        "train",
        "feature_teacher_weights feature_weight feature_share feature_weight_last",
        "train.feature_teacher",
        lambda r: bool(r.train.feature_teacher),
    ),
    Need.of("train", "no_object", "the loss 'softmax_ce'", lambda r: _class_loss(r) == "softmax_ce"),
    Need.of("train", "gamma", "another loss than 'softmax_ce'", lambda r: _class_loss(r) != "softmax_ce"),
    Need.of("train", "focal_alpha", "the loss 'focal' or 'ia_bce'", lambda r: _class_loss(r) in ("focal", "ia_bce")),
    Need.of("train", "vfl_alpha", "the loss 'vfl'", lambda r: _class_loss(r) == "vfl"),
    Need.of("augment", "crop_kind crop_scale crop_aspect", "augment.crop above 0", lambda r: r.augment.crop > 0),
    Need.of("augment", "crop_scale crop_aspect", "augment.crop_kind = 'iou'", lambda r: r.augment.crop_kind == "iou"),
    Need.of("augment", "zoom_out_scale", "augment.zoom_out above 0", lambda r: r.augment.zoom_out > 0),
    Need.of("augment", "brightness contrast saturation hue", "augment.color above 0", lambda r: r.augment.color > 0),
    Need.of(
        "augment",
        "mosaic_kind mosaic_degrees mosaic_shift mosaic_scale",
        "augment.mosaic above 0",
        lambda r: r.augment.mosaic > 0,
    ),
    Need.of(
        "augment",
        "mosaic_degrees mosaic_shift mosaic_scale",
        "augment.mosaic_kind = 'affine'",
        lambda r: r.augment.mosaic_kind == "affine",
    ),
    Need.of("augment", "mixup_beta", "augment.mixup above 0", lambda r: r.augment.mixup > 0),
    Need.of("augment", "magnitude", "augment.rand_augment above 0", lambda r: r.augment.rand_augment > 0),
    Need.of(
        "augment",
        "mix_until",
        "augment.mosaic, mixup or cutmix above 0",
        lambda r: max(r.augment.mosaic, r.augment.mixup, r.augment.cutmix) > 0,
    ),
    Need.of("augment", "mosaic mixup cutmix", "augment.mix_until above 0", lambda r: r.augment.mix_until > 0),
    Need.of(
        "augment",
        "crop crop_kind crop_scale crop_aspect zoom_out zoom_out_scale scale_jitter color brightness contrast "
        "saturation hue mosaic mosaic_kind mosaic_degrees mosaic_shift mosaic_scale mixup mixup_beta cutmix "
        "rand_augment magnitude erase mix_until",
        "augment.off_for_first and off_for_last below 1",
        lambda r: max(r.augment.off_for_first, r.augment.off_for_last) < 1,
    ),
    Need.of("quant", "percentile", "quant.observer = 'percentile'", lambda r: r.quant.observer == "percentile"),
)


def idle(recipe: Any, given: Iterable[str]) -> list[str]:
    """A sentence for each of the given settings, `section.key`, that has no effect in this recipe."""
    found = []
    for key in dict.fromkeys(given):
        lacking = [need.needed for need in NEEDS if key in need.keys and not need.met(recipe)]
        if lacking:
            found.append(f"--set {key} has no effect here: it needs {' and '.join(lacking)}")
    return found
