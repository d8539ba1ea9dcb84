"""Export a bundle: reference.npz and model.onnx from its weights, then FP16 and INT8. Fresh files are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgedetr.artifacts import ONNX, QUANTIZERS, RECIPE, REFERENCE, WEIGHTS
from edgedetr.bundle import Bundle, Manifest
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.images import decode
from edgedetr.data.layouts import load
from edgedetr.errors import ExportError, UsageError
from edgedetr.exporting.config import ExportConfig
from edgedetr.exporting.reference_run import is_imported, write_reference, write_reference_of_graph
from edgedetr.exporting.to_onnx import compare_with_pytorch, write_onnx
from edgedetr.models.deploy import DeployGraph, load_bundle_model
from edgedetr.models.detector import DetrModel
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX, model_metadata
from edgedetr.progress import Progress
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.peers.quantize_with import quantize_with, require_installed
from edgedetr.quantization.peers.registry import PEERS
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.quantize import export_fp16, quantize, read_onnx
from edgedetr.runtime.arguments import check_word
from edgedetr.runtime.preprocess import prepare

log = logging.getLogger(__name__)

CHECK_IMAGES = 2  # of the verify split, on which the ONNX file is compared with PyTorch


def export(
    bundle: Bundle | str | Path,
    *,
    int8: bool = False,
    fp16: bool = False,
    calib: Path | None = None,
    sampling: Literal["gather", "grid_sample"] | None = None,
    dynamic_batch: bool = False,
    quantizers: Sequence[str] = (),
    config: ExportConfig | None = None,
    quant: QuantConfig | None = None,
    placement: Placement | None = None,
    cure_for: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Write reference.npz and model.onnx, with `fp16` model.fp16.onnx, with `int8` ranges.json and the two INT8 graphs.

    calib           calibration images; None = the calibration split of the bundle's data
    sampling        how deformable attention samples; None = as the recipe sets it
    dynamic_batch   leave the batch size open, even where the recipe fixes it
    quantizers      peers that quantize model.onnx too, after our INT8 and on its images (artifacts.QUANTIZERS)
    config, quant   settings; None = those of the recipe in the bundle
    placement       which groups are INT8; None = as the policy chooses
    cure_for        backends whose known faults the INT8 graphs are cured of; None = those on which verify judges each
    """
    bundle = Bundle.open(bundle)
    _check_quantizers(quantizers, int8)
    if config is None or quant is None:
        recorded = recipe_settings(bundle)
        config, quant = config or recorded[0], quant or recorded[1]
    if (sampling == "grid_sample" or dynamic_batch) and is_imported(bundle):
        raise UsageError(
            f"{bundle.path} holds an imported graph: sampling and batch size are fixed; leave "
            "--sampling and --dynamic-batch out, or import it again: edgedetr import --sampling "
            "grid_sample"
        )
    if sampling is not None:
        config = replace(config, sampling=sampling)
    if dynamic_batch:
        config = replace(config, dynamic_batch=True)
    if bundle.has(ONNX.file) and not is_imported(bundle):
        asked = {"sampling": sampling is not None, "dynamic_batch": dynamic_batch}
        for sentence in undone(_made_by(bundle), config, [name for name, given in asked.items() if given]):
            log.warning("%s: %s", bundle.path, sentence)
    export_onnx(bundle, config, progress)
    if fp16:
        export_fp16(bundle, config=quant, calib=calib, progress=progress)
    if int8:
        quantize(bundle, config=quant, calib=calib, placement=placement, cure_for=cure_for, progress=progress)
    for name in dict.fromkeys(quantizers):
        quantize_with(bundle, name, progress=progress)
    return bundle


def _check_quantizers(names: Sequence[str], int8: bool) -> None:
    for name in names:
        check_word(name, QUANTIZERS, "quantizer")
        if not int8:
            raise UsageError(
                f"--quantizer {name} is measured beside our INT8 and uses its calibration images; add --int8"
            )
        require_installed(PEERS[name])


