"""Bring your own: a DETR-family ONNX file made elsewhere becomes a bundle that quantizes, lints, builds and verifies.

The file's own detections are the oracle: what comes out of the surgery must find the same objects in ONNX Runtime, on
images, or nothing is written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from edgedetr.artifacts import ONNX, WEIGHTS
from edgedetr.bundle import Bundle, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.data.layouts import load, splits
from edgedetr.errors import DataError, ExportError, UsageError, first_line
from edgedetr.importing import io_contract, surgery
from edgedetr.importing.choice import SPEAKS, Judge, choose
from edgedetr.importing.import_options import ImportOptions, Kept, Normalization, columns_of, read_names, usual
from edgedetr.importing.node_annotations import prefix_nodes
from edgedetr.importing.normalize_graph import dtype_of, fixed, read_model, size_of
from edgedetr.importing.onnx_sidecars import PROCESSOR, Beside, read_beside
from edgedetr.importing.original_model import NOISE, SIDE, Agreement, Original, agree, decoded, probes, renumbered
from edgedetr.importing.output_meaning import Asked, Understood, understand
from edgedetr.importing.trace_outputs import run
from edgedetr.onnx_graph.bundle_graph import METADATA_PREFIX, check_graph, model_metadata
from edgedetr.onnx_graph.fold import fold
from edgedetr.onnx_graph.fp32 import remove_redundant_casts
from edgedetr.onnx_graph.graph_edit import prune
from edgedetr.onnx_graph.grid_sample import replace_grid_samples
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.onnx_graph.opset import IR_VERSION, OPSET
from edgedetr.runtime.arguments import as_path
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import Detections
from edgedetr.storage.digests import digest

log = logging.getLogger(__name__)

MODEL = "imported"  # what bundle.json calls a model that only its ONNX file knows
STAGE = "import"


@dataclass(frozen=True)
class ImportedOnnxModel:
    """What was found in an ONNX file, and how well the bundle's graph agrees with it.

    contract       what the file gives: "raw", "joined" or "decoded", see io_contract.py
    opset          of the file
    activation     of its class logits
    boxes          how the file writes boxes, in the words of --boxes
    normalization  the preprocessing outside of the file; stated: whether the user gave any of it
    queries        number of queries
    notes          how its outputs were read and why, what the files next to it contain, what could not be kept
    ap             points, on some of the labeled images; None without
    is_fp16        whether the file computes in float16
    folded         scales and BatchNormalizations folded into convolutions
    gathered       GridSamples rewritten as gathers
    objects        detections of the file that were compared, on `images` images: all were found again
    """

    bundle: Bundle
    contract: str
    opset: int
    activation: str
    boxes: str
    normalization: Normalization
    stated: bool
    queries: int
    notes: tuple[str, ...]
    ap: float | None
    is_fp16: bool
    folded: int
    gathered: int
    objects: int
    images: int

    def describe(self) -> str:
        """What was found, in some sentences."""
        how = {
            "raw": "gives logits and boxes of all queries",
            "joined": "gives boxes and classes in one (they were taken apart)",
            "decoded": "gives chosen objects (the choice was cut off)",
        }[self.contract]
        size = f"{self.bundle.manifest.input.height} x {self.bundle.manifest.input.width} px"
        what = (
            f"opset {self.opset}, {'float16, ' if self.is_fp16 else ''}{size}, {how}; {self.queries} queries, "
            f"{self.activation}, {len(self.bundle.manifest.classes)} classes; {self.folded} scales folded into "
            f"convolutions, {self.gathered} GridSamples written as gathers"
        )
        lines = [what, *(f"read: {reason}" for reason in self.notes)]
        if self.ap is not None:
            lines.append(
                f"AP {self.ap:.1f} on labeled images"
                + (
                    ""
                    if self.ap >= SPEAKS
                    else ": it finds next to nothing there; check --classes, --columns, --scale, --mean and --std"
                )
            )
        if self.contract == "decoded":
            lines.append(
                f"checked on {self.images} images: all of {self.objects} "
                "objects that the file itself chooses are found again"
            )
        else:
            lines.append(
                f"checked on {self.images} images: the graph gives what the file gives, read the same way "
                f"({self.objects} objects); that says nothing of the reading"
            )
        if not self.stated:
            lines.append(
                f"normalization taken: {self.normalization.describe()}; the file itself does not say it, so check it, "
                "and change it by --scale, --mean, --std and --resize"
            )
        lines.append("the reference of this bundle is the ONNX file itself: there is no PyTorch model")
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """The keys of `edgedetr import --json`."""
        return {
            "bundle": str(self.bundle.path),
            "contract": self.contract,
            "opset": self.opset,
            "activation": self.activation,
            "boxes": self.boxes,
            "pixels": asdict(self.normalization),
            "queries": self.queries,
            "why": self.notes,
            "ap": self.ap,
            "half": self.is_fp16,
            "folded": self.folded,
            "gathered": self.gathered,
            "objects": self.objects,
            "pictures": self.images,
        }


def import_onnx_model(path: str | Path, out: str | Path, options: ImportOptions | None = None) -> ImportedOnnxModel:
    """Write a bundle from an ONNX file; a failed import leaves nothing behind.

    Errors: UsageError where the file leaves a meaning open and no option states it; ExportError for a file that cannot
    be imported; DataError for the data set.
    """
    options = options or ImportOptions()
    path, out = as_path(path, "path", "that of an ONNX file"), as_path(out, "out")
    if (out / WEIGHTS.file).exists():
        raise UsageError(f"{out} holds a trained model; name another --out")
    original = read_model(path)
    beside = read_beside(path)
    names = read_names(Path(options.classes)) if options.classes is not None else None
    taken = io_contract.inputs(original)
    height, width = size_of(original, taken.image, options.size, beside)
    model, graph, half = fixed(original, taken, height, width)
    pixels = options.normalization(replace(usual([item.name for item in model.graph.output]), **beside.pixels))
    contract = InputContract(height, width, pixels.resize)
    record = _record(options.data)
    dataset = load(record.path, record.verify_split) if record is not None else None
    images = probes(dataset, contract)
    oracle = Original(original, taken, pixels.factor, pixels.shift)
    feeds = [oracle.feed(images[number : number + 1]) for number in range(len(images))]
    found = understand(model, graph, feeds, Asked(options.activation, options.boxes, tuple(options.outputs)), SIDE)
    known = dataset.classes if dataset is not None else None
    source = "--classes"
    if names is None and options.columns is None and beside.names is not None:
        names, source = list(beside.names), "config.json"
    counted = names is not None or known is not None

    def kept_by(function: Literal["sigmoid", "softmax"]) -> Kept:
        return columns_of(found.width, function, names, known, options.columns or "index", source)

    noise = [found.logits.rows(value) for value in run(model, [found.logits.tensor], feeds[:NOISE])]
    judge = Judge(dataset, oracle, contract) if dataset is not None and len(dataset) else None
    choice = choose(found, kept_by, graph, beside.model_type, noise, judge, counted)
    found, kept = choice.found, choice.kept
    output = OutputContract(kept.activation, found.top_k or OutputContract().top_k)
    if taken.sizes:
        model.graph.initializer.append(
            numpy_helper.from_array(np.full((1, 2), SIDE, dtype_of(model, taken.sizes)), taken.sizes)
        )
    result = surgery.dress(
        model,
        taken.image,
        found.logits,
        found.boxes,
        found.form,
        scale=pixels.factor,
        shift=pixels.shift,
        columns=kept.places,
        queries=found.queries,
        width=found.width,
    )
    remove_redundant_casts(result)
    result = fold(result)
    folded = surgery.absorb_scales(result)
    surgery.name_nodes(result)
    gathered = replace_grid_samples(result) if options.sampling != "grid_sample" else 0
    prefix_nodes(result, found.queries)
    prune(result)
    manifest = Manifest(MODEL, kept.classes, contract, output, data=record)
    opset = GraphIndex(original).opset
    _finish(result, manifest, path, opset)
    notes = [*found.why, *beside.notes, *_sizes(beside, height, width)]
    ours = _objects(result, images, output, found)
    if half:  # rounding decides what the file chooses: the graph is compared with the same one in float32
        wide = Original(model, replace(taken, mask=""), pixels.factor, pixels.shift)
        found_again = _compare(ours, wide, images, output, found, kept).objects
        notes.append(
            f"the file computes in float16, model.onnx in float32; against the file: "
            f"{_compare(ours, oracle, images, output, found, kept, half=True).words}"
        )
    else:
        found_again = _compare(ours, oracle, images, output, found, kept).objects
    bundle = Bundle.create(out, manifest)
    with bundle.add(ONNX.file, stage=STAGE) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))
    return ImportedOnnxModel(
        bundle,
        found.answer.kind,
        opset,
        kept.activation,
        found.given.option,
        pixels,
        options.gives_normalization,
        found.queries,
        tuple(notes),
        choice.ap,
        half,
        folded,
        gathered,
        found_again,
        len(images),
    )


def _objects(
    result: ModelProto, images: np.ndarray, output: OutputContract, found: Understood
) -> dict[int, Detections]:
    """What the bundle's graph finds in each image, in pixels of the input."""
    given = run(result, ["logits", "boxes"], [{"images": images[number : number + 1]} for number in range(len(images))])
    return {
        number: decoded(
            RawOutputs(one["logits"], one["boxes"]),
            images[number : number + 1],
            output,
            one["logits"].shape[2],
            found.rule,
        )
        for number, one in enumerate(given)
    }


