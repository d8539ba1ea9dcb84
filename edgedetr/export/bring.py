"""Bring your own: a DETR-family ONNX file made elsewhere becomes a bundle that quantises, lints, builds and verifies.

The file's own detections are the oracle: what comes out of the surgery must find the same objects in ONNX Runtime, on
pictures, or nothing is written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto
from onnx.inliner import inline_local_functions

from edgedetr.bundle import Bundle, DataRecord, InputContract, Manifest, OutputContract, digest
from edgedetr.data.layouts import load, splits
from edgedetr.errors import DataError, ExportError, UsageError
from edgedetr.export import foreign, surgery
from edgedetr.export.fold import fold, remove_unused
from edgedetr.export.onnx_file import OPSET, PREFIX, check, describe
from edgedetr.export.opset import IR_VERSION, to_opset
from edgedetr.export.original import Original, agree, decoded, pick, probes, renumbered, session
from edgedetr.export.roles import prefix_nodes
from edgedetr.export.sampling import gather_samples
from edgedetr.export.settle import settle
from edgedetr.export.told import Kept, Pixels, columns_of, read_names, usual
from edgedetr.export.widen import widen
from edgedetr.graph.file import open_onnx
from edgedetr.graph.view import GraphView
from edgedetr.options import one_of
from edgedetr.runtime.runner import RawOutputs

log = logging.getLogger(__name__)

MODEL = "imported"              # what bundle.json calls a model that only its ONNX file knows
STAGE = "import"


@dataclass(frozen=True)
class Brought:
    """What was found in the file, and how well the bundle's graph agrees with it.

    contract     "raw", "decoded" or "joined", see foreign.py
    opset        of the file
    folded       scales and BatchNormalizations folded into convolutions
    gathered     GridSamples written as gathers
    objects      of the file's own detections that were compared, on `pictures` pictures: all were found again
    """

    bundle: Bundle
    contract: str
    opset: int
    activation: str
    pixels: Pixels
    queries: int
    folded: int
    gathered: int
    objects: int
    pictures: int

    def describe(self) -> str:
        """What was found, in one sentence or two."""
        how = {"raw": "gives logits and boxes", "decoded": "gives labels, boxes and scores, which were cut off",
               "joined": "gives boxes and scores in one, which were taken apart"}[self.contract]
        contract = self.bundle.manifest.input
        return (f"opset {self.opset}, {contract.height} x {contract.width} px, {how}; {self.queries} queries, "
                f"{self.activation}, {len(self.bundle.manifest.classes)} classes; {self.folded} scales folded into "
                f"convolutions, {self.gathered} GridSamples written as gathers\nchecked on {self.pictures} pictures: "
                f"all of {self.objects} objects that the file finds are found again")

    def to_json(self) -> dict[str, object]:
        return {**asdict(replace(self, bundle=None)), "bundle": str(self.bundle.path)}  # type: ignore[arg-type]  # a path in JSON


def bring(path: str | Path, out: str | Path, *, data: str | Path | None = None, classes: Path | None = None,
          size: tuple[int, int] | None = None, pixels: Pixels | None = None,
          activation: Literal["sigmoid", "softmax"] | None = None,
          columns: Literal["index", "category-id"] = "index",
          sampling: Literal["gather", "grid_sample"] = "gather") -> Brought:
    """Import an ONNX file; nothing is left behind where it fails.

    data     the labelled pictures to calibrate and verify on; its classes become the bundle's
    classes  a text file that says what each class logit stands for, one a line, "-" for one that is not used;
             None = the data set's classes in order
    size     height and width where the file leaves them open
    pixels   the normalisation outside of the file
    sampling "gather" rewrites GridSample, which TensorRT 10.14 to 11.1 get wrong, into gathers of the same numbers
    columns  where `classes` is None: a class stands at its index, or at the category id of the data set
    """
    path, out = Path(path), Path(out)
    one_of("activation", activation, (None, "sigmoid", "softmax"), UsageError)
    one_of("columns", columns, ("index", "category-id"), UsageError)
    one_of("sampling", sampling, ("gather", "grid_sample"), UsageError)
    if (out / "weights.safetensors").exists():
        raise UsageError(f"{out} holds a trained model; name another --out")
    opened = open_onnx(path)
    if opened.faults:
        raise ExportError(f"{path}: {opened.faults[0]}; expected weights in the file, or in a plain file beside it; "
                          "copy both into one folder (cp -L follows links)")
    names = read_names(classes) if classes is not None else None
    original = _standard(opened.model, path)
    taken = foreign.inputs(original)
    height, width = _size(original, taken.image, size)
    model, view = _fixed(original, taken, height, width)
    found = foreign.outputs(model, view)
    pixels = pixels or usual(found)
    contract = InputContract(height, width, pixels.resize)
    record = _record(data)
    dataset = load(record.path, record.verify_split) if record is not None else None
    images = probes(dataset, contract)
    oracle = Original(original, taken, found, pixels.factor, pixels.shift)
    picked = pick(model, view, oracle, images)
    known = dataset.classes if dataset is not None else None
    kept = columns_of(picked.width, picked.activation or activation, names, known, columns)
    output = OutputContract(kept.activation, oracle.top_k(images[:1]) or OutputContract().top_k)
    result = surgery.dress(model, taken.image, picked.logits, picked.boxes, scale=pixels.factor, shift=pixels.shift,
                           columns=kept.places, queries=picked.queries, width=picked.width)
    result = fold(result)
    folded = surgery.absorb_scales(result)
    surgery.name_nodes(result)
    gathered = gather_samples(result) if sampling == "gather" else 0
    prefix_nodes(result, picked.queries)
    remove_unused(result)
    manifest = Manifest(MODEL, kept.classes, contract, output, data=record)
    opset = GraphView(original, infer=False).opset
    _finish(result, manifest, path, opset)
    found_again = _compare(result, oracle, images, output, picked.width, kept)
    bundle = Bundle.create(out, manifest)
    with bundle.add("model.onnx", stage=STAGE) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))
    return Brought(bundle, found.kind, opset, kept.activation, pixels, picked.queries, folded, gathered,
                   found_again, len(images))


def _compare(result: ModelProto, oracle: Original, images: np.ndarray, output: OutputContract, width: int,
             kept: Kept) -> int:
    """Objects of the file that the new graph finds too; ExportError unless it is all of them."""
    runner = session(result)
    ours = {}
    for number in range(len(images)):
        logits, boxes = runner.run(["logits", "boxes"], {"images": images[number:number + 1]})
        if oracle.found.kind == "raw" and (np.abs(boxes).max() > 4 or boxes[..., 2:].min() < 0):
            raise ExportError(f"boxes go from {boxes.min():.3g} to {boxes.max():.3g}; expected cx, cy, w, h as shares "
                              "of the picture, 0..1; export the model without scaling its boxes")
        ours[number] = decoded(RawOutputs(logits, boxes), images[number:number + 1], output, logits.shape[2])
    theirs = renumbered(oracle.detect(images, output, width), kept.places[:len(kept.classes)])
    found = agree(theirs, ours)
    if not found.same:
        raise ExportError(f"after the import the graph does not detect what the file did: {found.words}; expected the "
                          "same objects; export the model at opset 17 to 19 with a fixed size, and report this")
    log.info("the imported graph finds what the file found: %s", found.words)
    return found.objects


def _standard(model: ModelProto, path: Path) -> ModelProto:
    """The file's graph in operators of ONNX alone, checked."""
    if model.functions:
        model = inline_local_functions(model)
    others = sorted({f"{node.op_type} ({node.domain})" for node in model.graph.node
                     if node.domain not in ("", "ai.onnx")})
    if others:
        raise ExportError(f"{path}: operators that are not ONNX's own: {', '.join(others[:5])}; expected a float32 "
                          "export without fused or custom operators (no plugins, no optimised model)")
    quantised = [node.op_type for node in model.graph.node
                 if node.op_type.endswith(("QuantizeLinear", "Integer")) or node.op_type.startswith("QLinear")]
    if quantised:
        raise ExportError(f"{path}: quantised already ({len(quantised)} nodes like {quantised[0]}); expected the "
                          "float32 model, which edgedetr export --int8 quantises")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"{path}: not valid ONNX ({str(error).splitlines()[0]}); export the model again") from error
    return model


