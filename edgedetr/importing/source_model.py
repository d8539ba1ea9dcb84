"""The source model, unchanged, in ONNX Runtime: the bundle's graph must find the objects that it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from edgedetr.bundle import ClassInfo, InputContract, OutputContract
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.errors import ExportError, ModelError
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.importing.import_options import Normalization
from edgedetr.importing.io_contract import DenseOutputs, GraphInputs, SelectedOutputs
from edgedetr.importing.output_formats import from_corners
from edgedetr.importing.output_meaning import OutputMeaning
from edgedetr.importing.output_tracing import RUN_FIX
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.preprocess import Geometry, prepare

NOISE_IMAGES = 2
VERIFY_IMAGES = 2  # of the verify split, in addition
MIN_OBJECTS = 10  # objects of each image that must be found again at least
ORIGINAL_SIDE = 1000  # given as height and width of the original image: in a square, their order does not matter


@dataclass(frozen=True)
class Tolerance:
    """When two models find the same objects.

    overlap   smallest IoU of a pair
    score, pixels   largest differences of pairs, 99th percentile
    matched   smallest fraction of the source model's objects that are found again, 0..1
    spurious  whether the other model may find further objects
    """

    overlap: float
    score: float
    pixels: float
    matched: float
    spurious: bool


# Rounding of float32 gives 1e-4 of a score and of a pixel.
FP32 = Tolerance(overlap=0.9, score=1e-2, pixels=0.5, matched=1.0, spurious=False)
# A file that computes in float16 rounds to 1e-3 of a logit of 10, layer after layer, and rounding changes which queries
# it selects: of a model with random weights 60 % of the best objects were the same.
FP16 = Tolerance(overlap=0.75, score=5e-2, pixels=4.0, matched=0.25, spurious=True)


@dataclass(frozen=True)
class Comparison:
    """objects   detections of the source model that were compared
    same         whether they were found again within the tolerance
    differences  in one sentence
    """

    objects: int
    same: bool
    differences: str


class SourceModel:
    """A session of the file, and the inputs that it takes in addition to the image."""

    def __init__(self, model: ModelProto, inputs: GraphInputs, normalization: Normalization) -> None:
        """normalization   applied to images before they go into the graph"""
        self.inputs = inputs
        self.factor, self.shift = (
            value.astype(np.float32).reshape(3, 1, 1) for value in (normalization.factor, normalization.shift)
        )
        self.types = {
            item.name: helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type) for item in model.graph.input
        }
        # For a few runs: threads need not spin, and a full optimization takes longer than the runs.
        self.session = GraphSession(model, optimize="basic", spin=False, fix=RUN_FIX)

    def feed(self, image: np.ndarray, *, mask: bool = False) -> dict[str, np.ndarray]:
        """Inputs for one image [1, 3, H, W], RGB 0..255."""
        given = {self.inputs.image: image * self.factor + self.shift}
        if self.inputs.sizes:
            given[self.inputs.sizes] = np.full((1, 2), ORIGINAL_SIDE, self.types[self.inputs.sizes])
        if self.inputs.mask and mask:
            given[self.inputs.mask] = np.ones((1, *image.shape[2:]), self.types[self.inputs.mask])
        return given

    def outputs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs for one image [1, 3, H, W]; float16 as float32."""
        found = self.session.run(self.feed(image, mask=True))
        return {
            name: np.asarray(value, np.float32 if np.asarray(value).dtype == np.float16 else None)
            for name, value in found.items()
        }

    def detect(self, images: np.ndarray, meaning: OutputMeaning, output: OutputContract) -> dict[int, Detections]:
        """Objects in each image, boxes in pixels of the input; a class is a column of the model's logits."""
        result = {}
        for number in range(len(images)):
            image = images[number : number + 1]
            values = self.outputs(image)
            if isinstance(meaning.outputs, SelectedOutputs):
                result[number] = _selected_objects(meaning.outputs, meaning, values, image)
            else:
                raw = raw_outputs(meaning.outputs, meaning, values)
                result[number] = decode_in_pixels(raw, image, output, meaning.width)
        return result


def raw_outputs(outputs: DenseOutputs, meaning: OutputMeaning, values: dict[str, np.ndarray]) -> RawOutputs:
    """logits [1, N, width] and boxes [1, N, 4] cx, cy, w, h in fractions of the image, from a file's outputs."""
    scores = outputs.scores.rows(values).astype(np.float64)
    corners = meaning.output_format.corners(outputs.boxes.rows(values).astype(np.float64))
    if meaning.has_log_probabilities:
        scores = np.exp(scores)
    if meaning.has_probabilities:
        scores = _logits(scores, meaning)
    return RawOutputs(scores[None].astype(np.float32), from_corners(corners, "cxcywh")[None].astype(np.float32))