def export_onnx(bundle: Bundle, config: ExportConfig, progress: Progress | None = None) -> None:
    """Write reference.npz and model.onnx. The ONNX file is compared with PyTorch before it enters the bundle."""
    if is_imported(bundle):
        write_reference_of_graph(bundle, progress)
        return
    made_by = json.dumps(asdict(config))
    record = bundle.manifest.data
    fresh_reference = record is None or bundle.has(REFERENCE.file)
    fresh_model = bundle.has(ONNX.file) and _made_by(bundle) == made_by
    if fresh_reference and fresh_model:
        return
    weights = bundle.require(WEIGHTS.file)
    detector, graph = load_bundle_model(bundle)
    _require_finite(bundle, detector)
    dataset = None if record is None else load(record.path, record.verify_split, classes=bundle.manifest.classes)
    if record is None:
        log.warning("%s: no data recorded, so no reference.npz; verify will need --data", bundle.path)
    if not fresh_reference and dataset is not None:
        write_reference(bundle, graph, dataset, progress)
    if fresh_model:
        return
    manifest = bundle.manifest
    if config.sampling != "gather" or config.decoder_layers:
        # The reference keeps all decoder layers, so that the verdict includes the cost of running fewer.
        graph = DeployGraph(
            detector, manifest.input.height, manifest.input.width, config.sampling, config.decoder_layers
        )
    if progress:
        progress("onnx", 0, 1)
    metadata = {**model_metadata(manifest, manifest.files[weights.name].sha256), "export": made_by}
    with bundle.add(ONNX.file, stage=ONNX.step, made_from=ONNX.made_from) as temporary:
        write_onnx(graph, temporary, batch=None if config.dynamic_batch else 1, opset=config.opset, metadata=metadata)
        compare_with_pytorch(graph, temporary, _probes(manifest, dataset))
    if progress:
        progress("onnx", 1, 1)


def _require_finite(bundle: Bundle, detector: DetrModel) -> None:
    for name, value in detector.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ExportError(
                f"{bundle.path}: weight {name} holds NaN or infinity; expected finite weights; "
                "train again from the last good checkpoint: edgedetr train --data DIR --resume"
            )


def _made_by(bundle: Bundle) -> str:
    properties = read_onnx(bundle.require(ONNX.file)).metadata_props
    return next((item.value for item in properties if item.key == f"{METADATA_PREFIX}export"), "")


def undone(made_by: str, config: ExportConfig, asked: Sequence[str]) -> list[str]:
    """A sentence for each option of an earlier export that this one, to which it is not given, takes back.

    made_by   the settings of the present model.onnx as JSON; "" where it does not record them
    asked     names of settings that are given to this export
    """
    found = []
    for name, was in json.loads(made_by or "{}").items():
        now = getattr(config, name, was)
        if name in ("sampling", "dynamic_batch") and name not in asked and was != now:
            found.append(
                f"{ONNX.file} is made again: {name} was {json.dumps(was)} and is {json.dumps(now)} now; to keep it in "
                f"every export: --set export.{name}={json.dumps(was)}"
            )
    return found


def _probes(manifest: Manifest, dataset: DetectionSet | None) -> np.ndarray:
    """Images [B, 3, H, W] to compare on: noise, and some of the verify split."""
    height, width = manifest.input.height, manifest.input.width
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, height, width)).astype(np.float32)
    if dataset is None or not len(dataset):
        return noise
    images = [decode(sample.path) for sample in dataset.evenly_spaced(CHECK_IMAGES)]
    return np.concatenate([noise, prepare(images, manifest.input)[0]])


def recipe_settings(bundle: Bundle) -> tuple[ExportConfig, QuantConfig]:
    """Export and quantization settings of the bundle's recipe; the defaults where it has none."""
    if RECIPE.file not in bundle.manifest.files:
        return ExportConfig(), QuantConfig()
    from edgedetr.recipe import Recipe

    recipe = Recipe.load(bundle.require(RECIPE.file))
    return recipe.export, recipe.quant
