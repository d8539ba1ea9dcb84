"""How a detector writes its outputs: layout and unit of boxes, activation of class logits.

The values refute most formats: a width is not negative, and few boxes leave the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from edgedetr.errors import ExportError
from edgedetr.options import one_of

Layout = Literal["cxcywh", "xyxy", "xywh"]
LAYOUTS: tuple[Layout, ...] = ("cxcywh", "xyxy", "xywh")
LAYOUT_DESCRIPTIONS = {"cxcywh": "center and size", "xyxy": "two corners", "xywh": "top-left corner and size"}
# Values of --boxes.
BOX_FORMATS = (*LAYOUTS, *(f"{name}-pixels" for name in LAYOUTS))

# Largest number of all boxes: up to the first they are fractions of the image, from the second on pixels.
MAX_FRACTION, MIN_PIXELS = 2.5, 8.0
VALID = 0.99  # fraction of the boxes whose width and height must not be negative
_EDGE = 0.02  # fraction of the image by which a box may leave it and still count as inside


@dataclass(frozen=True)
class BoxFormat:
    """How boxes are written.

    layout    meaning of the four numbers
    unit      (x, y): the numbers that mean the whole width and height of the input; (1, 1) for fractions
    """

    layout: Layout = "cxcywh"
    unit: tuple[float, float] = (1.0, 1.0)

    def corners(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [..., 4] of this format as xyxy in fractions of the image."""
        return to_corners(boxes / np.array(self.unit * 2), self.layout)

    @property
    def option(self) -> str:
        """The format as --boxes names it."""
        return self.layout + ("" if self.unit == (1.0, 1.0) else "-pixels")

    def describe(self) -> str:
        unit = "fractions of the image" if self.unit == (1.0, 1.0) else f"units of {self.unit[0]:g} x {self.unit[1]:g}"
        return f"boxes are {', '.join(_COLUMNS[self.layout])} ({LAYOUT_DESCRIPTIONS[self.layout]}) in {unit}"


_COLUMNS = {"cxcywh": ("cx", "cy", "w", "h"), "xyxy": ("x0", "y0", "x1", "y1"), "xywh": ("x0", "y0", "w", "h")}


@dataclass(frozen=True)
class LayoutFit:
    """Layouts that the values of boxes allow, the best first.

    decided   whether the first is clearly the best
    reason    one sentence
    """

    layouts: tuple[Layout, ...]
    decided: bool
    reason: str


def to_corners(boxes: np.ndarray, layout: str) -> np.ndarray:
    """Boxes [..., 4] of a layout as xyxy, in the same unit."""
    one_of("layout", layout, get_args(Layout))
    first, second = boxes[..., :2], boxes[..., 2:]
    if layout == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], -1)
    return np.concatenate([first, first + second], -1) if layout == "xywh" else boxes


def from_corners(boxes: np.ndarray, layout: str) -> np.ndarray:
    """Boxes [..., 4], given as xyxy, in another layout and the same unit."""
    one_of("layout", layout, get_args(Layout))
    first, second = boxes[..., :2], boxes[..., 2:]
    if layout == "cxcywh":
        return np.concatenate([(first + second) / 2, second - first], -1)
    return np.concatenate([first, second - first], -1) if layout == "xywh" else boxes


def are_pixels(boxes: np.ndarray) -> bool:
    """Whether boxes [..., 4] are in pixels; ExportError where they may be pixels or fractions."""
    largest = float(np.abs(boxes).max(initial=0))
    if MAX_FRACTION < largest < MIN_PIXELS:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g}; expected fractions of the image (0..1) "
            f"or pixels; say which: --boxes with one of {', '.join(BOX_FORMATS)}"
        )
    return largest >= MIN_PIXELS


def fit_layouts(boxes: np.ndarray) -> LayoutFit:
    """Layouts that boxes [..., 4], in fractions of the image, allow; ExportError if there is none."""
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    valid, outside = {}, {}
    for layout in LAYOUTS:
        corners = to_corners(boxes, layout)
        valid[layout] = float((corners[:, 2:] - corners[:, :2] >= -1e-4).all(1).mean())
        outside[layout] = float(((corners < -_EDGE) | (corners > 1 + _EDGE)).any(1).mean())
    allowed = sorted((name for name in LAYOUTS if valid[name] >= VALID), key=lambda name: outside[name])
    if not allowed:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g} (fractions of the image), and are "
            "neither cx, cy, w, h nor corners: widths would be negative in every reading; expected boxes "
            "[N, 4]; export the model without its post-processing"
        )
    best = allowed[0]
    if _fraction_far_outside(to_corners(boxes, best)) > 0.5:
        raise ExportError(
            f"boxes go from {boxes.min():.3g} to {boxes.max():.3g} fractions of the image, and most would "
            "lie far outside of it in every reading; expected cx, cy, w, h as fractions of the image, or "
            "pixels of the input; export the model without scaling its boxes"
        )
    refuted = [
        f"{name} is none: {100 * (1 - valid[name]):.0f} % of the widths or heights would be negative"
        for name in LAYOUTS
        if valid[name] < VALID
    ]
    near = [name for name in allowed if outside[name] <= max(2 * outside[best], outside[best] + 0.05)]
    refuted += [
        f"as {name} {100 * outside[name]:.0f} % of the boxes would leave the image, as {best} "
        f"{100 * outside[best]:.0f} %"
        for name in allowed
        if name not in near
    ]
    if set(near) == {"cxcywh", "xywh"}:  # no DETR gives a corner and a size
        best, near = "cxcywh", ["cxcywh"]
        refuted.append("xywh fits as well, which no DETR gives; --boxes xywh if this one does")
    return LayoutFit((best, *(name for name in allowed if name != best)), len(near) == 1, "; ".join(refuted))


