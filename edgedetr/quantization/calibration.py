"""Calibration: choose images, observe the range (amax) of every quantized activation over them, store ranges.json.

One image at a time goes through the float graph in ONNX Runtime. `ranges_of` is the entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from edgedetr.artifacts import RANGES, REFERENCE
from edgedetr.bundle import Bundle, InputContract
from edgedetr.data.images import decode
from edgedetr.data.layouts import NoLayout, load, splits
from edgedetr.data.listing import images_in
from edgedetr.data.near_duplicates import near_copies
from edgedetr.errors import DataError, ExportError
from edgedetr.evaluation.reference import Reference
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.printable import shown
from edgedetr.progress import Progress
from edgedetr.quantization.calibration_checks import (
    CLIPPED,
    MOVED,
    MOVED_FRACTION,
    REFERENCE_IMAGES,
    SHOWN,
    Likeness,
    clipped_tensors,
    compare_images,
    moved_ranges,
)
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import LEARNED, Histogram, observer_of
from edgedetr.quantization.probe import Probe
from edgedetr.quantization.smoothing import Fold, Smoothing, checked_smoothing, smoothed, smoothings
from edgedetr.runtime.preprocess import prepare
from edgedetr.storage.digests import digest
from edgedetr.storage.reading import MEBIBYTE, read_json

log = logging.getLogger(__name__)

MIN_IMAGES, RECOMMENDED_IMAGES = 8, 32
MAX_SHOWN = 5  # pairs of near-copies that a message names

SCHEMA = 1
LIMIT = 64 * MEBIBYTE  # bytes of ranges.json; 1,000 images and 300 tensors take about 150 kB
SHA256 = re.compile(r"[0-9a-f]{64}")

# An image is an outlier in a tensor where its largest magnitude is OUTLIER_FACTOR times that of the others, and it is
# reported where that holds in OUTLIER_FRACTION of the tensors. Measured with an rt_detr trained on BCCD (110 tensors,
# 128 images): the most extreme of BCCD's own images is an outlier in 3 % of the tensors, that of 128 cards in 16 %, and
# a frame of noise, of black and white dots, all black, or a card among BCCD's in 46 to 61 %. A white frame is one in
# 1 %: it changes no range.
OUTLIER_FACTOR = 1.25
OUTLIER_FRACTION = 0.25
MAX_OUTLIERS = 0.05  # of the images; if more exceed the rest, they are another kind of image, not a few bad ones
CHANGED = 1.2  # a range that changes by this factor or more counts as changed


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


def image_list_digest(images: Iterable[CalibrationImage]) -> str:
    """sha256 over the images' digests, one per line, in order."""
    return hashlib.sha256("".join(image.sha256 + "\n" for image in images).encode()).hexdigest()


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


# ------------------------------------------------------------------------------------------------- the bundle's ranges


def ranges_of(
    bundle: Bundle,
    model: ModelProto,
    tensors: Sequence[str],
    config: QuantConfig,
    policy: str,
    *,
    observers: Mapping[str, str] | None = None,
    folds: Sequence[Fold] = (),
    calib: Path | None = None,
    progress: Progress | None = None,
) -> Ranges:
    """The ranges in the bundle's ranges.json where it was made with these settings; otherwise new ones, written there.

    model     the float graph
    tensors   names of the activations that are quantized for at least one target
    policy    the policy's name, for ranges.json
    observers {tensor: label of its observer} where that is not the one of `config`
    folds     the tensors that are smoothed: their factors are observed first, and the ranges with these folded in
    calib     calibration images; None = the images of the present ranges.json, or the calibration split of the bundle's
              data
    """
    observers = observers or {}
    present = Ranges.load(bundle.require(RANGES.file)) if bundle.has(RANGES.file) else None
    if present is not None and _fits(present, tensors, config, policy, observers, folds):
        # Without --calib the bundle keeps its calibration, so that a device needs no images.
        if calib is None or choose_images(bundle, calib, config.images).images == present.images:
            return present
    if config.observer == LEARNED:
        raise ExportError(
            f"{bundle.path}: quant.observer is {LEARNED!r}, and no range was learned for this graph, policy and number "
            "of images; expected the ranges of quantization-aware training: edgedetr train --qat B; or observe them: "
            f"edgedetr export {bundle.path} --int8 --set quant.observer=mse"
        )
    chosen = choose_images(bundle, calib, config.images)
    if len(chosen.paths) < config.images:
        log.warning("%d calibration images, %d were asked for", len(chosen.paths), config.images)
    check_image_count(chosen)
    warn_of_near_copies(bundle, chosen)
    contract, training = bundle.manifest.input, Training.of(bundle) if calib is not None else None
    smooth: dict[str, Smoothing] = {}
    if folds:
        graph = GraphIndex(model)
        smooth = smoothings(graph, folds, _each(chosen.paths, contract, "smooth", progress))
        model = smoothed(graph, smooth)
    observed = calibrate(
        model, tensors, chosen.paths, contract, config, progress, observers=observers, training=training
    )
    amax = share_pool_ranges(model, observed)
    source = "" if calib is None else str(calib)
    ranges = Ranges(amax, config.observer_label, policy, config.images, source, chosen.images, observers, smooth)
    with bundle.add(RANGES.file, stage=RANGES.step, made_from=RANGES.made_from) as temporary:
        ranges.save(temporary)
    return ranges


