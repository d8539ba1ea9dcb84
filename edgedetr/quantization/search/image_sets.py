"""The three image sets of a search, disjoint by digest: ranges are observed on one, placements compared on the second,
and the budget is proved on the third, which nothing else sees."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgedetr.artifacts import REFERENCE
from edgedetr.bundle import Bundle
from edgedetr.data.detection_set import DetectionSet, Sample
from edgedetr.data.layouts import load, splits
from edgedetr.errors import ExportError
from edgedetr.evaluation.artifacts_run import load_split
from edgedetr.evaluation.reference import Reference
from edgedetr.evaluation.verify import stored_reference
from edgedetr.quantization.calibration_set import CalibrationSet, check_image_count, choose_images
from edgedetr.quantization.config import QuantConfig
from edgedetr.storage.digests import digest

FEWEST_SEARCH = 8  # images; fewer do not rank groups


@dataclass(frozen=True)
class SearchImages:
    """Labeled images of other splits than the verify split.

    dataset   the chosen images with their objects, of one or several splits; image ids are positions
    digests   sha256 of each file, in the same order
    """

    dataset: DetectionSet
    digests: tuple[str, ...]


@dataclass(frozen=True)
class ImageSets:
    """calibration  files with digests, from the calibration split or from --calib
    search       what placements are compared on
    verify       the verify split, in a fixed random order, so that its first images are a sample of all
    reference    the detections of the PyTorch model on the verify split
    """

    calibration: CalibrationSet
    search: SearchImages
    verify: tuple[Sample, ...]
    reference: Reference

    def digest(self) -> str:
        """One digest over the digests of all three sets, in order."""
        parts = [
            *(image.sha256 for image in self.calibration.images),
            "search",
            *self.search.digests,
            "verify",
            *self.reference.truth.digests.tolist(),
            *(str(sample.image_id) for sample in self.verify),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def image_sets(bundle: Bundle, config: QuantConfig, calib: Path | None, count: int, seed: int = 0) -> ImageSets:
    """The sets of a bundle; `count` images to compare on.

    Errors: ExportError where the bundle records no data, or where too few images are left for one of the sets.
    """
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        where = "records no data set" if record is None else f"records its data at {record.path}, which is not here"
        raise ExportError(
            f"{bundle.path} {where}; a search needs labeled images to compare on and the verify split to prove the "
            f"budget on; without a budget: edgedetr export {bundle.path} --int8 --calib DIR"
        )
    bundle.require(REFERENCE.file)
    verify = load_split(bundle)
    reference = stored_reference(bundle, verify)
    calibration = choose_images(bundle, calib, config.images)
    check_image_count(calibration)
    taken = {image.sha256 for image in calibration.images} | set(reference.truth.digests.tolist())
    search = _search_images(bundle, verify.name, count, taken)
    require_disjoint(
        {
            "calibration": [image.sha256 for image in calibration.images],
            "search": search.digests,
            "verify": reference.truth.digests.tolist(),
        }
    )
    order = np.random.default_rng(seed).permutation(len(verify.samples))
    return ImageSets(calibration, search, tuple(verify.samples[i] for i in order), reference)


def require_disjoint(sets: dict[str, Sequence[str]]) -> None:
    """Errors: ExportError where an image is in two of the sets. sets: {name: sha256 of its images}."""
    seen: dict[str, str] = {}
    for name, digests in sets.items():
        for sha256 in digests:
            other = seen.setdefault(sha256, name)
            if other != name:
                raise ExportError(
                    f"the image with sha256 {sha256:.12} is in the {other} set and in the {name} set; expected "
                    "disjoint sets, since a budget proved on images that the search saw proves nothing"
                )


def _search_images(bundle: Bundle, verify_split: str, count: int, taken: Collection[str]) -> SearchImages:
    """At most `count` images that are in no other set, evenly spaced over the splits that are not for verification."""
    record = bundle.manifest.data
    assert record is not None
    found: list[Sample] = []
    names = [name for name in splits(record.path) if name != verify_split]
    for name in names:
        found += load(record.path, name, classes=bundle.manifest.classes).samples
    chosen, digests = _not_taken(found, count, taken)
    if len(chosen) < FEWEST_SEARCH:
        raise ExportError(
            f"{record.path}: {len(chosen)} images of {', '.join(names) or 'no split'} are neither for calibration nor "
            f"for verification; a search compares on at least {FEWEST_SEARCH}; calibrate on fewer "
            f"(--set quant.images=...), or add images"
        )
    samples = tuple(_renumbered(sample, number) for number, sample in enumerate(chosen))
    dataset = DetectionSet("search", Path(record.path), samples, bundle.manifest.classes)
    return SearchImages(dataset, tuple(digests))


def _not_taken(samples: Sequence[Sample], count: int, taken: Collection[str]) -> tuple[list[Sample], list[str]]:
    """Evenly spaced over all samples first; then, where many of those are taken, over the others."""
    chosen: dict[str, Sample] = {}
    for sample in _spread(samples, count):
        sha256 = digest(sample.path)
        if sha256 not in taken:
            chosen.setdefault(sha256, sample)
        if len(chosen) == count:
            break
    return list(chosen.values()), list(chosen)


def _spread(samples: Sequence[Sample], count: int) -> Iterable[Sample]:
    """All samples, each once, in rounds that go evenly over the whole list."""
    step = max(1, len(samples) // max(1, count))
    for start in range(step):
        yield from samples[start::step]


def _renumbered(sample: Sample, number: int) -> Sample:
    return replace(sample, image_id=number)
