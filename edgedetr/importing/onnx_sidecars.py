"""What lies beside an ONNX file: config.json and preprocessor_config.json of transformers say classes and pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedetr.errors import ExportError
from edgedetr.storage.reading import read_json

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# Of preprocessor_config.json: read, or without effect on one image that is resized to a fixed input.
_READ = {
    "size",
    "max_size",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "do_pad",
    "pad_size",
    "do_center_crop",
    "do_flip_channel_order",
    "data_format",
}
_IDLE = {
    "annotations",
    "format",
    "do_convert_annotations",
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "return_segmentation_masks",
    "masks_path",
    "default_to_square",
    "crop_size",
    "do_convert_rgb",
    "input_data_format",
    "device",
    "return_tensors",
    "disable_grouping",
    "do_reduce_labels",
    "_valid_processor_keys",
    "auto_map",
    "transformers_version",
    "image_seq_length",
    "size_divisor",
}
_BILINEAR = 2  # PIL's number


@dataclass(frozen=True)
class Beside:
    """What the two files say; empty where they do not lie there.

    names        of the class logits, in order
    model_type   as transformers calls it
    pixels       fields of told.Pixels
    size         height and width
    notes        what was taken from where, and what could not be kept
    """

    names: tuple[str, ...] | None = None
    model_type: str | None = None
    pixels: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def read_beside(path: Path) -> Beside:
    """Of an ONNX file: in its folder, or in the one above where that is called onnx. ExportError for faulty files."""
    folders = [path.parent, *([path.parent.parent] if path.resolve().parent.name == "onnx" else [])]
    config, processor, whole = (
        next((folder / name for folder in folders if (folder / name).is_file()), None)
        for name in (CONFIG, PROCESSOR, "processor_config.json")
    )
    notes: list[str] = []
    told = _json(config)
    model_type = told.get("model_type")
    names = _names(told, config)
    if names is not None:
        notes.append(f"{len(names)} class names are those of {CONFIG}")
    pixels, size = _pixels(_json(processor) or _json(whole).get("image_processor") or {}, notes)
    return Beside(names, model_type if isinstance(model_type, str) else None, pixels, size, tuple(notes))


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = read_json(path, ExportError)
    return content if isinstance(content, dict) else {}  # another program's file of that name


def _names(told: Mapping[str, Any], path: Path | None) -> tuple[str, ...] | None:
    """id2label in order; None where it is not there, or was never filled in."""
    labels = told.get("id2label")
    if labels is None:
        return None
    try:
        places = {int(key): str(value) for key, value in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: id2label is not a name for each number; repair or remove it") from error
    if sorted(places) != list(range(len(places))):
        raise ExportError(
            f"{path}: id2label has no name for some numbers below {max(places, default=0)}; repair it, "
            "or give the names by --classes FILE and move it away"
        )
    names = ["-" if places[index] == "N/A" else places[index] for index in range(len(places))]
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return None
    used = [name for name in names if name != "-"]
    if not used or "" in used or len(set(used)) < len(used):
        raise ExportError(
            f"{path}: id2label has empty names or one name twice; repair it, or give the names by "
            "--classes FILE and move it away"
        )
    count = told.get("num_labels")
    if isinstance(count, int) and count != len(names):
        raise ExportError(
            f"{path}: num_labels is {count}, and id2label names {len(names)}; repair it, or give the "
            "names by --classes FILE and move it away"
        )
    return tuple(names)


def _pixels(told: Any, notes: list[str]) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Normalization and size that the processor makes; refused where it does what a bundle cannot."""
    if not isinstance(told, dict) or not told:
        return {}, None
    for key in ("do_center_crop", "do_flip_channel_order"):
        if told.get(key):
            raise ExportError(
                f"{PROCESSOR}: {key} is true, which a bundle cannot do; expected a whole image in RGB; "
                "move the file away and say --scale, --mean, --std and --resize"
            )
    found: dict[str, Any] = {"scale": _number(told, "rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0}
    kind = told.get("image_processor_type", told.get("feature_extractor_type"))
    usual = not str(kind).startswith("RTDetr")  # where the file does not say it: RT-DETR's divides by 255 alone
    if told.get("do_normalize", usual) and "image_mean" in told and "image_std" in told:
        found |= {"mean": _three(told, "image_mean"), "std": _three(told, "image_std")}
    elif told.get("do_normalize", False):
        raise ExportError(
            f"{PROCESSOR}: do_normalize is true without image_mean and image_std; add them, or say "
            "--mean and --std and move the file away"
        )
    else:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    size, found["resize"] = _size(told, notes)
    notes.append(f"pixels go in as {PROCESSOR} says")
    if told.get("resample", _BILINEAR) not in (_BILINEAR, None):
        notes.append(f"{PROCESSOR}: resample {told['resample']} is not kept: a bundle resizes bilinearly")
    if not told.get("do_resize", True):
        notes.append(f"{PROCESSOR}: do_resize is false; a bundle resizes every image to its input")
    unknown = sorted(set(told) - _READ - _IDLE)
    if unknown:
        notes.append(f"{PROCESSOR}: not read: {', '.join(unknown[:8])}")
    return found, size


def _size(told: Mapping[str, Any], notes: list[str]) -> tuple[tuple[int, int] | None, str]:
    """Height and width, and how images are fitted."""
    size = told.get("size")
    pad = told.get("pad_size")
    padded = _sides(pad) if told.get("do_pad", False) and isinstance(pad, dict) else None
    if isinstance(size, dict) and "height" in size and "width" in size:
        return _sides(size), "stretch"
    if isinstance(size, int) and "max_size" not in told:
        return (size, size), "stretch"
    if size is None:
        return padded, "stretch"
    short, long = (size, told.get("max_size")) if isinstance(size, int) else (None, None)
    if isinstance(size, dict):
        short, long = (
            size.get(key, size.get(other))
            for key, other in (("shortest_edge", "max_height"), ("longest_edge", "max_width"))
        )
    if not all(isinstance(side, int) and side > 0 for side in (short, long)):
        raise ExportError(
            f"{PROCESSOR}: size {size!r} is not known; expected height and width, or shortest_edge and "
            "longest_edge; move the file away and say --input and --resize"
        )
    notes.append(f"{PROCESSOR} keeps the aspect of images ({short} to {long} px): they are letterboxed into the input")
    return padded, "letterbox"


def _sides(size: Mapping[str, Any]) -> tuple[int, int]:
    height, width = size.get("height"), size.get("width")
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
        raise ExportError(
            f"{PROCESSOR}: size {dict(size)!r}; expected a height and a width of whole pixels; repair "
            "it, or move it away and say --input"
        )
    return height, width


def _number(told: Mapping[str, Any], key: str, default: float) -> float:
    value = told.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExportError(f"{PROCESSOR}: {key} is {value!r}; expected a number; repair it, or move it away")
    return float(value)


def _three(told: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = told[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value] * 3
    if not (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)
    ):
        raise ExportError(
            f"{PROCESSOR}: {key} is {value!r}; expected a number for each of R, G, B; repair it, or move it away"
        )
    return float(value[0]), float(value[1]), float(value[2])
