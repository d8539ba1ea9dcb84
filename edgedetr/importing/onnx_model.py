"""Import a DETR-family ONNX file made elsewhere: a bundle that quantizes, lints, builds and verifies.

The file's own detections are the reference: the bundle's graph must find the same objects in ONNX Runtime, on images,
or nothing is written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from edgedetr.artifacts import ONNX, WEIGHTS
from edgedetr.bundle import Bundle, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.data.coco_classes import UNUSED
from edgedetr.data.layouts import load, splits
from edgedetr.errors import DataError, ExportError, UsageError, first_line
from edgedetr.importing import io_contract, surgery
from edgedetr.importing.class_names import ClassColumns, class_columns, read_names
from edgedetr.importing.disambiguation import DECISIVE_AP, Clues, LabeledImages, resolve_ambiguity
from edgedetr.importing.image_processor import PROCESSOR, find_processor, read_processor, unsupported
from edgedetr.importing.import_options import ImportOptions, Normalization, default_normalization
from edgedetr.importing.output_meaning import OutputMeaning, find_output_meaning
from edgedetr.importing.output_tracing import run_graph
from edgedetr.importing.source_model import (
    FP16,
    FP32,
    NOISE_IMAGES,
    ORIGINAL_SIDE,
    Comparison,
    SourceModel,
    Tolerance,
    compare,
    decode_in_pixels,
    probe_images,
    select_classes,
)
from edgedetr.models.checkpoints.transformers_config import config_labels
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
from edgedetr.storage.reading import read_json

log = logging.getLogger(__name__)

MODEL = "imported"  # name of the model in bundle.json: only its ONNX file knows more
STEP = "import"


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
            "joined": "gives boxes and classes in one (they were split)",
            "decoded": "gives selected objects (the selection was cut off)",
        }[self.contract]
        size = f"{self.bundle.manifest.input.height} x {self.bundle.manifest.input.width} px"
        what = (
            f"opset {self.opset}, {'float16, ' if self.is_fp16 else ''}{size}, {how}; {self.queries} queries, "
            f"{self.activation}, {len(self.bundle.manifest.classes)} classes; {self.folded} scales folded into "
            f"convolutions, {self.gathered} GridSamples written as gathers"
        )
        lines = [what, *(f"read: {note}" for note in self.notes)]
        if self.ap is not None:
            lines.append(
                f"AP {self.ap:.1f} on labeled images"
                + (
                    ""
                    if self.ap >= DECISIVE_AP
                    else ": it finds next to nothing there; check --classes, --columns, --scale, --mean and --std"
                )
            )
        if self.contract == "decoded":
            lines.append(
                f"checked on {self.images} images: all of {self.objects} "
                "objects that the file itself selects are found again"
            )
        else:
            lines.append(
                f"checked on {self.images} images: the graph gives what the file gives, read the same way "
                f"({self.objects} objects); that does not show that the reading is right"
            )
        if not self.stated:
            lines.append(
                f"normalization taken: {self.normalization.describe()}; the file itself does not contain it, so "
                "check it, and change it by --scale, --mean, --std and --resize"
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
            "images": self.images,
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
    source_model = io_contract.read_model(path)
    files = read_model_files(path)
    inputs = io_contract.classify_inputs(source_model)
    height, width = io_contract.input_size(source_model, inputs.image, options.size, files.size)
    graph = surgery.normalize(source_model, inputs, height, width)
    usual = default_normalization([item.name for item in graph.model.graph.output])
    normalization = options.normalization(files.normalization or usual)
    contract = InputContract(height, width, normalization.resize)
    record = _data_record(options.data)
    dataset = load(record.path, record.verify_split) if record is not None else None
    images = probe_images(dataset, contract)
    source = SourceModel(source_model, inputs, normalization)
    feeds = [source.feed(images[number : number + 1]) for number in range(len(images))]
    meaning = find_output_meaning(graph.model, graph.index, feeds, options, ORIGINAL_SIDE)

    names, named_by = _class_names(options, files)
    known = dataset.classes if dataset is not None else None

    def columns_for(activation: Literal["sigmoid", "softmax"]) -> ClassColumns:
        return class_columns(meaning.width, activation, names, known, options.columns or "index", named_by)

    noise = run_graph(graph.model, [meaning.logits.tensor], feeds[:NOISE_IMAGES])
    clues = Clues(
        graph.index,
        files.model_type,
        [meaning.logits.rows(value) for value in noise],
        LabeledImages(dataset, source, contract) if dataset is not None and len(dataset) else None,
        has_class_count=names is not None or known is not None,
    )
    resolved = resolve_ambiguity(meaning, columns_for, clues)
    meaning, columns = resolved.meaning, resolved.columns
    output = OutputContract(columns.activation, meaning.top_k or OutputContract().top_k)
    result, folded, gathered = _rewrite(graph.model, inputs, meaning, columns, normalization, options)
    manifest = Manifest(MODEL, columns.classes, contract, output, data=record)
    opset = GraphIndex(source_model).opset
    _write_metadata(result, manifest, path, opset)

    notes = [*meaning.reasons, *files.notes]
    if files.size not in (None, (height, width)):
        listed = " x ".join(str(side) for side in files.size or ())
        notes.append(f"{PROCESSOR} has size {listed}; the input is {height} x {width}")
    imported = _detect(result, images, output, meaning)
    if graph.is_fp16:  # rounding decides what the file selects: the graph is compared with itself in float32
        widened = SourceModel(graph.model, replace(inputs, mask=""), normalization)
        objects = _compare(widened.detect(images, meaning, output), imported, columns, FP32).objects
        rounded = _compare(source.detect(images, meaning, output), imported, columns, FP16)
        notes.append(f"the file computes in float16, {ONNX.file} in float32; against the file: {rounded.differences}")
    else:
        objects = _compare(source.detect(images, meaning, output), imported, columns, FP32).objects
    bundle = Bundle.create(out, manifest)
    with bundle.add(ONNX.file, stage=STEP) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))
    return ImportedOnnxModel(
        bundle,
        meaning.outputs.kind,
        opset,
        columns.activation,
        meaning.output_format.option,
        normalization,
        options.gives_normalization,
        meaning.queries,
        tuple(notes),
        resolved.ap,
        graph.is_fp16,
        folded,
        gathered,
        objects,
        len(images),
    )


@dataclass(frozen=True)
class ModelFiles:
    """What config.json and the image processor next to an ONNX file contain; empty without them.

    names           of the class logits in order, "-" for one that is not used
    model_type      as transformers names it
    normalization   and kind of resize
    size            (height, width) of the input
    notes           what was taken from where, and what could not be kept
    """

    names: tuple[str, ...] | None = None
    model_type: str | None = None
    normalization: Normalization | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def read_model_files(path: Path) -> ModelFiles:
    """The files of transformers in the folder of an ONNX file, or in the folder above one called onnx.

    Errors: ExportError for damaged files, and for preprocessing that a bundle cannot do.
    """
    folders = [path.parent, *([path.parent.parent] if path.resolve().parent.name == "onnx" else [])]

    def find(name: str) -> Path | None:
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    notes: list[str] = []
    config_path = find("config.json")
    config = read_json(config_path, ExportError) if config_path is not None else {}
    config = config if isinstance(config, dict) else {}  # another program's file of that name
    model_type = config.get("model_type")
    names = _config_names(config, str(config_path))
    if names is not None:
        notes.append(f"{len(names)} class names are those of config.json")
    found = find_processor(find, ExportError)
    normalization, size = _config_normalization(*found, notes) if found is not None else (None, None)
    return ModelFiles(names, model_type if isinstance(model_type, str) else None, normalization, size, tuple(notes))


def _config_names(config: dict[str, Any], where: str) -> tuple[str, ...] | None:
    """Names of the class logits; None if there are none, or only the placeholders LABEL_0, LABEL_1 ..."""
    labels = config_labels(config, where, ExportError)
    if labels is None or all(name == f"LABEL_{index}" for index, name in enumerate(labels)):
        return None
    names = ["-" if name == UNUSED else name for name in labels]
    used = [name for name in names if name != "-"]
    if not used or "" in used or len(set(used)) < len(used):
        raise ExportError(
            f"{where}: id2label has empty names or one name twice; repair it, or give the names by "
            "--classes FILE and move it away"
        )
    count = config.get("num_labels")
    if isinstance(count, int) and count != len(names):
        raise ExportError(
            f"{where}: num_labels is {count}, and id2label names {len(names)}; repair it, or give the "
            "names by --classes FILE and move it away"
        )
    return tuple(names)


def _config_normalization(
    raw: dict[str, Any], where: str, notes: list[str]
) -> tuple[Normalization, tuple[int, int] | None]:
    """Normalization and size (height, width) of an image processor; `notes` gets what a bundle does differently."""
    reasons = unsupported(raw)
    for key in ("do_center_crop", "do_flip_channel_order"):
        if key in reasons:
            raise ExportError(
                f"{where}: {key} is true, which a bundle cannot do; expected a whole image in RGB; "
                "move the file away and give --scale, --mean, --std and --resize"
            )
    found = read_processor(raw, where, ExportError)
    name = Path(where).name
    size = found.padding
    resize: Literal["stretch", "letterbox"] = "stretch"
    if found.size is not None and found.size.kind == "sides":
        size = found.size.first, found.size.second
    elif found.size is not None:
        resize = "letterbox"
        notes.append(
            f"{name} keeps the aspect of images ({found.size.first} to {found.size.second} px): they are letterboxed "
            "into the input"
        )
    notes.append(f"the normalization is that of {name}")
    if "resample" in reasons:
        notes.append(f"{name}: resample {raw['resample']} is not kept: {reasons['resample']}")
    if not found.resizes:
        notes.append(f"{name}: do_resize is false; a bundle resizes every image to its input")
    unread = sorted(set(reasons) - {"resample"})
    if unread:
        notes.append(f"{name}: not read: {', '.join(unread[:8])}")
    return Normalization(found.scale, found.mean, found.std, resize), size


def _class_names(options: ImportOptions, files: ModelFiles) -> tuple[list[str] | None, str]:
    """Names of the class logits and where they come from; None if they have to come from the data set."""
    if options.classes is not None:
        return read_names(Path(options.classes)), "--classes"
    if options.columns is None and files.names is not None:
        return list(files.names), "config.json"
    return None, "--classes"


def _rewrite(
    model: ModelProto,
    inputs: io_contract.GraphInputs,
    meaning: OutputMeaning,
    columns: ClassColumns,
    normalization: Normalization,
    options: ImportOptions,
) -> tuple[ModelProto, int, int]:
    """The bundle's graph, the number of scales folded into convolutions, and of GridSamples rewritten as gathers."""
    if inputs.sizes:
        side = np.full((1, 2), ORIGINAL_SIDE, io_contract.dtype_of(model, inputs.sizes))
        model.graph.initializer.append(numpy_helper.from_array(side, inputs.sizes))
    outputs = surgery.ContractOutputs(
        meaning.logits, meaning.boxes, meaning.box_format, meaning.queries, meaning.width, columns.columns
    )
    result = surgery.attach_contract(
        model, inputs.image, outputs, scale=normalization.factor, shift=normalization.shift
    )
    remove_redundant_casts(result)
    result = fold(result)
    folded = surgery.fold_scales(result)
    surgery.name_nodes(result)
    gathered = replace_grid_samples(result) if options.sampling != "grid_sample" else 0
    surgery.annotate_nodes(result, meaning.queries)
    prune(result)
    return result, folded, gathered


