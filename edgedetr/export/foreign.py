"""What a detector's ONNX file made elsewhere takes and gives: its inputs, and where logits and boxes may be in it.

Three contracts are known:

  raw      logits [B, N, K] and boxes [B, N, 4] as outputs: Hugging Face (logits, pred_boxes), RF-DETR (labels, dets)
  decoded  labels, boxes, scores: RT-DETR, D-FINE and their heirs, with orig_target_sizes as a second input
  joined   one output [B, N, 4 + K]: boxes and scores side by side

Of the last two, the tensors before the decoding are wanted. They are not guessed from a pattern of nodes: candidates
are collected here by shape, and those that reproduce the file's own detections are taken (bring.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from edgedetr.errors import ExportError
from edgedetr.graph.view import GraphView, type_name

LOGITS = ("logits", "pred_logits", "labels", "scores", "class_logits")
BOXES = ("pred_boxes", "dets", "boxes", "bboxes")
# Of these operators only the first input carries the values that are decoded; the others are places and sizes.
_BY_PLACE = {"Gather", "GatherElements", "GatherND", "TopK", "Reshape", "Expand", "Tile", "Slice", "Squeeze",
             "Unsqueeze", "Split", "ReduceMax", "ReduceSum", "Pad", "Resize", "Clip"}
_NEAREST = {"logits": 4, "boxes": 16}       # candidates of each that are tried, from the outputs backwards


@dataclass(frozen=True)
class Inputs:
    """Names of the graph's inputs: the picture, the size of the original picture or "", a mask of its pixels or ""."""

    image: str
    sizes: str = ""
    mask: str = ""


@dataclass(frozen=True)
class Outputs:
    """kind      "raw", "decoded" or "joined"
    given        names of the file's own outputs: (logits, boxes), (labels, boxes, scores) or (joined,)
    """

    kind: str
    given: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A tensor that may be the logits, with the activation behind it in the file; or the boxes."""

    tensor: str
    activation: str = ""


def inputs(model: ModelProto) -> Inputs:
    """Which input is what; ExportError that lists them where that is not clear."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, list[str]] = {"image": [], "sizes": [], "mask": []}
    for item in model.graph.input:
        if item.name in constants:
            continue
        rank, kind = len(item.type.tensor_type.shape.dim), item.type.tensor_type.elem_type
        if rank == 4:
            found["image"].append(item.name)
            if kind != TensorProto.FLOAT:
                raise ExportError(f"input {item.name!r} is {type_name(kind)}; expected float32 pictures: export the "
                                  "float32 model, normalised outside the graph")
        elif rank == 2 and (item.type.tensor_type.shape.dim[1].dim_value in (0, 2)):
            found["sizes"].append(item.name)
        elif rank == 3 and "mask" in item.name:
            found["mask"].append(item.name)
        else:
            raise ExportError(f"input {_signature(item)} is not known; {_EXPECTED_INPUTS}")
    if len(found["image"]) != 1 or len(found["sizes"]) > 1 or len(found["mask"]) > 1:
        listed = ", ".join(_signature(item) for item in model.graph.input if item.name not in constants)
        raise ExportError(f"the graph takes {listed or 'nothing'}; {_EXPECTED_INPUTS}")
    return Inputs(found["image"][0], *(next(iter(found[name]), "") for name in ("sizes", "mask")))


def size_of(model: ModelProto, image: str) -> tuple[int | None, int | None]:
    """Height and width that the file is fixed to; None where open. ExportError when it is no batch of RGB pictures."""
    item = next(item for item in model.graph.input if item.name == image)
    batch, channels, height, width = (size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else None
                                      for size in item.type.tensor_type.shape.dim)
    if channels not in (None, 3):
        raise ExportError(f"input {_signature(item)} has {channels} channels at its second place; expected RGB "
                          "pictures [B, 3, H, W]; export the model with channels first")
    if batch not in (None, 1):
        raise ExportError(f"input {_signature(item)} takes {batch} pictures at a time; expected 1 or an open batch: "
                          "export the model with batch size 1")
    return height, width


