"""ranges.json: the largest magnitude of every quantized tensor, and the images it was observed on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.errors import ExportError
from edgedetr.storage.reading import MEBIBYTE, read_json, shown

SCHEMA = 1
LIMIT = 64 * MEBIBYTE  # bytes; 1,000 images and 300 tensors take about 150 kB
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CalibrationImage:
    """One image: digest of its file's bytes, and its name (for people)."""

    sha256: str
    name: str


@dataclass(frozen=True)
class Ranges:
    """How large the quantized tensors get, and how that was found.

    amax      {tensor: largest magnitude to represent, >= 0}
    observer  "minmax", "mse", "entropy" or "percentile 99.99"
    policy    name of the policy that chose the tensors
    wanted    images asked for (the set may have held fewer)
    source    the folder given by --calib, or "" for the calibration split of the bundle's data
    """

    amax: dict[str, float]
    observer: str
    policy: str
    wanted: int
    source: str
    images: tuple[CalibrationImage, ...]

    @property
    def image_list(self) -> str:
        """sha256 of the digests in order: two calibrations with the same one saw the same images."""
        return image_list_digest(self.images)

    def save(self, path: Path) -> None:
        raw = {"schema": SCHEMA, "image_list": self.image_list, **asdict(self)}
        path.write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read and check; ExportError for anything that is not what `save` writes."""
        fix = f"run: edgedetr export {path.parent} --int8"
        raw = read_json(path, ExportError, limit=LIMIT, fix=f"damaged or of another kind; {fix}")
        try:
            expected = {"schema", "image_list", *cls.__dataclass_fields__}
            if not isinstance(raw, dict) or set(raw) != expected:
                raise ValueError(f"expected the keys {', '.join(sorted(expected))}")
            if raw["schema"] != SCHEMA or isinstance(raw["schema"], bool):
                raise ValueError(f"schema is {shown(raw['schema'])}, this version reads {SCHEMA}")
            for key, kind, words in (
                ("amax", dict, "an object"),
                ("images", list, "a list"),
                ("observer", str, "text"),
                ("policy", str, "text"),
                ("source", str, "text"),
                ("image_list", str, "text"),
            ):
                if not isinstance(raw[key], kind):
                    raise ValueError(f"{key} is {shown(raw[key])}; expected {words}")
            wanted = raw["wanted"]
            if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted < 1 << 31:
                raise ValueError(f"wanted is {shown(wanted)}; expected a number of images")
            amax = {name: _amax(name, value) for name, value in raw["amax"].items()}
            images = tuple(_image(item) for item in raw["images"])
            if image_list_digest(images) != raw["image_list"]:
                raise ValueError("image_list is not the digest of images")
            return cls(amax, raw["observer"], raw["policy"], wanted, raw["source"], images)
        except ValueError as error:
            raise ExportError(f"{path}: damaged or of another kind ({error}); {fix}") from error


def _amax(name: str, value: object) -> float:
    # Larger than any float32 is as useless as infinity: it is a scale in the graph.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 3.4e38:
        raise ValueError(f"amax of {shown(name)} is {shown(value)}; expected a finite number of at least 0")
    return float(value)


def _image(item: object) -> CalibrationImage:
    sha256, name = (item.get("sha256"), item.get("name")) if isinstance(item, dict) else (None, None)
    if not isinstance(sha256, str) or not isinstance(name, str) or not SHA256.fullmatch(sha256):
        raise ValueError(f"an image is {shown(item)}; expected sha256 and name")
    return CalibrationImage(sha256, name)


def image_list_digest(images: Iterable[CalibrationImage]) -> str:
    """sha256 over the images' digests, one a line, in order."""
    return hashlib.sha256("".join(image.sha256 + "\n" for image in images).encode()).hexdigest()
