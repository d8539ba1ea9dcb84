"""The foreign file in ONNX Runtime, as it came: what it detects decides which tensors are its logits and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from edgedetr.boxes import cxcywh_to_xyxy
from edgedetr.bundle import ClassInfo, InputContract, OutputContract
from edgedetr.data.form import DetectionSet
from edgedetr.data.images import decode as decode_image
from edgedetr.errors import ExportError, ModelError
from edgedetr.evaluation.parity import match
from edgedetr.export.foreign import Inputs, Outputs, candidates
from edgedetr.graph.view import GraphView
from edgedetr.runtime.detections import Detections
from edgedetr.runtime.ort import plain_session
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import Geometry, prepare
from edgedetr.runtime.runner import RawOutputs

PICTURES = 2            # of the verify split, besides two of noise
BEST = 10               # objects of each picture that must be found again at least
SIZE = 1000             # what is said to be the height and width of the original picture: a square has no order
OVERLAP = 0.9           # at which a box counts as the same
SCORE, PIXELS = 1e-2, 0.5   # largest differences of matched objects (99th percentile); rounding gives 1e-4 of either


@dataclass(frozen=True)
class Picked:
    """The tensors that are the detector's answer: logits [1, queries, width] and boxes [1, queries, 4]."""

    logits: str
    boxes: str
    activation: str         # as the file itself decodes, or "" where it does not
    width: int
    queries: int


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
    """The file, and what it needs besides the picture."""

    def __init__(self, model: ModelProto, taken: Inputs, found: Outputs, factor: np.ndarray, shift: np.ndarray) -> None:
        """factor, shift  [3]  the normalisation that the file expects outside: pixels * factor + shift"""
        self.taken, self.found = taken, found
        self.factor, self.shift = (value.astype(np.float32).reshape(3, 1, 1) for value in (factor, shift))
        self.types = {item.name: helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
                      for item in model.graph.input}
        self.session = session(model)

    def feed(self, image: np.ndarray, *, mask: bool) -> dict[str, np.ndarray]:
        """Inputs for one picture [1, 3, H, W], RGB 0..255."""
        given = {self.taken.image: image * self.factor + self.shift}
        if self.taken.sizes:
            given[self.taken.sizes] = np.full((1, 2), SIZE, self.types[self.taken.sizes])
        if self.taken.mask and mask:
            given[self.taken.mask] = np.ones((1, *image.shape[2:]), self.types[self.taken.mask])
        return given

    def outputs(self, image: np.ndarray) -> list[np.ndarray]:
        """The file's own outputs for one picture, in the order of `found.given`."""
        try:
            return self.session.run(list(self.found.given), self.feed(image, mask=True))
        except Exception as error:      # the library's exceptions share no public base class
            raise ExportError(f"the file does not run on a picture of {image.shape[2]} x {image.shape[3]} in ONNX "
                              f"Runtime ({str(error).splitlines()[0]}); say its size with --input HxW") from error

    def detect(self, images: np.ndarray, output: OutputContract, width: int) -> dict[int, Detections]:
        """What the file detects in each picture, in pixels of the input; classes are places among `width` logits."""
        found = {}
        for number in range(len(images)):
            image = images[number:number + 1]
            given = self.outputs(image)
            if self.found.kind == "raw":
                raw = RawOutputs(given[0], given[1])
                found[number] = decoded(raw, image, OutputContract(output.activation, output.top_k), width)
            else:
                found[number] = self._own(given, image)
        return found

    def _own(self, given: list[np.ndarray], image: np.ndarray) -> Detections:
        """The file's own decoding as Detections."""
        pixels = np.array([image.shape[3], image.shape[2]] * 2, np.float32)
        if self.found.kind == "joined":
            boxes, scores = given[0][0, :, :4], given[0][0, :, 4:]
            best = np.argsort(-scores, axis=None, kind="stable")[:len(scores)]
            query, label = np.unravel_index(best, scores.shape)
            return Detections((cxcywh_to_xyxy(boxes[query]) * pixels).astype(np.float32),
                              scores[query, label].astype(np.float32), label.astype(np.int64))
        labels, boxes, scores = (value[0] for value in given)
        if self.taken.sizes:
            boxes = boxes / SIZE * pixels
        elif np.abs(boxes).max(initial=0) <= 2:         # not pixels, but shares of the picture
            boxes = boxes * pixels
        order = np.argsort(-scores, kind="stable")
        limit = np.array([image.shape[3], image.shape[2]] * 2)
        return Detections(np.clip(boxes[order], 0, limit).astype(np.float32), scores[order].astype(np.float32),
                          labels[order].astype(np.int64))

    def top_k(self, image: np.ndarray) -> int | None:
        """How many objects the file itself gives, or None where it gives all queries."""
        return self.outputs(image)[0].shape[1] if self.found.kind == "decoded" else None