def _size(model: ModelProto, image: str, asked: tuple[int, int] | None) -> tuple[int, int]:
    fixed = foreign.size_of(model, image)
    if asked is not None and any(one not in (None, two) for one, two in zip(fixed, asked)):
        raise UsageError(f"--input is {asked[0]}x{asked[1]}; the file takes {fixed[0] or '?'}x{fixed[1] or '?'} alone; "
                         "leave --input out, or export the model with an open size")
    height, width = asked or fixed
    if height is None or width is None:
        raise UsageError("the file leaves height and width open; say which to use: --input 640x640 (height x width)")
    return height, width


def _fixed(original: ModelProto, taken: foreign.Inputs, height: int, width: int) -> tuple[ModelProto, GraphView]:
    """The graph for one picture of one size, at our opset, folded."""
    model = ModelProto()
    model.CopyFrom(original)
    sizes = {taken.image: [1, 3, height, width], **({taken.sizes: [1, 2]} if taken.sizes else {})}
    masks = {taken.mask: np.ones((1, height, width), _dtype(original, taken.mask))} if taken.mask else {}
    surgery.fix_inputs(model, sizes, masks)
    widen(model)
    model = settle(to_opset(model, OPSET))
    surgery.name_nodes(model)
    view = GraphView(model)
    if view.fault:
        raise ExportError(f"sizes cannot be inferred for a {height} x {width} picture ({view.fault}); expected a model "
                          "that takes this size; say another with --input HxW")
    return model, view


def _dtype(model: ModelProto, name: str) -> np.dtype:
    kind = next(item.type.tensor_type.elem_type for item in model.graph.input if item.name == name)
    return onnx.helper.tensor_dtype_to_np_dtype(kind)


def _record(data: str | Path | None) -> DataRecord | None:
    """Which splits of a data set verify and calibrate, as training chooses them."""
    if data is None:
        return None
    there = splits(data)
    verify = next((name for name in ("test", "val") if there.get(name)), None)
    calib = "train" if there.get("train") else None
    if verify is None or calib is None:
        raise DataError(f"{data}: splits {', '.join(there) or 'none'}; expected train to calibrate on, and test or val "
                        "to verify on")
    return DataRecord(str(Path(data).resolve()), verify, calib)


def _finish(model: ModelProto, manifest: Manifest, path: Path, opset: int) -> None:
    """Name the file's origin in it, and check that it is one of ours."""
    model.producer_name, model.graph.name = "edgedetr", "edgedetr"
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    for item in list(model.opset_import):
        if item.domain:
            model.opset_import.remove(item)
    told = describe(manifest, "")
    told.update({"imported": json.dumps({"file": path.name, "sha256": digest(path), "opset": opset})})
    onnx.helper.set_model_props(model, {PREFIX + key: value for key, value in told.items()})
    check(model, OPSET)
    onnx.checker.check_model(model, full_check=True)
