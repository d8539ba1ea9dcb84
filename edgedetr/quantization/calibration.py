"""Calibration: observe the range (amax) of every quantized activation over images, and store ranges.json.

One image at a time goes through the float graph in ONNX Runtime. `ranges_of` is the entry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from onnx import ModelProto

from edgedetr.artifacts import RANGES
from edgedetr.bundle import Bundle, InputContract
from edgedetr.data.images import decode
from edgedetr.data.layouts import load
from edgedetr.errors import ExportError
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
from edgedetr.quantization.calibration_set import check_image_count, choose_images, evenly_spaced, warn_of_near_copies
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import LEARNED, Histogram, observer_of
from edgedetr.quantization.probe import Probe
from edgedetr.quantization.ranges import Ranges, share_pool_ranges
from edgedetr.quantization.smoothing import Fold, Smoothing, smoothed, smoothings
from edgedetr.runtime.preprocess import prepare

log = logging.getLogger(__name__)

# An image is an outlier in a tensor where its largest magnitude is OUTLIER_FACTOR times that of the others, and it is
# reported where that holds in OUTLIER_FRACTION of the tensors. Measured with an rt_detr trained on BCCD (110 tensors,
# 128 images): the most extreme of BCCD's own images is an outlier in 3 % of the tensors, that of 128 cards in 16 %, and
# a frame of noise, of black and white dots, all black, or a card among BCCD's in 46 to 61 %. A white frame is one in
# 1 %: it changes no range.
OUTLIER_FACTOR = 1.25
OUTLIER_FRACTION = 0.25
MAX_OUTLIERS = 0.05  # of the images; if more exceed the rest, they are another kind of image, not a few bad ones
CHANGED = 1.2  # a range that changes by this factor or more counts as changed


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
