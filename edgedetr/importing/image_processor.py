"""Read an image processor of transformers: how it resizes and normalizes an image.

It is in preprocessor_config.json, or in `image_processor` of processor_config.json. Both imports, of weights and of
ONNX files, read it here. Every key is read, or refused or reported by name, or has no effect on the pixels of an image.
Sources: the image processors of transformers 4.57 and 5.23.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgedetr.errors import EdgedetrError, ModelError, did_you_mean
from edgedetr.importing.import_options import IMAGENET
from edgedetr.models.checkpoints.transformers_config import as_text, read_json_object
from edgedetr.models.checkpoints.transformers_keys import Key, NoEffect, Only, Special
from edgedetr.models.member import PublishedResize
from edgedetr.published.published_detectors import PublishedDetector

PROCESSOR = "preprocessor_config.json"
STEP = 32  # input sides are multiples of the coarsest stride
MAX_SIDE = 1 << 14  # pixels; a longer side is an error in the file
# Sizes if a file gives none, by class of processor: RT-DETR's stretches to a square, the others scale by the sides.
SQUARE, SHORT, LONG = 640, 800, 1333  # pixels
TYPE = re.compile(
    r"(RTDetr|RfDetr|Detr|ConditionalDetr|DeformableDetr)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)$"
)

_PIXELS = Special("scale, mean and deviation")
_SIZE = Special("how images are resized to one size")
_ANNOTATIONS = NoEffect("of annotations, in training")
_FORM = NoEffect("format of arrays in and out")
KEYS: dict[str, Key] = {
    **dict.fromkeys(("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"), _PIXELS),
    **dict.fromkeys(("do_resize", "size", "max_size", "do_pad", "pad_and_return_pixel_mask", "pad_size"), _SIZE),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type"), Special("whose defaults hold")),
    "resample": Only("the bundle's resize is bilinear", (2, None)),
    "do_center_crop": Only("nothing is cut off", (False, None)),
    "do_flip_channel_order": Only("a bundle takes RGB", (False, None)),
    "crop_size": NoEffect("nothing is cropped, see do_center_crop"),
    "default_to_square": NoEffect("these processors make no square of a single number"),
    "do_convert_rgb": NoEffect("images come as RGB in any case"),
    **dict.fromkeys(
        ("format", "do_convert_annotations", "annotations", "return_segmentation_masks", "masks_path"), _ANNOTATIONS
    ),
    **dict.fromkeys(
        (
            "data_format",
            "input_data_format",
            "return_tensors",
            "device",
            "disable_grouping",
            "image_seq_length",
            "_valid_processor_keys",
            "model_input_names",
        ),
        _FORM,
    ),
    **dict.fromkeys(
        ("processor_class", "_processor_class", "transformers_version", "backend"),
        NoEffect("which class wrote the file, and which library runs it"),
    ),
    "auto_map": Only("code that comes with a model is not executed", (None,)),
}


@dataclass(frozen=True)
class TargetSize:
    """Size of a processor's images.

    kind    "sides": exactly first x second (height, width); "edges": the shorter side is `first`, the longer at most
            `second`; "bounds": at most first x second
    """

    kind: Literal["sides", "edges", "bounds"]
    first: int
    second: int


@dataclass(frozen=True)
class ImageProcessor:
    """What a processor does to an image: resize, then (value * scale - mean) / std per RGB channel.

    size       None if the file gives none and the class of the processor is unknown
    resizes    False: images keep their sizes
    padding    (height, width) that images are padded to; None: not padded, or to the largest of a batch
    """

    where: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: TargetSize | None
    resizes: bool
    padding: tuple[int, int] | None


def find_processor(find: Callable[[str], Path | None], error: type[EdgedetrError]) -> tuple[dict[str, Any], str] | None:
    """The processor's configuration next to a model, and its file; the newer form first, as in transformers.

    find    path of a file next to the model by its name, or None
    Errors: `error` for a file that is not a JSON object.
    """
    for name, inner in (("processor_config.json", "image_processor"), (PROCESSOR, None)):
        path = find(name)
        if path is None:
            continue
        content = read_json_object(path, error)
        nested = content if inner is None else content.get(inner)
        if isinstance(nested, dict):
            return nested, str(path)
    return None


def read_processor(
    raw: Mapping[str, Any], where: str, error: type[EdgedetrError], published: PublishedResize | None = None
) -> ImageProcessor:
    """Scale, mean, deviation and size of a processor, with the defaults of its class in transformers.

    published   resize of a member of the family, whose class holds if the file names none; None: not of the family
    Errors: `error` that names the key, its value and what is expected.
    """
    read = _Reader(raw, where, error)
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type"))
    known = TYPE.match(kind) if isinstance(kind, str) else None
    if kind is not None and published is not None and not known:
        raise error(
            f"{where}: image_processor_type is {as_text(kind)}; expected that of DETR, Conditional "
            "DETR, Deformable DETR, RT-DETR or RF-DETR"
        )
    is_known = known is not None or (kind is None and published is not None)
    if known:
        stretched = known[1] == "RTDetr"
    else:
        stretched = str(kind).startswith("RTDetr") or (published is not None and published.square > 0)
    scale = 1.0
    if read.flag("do_rescale", True):
        scale = 1 / 255
        if raw.get("rescale_factor") is not None:
            scale = read.number(raw["rescale_factor"], "rescale_factor", positive=True)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    given = "image_mean" in raw and "image_std" in raw
    if read.flag("do_normalize", not stretched) and (given or is_known):
        mean = read.three("image_mean", IMAGENET[0])
        std = read.three("image_std", IMAGENET[1], positive=True)
    elif raw.get("do_normalize") and not given:
        raise error(
            f"{where}: do_normalize is true without image_mean and image_std; add them, or give "
            "--mean and --std and move the file away"
        )
    size = read.size(stretched, is_known)
    pads = read.flag("do_pad", read.flag("pad_and_return_pixel_mask", is_known))
    padding = read.padding() if pads else None
    return ImageProcessor(where, scale, mean, std, size, read.flag("do_resize", True), padding)


def unsupported(raw: Mapping[str, Any]) -> dict[str, str]:
    """For each key that is unknown, or has a value that a bundle does not compute: the reason."""
    found = {}
    for key, value in raw.items():
        entry = KEYS.get(key)
        if entry is None:
            found[key] = ""
        elif isinstance(entry, Only) and (value not in entry.values or (isinstance(value, bool) and value)):
            found[key] = entry.why
    return found


@dataclass(frozen=True)
class Preprocessing:
    """What reaches the network of imported weights: (value / 255 - mean) / std of an image at height x width.

    resize     "stretch" or "letterbox"
    mean, std  of R, G, B; None: those that the member's published weights were trained with
    notes      for the user
    """

    height: int
    width: int
    resize: str
    mean: list[float] | None = None
    std: list[float] | None = None
    notes: tuple[str, ...] = ()


def preprocessing_of(
    raw: Mapping[str, Any] | None, published: PublishedResize, where: str, asked: tuple[int, int] | None
) -> Preprocessing:
    """The preprocessing of a member's weights: as the processor next to them does, or as published if there is none.

    published  how images reached the published weights
    asked      (height, width) that the user wants instead

    Errors: ModelError that names the key, its value and what is read.
    """
    if raw is None:
        size = (
            TargetSize("sides", published.square, published.square)
            if published.square
            else TargetSize("edges", published.shortest, published.longest)
        )
        height, width, resize, note = _target(size, "")
        note = f"no {PROCESSOR}: {note}, as published"
        return _with_size(Preprocessing(height, width, resize, None, None, (note,)), asked, "that were published")
    for key, why in unsupported(raw).items():
        entry = KEYS.get(key)
        if not isinstance(entry, Only):
            raise ModelError(
                f"{where}: unknown key {key!r} = {as_text(raw[key])}{did_you_mean(key, KEYS)}; the pixels may "
                "depend on it; if they do not, remove it from a copy of the file"
            )
        raise ModelError(f"{where}: {key} is {as_text(raw[key])}; expected {as_text(entry.values[0])} ({why})")
    found = read_processor(raw, where, ModelError, published)
    # (x f - m) / s with x in 0..255 is (x / 255 - m / 255 f) / (s / 255 f).
    levels = 1.0 if found.scale == 1 / 255 else 255 * found.scale
    mean, std = ([value / levels for value in values] for values in (found.mean, found.std))
    if not found.resizes:
        if asked is None:
            raise ModelError(
                f"{where}: do_resize is false, so images keep their sizes, and a bundle has one; name it by --input HxW"
            )
        note = "the processor keeps every image's size; images of other sizes are stretched to the input"
        return Preprocessing(*asked, "stretch", mean, std, (note,))
    if found.size is None:
        raise ModelError(f"{where}: no size; expected one; or name it by --input HxW")
    height, width, resize, note = _target(found.size, where)
    if found.padding is not None and (
        found.size.kind == "edges" or found.padding != (found.size.first, found.size.second)
    ):
        raise ModelError(
            f"{where}: pad_size is {as_text(raw.get('pad_size'))}; expected that of size, {as_text(raw.get('size'))}: "
            "a bundle pads to what it resizes to"
        )
    notes = (note,) if resize == "letterbox" else ()
    return _with_size(Preprocessing(height, width, resize, mean, std, notes), asked)


def preprocessing_of_published(row: PublishedDetector, asked: tuple[int, int] | None) -> Preprocessing:
    """The preprocessing of a published detector that has no processor beside its weights: as the table says.

    asked   (height, width) that the user wants instead
    """
    kind: Literal["sides", "edges"] = "sides" if row.resize == "stretch" else "edges"
    height, width, resize, note = _target(TargetSize(kind, *row.input), row.name)
    mean, std = row.mean_and_std
    notes = (f"no {PROCESSOR}: {note}, as the table of published detectors says",)
    return _with_size(Preprocessing(height, width, resize, list(mean), list(std), notes), asked)


def _with_size(
    found: Preprocessing, asked: tuple[int, int] | None, whose: str = "that it was trained with"
) -> Preprocessing:
    if asked is None:
        return found
    note = f"input {asked[0]} x {asked[1]} instead of the {found.height} x {found.width} {whose}"
    return Preprocessing(*asked, found.resize, found.mean, found.std, (*found.notes, note))


def _default_size(stretched: bool) -> TargetSize:
    return TargetSize("sides", SQUARE, SQUARE) if stretched else TargetSize("edges", SHORT, LONG)


def _target(size: TargetSize, where: str) -> tuple[int, int, str, str]:
    """Height, width, kind of resize, and a sentence about it."""
    first, second = size.first, size.second
    if size.kind == "sides":
        return first, second, "stretch", f"stretched to {first} x {second}"
    height, width = _round_up(first), _round_up(second)
    if size.kind == "bounds":
        note = f"trained at up to {first} x {second} px, the aspect kept: letterbox to {height} x {width}"
        return height, width, "letterbox", note
    if second < first:
        raise ModelError(
            f"{where}: size has longest_edge {second} below shortest_edge {first}; expected at least as much"
        )
    note = (
        f"trained with the shorter side at {first} px and the longer at most {second}: "
        f"letterbox to {height} x {width} keeps that for wide images; for upright ones "
        f"use --input {width}x{height}"
    )
    return height, width, "letterbox", note


def _round_up(pixels: int) -> int:
    return -(-pixels // STEP) * STEP


@dataclass(frozen=True)
class _Reader:
    """Typed values of a processor's keys; each method raises `error` with the key, its value and what is expected."""

    raw: Mapping[str, Any]
    where: str
    error: type[EdgedetrError]

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{self.where}: {key} is {as_text(value)}; expected true or false")
        return value

    def number(self, value: Any, key: str, positive: bool = False) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
        if not fits or not math.isfinite(value) or (positive and value < 1e-9):
            raise self.error(
                f"{self.where}: {key} is {as_text(value)}; expected a {'positive ' if positive else ''}number"
            )
        return float(value)

    def three(
        self, key: str, default: tuple[float, float, float], positive: bool = False
    ) -> tuple[float, float, float]:
        """One number per channel, or one for all."""
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, list) and len(value) != 3:
            raise self.error(f"{self.where}: {key} is {as_text(value)}; expected three numbers, of R, G and B")
        listed = value if isinstance(value, list) else [value] * 3
        red, green, blue = (self.number(item, key, positive) for item in listed)
        return red, green, blue

    def size(self, stretched: bool, is_known: bool) -> TargetSize | None:
        """The size; for a single number and for none, as the processor's class takes it."""
        size, longest = self.raw.get("size"), self.raw.get("max_size")
        if size is None:
            return _default_size(stretched) if is_known else None
        if isinstance(size, int) and not isinstance(size, bool) and not stretched:
            is_square = not is_known and longest is None  # what most classes take a single number for
            size = (
                {"height": size, "width": size}
                if is_square
                else {"shortest_edge": size, "longest_edge": LONG if longest is None else longest}
            )
        elif isinstance(size, list) and len(size) == 2:
            size = {"height": size[0], "width": size[1]}
        if isinstance(size, dict):
            named = {name: value for name, value in size.items() if value is not None}
            kinds: tuple[tuple[Literal["sides", "edges", "bounds"], str, str], ...] = (
                ("edges", "shortest_edge", "longest_edge"),
                ("bounds", "max_height", "max_width"),
                ("sides", "height", "width"),
            )
            for kind, first, second in kinds:
                if set(named) == {first, second}:
                    return TargetSize(kind, *(self._side(named[name], f"size: {name}") for name in (first, second)))
        raise self.error(
            f"{self.where}: size is {as_text(self.raw.get('size'))}; expected shortest_edge and longest_edge, "
            f"max_height and max_width, or height and width{'' if stretched else ', or one number and max_size'}"
        )

    def padding(self) -> tuple[int, int] | None:
        padded = self.raw.get("pad_size")
        if padded is None:
            return None
        if not isinstance(padded, dict):
            raise self.error(f"{self.where}: pad_size is {as_text(padded)}; expected height and width")
        return self._side(padded.get("height"), "pad_size: height"), self._side(padded.get("width"), "pad_size: width")

    def _side(self, value: Any, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE:
            raise self.error(f"{self.where}: {key} is {as_text(value)}; expected pixels, 1 to {MAX_SIDE}")
        return value