def session(model: ModelProto) -> Any:
    """ONNX Runtime on the CPU; ExportError where it does not take the graph."""
    # A few runs: threads need not wait hot, and finding the fastest form would take longer than running.
    return plain_session(model.SerializeToString(), optimise="basic", spin=False, error=ExportError, fix="export the "
                         "model again, as float32 and with operators of ONNX alone")


def pick(model: ModelProto, view: GraphView, original: Original, images: np.ndarray) -> Picked:
    """Which tensors of the fixed graph are logits and boxes; ExportError where none give the file's detections."""
    logits, boxes = candidates(view, original.found)
    sizes = {item.tensor: view.shape(item.tensor) or [] for item in [*logits, *boxes]}
    if original.found.kind == "raw":
        queries, width = sizes[logits[0].tensor][1:]
        if queries is None or width is None or queries != sizes[boxes[0].tensor][1]:
            raise ExportError(f"{logits[0].tensor} is {sizes[logits[0].tensor]} and {boxes[0].tensor} "
                              f"{sizes[boxes[0].tensor]}; expected [1, N, K] and [1, N, 4] for one N")
        return Picked(logits[0].tensor, boxes[0].tensor, "", width, queries)
    probe = ModelProto()
    probe.CopyFrom(model)
    names = list(sizes)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    runner = session(probe)
    values = [dict(zip(names, runner.run(names, original.feed(images[i:i + 1], mask=False))))
              for i in range(len(images))]
    count = original.top_k(images[:1]) or 300
    for one in logits:
        for other in boxes:
            queries, width = sizes[one.tensor][1:]
            if width is None or queries is None or sizes[other.tensor][1] != queries:
                continue
            output = OutputContract(one.activation, count)
            ours = {number: decoded(RawOutputs(value[one.tensor], value[other.tensor]), images[number:number + 1],
                                    output, width) for number, value in enumerate(values)}
            if agree(original.detect(images, output, width), ours).same:
                return Picked(one.tensor, other.tensor, one.activation, width, queries)
    raise ExportError(f"none of {len(logits)} x {len(boxes)} tensors that may be logits and boxes give the detections "
                      "that the file itself gives; expected the decoding of RT-DETR or D-FINE (sigmoid or softmax, the "
                      "best of all, boxes as cx, cy, w, h in 0..1); export the model without its post-processing")


def decoded(raw: RawOutputs, image: np.ndarray, output: OutputContract, width: int) -> Detections:
    """Detections in pixels of the input; one class for each of `width` logits but the "no object" of softmax."""
    height, columns = image.shape[2:]
    whole = [Geometry.of(height, columns, InputContract(height, columns))]
    usable = width - (output.activation == "softmax")
    classes = [ClassInfo(place, place, str(place)) for place in range(usable)]
    try:
        return decode(raw, whole, classes, output)[0]
    except ModelError as error:
        raise ExportError("the model gives NaN or infinity on a picture; expected finite numbers: check --scale, "
                          "--mean and --std, and the file itself") from error


def agree(theirs: dict[int, Detections], ours: dict[int, Detections]) -> Agreement:
    """Whether both found the same: the BEST of every picture at least, by class, place and score."""
    shown = [item.confidence[min(BEST, len(item)) - 1] for item in theirs.values() if len(item)]
    if not shown:
        return Agreement(0, all(len(item) == 0 for item in ours.values()), "no object found in any picture")
    found = match(theirs, ours, confidence=float(min(shown)), iou=OVERLAP)
    same = found.matched == 1.0 and not found.spurious
    close = (found.score_p99 or 0) <= SCORE and (found.box_p99 or 0) <= PIXELS
    words = (f"{100 * (found.matched or 0):.1f} % of {found.objects} objects found again, "
             f"{100 * (found.spurious or 0):.1f} % added, scores within {found.score_p99 or 0:.2g}, "
             f"boxes within {found.box_p99 or 0:.2g} px")
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
    """Pictures [B, 3, H, W] to compare on: noise, noise in blocks, and some of the verify split."""
    rng = np.random.default_rng(0)
    shape = (contract.height, contract.width, 3)
    coarse = rng.integers(0, 256, (contract.height // 16 + 1, contract.width // 16 + 1, 3), dtype=np.uint8)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8), coarse.repeat(16, 0).repeat(16, 1)[:shape[0], :shape[1]]]
    if dataset is not None and len(dataset):
        chosen = np.linspace(0, len(dataset) - 1, min(PICTURES, len(dataset))).astype(int)
        pictures += [decode_image(dataset.samples[number].path) for number in chosen]
    return prepare(pictures, contract)[0]
