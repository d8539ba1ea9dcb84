"""What an ONNX file cannot say of itself and its user must: how pixels go in, and what the class logits stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgedetr.bundle import ClassInfo
from edgedetr.errors import UsageError
from edgedetr.options import one_of

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pixels:
    """What the foreign graph takes: (pixel * scale - mean) / std, per RGB channel, of an image that was resized so."""

    scale: float = 1 / 255  # RT-DETR, D-FINE: 0..1, no mean
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Literal["stretch", "letterbox"] = "stretch"

    def __post_init__(self) -> None:
        one_of("resize", self.resize, ("stretch", "letterbox"), UsageError)
        if not (np.isfinite([self.scale, *self.mean, *self.std]).all() and self.scale > 0 and min(self.std) > 0):
            raise UsageError(
                f"scale {self.scale}, mean {self.mean}, std {self.std}; expected finite numbers, scale and std above 0"
            )

    def words(self) -> str:
        """(pixel * 0.00392157 - mean) / std in numbers."""
        listed = [" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        return f"(pixel x {self.scale:.6g} - {listed[0]}) / {listed[1]}, resized by {self.resize}"

    @property
    def factor(self) -> np.ndarray:
        """[3] what pixels are multiplied by."""
        return self.scale / np.array(self.std)

    @property
    def shift(self) -> np.ndarray:
        """[3] what is added then."""
        return -np.array(self.mean) / np.array(self.std)


@dataclass(frozen=True)
class Kept:
    """The class logits that the bundle keeps: `places` in the file, in the order of `classes` ("no object" last)."""

    activation: str
    classes: tuple[ClassInfo, ...]
    places: tuple[int, ...]


def usual(outputs: Sequence[str]) -> Pixels:
    """The normalization that models with outputs of these names are published with."""
    return Pixels(mean=IMAGENET[0], std=IMAGENET[1]) if set(outputs) == {"dets", "labels"} else Pixels()  # RF-DETR


def read_names(path: Path) -> list[str]:
    """One name per line; "-" for a class logit that is not used."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({error}); expected a text file with one class name per line"
        ) from error
    names = names[: len(names) - next((i for i, name in enumerate(reversed(names)) if name), len(names))]
    used = [name for name in names if name != "-"]
    if not used or "" in names or len(set(used)) < len(used):
        raise UsageError(
            f"{path}: {len(used)} names, of which some are empty or twice there; expected one line for "
            "each class logit of the file, in order, `-` for one that is not used"
        )
    return names


def columns_of(
    width: int,
    activation: Literal["sigmoid", "softmax"],
    names: Sequence[str] | None,
    known: tuple[ClassInfo, ...] | None,
    columns: str,
    source: str = "--classes",
) -> Kept:
    """What the `width` class logits of the file stand for, and which of them the bundle keeps.

    names    of the logits, in order, as `source` says; None = the data set's classes, `known`, as `columns` says
    Errors: UsageError where they cannot stand for that under this activation.
    """
    usable = width - (activation == "softmax")
    if names is not None:
        given = {name: place for place, name in enumerate(names) if name != "-"}
        lost = [item.name for item in known or () if item.name not in given]
        if lost:
            way = "" if source == "--classes" else "; or say --columns index where they stand in the data set's order"
            raise UsageError(
                f"{source} does not name {', '.join(lost[:5])}, which the data set has; expected one "
                f"line of --classes for each class logit of the file, in order, `-` for one that is not "
                f"used{way}"
            )
        known = known or tuple(ClassInfo(index, place, name) for index, (name, place) in enumerate(given.items()))
        places, count = [given[item.name] for item in known], len(names)
    else:
        known = known or tuple(ClassInfo(index, index, f"class {index}") for index in range(usable))
        places, count = [item.category_id if columns == "category-id" else item.index for item in known], len(known)
    if not places or min(places) < 0 or max(places) >= usable:
        raise UsageError(
            f"the file has {usable} class logits{' besides no object' if usable < width else ''}, and a "
            f"class stands at place {max(places, default=0)}; expected one line of --classes for each "
            "logit of the file, or --columns index"
        )
    if width > count + 1 and columns == "index":
        raise UsageError(
            f"the file has {width} class logits for {count} classes; say which is which: --classes FILE, "
            "or --columns category-id where they stand at the category ids (COCO: 91 for 80)"
        )
    return Kept(activation, known, tuple(places + ([width - 1] if activation == "softmax" else [])))
