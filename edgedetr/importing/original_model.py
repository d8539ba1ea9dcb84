"""The foreign file in ONNX Runtime, as it came: what it detects is what the bundle's graph must detect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from edgedetr.bundle import ClassInfo, InputContract, OutputContract
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.errors import ExportError, ModelError, first_line
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.importing.box_format import from_corners
from edgedetr.importing.io_contract import Inputs
from edgedetr.importing.output_meaning import Understood
from edgedetr.importing.output_roles import Chosen
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.backends.onnxruntime import plain_session
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.preprocess import Geometry, prepare

PICTURES = 2  # of the verify split, besides NOISE
NOISE = 2
BEST = 10  # objects of each image that must be found again at least
SIDE = 1000  # what is said to be the height and width of the original image: a square has no order
# Smallest overlap of a box that counts as the same; largest differences of matched objects (99th percentile): rounding
# gives 1e-4 of either. A file that computes in float16 rounds to 1e-3 of a logit of 10, layer after layer.
OVERLAP, SCORE, PIXELS = 0.9, 1e-2, 0.5
# Rounding moves the choice of queries: of a model with random weights 60 % of the best objects were the same.
HALF_OVERLAP, HALF_SCORE, HALF_PIXELS, HALF_FOUND = 0.75, 5e-2, 4.0, 0.25


@dataclass(frozen=True)
class Agreement:
    """objects   of the file's own detections that were compared
    same         all of them were found again, none added, at the same place with the same score
    words        the differences, for a message
    """

    objects: int
    same: bool
    words: str


class Original:
    """The file, and what it needs besides the image."""

    def __init__(self, model: ModelProto, taken: Inputs, factor: np.ndarray, shift: np.ndarray) -> None:
        """factor, shift  [3]  the normalization that the file expects outside: pixels * factor + shift"""
        self.taken = taken
        self.factor, self.shift = (value.astype(np.float32).reshape(3, 1, 1) for value in (factor, shift))
        self.types = {
            item.name: helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type) for item in model.graph.input
        }
        self.names = [item.name for item in model.graph.output]
        # A few runs: threads need not wait hot, and finding the fastest form would take longer than running.
        self.session = plain_session(
            model.SerializeToString(),
            optimize="basic",
            spin=False,
            error=ExportError,
            fix="export the model again, as float32 and with operators of ONNX alone",
        )

    def feed(self, image: np.ndarray, *, mask: bool = False) -> dict[str, np.ndarray]:
        """Inputs for one image [1, 3, H, W], RGB 0..255."""
        given = {self.taken.image: image * self.factor + self.shift}
        if self.taken.sizes:
            given[self.taken.sizes] = np.full((1, 2), SIDE, self.types[self.taken.sizes])
        if self.taken.mask and mask:
            given[self.taken.mask] = np.ones((1, *image.shape[2:]), self.types[self.taken.mask])
        return given

    def outputs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs for one image."""
        try:
            found = self.session.run(self.names, self.feed(image, mask=True))
        except Exception as error:  # the library's exceptions share no public base class
            raise ExportError(
                f"the file does not run on an image of {image.shape[2]} x {image.shape[3]} in ONNX "
                f"Runtime ({first_line(error)}); say its size with --input HxW"
            ) from error
        return {
            name: np.asarray(value, np.float32 if np.asarray(value).dtype == np.float16 else None)
            for name, value in zip(self.names, found)
        }

    def raw(self, found: Understood, values: dict[str, np.ndarray]) -> RawOutputs:
        """logits [1, N, width] and boxes [1, N, 4] cx, cy, w, h in shares, from what the file gives for all queries."""
        scores = found.answer.scores.rows(values).astype(np.float64)  # type: ignore[union-attr]  # Dense
        boxes = found.given.corners(found.answer.boxes.rows(values).astype(np.float64))  # type: ignore[union-attr]
        if found.logarithms:
            scores = np.exp(scores)
        if found.probabilities:
            scores = _logits(scores, found)
        return RawOutputs(scores[None].astype(np.float32), from_corners(boxes, "cxcywh")[None].astype(np.float32))

    def detect(self, images: np.ndarray, found: Understood, output: OutputContract) -> dict[int, Detections]:
        """What the file detects in each image, in pixels of the input; classes are places among its logits."""
        result = {}
        for number in range(len(images)):
            image = images[number : number + 1]
            if isinstance(found.answer, Chosen):
                result[number] = self._own(found, image)
            else:
                result[number] = decoded(self.raw(found, self.outputs(image)), image, output, found.width)
        return result

    def _own(self, found: Understood, image: np.ndarray) -> Detections:
        """The file's own choice as Detections."""
        rows = found.answer.rows(self.outputs(image))  # type: ignore[union-attr]  # Chosen
        size = np.array([image.shape[3], image.shape[2]] * 2)
        places = {theirs: ours for ours, theirs in (found.labels or {}).items()}
        labels = np.array([places.get(int(label), -1) for label in rows.labels], np.int64)
        corners = np.clip(found.given.corners(rows.boxes.astype(np.float64)) * size, 0, size)
        return Detections(corners.astype(np.float32), rows.scores.astype(np.float32), labels)


