"""Images to compare graphs on: neither for calibration nor for verification."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedetr.artifacts import RANGES
from edgedetr.bundle import Bundle
from edgedetr.data.layouts import load, splits
from edgedetr.errors import DataError, ExportError
from edgedetr.quantization.calibration_set import CalibrationSet, candidates, choose_images, verify_digests
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.ranges import Ranges
from edgedetr.storage.digests import digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonImages:
    """Images to compare on: files, the sha256 of each, and the splits (or the folder) that they are from."""

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    splits: tuple[str, ...]


def comparison_images(
    bundle: Bundle, count: int, calibration: CalibrationSet, data: Path | None = None
) -> ComparisonImages:
    """At most `count` images, evenly spaced, that are neither calibration nor verify images, by digest.

    data   a data set or a folder of images; None = the splits of the bundle's data other than the verify split

    Errors: ExportError where none is left.
    """
    if count < 1:
        raise ExportError(f"{count} images to compare on; expected at least 1")
    taken = {image.sha256 for image in calibration.images} | set(verify_digests(bundle))
    listed = _listed(bundle, data)
    chosen: dict[str, tuple[Path, str]] = {}
    for path, split in _spread(listed, count):
        sha256 = digest(path)
        if sha256 not in taken:
            chosen.setdefault(sha256, (path, split))
        if len(chosen) == count:
            break
    if not chosen:
        names = ", ".join(dict.fromkeys(split for _, split in listed)) or "no split"
        raise ExportError(
            f"{bundle.path}: no image is left to compare on: all {len(listed)} of {names} are for calibration or for "
            f"verification; add images, calibrate on fewer (quant.images), or name others: edgedetr sensitivity "
            f"{bundle.path} --data DIR"
        )
    where = dict.fromkeys(split for _, split in chosen.values())
    return ComparisonImages(tuple(path for path, _ in chosen.values()), tuple(chosen), tuple(where))


def _listed(bundle: Bundle, data: Path | None) -> list[tuple[Path, str]]:
    """(file, split) of all images that could be compared on."""
    if data is not None:
        paths, root = candidates(bundle, data)
        return [(path, str(root)) for path in paths]
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        where = "records no data set" if record is None else f"records its data at {record.path}, which is not here"
        raise ExportError(
            f"{bundle.path} {where}; expected images to compare on; run: edgedetr sensitivity {bundle.path} --data DIR"
        )
    names = [name for name in splits(record.path) if name != record.verify_split]
    return [(sample.path, name) for name in names for sample in load(record.path, name).samples]


def _spread(items: Sequence[tuple[Path, str]], count: int) -> Iterator[tuple[Path, str]]:
    """All items, each once, in rounds that go evenly over the whole list."""
    step = max(1, len(items) // max(1, count))
    for start in range(step):
        yield from items[start::step]


def calibration_images(bundle: Bundle, config: QuantConfig) -> CalibrationSet:
    """The images of the bundle's ranges.json, where they are here; otherwise those that an export would choose.

    Errors: ExportError, DataError where there are none.
    """
    if bundle.has(RANGES.file):
        present = Ranges.load(bundle.require(RANGES.file))
        try:
            found = choose_images(bundle, Path(present.source) if present.source else None, present.requested)
        except (DataError, ExportError, OSError) as error:
            log.warning("the calibration images of %s are not here (%s); others are chosen", RANGES.file, error)
        else:
            if found.images == present.images:
                return found
    return choose_images(bundle, None, config.images)
