"""What the numbers per class mean: logits or probabilities, one by one (sigmoid) or one of all (softmax)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Activation = Literal["sigmoid", "softmax"]
BOTH: tuple[Activation, ...] = ("sigmoid", "softmax")
# Classes by softmax, the last logit for "no object", in transformers; every other detector there is trained with
# sigmoid (its post_process_object_detection).
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
_QUERIES = 0.8  # part of the queries that must speak for a reading


@dataclass(frozen=True)
class Evidence:
    """An activation, and the sentence that says why."""

    activation: Activation
    why: str


def apply(logits: np.ndarray, activation: str) -> np.ndarray:
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


def by_numbers(logits: np.ndarray) -> Evidence | None:
    """What logits [..., K] on images of noise say of their own training; None where they say nothing."""
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


def by_model_type(name: str | None) -> Evidence | None:
    """What config.json's model_type says."""
    if name in SOFTMAX_MODELS:
        return Evidence("softmax", f"config.json says model_type {name}: softmax, the last logit is 'no object'")
    if name in SIGMOID_MODELS:
        return Evidence("sigmoid", f"config.json says model_type {name}: sigmoid")
    return None