def _fits(
    present: Ranges,
    tensors: Sequence[str],
    config: QuantConfig,
    policy: str,
    observers: Mapping[str, str],
    folds: Sequence[Fold],
) -> bool:
    settings = (config.observer_label, policy, config.images, observers)
    alphas = {name: one.alpha for name, one in present.smooth.items()}
    return (
        (present.observer, present.policy, present.requested, present.observers) == settings
        and alphas == {fold.tensor: fold.alpha for fold in folds}
        and set(tensors) == set(present.amax)
    )


def share_pool_ranges(model: ModelProto, amax: Mapping[str, float]) -> dict[str, float]:
    """Ranges in which the output of a MaxPool shares its input's scale, so that the pool runs on integers unchanged."""
    shared = dict(amax)
    for node in model.graph.node:
        if node.op_type == "MaxPool" and node.input[0] in shared and node.output[0] in shared:
            shared[node.output[0]] = shared[node.input[0]]
    return shared


# ---------------------------------------------------------------------------------------------------- choosing images


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


# ------------------------------------------------------------------------------------------------------ observing them


@dataclass(frozen=True)
class Training:
    """Some images of the training split, and the data set's folder."""

    paths: tuple[Path, ...]
    data: str

    @classmethod
    def of(cls, bundle: Bundle) -> Training | None:
        """None where the bundle records no data set, or it is not on this machine."""
        record = bundle.manifest.data
        if record is None or not Path(record.path).is_dir():
            return None
        paths = [sample.path for sample in load(record.path, record.calib_split).samples]
        return cls(tuple(evenly_spaced(paths, REFERENCE_IMAGES)), record.path)


def calibrate(
    model: ModelProto,
    tensors: Sequence[str],
    paths: Sequence[Path],
    contract: InputContract,
    config: QuantConfig,
    progress: Progress | None = None,
    *,
    observers: Mapping[str, str] | None = None,
    training: Training | None = None,
) -> dict[str, float]:
    """amax of every tensor (see `observe`). What the calibration says against itself is logged.

    observers   {tensor: label of its observer} where that is not the one of `config`
    training    images to compare with, where `paths` are others

    Warnings: a few images that alone decide many ranges; many ranges that differ between the halves of the images;
    ranges that clip more than a few values; images unlike those of the training.
    """
    observers = observers or {}
    histograms = observe(model, tensors, paths, contract, progress)
    amax = _amax(histograms, config, observers)
    _say_what_moved(histograms, config, observers)
    _warn_of_clipping(histograms, amax, config)
    if training is not None:
        seen = observe(model, tensors, training.paths, contract, progress)
        _warn_of_another_kind(compare_images(histograms, seen), paths, training)
    outliers = outlier_images(np.array([histogram.image_absmax for histogram in histograms.values()]))
    if outliers:
        rest = [path for index, path in enumerate(paths) if index not in outliers]
        changed = changed_ranges(amax, _amax(observe(model, tensors, rest, contract, progress), config, observers))
        names = ", ".join(f"{paths[index]} ({fraction:.0%})" for index, fraction in outliers.items())
        effect = f"without them {len(changed)} of {len(amax)} ranges change by more than {CHANGED - 1:.0%}"
        if changed:
            name, factor = next(iter(changed.items()))
            effect += f", {name!r} by a factor of {factor:.1f}"
        log.warning(
            "calibration images whose activations exceed those of the other %d images (in brackets: in how "
            "many of the tensors): %s; %s. Look at them; if they do not belong here, calibrate on a folder "
            "without them: edgedetr export BUNDLE --int8 --calib DIR",
            len(rest),
            names,
            effect,
        )
    return amax


def _amax(histograms: Mapping[str, Histogram], config: QuantConfig, observers: Mapping[str, str]) -> dict[str, float]:
    return {name: _range(histogram, config, observers) for name, histogram in histograms.items()}


def _range(histogram: Histogram, config: QuantConfig, observers: Mapping[str, str]) -> float:
    own = observers.get(histogram.name)
    return histogram.amax(*((config.observer, config.observer_option) if own is None else observer_of(own)))


