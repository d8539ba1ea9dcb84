"""From a bundle's float graph to its INT8 graphs: choose pictures, observe ranges, write both dialects."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import onnx
from onnx import ModelProto

from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError
from edgedetr.quantization.calibrate import Progress, calibrate, choose
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.dialect import CPU, TENSORRT, Dialect, tensors, tied, weight_bits
from edgedetr.quantization.legality import tensorrt_faults
from edgedetr.quantization.policy import Plan, Policy, load, plan
from edgedetr.quantization.qdq import insert
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.rewrite import split_concats

log = logging.getLogger(__name__)

KEY = "edgedetr.quantisation"       # metadata of an INT8 graph: what it was made by, as JSON
FLOAT = "edgedetr.float_layers"     # and which weighted layers stayed float: JSON {reason: [node names]}


def quantize(bundle: Bundle, *, config: QuantConfig | None = None, calib: Path | None = None,
             progress: Progress | None = None) -> Plan:
    """Write ranges.json, model.int8.onnx and model.int8-cpu.onnx; what is there and made by the same settings is kept.

    calib   where the calibration pictures are; None = present ranges of these settings, or the calibration split of the
            bundle's data
    """
    config = config or QuantConfig()
    model = split_concats(read(bundle.require("model.onnx")))
    policy = load(config.policy)
    chosen = plan(model, policy)
    ranges = _ranges(bundle, model, chosen, policy, config, calib, progress)
    for dialect in (TENSORRT, replace(CPU, weight_bits=weight_bits(config.cpu_weights))):
        _write(bundle, model, chosen, policy, ranges, dialect)
    log.info("%d layers INT8, %d float", len(chosen.layers), len(chosen.islands))
    return chosen


def read(path: Path) -> ModelProto:
    """An ONNX file; ExportError when it is none."""
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf and onnx raise unrelated kinds for damaged files
        raise ExportError(f"{path}: cannot be read as ONNX ({error}); run: edgedetr export {path.parent}") from error


def _ranges(bundle: Bundle, model: ModelProto, chosen: Plan, policy: Policy, config: QuantConfig, calib: Path | None,
            progress: Progress | None) -> Ranges:
    """The bundle's ranges where they are these settings' own, new ones otherwise."""
    wanted = tensors(model, chosen)
    observer = f"percentile {config.percentile:g}" if config.observer == "percentile" else config.observer
    if bundle.has("ranges.json"):
        present = Ranges.load(bundle.require("ranges.json"))
        same = (present.observer, present.policy, present.wanted) == (observer, policy.name, config.images)
        if same and set(wanted) == set(present.amax):
            # Without --calib whatever the bundle was calibrated on stays, so that a device needs no pictures.
            if calib is None or choose(bundle, calib, config.images).images == present.images:
                return present
    pictures = choose(bundle, calib, config.images)
    if len(pictures.paths) < config.images:
        log.warning("%d calibration pictures, %d were asked for", len(pictures.paths), config.images)
    amax = tied(model, calibrate(model, wanted, pictures.paths, bundle.manifest.input, config, progress))
    ranges = Ranges(amax, observer, policy.name, config.images, "" if calib is None else str(calib), pictures.images)
    with bundle.add("ranges.json", stage="calibrate", made_from=["model.onnx"]) as temporary:
        ranges.save(temporary)
    return ranges


def _write(bundle: Bundle, model: ModelProto, chosen: Plan, policy: Policy, ranges: Ranges, dialect: Dialect) -> None:
    """One INT8 graph, unless the bundle has it already."""
    made_by = json.dumps({
        "dialect": dialect.name, "weight_bits": dialect.weight_bits, "observer": ranges.observer, "policy": policy.name,
        "policy_sha256": hashlib.sha256(json.dumps(asdict(policy), sort_keys=True).encode()).hexdigest(),
        "image_list": ranges.image_list, "layers_int8": len(chosen.layers), "layers_float": len(chosen.islands),
    })
    if bundle.has(dialect.file) and _property(read(bundle.require(dialect.file)), KEY) == made_by:
        return
    result = insert(model, chosen, ranges.amax, dialect)
    for key, value in ((KEY, made_by), (FLOAT, json.dumps(_by_reason(chosen), ensure_ascii=False))):
        item = result.metadata_props.add()
        item.key, item.value = key, value
    onnx.checker.check_model(result)
    faults = tensorrt_faults(result) if not dialect.unsigned else []
    if faults:
        raise ExportError(f"{dialect.file} would not be legal for TensorRT: {faults[0]} ({len(faults)} such); expected "
                          "explicit signed Q/DQ; this is a defect, report it with the recipe and the policy")
    with bundle.add(dialect.file, stage="quantise", made_from=["model.onnx", "ranges.json"]) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))


def _by_reason(chosen: Plan) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in chosen.islands.items():
        found.setdefault(reason, []).append(name)
    return found


def _property(model: ModelProto, key: str) -> str:
    return next((item.value for item in model.metadata_props if item.key == key), "")