def _logits(scores: np.ndarray, found: Understood) -> np.ndarray:
    """Logits of probabilities [N, K]; of softmax with the one for "no object", where the file leaves it out."""
    if found.activation == "softmax":
        if scores.shape[1] < found.width:
            scores = np.concatenate([scores, 1 - scores.sum(1, keepdims=True)], 1)
        return np.log(np.maximum(scores, 1e-30))
    scores = np.clip(scores, 1e-30, 1 - 1e-7)
    return np.log(scores) - np.log1p(-scores)


def decoded(raw: RawOutputs, image: np.ndarray, output: OutputContract, width: int, rule: str = "all") -> Detections:
    """Detections in pixels of the input; one class for each of `width` logits but the "no object" of softmax.

    rule  "query" keeps the best class of each query alone
    """
    height, columns = image.shape[2:]
    whole = [Geometry.of(height, columns, InputContract(height, columns))]
    usable = width - (output.activation == "softmax")
    classes = [ClassInfo(place, place, str(place)) for place in range(usable)]
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


def agree(theirs: dict[int, Detections], ours: dict[int, Detections], *, half: bool = False) -> Agreement:
    """Whether both found the same: the BEST of every image at least, by class, place and score.

    half   one computes in float16, and the other does not
    """
    shown = [item.confidence[min(BEST, len(item)) - 1] for item in theirs.values() if len(item)]
    if not shown:
        return Agreement(0, all(len(item) == 0 for item in ours.values()), "no object found in any image")
    overlap, score, pixels = (HALF_OVERLAP, HALF_SCORE, HALF_PIXELS) if half else (OVERLAP, SCORE, PIXELS)
    found = compare_detections(theirs, ours, confidence=float(min(shown)), iou=overlap)
    same = (found.matched or 0) >= (HALF_FOUND if half else 1.0) and (half or not found.spurious)
    close = (found.score_p99 or 0) <= score and (found.box_p99 or 0) <= pixels
    words = (
        f"{100 * (found.matched or 0):.1f} % of {found.objects} objects found again, "
        f"{100 * (found.spurious or 0):.1f} % added, scores within {found.score_p99 or 0:.2g}, "
        f"boxes within {found.box_p99 or 0:.2g} px"
    )
    return Agreement(found.objects, same and close, words)


def renumbered(found: dict[int, Detections], kept: Sequence[int]) -> dict[int, Detections]:
    """Only the classes at the places `kept`, under their index there."""
    index = {place: number for number, place in enumerate(kept)}
    result = {}
    for number, item in found.items():
        keep = np.isin(item.class_id, list(index))
        labels = np.array([index[int(place)] for place in item.class_id[keep]], np.int64)
        result[number] = Detections(item.xyxy[keep], item.confidence[keep], labels)
    return result


def probes(dataset: DetectionSet | None, contract: InputContract) -> np.ndarray:
    """Images [B, 3, H, W] to compare on: noise, noise in blocks, and some of the verify split."""
    rng = np.random.default_rng(0)
    shape = (contract.height, contract.width, 3)
    coarse = rng.integers(0, 256, (contract.height // 16 + 1, contract.width // 16 + 1, 3), dtype=np.uint8)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8), coarse.repeat(16, 0).repeat(16, 1)[: shape[0], : shape[1]]]
    if dataset is not None and len(dataset):
        chosen = np.linspace(0, len(dataset) - 1, min(PICTURES, len(dataset))).astype(int)
        pictures += [decode_image(dataset.samples[number].path) for number in chosen]
    return prepare(pictures, contract)[0]