def _say_what_moved(histograms: Mapping[str, Histogram], config: QuantConfig, observers: Mapping[str, str]) -> None:
    """Log the ranges that differ between the halves of the images; a warning where they are many."""
    moved = moved_ranges(histograms, lambda histogram: _range(histogram, config, observers))
    if not moved:
        return
    level = logging.WARNING if len(moved) > MOVED_FRACTION * len(histograms) else logging.INFO
    log.log(
        level,
        "%d of %d ranges differ by more than %.0f%% between two halves of the calibration images: %s. More images, or "
        "more kinds of scenes, make them steady: --set quant.images=N, --calib DIR",
        len(moved),
        len(histograms),
        100 * (MOVED - 1),
        _first(moved, "by a factor of {:.2f}"),
    )


def _warn_of_clipping(histograms: Mapping[str, Histogram], amax: Mapping[str, float], config: QuantConfig) -> None:
    clipped = clipped_tensors(histograms, amax)
    if clipped:
        log.warning(
            "the ranges that observer %s chose clip more than %.0f%% of the values of %d of %d tensors: %s. Another "
            "observer keeps them: --set quant.observer=mse",
            config.observer_label,
            100 * CLIPPED,
            len(clipped),
            len(histograms),
            _first(clipped, "{:.1%}"),
        )


def _warn_of_another_kind(likeness: Likeness, paths: Sequence[Path], training: Training) -> None:
    if likeness.another_kind:
        log.warning(
            "the calibration images in %s are of another kind than the training images of %s: half of them are %.1f or "
            "more spreads of the training images away (those themselves about 1), with largest magnitudes in %s. "
            "Ranges that fit them may not fit what the detector was trained to see; leave --calib out, or name images "
            "like those of the training",
            paths[0].parent,
            training.data,
            likeness.distance,
            _first(likeness.factors, "{:.2g} times as large"),
        )


def _first(figures: Mapping[str, float], words: str) -> str:
    """The first tensors with their figures: 'a' 1.3, 'b' 1.2, ..."""
    named = [f"{name!r} {words.format(figure)}" for name, figure in islice(figures.items(), SHOWN)]
    return ", ".join([*named, "..."] if len(figures) > SHOWN else named)


def observe(
    model: ModelProto,
    tensors: Sequence[str],
    paths: Sequence[Path],
    contract: InputContract,
    progress: Progress | None = None,
) -> dict[str, Histogram]:
    """The distribution of every tensor over the images.

    Memory: the weights, what one image's pass needs at a time, and one histogram of 2,048 bins per tensor, however many
    images there are.
    Errors: DataError for an image that cannot be decoded; ExportError that names a tensor with NaN or infinity.
    """
    observed = [name for name in tensors if name != "images"]
    probe = Probe(model, observed)
    histograms = {name: Histogram(name) for name in tensors}
    for batch, path in zip(_each(paths, contract, "calibrate", progress), paths):
        if "images" in histograms:
            histograms["images"].observe(batch)
        probe.observe(batch, histograms, f"the calibration image {shown(path.name)}")
    return histograms


def _each(paths: Sequence[Path], contract: InputContract, step: str, progress: Progress | None) -> Iterator[np.ndarray]:
    """The images as the graph takes them, [1, 3, H, W], one after the other."""
    for done, path in enumerate(paths):
        if progress:
            progress(step, done, len(paths))
        yield prepare([decode(path)], contract)[0]
    if progress:
        progress(step, len(paths), len(paths))


# ------------------------------------------------------------------------------------------------------ outlier images
# A few saturated, noisy or unrelated frames among a hundred good images change half of a detector's ranges by 1.2 to 5
# times, whatever the observer, and every good image then pays with coarser steps.


def outlier_images(absmax: np.ndarray) -> dict[int, float]:
    """{image: fraction of the tensors in which it exceeds the others}, for fractions of at least OUTLIER_FRACTION.

    absmax   [T, I] largest magnitude of each of T tensors on each of I images

    The others are all images except the most extreme 5 % (at least one) of each tensor, so that two bad images do not
    hide each other.
    """
    tensors, images = absmax.shape
    few = max(1, int(images * MAX_OUTLIERS))
    if tensors == 0 or images <= few + 1:
        return {}
    rest = np.sort(absmax, axis=1)[:, images - few - 1]  # [T] largest of the others
    fractions = (absmax > OUTLIER_FACTOR * rest[:, None]).mean(axis=0)  # [I]
    return {int(index): float(fractions[index]) for index in np.flatnonzero(fractions >= OUTLIER_FRACTION)}


def changed_ranges(with_them: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    """{tensor: factor >= CHANGED by which its range changes without the images}, the largest factor first.

    A range that is 0 on one side only changes by infinity.
    """
    found = {}
    for name, one in with_them.items():
        low, high = sorted((one, without[name]))
        factor = high / low if low else (float("inf") if high else 1.0)
        if factor >= CHANGED:
            found[name] = factor
    return dict(sorted(found.items(), key=lambda item: -item[1]))