def _fraction_far_outside(corners: np.ndarray) -> float:
    """Fraction of the boxes that leave the image by more than its own size."""
    return float(((corners < -1) | (corners > 2)).any(1).mean())


def require_layout(boxes: np.ndarray, layout: str) -> None:
    """ExportError if boxes [..., 4] cannot be of the layout that --boxes names."""
    corners = to_corners(boxes.reshape(-1, 4), layout)
    valid = float((corners[:, 2:] - corners[:, :2] >= -1e-4).all(1).mean())
    if valid < VALID:
        raise ExportError(
            f"--boxes {layout}: {100 * (1 - valid):.0f} % of the widths or heights would be negative; "
            f"expected another of {', '.join(BOX_FORMATS)}, or leave --boxes out"
        )


def ambiguous_layouts(found: Sequence[Layout]) -> ExportError:
    """The error for layouts that fit equally well."""
    listed = " or ".join(f"{name} ({LAYOUT_DESCRIPTIONS[name]})" for name in found)
    return ExportError(
        f"boxes may be {listed}: the numbers fit these readings equally; say which: --boxes "
        f"{' or --boxes '.join(found)}; or give labeled images, which may decide: --data DIR"
    )


Activation = Literal["sigmoid", "softmax"]
ACTIVATIONS: tuple[Activation, ...] = ("sigmoid", "softmax")
# Detectors of transformers whose post_process_object_detection uses softmax, with the last logit for "no object"; all
# others use sigmoid.
SOFTMAX_MODELS = ("detr", "table-transformer", "yolos", "maskformer")
SIGMOID_MODELS = (
    "conditional_detr",
    "deformable_detr",
    "dab-detr",
    "dab_detr",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "rf_detr",
    "lw_detr",
    "deta",
    "grounding-dino",
    "pp_doclayout_v3",
)
_QUERIES = 0.8  # fraction of the queries that must support an activation


@dataclass(frozen=True)
class Evidence:
    """An activation, and the reason for it in one sentence."""

    activation: Activation
    reason: str


def apply_activation(logits: np.ndarray, activation: str) -> np.ndarray:
    """Probabilities of logits [..., K], in float64."""
    logits = logits.astype(np.float64)
    if activation == "softmax":
        power = np.exp(logits - logits.max(-1, keepdims=True))
        return power / power.sum(-1, keepdims=True)
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))


def are_probabilities(values: np.ndarray) -> bool:
    """Whether all lie in 0..1."""
    return bool(values.min() >= -1e-6 and values.max() <= 1 + 1e-6)


def activation_from_logits(logits: np.ndarray) -> Evidence | None:
    """The activation that logits [..., K] on images of noise were trained with; None if they do not show it."""
    logits = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    if logits.shape[1] < 2:
        return Evidence("sigmoid", "there is one class logit: softmax would always give 1")
    if np.abs(np.log(np.exp(np.minimum(logits, 50)).sum(1))).max() < 1e-3:
        return Evidence("softmax", "the class outputs are logarithms of probabilities that add up to 1")
    low = float((logits.max(1) < -1).mean())
    rest = logits[:, :-1].max(1)
    nothing = float((logits[:, -1] > np.maximum(rest + 1, 0)).mean())
    if low >= _QUERIES:
        return Evidence(
            "sigmoid",
            f"on noise {100 * low:.0f} % of the queries have no class logit above -1, as detectors trained by sigmoid",
        )
    if nothing >= _QUERIES:
        return Evidence(
            "softmax",
            f"on noise {100 * nothing:.0f} % of the queries prefer the last class logit, as one for 'no object'",
        )
    return None


def activation_from_model_type(name: str | None) -> Evidence | None:
    """The activation of a model_type of config.json; None if it is unknown."""
    if name in SOFTMAX_MODELS:
        return Evidence("softmax", f"config.json has model_type {name}: softmax, the last logit is 'no object'")
    if name in SIGMOID_MODELS:
        return Evidence("sigmoid", f"config.json has model_type {name}: sigmoid")
    return None
