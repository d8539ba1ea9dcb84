"""Observe the ranges of a float graph's activations over images, one image at a time in ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from edgedetr.artifacts import REFERENCE
from edgedetr.bundle import Bundle, InputContract, digest
from edgedetr.data.images import decode
from edgedetr.data.layouts import load, splits
from edgedetr.data.listing import images_in
from edgedetr.data.near_duplicates import near_copies
from edgedetr.errors import DataError, ExportError
from edgedetr.evaluation.reference import Reference
from edgedetr.progress import Progress
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import Histogram
from edgedetr.quantization.outliers import MOVED, moved, standouts
from edgedetr.quantization.ranges import CalibrationImage
from edgedetr.runtime.backends.onnxruntime import plain_session
from edgedetr.runtime.preprocess import prepare

log = logging.getLogger(__name__)

LEAST, ENOUGH = 8, 32
SHOWN = 5  # pairs of near-copies that a message names


@dataclass(frozen=True)
class Pictures:
    """Calibration images: where they are, and what they are."""

    paths: tuple[Path, ...]
    images: tuple[CalibrationImage, ...]


def choose(bundle: Bundle, directory: Path | None, count: int) -> Pictures:
    """At most `count` images, evenly spaced over the calibration split or over a folder.

    directory   a data set (its train split) or a folder of images; None = the calibration split of the bundle's data
    An image that is also in the verify split, by digest, is an ExportError: INT8 would be judged on what it was
    fitted to.
    """
    paths, root = _candidates(bundle, directory)
    if not paths:
        raise ExportError(f"{root}: no images to calibrate on; expected at least one image file")
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int))]
    images = [CalibrationImage(digest(path), _name(path, root)) for path in chosen]
    verify = _verify_digests(bundle)
    for path, image in zip(chosen, images):
        if image.sha256 in verify:
            raise ExportError(
                f"{path}: this calibration image is also in the verify split, so the verdict would be "
                "biased; expected disjoint images; run: edgedetr export BUNDLE --int8 --calib DIR"
            )
    return Pictures(tuple(chosen), tuple(images))


def enough(images: Pictures) -> None:
    """Refuse to observe ranges on fewer than LEAST images, and warn below ENOUGH. Errors: ExportError."""
    count = len(images.paths)
    if count < LEAST:
        raise ExportError(
            f"{count} calibration images are too few for INT8: expected at least {LEAST}, better "
            f"{ENOUGH} or more; add images, raise quant.images, or name others: "
            "edgedetr export BUNDLE --int8 --calib DIR"
        )
    if count < ENOUGH:
        log.warning(
            "%d calibration images: ranges may miss values that other images have; %d or more are better "
            "(quant.images, --calib DIR)",
            count,
            ENOUGH,
        )


def near_verify(bundle: Bundle, images: Pictures) -> None:
    """Warn of calibration images that show a scene of the verify split, though their bytes differ.

    The same bytes are refused by `choose`; a near-copy may be a second frame of one scene, so it is left to the user.
    Nothing is said where the images of the verify split are not here.
    """
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        return
    verify = [sample.path for sample in load(record.path, record.verify_split).samples]
    found = near_copies(verify, images.paths)
    if found:
        shown = ", ".join(
            f"{_name(pair.second, Path(record.path))} = {_name(pair.first, Path(record.path))}"
            for pair in found[:SHOWN]
        )
        log.warning(
            "%d of %d calibration images nearly copy images of the verify split, so the verdict may be too "
            "good: %s%s; take one of each pair out, or calibrate on other images: "
            "edgedetr export BUNDLE --int8 --calib DIR",
            len(found),
            len(images.paths),
            shown,
            ", ..." if len(found) > SHOWN else "",
        )


def _candidates(bundle: Bundle, directory: Path | None) -> tuple[list[Path], Path]:
    record = bundle.manifest.data
    if directory is None:
        if record is None:
            raise ExportError(
                f"{bundle.path}: the bundle does not say where its data are; expected calibration "
                f"images; run: edgedetr export {bundle.path} --int8 --calib DIR"
            )
        return [sample.path for sample in load(record.path, record.calib_split).samples], Path(record.path)
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; expected calibration images or a data set")
    try:
        names = splits(directory)
    except DataError:  # no layout of annotations: a plain folder of images
        return images_in(directory), directory
    split = "train" if "train" in names else next(iter(names))
    return [sample.path for sample in load(directory, split).samples], directory


def _verify_digests(bundle: Bundle) -> Collection[str]:
    """sha256 of the verify images, from reference.npz where there is one, otherwise from the files."""
    if bundle.has(REFERENCE.file):
        return set(Reference.load(bundle.require(REFERENCE.file)).truth.digests.tolist())
    record = bundle.manifest.data
    if record is None or not Path(record.path).is_dir():
        return ()
    return {digest(sample.path) for sample in load(record.path, record.verify_split).samples}


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def calibrate(
    model: ModelProto,
    tensors: Sequence[str],
    paths: Sequence[Path],
    contract: InputContract,
    config: QuantConfig,
    progress: Progress | None = None,
) -> dict[str, float]:
    """amax of every tensor (see `observe`); a warning names the few images that alone decide many ranges."""
    histograms = observe(model, tensors, paths, contract, progress)
    amax = _amax(histograms, config)
    found = standouts(np.array([histogram.peaks for histogram in histograms.values()]))
    if found:
        rest = [path for index, path in enumerate(paths) if index not in found]
        changed = moved(amax, _amax(observe(model, tensors, rest, contract, progress), config))
        names = ", ".join(f"{paths[index]} ({share:.0%})" for index, share in found.items())
        effect = f"without them {len(changed)} of {len(amax)} ranges change by more than {MOVED - 1:.0%}"
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


def _amax(histograms: Mapping[str, Histogram], config: QuantConfig) -> dict[str, float]:
    return {name: histogram.amax(config.observer, config.percentile) for name, histogram in histograms.items()}


def observe(
    model: ModelProto,
    tensors: Sequence[str],
    paths: Sequence[Path],
    contract: InputContract,
    progress: Progress | None = None,
) -> dict[str, Histogram]:
    """The distribution of every tensor over the images.

    Memory: one image's activations and one histogram of 2,048 bins per tensor, however many images there are.
    An image that cannot be decoded is a DataError; NaN or infinity in a tensor an ExportError that names it.
    """
    observed = [name for name in tensors if name != "images"]
    session = _exposed(model, observed)
    histograms = {name: Histogram(name) for name in tensors}
    for done, path in enumerate(paths):
        if progress:
            progress("calibrate", done, len(paths))
        batch, _ = prepare([decode(path)], contract)
        if "images" in histograms:
            histograms["images"].observe(batch)
        for name, values in zip(observed, session.run(observed, {"images": batch})):
            histograms[name].observe(values)
    if progress:
        progress("calibrate", len(paths), len(paths))
    return histograms


def _exposed(model: ModelProto, tensors: Sequence[str]) -> Any:
    """A session of the float graph in which these tensors are outputs."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    present = {item.name for item in exposed.graph.output}
    exposed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors if name not in present)
    return plain_session(exposed.SerializeToString(), optimize=True, error=ExportError)
