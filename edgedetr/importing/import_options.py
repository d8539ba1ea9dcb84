"""Options of an import: what the user states about a model made elsewhere, because its files do not contain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np

from edgedetr.errors import UsageError
from edgedetr.image_size import check_size
from edgedetr.importing.output_formats import BOX_FORMATS
from edgedetr.options import one_of
from edgedetr.printable import shown
from edgedetr.runtime.arguments import as_path, check_texts

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of R, G, B in 0..1


@dataclass(frozen=True)
class Normalization:
    """What an ONNX graph takes: (pixel * scale - mean) / std, per RGB channel, of an image resized by `resize`."""

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

    def describe(self) -> str:
        """(pixel x 0.00392157 - mean) / std in numbers."""
        listed = [" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        return f"(pixel x {self.scale:.6g} - {listed[0]}) / {listed[1]}, resized by {self.resize}"

    @property
    def factor(self) -> np.ndarray:
        """[3] what pixels are multiplied by."""
        return self.scale / np.array(self.std)

    @property
    def shift(self) -> np.ndarray:
        """[3] what is added after that."""
        return -np.array(self.mean) / np.array(self.std)


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import; None leaves the choice to the model's files.

    Every import:
    data        directory of labeled images: its classes become the bundle's, and export and verify use its images
    classes     text file with the name of each class logit, one per line; "-" is a logit that is not used.
                None: the names in config.json, else those of the data set in order
    size        (height, width) of the input in pixels

    Weights only:
    model       member of the family that the weights belong to; None: that of a published detector
    sets        "section.key=value" of the recipe, applied over the values in the files
    accept_license  names of licenses whose terms the user accepts, where weights have one that not everybody may use

    ONNX files only:
    scale, mean, std, resize   the preprocessing outside of the file, see `Normalization`. None: as in
                preprocessor_config.json next to it, else the usual one of models with such outputs
    activation  "sigmoid" or "softmax": what turns its class logits into scores
    boxes       format of its boxes, one of output_formats.BOX_FORMATS
    outputs     names of the outputs to use: class logits, boxes
    columns     where a class of the data set is among the logits, if nothing names them: at its "index", or at its
                "category-id"
    sampling    "gather" rewrites GridSample, which TensorRT 10.14 to 11.1 computes wrongly, as gathers with the same
                result; "grid_sample" keeps it. None: "gather"

    Errors: UsageError for a value of another type or without meaning.
    """

    data: str | Path | None = None
    classes: str | Path | None = None
    size: tuple[int, int] | None = None
    model: str | None = None
    sets: Sequence[str] = ()
    accept_license: Sequence[str] = ()
    scale: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: Literal["stretch", "letterbox"] | None = None
    activation: Literal["sigmoid", "softmax"] | None = None
    boxes: str | None = None
    outputs: Sequence[str] = ()
    columns: Literal["index", "category-id"] | None = None
    sampling: Literal["gather", "grid_sample"] | None = None

    def __post_init__(self) -> None:
        for name in ("data", "classes"):
            if getattr(self, name) is not None:
                as_path(getattr(self, name), name)
        if self.size is not None:
            check_size(self.size)
        check_texts(self.sets, "sets", "a list of section.key=value")
        check_texts(self.accept_license, "accept_license", "a list of names of licenses")
        check_texts(self.outputs, "outputs", "a list of names")
        for name, count in (("scale", 1), ("mean", 3), ("std", 3)):
            _check_numbers(name, getattr(self, name), count)
        one_of("resize", self.resize, (None, "stretch", "letterbox"), UsageError)
        one_of("activation", self.activation, (None, "sigmoid", "softmax"), UsageError)
        one_of("boxes", self.boxes, (None, *BOX_FORMATS), UsageError)
        one_of("columns", self.columns, (None, "index", "category-id"), UsageError)
        one_of("sampling", self.sampling, (None, "gather", "grid_sample"), UsageError)
        if self.columns is not None and (self.data is None or self.classes is not None):
            raise UsageError(
                f"--columns {self.columns} gives the positions of the data set's classes among the logits; give --data "
                "with it, and no --classes, which gives them too"
            )

    def require_only_for(self, source: str, *, is_onnx: bool) -> None:
        """UsageError for an option that only the other kind of source has."""
        for name in FOR_WEIGHTS if is_onnx else FOR_ONNX:
            if getattr(self, name) not in (None, (), []):
                raise UsageError(
                    f"--{OPTION_OF.get(name, name)} is for "
                    f"{'weights' if is_onnx else 'an ONNX file'}, and {source} is "
                    f"{'an ONNX file' if is_onnx else 'none'}; leave it out"
                )

    def normalization(self, known: Normalization) -> Normalization:
        """`known` with the fields that are given here."""
        return Normalization(
            known.scale if self.scale is None else self.scale,
            known.mean if self.mean is None else self.mean,
            known.std if self.std is None else self.std,
            known.resize if self.resize is None else self.resize,
        )

    @property
    def gives_normalization(self) -> bool:
        return any(value is not None for value in (self.scale, self.mean, self.std, self.resize))


def _check_numbers(name: str, value: object, count: int) -> None:
    """UsageError unless it is None, or a number (count 1), or `count` of them."""
    listed = [value] if count == 1 else list(value) if isinstance(value, (list, tuple)) else []
    fits = len(listed) == count and all(isinstance(one, Real) and not isinstance(one, bool) for one in listed)
    if value is not None and not fits:
        raise UsageError(f"{name} is {shown(value)}; expected {'a number' if count == 1 else f'{count} numbers'}")


OPTION_OF = {"sets": "set", "accept_license": "accept-license"}  # where the option has another name
FOR_WEIGHTS = ("model", "sets", "accept_license")
FOR_ONNX = ("scale", "mean", "std", "resize", "activation", "boxes", "outputs", "columns", "sampling")


def default_normalization(outputs: Sequence[str]) -> Normalization:
    """The normalization of published models whose outputs have these names."""
    return (
        Normalization(mean=IMAGENET[0], std=IMAGENET[1]) if set(outputs) == {"dets", "labels"} else Normalization()
    )  # RF-DETR