def outputs(model: ModelProto, view: GraphView) -> Outputs:
    """Which contract the outputs keep, by their names and shapes; ExportError that lists them where it is none."""
    names = [item.name for item in model.graph.output]
    shapes = {name: view.shape(name) or [] for name in names}
    lower = {name.lower(): name for name in names}
    if {"labels", "boxes", "scores"} <= set(lower) and len(shapes[lower["labels"]]) == 2:
        return Outputs("decoded", tuple(lower[name] for name in ("labels", "boxes", "scores")))
    threes = [name for name in names if len(shapes[name]) == 3]
    fours = [name for name in threes if shapes[name][2] == 4]
    boxes = next((lower[name] for name in BOXES if lower.get(name) in fours), fours[0] if len(fours) == 1 else None)
    others = [name for name in threes if name != boxes and boxes is not None and shapes[name][1] == shapes[boxes][1]]
    alone = others[0] if len(others) == 1 else None
    logits = next((lower[name] for name in LOGITS if lower.get(name) in others), alone)
    if boxes is not None and logits is not None:
        return Outputs("raw", (logits, boxes))
    if len(names) == 1 and len(threes) == 1 and (shapes[names[0]][2] or 0) > 4:
        return Outputs("joined", (names[0],))
    raise ExportError(f"the graph gives {', '.join(_signature(item) for item in model.graph.output)}; expected one of: "
                      "logits [B, N, K] and boxes [B, N, 4]; labels, boxes, scores [B, n]; or one [B, N, 4 + K]; "
                      "export the detector without other outputs")


def candidates(view: GraphView, found: Outputs) -> tuple[list[Candidate], list[Candidate]]:
    """Tensors that may be logits and boxes, nearest to the outputs first; ExportError when there are none."""
    if found.kind == "raw":
        return [Candidate(found.given[0])], [Candidate(found.given[1])]
    scores, boxes = (found.given[2], found.given[1]) if found.kind == "decoded" else (found.given[0], found.given[0])
    logits = [Candidate(node.input[0], node.op_type.lower()) for node in _upstream(view, scores)
              if node.op_type in ("Sigmoid", "Softmax") and _is(view, node.input[0], None)]
    places = [Candidate(name) for node in _upstream(view, boxes) for name in node.output if _is(view, name, 4)]
    if not logits or not places:
        what = "a Sigmoid or Softmax of class logits [1, N, K]" if not logits else "boxes [1, N, 4]"
        raise ExportError(f"no {what} was found on the way back from output {(scores if not logits else boxes)!r}; "
                          "expected the decoding of RT-DETR or D-FINE; export the model without its post-processing, "
                          "so that logits and boxes are its outputs")
    return logits[:_NEAREST["logits"]], places[:_NEAREST["boxes"]]


def _upstream(view: GraphView, output: str) -> Iterator[NodeProto]:
    """Nodes that an output's values come from, those nearest to the output first."""
    order = {id(node): number for number, node in enumerate(view.nodes)}
    reached, waiting = set(), [output]
    chosen: dict[int, NodeProto] = {}
    while waiting:
        node = view.makers.get(waiting.pop())
        if node is None or id(node) in reached:
            continue
        reached.add(id(node))
        chosen[order[id(node)]] = node
        waiting.extend(node.input[:1] if node.op_type in _BY_PLACE else node.input)
    for number in sorted(chosen, reverse=True):
        yield chosen[number]


def _is(view: GraphView, name: str, last: int | None) -> bool:
    """Whether a computed tensor is float [1, N, last]."""
    shape = view.shape(name)
    fits = shape is not None and len(shape) == 3 and shape[0] == 1 and (last is None or shape[2] == last)
    return fits and view.types.get(name) == TensorProto.FLOAT and name not in view.constants


def _signature(item: ValueInfoProto) -> str:
    shape = ", ".join(size.dim_param or str(size.dim_value or "?") for size in item.type.tensor_type.shape.dim)
    return f"{item.name} {type_name(item.type.tensor_type.elem_type)} [{shape}]"


_EXPECTED_INPUTS = ("expected pictures float32 [B, 3, H, W], and besides them at most orig_target_sizes [B, 2] and "
                    "pixel_mask [B, H, W]; export the detector with these inputs alone")