def _detect(
    model: ModelProto, images: np.ndarray, output: OutputContract, meaning: OutputMeaning
) -> dict[int, Detections]:
    """What the bundle's graph detects in each image, in pixels of the input."""
    feeds = [{"images": images[number : number + 1]} for number in range(len(images))]
    found = {}
    for number, values in enumerate(run_graph(model, ["logits", "boxes"], feeds)):
        raw, width = RawOutputs(values["logits"], values["boxes"]), values["logits"].shape[2]
        found[number] = decode_in_pixels(raw, images[number : number + 1], output, width, meaning.rule)
    return found


def _compare(
    source: dict[int, Detections], imported: dict[int, Detections], columns: ClassColumns, tolerance: Tolerance
) -> Comparison:
    """How the imported graph finds the source model's objects again; ExportError unless within the tolerance."""
    found = compare(select_classes(source, columns.columns[: len(columns.classes)]), imported, tolerance)
    if not found.same:
        raise ExportError(
            f"after the import the graph does not detect what the file did: {found.differences}; expected the "
            "same objects; export the model at opset 17 to 19 with a fixed size, and report this"
        )
    log.info("the imported graph finds what the file found: %s", found.differences)
    return found


def _data_record(data: str | Path | None) -> DataRecord | None:
    """The splits of a data set to verify and to calibrate on, chosen as training does."""
    if data is None:
        return None
    found = splits(data)
    verify = next((name for name in ("test", "val") if found.get(name)), None)
    calib = "train" if found.get("train") else None
    if verify is None or calib is None:
        raise DataError(
            f"{data}: splits {', '.join(found) or 'none'}; expected train to calibrate on, and test or val to verify on"
        )
    return DataRecord(str(Path(data).resolve()), verify, calib)


def _write_metadata(model: ModelProto, manifest: Manifest, path: Path, opset: int) -> None:
    """Write the bundle's metadata and the file's origin into the graph, and check it."""
    model.producer_name, model.graph.name = "edgedetr", "edgedetr"
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    for item in list(model.opset_import):
        if item.domain:
            model.opset_import.remove(item)
    metadata = model_metadata(manifest, "")
    metadata.update({"imported": json.dumps({"file": path.name, "sha256": digest(path), "opset": opset})})
    onnx.helper.set_model_props(model, {METADATA_PREFIX + key: value for key, value in metadata.items()})
    check_graph(model, OPSET)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # C++ errors of several kinds
        raise ExportError(
            f"{path}: the result of the import is not valid ONNX ({first_line(error)}); export the model "
            "at opset 17 to 19, and report this"
        ) from error