def _compare(
    ours: dict[int, Detections],
    oracle: Original,
    images: np.ndarray,
    output: OutputContract,
    found: Understood,
    kept: Kept,
    *,
    half: bool = False,
) -> Agreement:
    """How the file's objects are found again by the new graph; ExportError unless it is all of them.

    half  the oracle computes in float16
    """
    theirs = renumbered(oracle.detect(images, found, output), kept.places[: len(kept.classes)])
    again = agree(theirs, ours, half=half)
    if not again.same:
        raise ExportError(
            f"after the import the graph does not detect what the file did: {again.words}; expected the "
            "same objects; export the model at opset 17 to 19 with a fixed size, and report this"
        )
    log.info("the imported graph finds what the file found: %s", again.words)
    return again


def _sizes(beside: Beside, height: int, width: int) -> list[str]:
    """What is to be said of the size where the processor names another."""
    if beside.size in (None, (height, width)):
        return []
    return [f"{PROCESSOR} says {' x '.join(str(side) for side in beside.size or ())}; the input is {height} x {width}"]


def _record(data: str | Path | None) -> DataRecord | None:
    """Which splits of a data set verify and calibrate, as training chooses them."""
    if data is None:
        return None
    there = splits(data)
    verify = next((name for name in ("test", "val") if there.get(name)), None)
    calib = "train" if there.get("train") else None
    if verify is None or calib is None:
        raise DataError(
            f"{data}: splits {', '.join(there) or 'none'}; expected train to calibrate on, and test or val to verify on"
        )
    return DataRecord(str(Path(data).resolve()), verify, calib)


def _finish(model: ModelProto, manifest: Manifest, path: Path, opset: int) -> None:
    """Name the file's origin in it, and check that it is one of ours."""
    model.producer_name, model.graph.name = "edgedetr", "edgedetr"
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    for item in list(model.opset_import):
        if item.domain:
            model.opset_import.remove(item)
    told = model_metadata(manifest, "")
    told.update({"imported": json.dumps({"file": path.name, "sha256": digest(path), "opset": opset})})
    onnx.helper.set_model_props(model, {METADATA_PREFIX + key: value for key, value in told.items()})
    check_graph(model, OPSET)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # C++ errors of several kinds
        raise ExportError(
            f"{path}: what came of the import is not valid ONNX ({first_line(error)}); export the model "
            "at opset 17 to 19, and report this"
        ) from error
