"""From a bundle's float graph to its FP16 and INT8 graphs: choose images, observe ranges, write each file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from edgedetr.artifacts import FP16, INT8, ONNX, RANGES
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.errors import DataError, ExportError
from edgedetr.onnx_graph.fp16 import activation_absmax, convert_to_fp16, fp32_nodes
from edgedetr.quantization.bias_correction import PARTS, PICTURES, shifts
from edgedetr.quantization.calibration import Progress, calibrate, choose, enough, near_verify
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.policy import Plan, Policy, check_patterns, load, plan
from edgedetr.quantization.qdq import insert
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.rewrite import split_concats
from edgedetr.quantization.targets import CPU, TENSORRT, Dialect, tensors, tied, weight_bits
from edgedetr.runtime.backends import onnx_bytes
from edgedetr.runtime.backends.base import MADE_BY
from edgedetr.runtime.preprocess import prepare

Check = Callable[[ModelProto, str], None]

log = logging.getLogger(__name__)

FLOAT = "edgedetr.float_layers"  # and which weighted layers stayed float: JSON {reason: [node names]}
FLOAT32 = "edgedetr.float32_nodes"  # of a graph with FP16: which nodes stayed float32: JSON {reason: [node names]}
PEAK_PICTURES = 8  # show how large tensors get; half.LARGEST leaves a factor of 2 for the others


def quantize(
    bundle: Bundle,
    *,
    config: QuantConfig | None = None,
    calib: Path | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Write ranges.json, model.int8.onnx and model.int8-cpu.onnx; what is there and made by the same settings is kept.

    calib   where the calibration images are; None = present ranges of these settings, or the calibration split of the
            bundle's data
    check   told each graph for TensorRT and its name before it enters the bundle; raises where it must not
    """
    config = config or QuantConfig()
    model = split_concats(read(bundle.require(ONNX.file)))
    policy = load(config.policy)
    check_patterns(model, policy)
    chosen = plan(model, policy)
    ranges = _ranges(bundle, model, chosen, policy, config, calib, progress)
    for dialect in (TENSORRT, replace(CPU, weight_bits=weight_bits(config.cpu_weights))):
        _write(bundle, model, chosen, policy, ranges, dialect, config, calib, check, progress)
    log.info("%d layers INT8, %d float", len(chosen.layers), len(chosen.islands))
    return chosen


def to_half(
    bundle: Bundle,
    *,
    config: QuantConfig | None = None,
    calib: Path | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> None:
    """Write model.fp16.onnx, unless the bundle has it from the same graph and policy.

    calib   images to see magnitudes on; None = the calibration split of the bundle's data
    """
    policy = load((config or QuantConfig()).policy)
    made_by = json.dumps(
        {
            "dialect": FP16.id,
            "policy": policy.name,
            "policy_sha256": _sha256(policy),
            "calib": "" if calib is None else str(calib),
        }
    )
    if bundle.has(FP16.file) and _property(read(bundle.require(FP16.file)), MADE_BY) == made_by:
        return
    model = read(bundle.require(ONNX.file))
    check_patterns(model, policy)
    result, stayed = _halved(bundle, model, model, policy, calib, progress)
    onnx.helper.set_model_props(
        result, {**{item.key: item.value for item in model.metadata_props}, MADE_BY: made_by, FLOAT32: stayed}
    )
    onnx.checker.check_model(result)
    if check is not None:
        check(result, FP16.file)
    with bundle.add(FP16.file, stage=FP16.step, made_from=FP16.made_from) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))


def _halved(
    bundle: Bundle, model: ModelProto, result: ModelProto, policy: Policy, calib: Path | None, progress: Progress | None
) -> tuple[ModelProto, str]:
    """`result`, which is `model` or its quantized form, with FP16 inside, and what stayed float32 as JSON."""
    found = activation_absmax(model, _batches(bundle, calib, progress))
    stayed = _by_reason(fp32_nodes(result, found, policy.float32))
    return convert_to_fp16(result, found, policy.float32), json.dumps(stayed, ensure_ascii=False)


def _batches(bundle: Bundle, calib: Path | None, progress: Progress | None) -> Iterator[np.ndarray]:
    """A few calibration images as the graph takes them, [1, 3, H, W]; noise where the images are not here."""
    contract = bundle.manifest.input
    try:
        paths = choose(bundle, calib, PEAK_PICTURES).paths
    except (DataError, ExportError, OSError) as error:
        if calib is not None:
            raise
        log.warning("FP16: no calibration images here (%s), so magnitudes are seen on noise alone", error)
        paths = ()
        noise = np.random.default_rng(0).integers(0, 256, (1, 3, contract.height, contract.width))
        yield noise.astype(np.float32)
    yield from _prepared(bundle, paths, FP16.id, progress)


def read(path: Path) -> ModelProto:
    """An ONNX file; ExportError when it is none."""
    model: ModelProto = onnx_bytes.load(path, ExportError)
    try:
        onnx.checker.check_model(model)  # what follows relies on each node having its inputs and attributes
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ExportError(f"{path}: not valid ONNX ({reason}); run: edgedetr export {path.parent}") from error
    return model


