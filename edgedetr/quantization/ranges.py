"""ranges.json: the largest magnitude of every quantised tensor, and the pictures it was observed on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from edgedetr.errors import ExportError

SCHEMA = 1


@dataclass(frozen=True)
class CalibrationImage:
    """One picture: digest of its file's bytes, and its name (for people)."""

    sha256: str
    name: str


@dataclass(frozen=True)
class Ranges:
    """How large the quantised tensors get, and how that was found.

    amax      {tensor: largest magnitude to represent, >= 0}
    observer  "minmax", "mse", "entropy" or "percentile 99.99"
    policy    name of the policy that chose the tensors
    wanted    pictures asked for (the set may have held fewer)
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
        """sha256 of the digests in order: two calibrations with the same one saw the same pictures."""
        return image_list_digest(self.images)

    def save(self, path: Path) -> None:
        raw = {"schema": SCHEMA, "image_list": self.image_list, **asdict(self)}
        path.write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read and check; ExportError for anything that is not what `save` writes."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            expected = {"schema", "image_list", *cls.__dataclass_fields__}
            if not isinstance(raw, dict) or set(raw) != expected:
                raise ValueError(f"expected the keys {', '.join(sorted(expected))}")
            if raw["schema"] != SCHEMA:
                raise ValueError(f"schema is {raw['schema']!r}, this version reads {SCHEMA}")
            amax = {str(name): float(value) for name, value in raw["amax"].items()}
            for name, value in amax.items():
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"amax of {name!r} is {value}; expected a finite number of at least 0")
            images = tuple(CalibrationImage(str(item["sha256"]), str(item["name"])) for item in raw["images"])
            if image_list_digest(images) != raw["image_list"]:
                raise ValueError("image_list is not the digest of images")
            return cls(amax, str(raw["observer"]), str(raw["policy"]), int(raw["wanted"]), str(raw["source"]), images)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportError(f"{path}: damaged or of another kind ({error}); "
                              f"run: edgedetr export {path.parent} --int8") from error


def image_list_digest(images: Iterable[CalibrationImage]) -> str:
    """sha256 over the pictures' digests, one a line, in order."""
    return hashlib.sha256("".join(image.sha256 + "\n" for image in images).encode()).hexdigest()