def _selected_objects(
    outputs: SelectedOutputs, meaning: OutputMeaning, values: dict[str, np.ndarray], image: np.ndarray
) -> Detections:
    """The objects that the file itself selects in an image."""
    rows = outputs.rows(values)
    size = np.array([image.shape[3], image.shape[2]] * 2)
    columns = {theirs: ours for ours, theirs in (meaning.labels or {}).items()}
    labels = np.array([columns.get(int(label), -1) for label in rows.labels], np.int64)
    corners = np.clip(meaning.output_format.corners(rows.boxes.astype(np.float64)) * size, 0, size)
    return Detections(corners.astype(np.float32), rows.scores.astype(np.float32), labels)


def _logits(scores: np.ndarray, meaning: OutputMeaning) -> np.ndarray:
    """Logits of probabilities [N, K]. For softmax, "no object" is added if the file leaves it out."""
    if meaning.activation == "softmax":
        if scores.shape[1] < meaning.width:
            scores = np.concatenate([scores, 1 - scores.sum(1, keepdims=True)], 1)
        return np.log(np.maximum(scores, 1e-30))
    scores = np.clip(scores, 1e-30, 1 - 1e-7)
    return np.log(scores) - np.log1p(-scores)


def decode_in_pixels(
    raw: RawOutputs, image: np.ndarray, output: OutputContract, width: int, rule: str = "all"
) -> Detections:
    """Detections in pixels of the input [1, 3, H, W], with one class per logit, except softmax's "no object".

    rule  "query" keeps only the best class of each query
    """
    height, columns = image.shape[2:]
    whole = [Geometry.of(height, columns, InputContract(height, columns))]
    usable = width - (output.activation == "softmax")
    classes = [ClassInfo(index, index, str(index)) for index in range(usable)]
    if rule == "query" and output.activation == "sigmoid":
        best = raw.logits == raw.logits.max(-1, keepdims=True)
        raw = RawOutputs(np.where(best, raw.logits, np.float32(-1e4)), raw.boxes)
    try:
        return decode(raw, whole, classes, output)[0]
    except ModelError as error:
        raise ExportError(
            "the model gives NaN or infinity on an image; expected finite numbers: check --scale, "
            "--mean and --std, and the file itself"
        ) from error


def compare(source: dict[int, Detections], imported: dict[int, Detections], tolerance: Tolerance = FP32) -> Comparison:
    """Whether both models found the same objects: at least the MIN_OBJECTS best of every image."""
    shown = [item.confidence[min(MIN_OBJECTS, len(item)) - 1] for item in source.values() if len(item)]
    if not shown:
        return Comparison(0, all(len(item) == 0 for item in imported.values()), "no object found in any image")
    found = compare_detections(source, imported, confidence=float(min(shown)), iou=tolerance.overlap)
    same = (found.matched or 0) >= tolerance.matched and (tolerance.spurious or not found.spurious)
    close = (found.score_p99 or 0) <= tolerance.score and (found.box_p99 or 0) <= tolerance.pixels
    differences = (
        f"{100 * (found.matched or 0):.1f} % of {found.objects} objects found again, "
        f"{100 * (found.spurious or 0):.1f} % added, scores within {found.score_p99 or 0:.2g}, "
        f"boxes within {found.box_p99 or 0:.2g} px"
    )
    return Comparison(found.objects, same and close, differences)


def select_classes(found: dict[int, Detections], columns: Sequence[int]) -> dict[int, Detections]:
    """Only the objects whose class is in `columns`, with its index there as their class."""
    index = {column: number for number, column in enumerate(columns)}
    result = {}
    for number, item in found.items():
        keep = np.isin(item.class_id, list(index))
        labels = np.array([index[int(column)] for column in item.class_id[keep]], np.int64)
        result[number] = Detections(item.xyxy[keep], item.confidence[keep], labels)
    return result


def probe_images(dataset: DetectionSet | None, contract: InputContract) -> np.ndarray:
    """Images [B, 3, H, W] to compare models on: noise, noise in blocks of 16 x 16, and some of the verify split."""
    rng = np.random.default_rng(0)
    shape = (contract.height, contract.width, 3)
    coarse = rng.integers(0, 256, (contract.height // 16 + 1, contract.width // 16 + 1, 3), dtype=np.uint8)
    images = [rng.integers(0, 256, shape, dtype=np.uint8), coarse.repeat(16, 0).repeat(16, 1)[: shape[0], : shape[1]]]
    if dataset is not None and len(dataset):
        images += [decode_image(sample.path) for sample in dataset.evenly_spaced(VERIFY_IMAGES)]
    return prepare(images, contract)[0]