def _ranges(
    bundle: Bundle,
    model: ModelProto,
    chosen: Plan,
    policy: Policy,
    config: QuantConfig,
    calib: Path | None,
    progress: Progress | None,
) -> Ranges:
    """The bundle's ranges where they are these settings' own, new ones otherwise."""
    wanted = tensors(model, chosen)
    observer = f"percentile {config.percentile:g}" if config.observer == "percentile" else config.observer
    if bundle.has(RANGES.file):
        present = Ranges.load(bundle.require(RANGES.file))
        same = (present.observer, present.policy, present.wanted) == (observer, policy.name, config.images)
        if same and set(wanted) == set(present.amax):
            # Without --calib whatever the bundle was calibrated on stays, so that a device needs no images.
            if calib is None or choose(bundle, calib, config.images).images == present.images:
                return present
    pictures = choose(bundle, calib, config.images)
    if len(pictures.paths) < config.images:
        log.warning("%d calibration images, %d were asked for", len(pictures.paths), config.images)
    enough(pictures)
    near_verify(bundle, pictures)
    amax = tied(model, calibrate(model, wanted, pictures.paths, bundle.manifest.input, config, progress))
    ranges = Ranges(amax, observer, policy.name, config.images, "" if calib is None else str(calib), pictures.images)
    with bundle.add(RANGES.file, stage=RANGES.step, made_from=RANGES.made_from) as temporary:
        ranges.save(temporary)
    return ranges


def _write(
    bundle: Bundle,
    model: ModelProto,
    chosen: Plan,
    policy: Policy,
    ranges: Ranges,
    dialect: Dialect,
    config: QuantConfig,
    calib: Path | None,
    check: Check | None,
    progress: Progress | None,
) -> None:
    """One INT8 graph, unless the bundle has it already."""
    about = {
        "dialect": dialect.name,
        "weight_bits": dialect.weight_bits,
        "observer": ranges.observer,
        "policy": policy.name,
        "policy_sha256": _sha256(policy),
        **({"half": True} if dialect.half else {}),
        "image_list": ranges.image_list,
        "layers_int8": len(chosen.layers),
        "layers_float": len(chosen.islands),
    }
    made_by = json.dumps({**about, "bias_correction": [PICTURES, PARTS]} if config.bias_correction else about)
    if bundle.has(dialect.file) and _property(read(bundle.require(dialect.file)), MADE_BY) == made_by:
        return
    result = insert(model, chosen, ranges.amax, dialect)
    if config.bias_correction:
        paths = _calibration_pictures(bundle, ranges)
        if paths:
            passes = _passes(bundle, paths, f"bias {dialect.name}", progress)
            result = insert(model, chosen, ranges.amax, dialect, shifts(model, result, chosen, passes))
        else:
            made_by = json.dumps(about)
    told = {item.key: item.value for item in result.metadata_props}
    told |= {MADE_BY: made_by, FLOAT: json.dumps(_by_reason(chosen.islands), ensure_ascii=False)}
    if dialect.half:
        result, told[FLOAT32] = _halved(bundle, model, result, policy, calib, progress)
    onnx.helper.set_model_props(result, told)
    onnx.checker.check_model(result)
    if check is not None and not dialect.unsigned:
        check(result, dialect.file)
    with bundle.add(dialect.file, stage=INT8.step, made_from=INT8.made_from) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))


def _calibration_pictures(bundle: Bundle, ranges: Ranges) -> list[Path]:
    """Some of the images that the ranges were observed on, evenly spaced; none, with a warning, where they have gone.

    Ranges need no images once they are there, so that a device can write a graph of its own dialect; such a graph is
    written without correction, and again, with it, where the images are.
    """
    try:
        found = choose(bundle, Path(ranges.source) if ranges.source else None, ranges.wanted)
        reason = "they have changed since" if found.images != ranges.images else ""
    except (DataError, ExportError, OSError) as error:
        reason = str(error)
    if reason:
        log.warning("INT8: biases are not corrected: the calibration images are not here (%s)", reason)
        return []
    count = len(found.paths)
    return [found.paths[i] for i in np.unique(np.linspace(0, count - 1, min(PICTURES, count)).round().astype(int))]


def _passes(
    bundle: Bundle, paths: Sequence[Path], what: str, progress: Progress | None
) -> Callable[[], Iterator[np.ndarray]]:
    """The images, as often as bias correction wants them, told as one work."""
    seen = 0

    def once() -> Iterator[np.ndarray]:
        nonlocal seen
        for batch in _prepared(bundle, paths):
            yield batch
            seen += 1
            if progress:
                progress(what, seen, PARTS * len(paths))

    return once


def _prepared(
    bundle: Bundle, paths: Sequence[Path], what: str = "", progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Images as the graph takes them, [1, 3, H, W], one after the other."""
    for number, path in enumerate(paths):
        if progress:
            progress(what, number, len(paths))
        yield prepare([decode(path)], bundle.manifest.input)[0]
    if progress and paths:
        progress(what, len(paths), len(paths))


def _sha256(policy: Policy) -> str:
    return hashlib.sha256(json.dumps(asdict(policy), sort_keys=True).encode()).hexdigest()


def _by_reason(nodes: dict[str, str]) -> dict[str, list[str]]:
    """{node: reason} the other way round."""
    found: dict[str, list[str]] = {}
    for name, reason in nodes.items():
        found.setdefault(reason, []).append(name)
    return found


def _property(model: ModelProto, key: str) -> str:
    return next((item.value for item in model.metadata_props if item.key == key), "")
