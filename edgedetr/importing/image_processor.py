"""What an image processor of transformers does to an image, as resize and normalization of a bundle.

Every key of preprocessor_config.json (or of `image_processor` in processor_config.json) is read, has no effect on the
pixels of one image, or makes the import refuse with its name. Sources: the image processors of transformers 4.57, 5.23.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.models import FAMILY
from edgedetr.models.checkpoints.transformers_keys import Key, NoEffect, Only, Special

STEP = 32  # input sides are multiples of the coarsest stride
SIDE = 1 << 14  # pixels; longer sides are a mistake
# Sizes where a processor's configuration has none: RT-DETR's stretches to a square, the others scale by the sides.
SQUARE, SHORT, LONG = 640, 800, 1333
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TYPE = re.compile(r"(RTDetr|Detr|ConditionalDetr|DeformableDetr)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)$")

_PIXELS = Special("scale, mean and deviation")
_SIZE = Special("how images are brought to one size")
_ANNOTATIONS = NoEffect("of annotations, in training")
_FORM = NoEffect("in which form arrays come and go")
KEYS: dict[str, Key] = {
    **dict.fromkeys(("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"), _PIXELS),
    **dict.fromkeys(("do_resize", "size", "max_size", "do_pad", "pad_and_return_pixel_mask", "pad_size"), _SIZE),
    **dict.fromkeys(("image_processor_type", "feature_extractor_type"), Special("whose defaults hold")),
    "resample": Only("the bundle's resize is bilinear", (2, None)),
    "do_center_crop": Only("nothing is cut off", (False, None)),
    "crop_size": NoEffect("nothing is cropped, see do_center_crop"),
    "default_to_square": NoEffect("these processors make no square of a single number"),
    "do_convert_rgb": NoEffect("images come as RGB in any case"),
    **dict.fromkeys(("format", "do_convert_annotations"), _ANNOTATIONS),
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
class Pixels:
    """What reaches the network: (value / 255 - mean) / std of an image at height x width.

    resize     "stretch" or "letterbox"
    mean, std  of R, G, B; None: as the member's published weights take them
    notes      what the reader should know
    """

    height: int
    width: int
    resize: str
    mean: list[float] | None = None
    std: list[float] | None = None
    notes: tuple[str, ...] = ()


def pixels(raw: Mapping[str, Any] | None, member: str, where: str, asked: tuple[int, int] | None) -> Pixels:
    """Read a processor's configuration, or take the member's published one where there is none.

    asked   height, width that the user wants instead

    Errors: ModelError that names the key, its value and what is read.
    """
    published = FAMILY[member].resize
    stretched = published.square > 0
    if raw is None:
        size = (
            {"height": published.square, "width": published.square}
            if stretched
            else {"shortest_edge": published.shortest, "longest_edge": published.longest}
        )
        height, width, resize, note = _target(size, "")
        note = f"no preprocessor_config.json: {note}, as published"
        return _asked(Pixels(height, width, resize, None, None, (note,)), asked, "that were published")
    for key, value in raw.items():
        entry = KEYS.get(key)
        if entry is None:
            raise ModelError(
                f"{where}: unknown key {key!r} = {_shown(value)}{did_you_mean(key, KEYS)}; the pixels may "
                "depend on it; if they do not, remove it from a copy of the file"
            )
        if isinstance(entry, Only) and (value not in entry.values or (isinstance(value, bool) and value)):
            raise ModelError(f"{where}: {key} is {_shown(value)}; expected {_shown(entry.values[0])} ({entry.why})")
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type"))
    if kind is not None:
        found = TYPE.match(kind) if isinstance(kind, str) else None
        if not found:
            raise ModelError(
                f"{where}: image_processor_type is {_shown(kind)}; expected that of DETR, Conditional "
                "DETR, Deformable DETR or RT-DETR"
            )
        stretched = found[1] == "RTDetr"
    mean, std = _colors(raw, where, normalize=not stretched)
    size = _size(raw, where, stretched)
    if not _flag(raw, "do_resize", True, where):
        if asked is None:
            raise ModelError(
                f"{where}: do_resize is false, so images keep their sizes, and a bundle has one; name it by --input HxW"
            )
        note = "the processor keeps every image's size; images of other sizes are stretched to the input"
        return Pixels(*asked, "stretch", mean, std, (note,))
    height, width, resize, note = _target(size, where)
    _padding(raw, size, where)
    return _asked(Pixels(height, width, resize, mean, std, (note,) if resize == "letterbox" else ()), asked)


def _asked(found: Pixels, asked: tuple[int, int] | None, whose: str = "that it was trained with") -> Pixels:
    if asked is None:
        return found
    note = f"input {asked[0]} x {asked[1]} instead of the {found.height} x {found.width} {whose}"
    return Pixels(*asked, found.resize, found.mean, found.std, (*found.notes, note))


def _colors(raw: Mapping[str, Any], where: str, normalize: bool) -> tuple[list[float], list[float]]:
    """Mean and deviation of values / 255, whatever factor the processor scales by before it normalizes."""
    factor = 1 / 255
    if not _flag(raw, "do_rescale", True, where):
        factor = 1.0
    elif raw.get("rescale_factor") is not None:
        factor = _number(raw["rescale_factor"], f"{where}: rescale_factor", positive=True)
    mean, std = [0.0] * 3, [1.0] * 3
    if _flag(raw, "do_normalize", normalize, where):
        mean = _three(raw.get("image_mean"), IMAGENET[0], f"{where}: image_mean")
        std = _three(raw.get("image_std"), IMAGENET[1], f"{where}: image_std", positive=True)
    # (x f - m) / s with x in 0..255 is (x / 255 - m / 255 f) / (s / 255 f).
    levels = 255 * factor
    return (
        [value if factor == 1 / 255 else value / levels for value in mean],
        [value if factor == 1 / 255 else value / levels for value in std],
    )


def _size(raw: Mapping[str, Any], where: str, stretched: bool) -> dict[str, int]:
    """The size as a pair of edges, of sides, or of largest sides."""
    size = raw.get("size")
    if size is None:
        size = {"height": SQUARE, "width": SQUARE} if stretched else {"shortest_edge": SHORT, "longest_edge": LONG}
    elif isinstance(size, int) and not isinstance(size, bool) and not stretched:
        longest = raw.get("max_size")
        size = {"shortest_edge": size, "longest_edge": LONG if longest is None else longest}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, dict):
        named = {name: value for name, value in size.items() if value is not None}
        for pair in (("shortest_edge", "longest_edge"), ("max_height", "max_width"), ("height", "width")):
            if set(named) == set(pair):
                return {name: _side(named[name], f"{where}: size: {name}") for name in pair}
    raise ModelError(
        f"{where}: size is {_shown(raw.get('size'))}; expected shortest_edge and longest_edge, max_height "
        f"and max_width, or height and width{'' if stretched else ', or one number and max_size'}"
    )


def _target(size: Mapping[str, int], where: str) -> tuple[int, int, str, str]:
    """Height, width, way of the resize, and the sentence about it."""
    if "height" in size:
        return size["height"], size["width"], "stretch", f"stretched to {size['height']} x {size['width']}"
    if "max_height" in size:
        height, width = _up(size["max_height"]), _up(size["max_width"])
        return (
            height,
            width,
            "letterbox",
            (
                f"trained at up to {size['max_height']} x {size['max_width']} px, the "
                f"aspect kept: letterbox to {height} x {width}"
            ),
        )
    short, long = size["shortest_edge"], size["longest_edge"]
    if long < short:
        raise ModelError(
            f"{where}: size has longest_edge {long} below shortest_edge {short}; expected at least as much"
        )
    height, width = _up(short), _up(long)
    return (
        height,
        width,
        "letterbox",
        (
            f"trained with the shorter side at {short} px and the longer at most {long}: "
            f"letterbox to {height} x {width} keeps that for wide images; for upright ones "
            f"use --input {width}x{height}"
        ),
    )


def _padding(raw: Mapping[str, Any], size: Mapping[str, int], where: str) -> None:
    """Padding of one image: none, or up to the very size that the letterbox fills."""
    pads = _flag(raw, "do_pad", _flag(raw, "pad_and_return_pixel_mask", True, where), where)
    padded = raw.get("pad_size")
    if not pads or padded is None:
        return
    sides = tuple(size.values()) if "shortest_edge" not in size else ()
    given = (padded.get("height"), padded.get("width")) if isinstance(padded, dict) else ()
    if given != sides or not sides:
        raise ModelError(
            f"{where}: pad_size is {_shown(padded)}; expected that of size, {_shown(dict(size))}: a "
            "bundle pads to what it resizes to"
        )


def _up(pixels: int) -> int:
    return -(-pixels // STEP) * STEP


def _side(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= SIDE:
        raise ModelError(f"{where} is {_shown(value)}; expected pixels, 1 to {SIDE}")
    return value


def _flag(raw: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key} is {_shown(value)}; expected true or false")
    return value


def _number(value: Any, where: str, positive: bool = False) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    if not fits or not math.isfinite(value) or (positive and value < 1e-9):
        raise ModelError(f"{where} is {_shown(value)}; expected a {'positive ' if positive else ''}number")
    return float(value)


def _three(value: Any, default: list[float], where: str, positive: bool = False) -> list[float]:
    """One number per channel, or one for all."""
    if value is None:
        return default
    if isinstance(value, list) and len(value) == 3:
        return [_number(item, where, positive) for item in value]
    if isinstance(value, list):
        raise ModelError(f"{where} is {_shown(value)}; expected three numbers, of R, G and B")
    return [_number(value, where, positive)] * 3


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
