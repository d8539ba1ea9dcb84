"""ranges.json: the range of every quantized activation, how it was observed, and on which images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from edgedetr.errors import ExportError
from edgedetr.printable import shown
from edgedetr.quantization.calibration_set import CalibrationImage, image_list_digest
from edgedetr.quantization.smoothing import Smoothing, checked_smoothing
from edgedetr.storage.reading import MEBIBYTE, read_json

SCHEMA = 1
LIMIT = 64 * MEBIBYTE  # bytes of ranges.json; 1,000 images and 300 tensors take about 150 kB
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Ranges:
    """The range of every quantized activation, and how it was observed.

    amax        {tensor: largest magnitude that INT8 represents}
    observer    name of the observer, with its option where it has one
    policy      name of the policy
    requested   number of images that was asked for (ranges.json: "wanted"); `images` can be fewer
    source      the folder given as --calib; "" = the calibration split of the bundle's data
    images      what was observed, in order
    observers   {tensor: label of its observer} where a placement chose another than `observer`
    smooth      {tensor: what SmoothQuant divides it by}: its range is that of the divided tensor
    """

    amax: dict[str, float]
    observer: str
    policy: str
    requested: int
    source: str
    images: tuple[CalibrationImage, ...]
    observers: Mapping[str, str] = field(default_factory=dict)
    smooth: Mapping[str, Smoothing] = field(default_factory=dict)

    @property
    def image_list(self) -> str:
        """sha256 of the digests in order: two calibrations with the same one saw the same images."""
        return image_list_digest(self.images)

    def save(self, path: Path) -> None:
        raw = {
            "schema": SCHEMA,
            "image_list": self.image_list,
            "amax": self.amax,
            "observer": self.observer,
            "policy": self.policy,
            "wanted": self.requested,
            "source": self.source,
            "images": [{"sha256": image.sha256, "name": image.name} for image in self.images],
            **({"observers": dict(self.observers)} if self.observers else {}),
            **({"smooth": {name: asdict(one) for name, one in self.smooth.items()}} if self.smooth else {}),
        }
        path.write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read and check. Errors: ExportError for everything that `save` does not write."""
        fix = f"run: edgedetr export {path.parent} --int8"
        raw = read_json(path, ExportError, limit=LIMIT, fix=f"damaged or of another kind; {fix}")
        try:
            _check_fields(raw)
            amax = {name: _checked_amax(name, value) for name, value in raw["amax"].items()}
            images = tuple(_checked_image(item) for item in raw["images"])
            if image_list_digest(images) != raw["image_list"]:
                raise ValueError("image_list is not the digest of images")
            smooth = {name: checked_smoothing(name, value) for name, value in raw.get("smooth", {}).items()}
            settings = (raw["observer"], raw["policy"], raw["wanted"], raw["source"])
            return cls(amax, *settings, images, raw.get("observers", {}), smooth)
        except ValueError as error:
            raise ExportError(f"{path}: damaged or of another kind ({error}); {fix}") from error


_FIELDS: Mapping[str, tuple[type, str]] = {
    "amax": (dict, "an object"),
    "images": (list, "a list"),
    "observer": (str, "text"),
    "policy": (str, "text"),
    "source": (str, "text"),
    "image_list": (str, "text"),
}


def _check_fields(raw: Any) -> None:
    """Errors: ValueError where the keys of ranges.json or the types of their values are not those of `Ranges.save`."""
    expected = {"schema", "wanted", *_FIELDS}
    if not isinstance(raw, dict) or set(raw) - {"observers", "smooth"} != expected:
        raise ValueError(f"expected the keys {', '.join(sorted(expected))}")
    if raw["schema"] != SCHEMA or isinstance(raw["schema"], bool):
        raise ValueError(f"schema is {shown(raw['schema'])}, this version reads {SCHEMA}")
    for key, (kind, words) in _FIELDS.items():
        if not isinstance(raw[key], kind):
            raise ValueError(f"{key} is {shown(raw[key])}; expected {words}")
    named = raw.get("observers", {})
    if not isinstance(named, dict) or not all(isinstance(label, str) for label in named.values()):
        raise ValueError(f"observers is {shown(named)}; expected an object of labels")
    if not isinstance(raw.get("smooth", {}), dict):
        raise ValueError(f"smooth is {shown(raw['smooth'])}; expected an object")
    wanted = raw["wanted"]
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted < 1 << 31:
        raise ValueError(f"wanted is {shown(wanted)}; expected a number of images")


def _checked_amax(name: str, value: object) -> float:
    # Larger than any float32 is as useless as infinity: it is a scale in the graph.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 3.4e38:
        raise ValueError(f"amax of {shown(name)} is {shown(value)}; expected a finite number of at least 0")
    return float(value)


def _checked_image(item: object) -> CalibrationImage:
    sha256, name = (item.get("sha256"), item.get("name")) if isinstance(item, dict) else (None, None)
    if not isinstance(sha256, str) or not isinstance(name, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"an image is {shown(item)}; expected sha256 and name")
    return CalibrationImage(sha256, name)


def share_pool_ranges(model: ModelProto, amax: Mapping[str, float]) -> dict[str, float]:
    """Ranges in which the output of a MaxPool shares its input's scale, so that the pool runs on integers unchanged."""
    shared = dict(amax)
    for node in model.graph.node:
        if node.op_type == "MaxPool" and node.input[0] in shared and node.output[0] in shared:
            shared[node.output[0]] = shared[node.input[0]]
    return shared
