"""Which images to calibrate on: never one of the verify split, and named by the digests of their bytes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgedetr.artifacts import REFERENCE
from edgedetr.bundle import Bundle
from edgedetr.data.layouts import NoLayout, load, splits
from edgedetr.data.listing import images_in
from edgedetr.data.near_duplicates import near_copies
from edgedetr.errors import DataError, ExportError
from edgedetr.evaluation.reference import Reference
from edgedetr.storage.digests import digest

log = logging.getLogger(__name__)

MIN_IMAGES, RECOMMENDED_IMAGES = 8, 32
MAX_SHOWN = 5  # pairs of near-copies that a message names


@dataclass(frozen=True)
class CalibrationImage:
    """One image: digest of its file's bytes, and its name (for people)."""

    sha256: str
    name: str


@dataclass(frozen=True)
class CalibrationSet:
    """The files to calibrate on, and for each its digest and name."""

    paths: tuple[Path, ...]
    images: tuple[CalibrationImage, ...]


def image_list_digest(images: Iterable[CalibrationImage]) -> str:
    """sha256 over the images' digests, one per line, in order."""
    return hashlib.sha256("".join(image.sha256 + "\n" for image in images).encode()).hexdigest()


def choose_images(bundle: Bundle, directory: Path | None, count: int) -> CalibrationSet:
    """At most `count` images, evenly spaced over the calibration split or over a folder.

    directory   a data set (its train split) or a folder of images; None = the calibration split of the bundle's data

    Errors: ExportError for an image that is also in the verify split, by digest: INT8 would be judged on the images
    that it was fitted to.
    """
    paths, root = candidates(bundle, directory)
    if not paths:
        raise ExportError(f"{root}: no images to calibrate on; expected at least one image file")
    chosen = evenly_spaced(paths, count)
    images = [CalibrationImage(digest(path), _name(path, root)) for path in chosen]
    verify = verify_digests(bundle)
    for path, image in zip(chosen, images):
        if image.sha256 in verify:
            raise ExportError(
                f"{path}: this calibration image is also in the verify split, so the verdict would be "
                "biased; expected disjoint images; run: edgedetr export BUNDLE --int8 --calib DIR"
            )
    return CalibrationSet(tuple(chosen), tuple(images))


def evenly_spaced(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths, with the first and the last."""
    positions = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    return [paths[i] for i in np.unique(positions)]


def check_image_count(images: CalibrationSet) -> None:
    """Refuse fewer than MIN_IMAGES images, and warn below RECOMMENDED_IMAGES. Errors: ExportError."""
    count = len(images.paths)
    if count < MIN_IMAGES:
        raise ExportError(
            f"{count} calibration images are too few for INT8: expected at least {MIN_IMAGES}, better "
            f"{RECOMMENDED_IMAGES} or more; add images, raise quant.images, or name others: "
            "edgedetr export BUNDLE --int8 --calib DIR"
        )
    if count < RECOMMENDED_IMAGES:
        log.warning(
            "%d calibration images: ranges may miss values that other images have; %d or more are better "
            "(quant.images, --calib DIR)",
            count,
            RECOMMENDED_IMAGES,
        )


def warn_of_near_copies(bundle: Bundle, images: CalibrationSet) -> None:
    """Warn of calibration images that show a scene of the verify split, though their bytes differ.

    `choose_images` refuses the same bytes. A near-copy may be a second frame of one scene, so the user decides. Nothing
    is reported where the images of the verify split are not on this machine.
    """
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        return
    verify = [sample.path for sample in load(record.path, record.verify_split).samples]
    found = near_copies(verify, images.paths)
    if found:
        root = Path(record.path)
        pairs = ", ".join(f"{_name(pair.second, root)} = {_name(pair.first, root)}" for pair in found[:MAX_SHOWN])
        log.warning(
            "%d of %d calibration images nearly copy images of the verify split, so the verdict may be too "
            "good: %s%s; take one of each pair out, or calibrate on other images: "
            "edgedetr export BUNDLE --int8 --calib DIR",
            len(found),
            len(images.paths),
            pairs,
            ", ..." if len(found) > MAX_SHOWN else "",
        )


def candidates(bundle: Bundle, directory: Path | None) -> tuple[list[Path], Path]:
    """All images that could be calibrated on, and the folder that their names are relative to."""
    record = bundle.manifest.data
    if directory is None:
        if record is None:
            raise ExportError(
                f"{bundle.path}: the bundle does not record where its data are; expected calibration "
                f"images; run: edgedetr export {bundle.path} --int8 --calib DIR"
            )
        return [sample.path for sample in load(record.path, record.calib_split).samples], Path(record.path)
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; expected calibration images or a data set")
    try:
        names = splits(directory)
    except NoLayout:  # a plain folder of images
        return images_in(directory), directory
    split = "train" if "train" in names else next(iter(names))
    return [sample.path for sample in load(directory, split).samples], directory


def verify_digests(bundle: Bundle) -> Collection[str]:
    """sha256 of the verify images, from reference.npz where there is one, otherwise from the files."""
    if bundle.has(REFERENCE.file):
        return set(Reference.load(bundle.require(REFERENCE.file)).truth.digests.tolist())
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        return ()
    return {digest(sample.path) for sample in load(record.path, record.verify_split).samples}


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
