"""Losses of classes and boxes, one number per decoder layer, in float32 whatever the model computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_ce(logits: Tensor, labels: Tensor, no_object: float, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a light no-object class, the weighted mean over all queries (DETR, section 3.2).

    logits     [G, B, N, K + 1], the last class is no object
    labels     [G, B, N], K where there is no object
    smoothing  share of the target that is spread over all classes, no object among them, by their weights
    return     [G]
    """
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = no_object
    loss = F.cross_entropy(logits.movedim(-1, 1), labels, weight, reduction="none", label_smoothing=smoothing)
    return loss.flatten(1).sum(1) / weight[labels].flatten(1).sum(1)


def focal(logits: Tensor, onehot: Tensor, alpha: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Sigmoid focal loss summed over queries and classes (Lin et al. 2017, eq. 5); all [G, B, N, K] -> [G].

    smoothing   a matched query's targets move from 0 and 1 towards one half by this share; others stay 0
    """
    prob = logits.sigmoid()
    miss = torch.where(onehot > 0, 1 - prob, prob)
    share = torch.where(onehot > 0, alpha, 1 - alpha)
    wanted = _smoothed(onehot, smoothing)
    loss = share * miss**gamma * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return loss.flatten(1).sum(1)


def varifocal(
    logits: Tensor, onehot: Tensor, quality: Tensor, alpha: float, gamma: float, smoothing: float = 0.0
) -> Tensor:
    """Varifocal loss (Zhang et al. 2021, eq. 2): the score of a matched query learns the IoU of its box.

    logits, onehot  [G, B, N, K];  quality [G, B, N], IoU of matched queries, else 0;  return [G], summed
    smoothing       as in `focal`, of 0 and the IoU towards half the IoU; the weights stay
    """
    score = onehot * quality[..., None]
    weight = torch.where(onehot > 0, score, alpha * logits.detach().sigmoid() ** gamma)
    wanted = _smoothed(onehot, smoothing) * quality[..., None]
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="none").flatten(1).sum(1)


def matchability(logits: Tensor, onehot: Tensor, quality: Tensor, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Matchability-aware loss (Huang et al. 2024, "DEIM", eq. 5): like varifocal, but poor matches weigh fully.

    logits, onehot  [G, B, N, K];  quality [G, B, N];  return [G], summed
    smoothing       as in `varifocal`, of the IoU to the power of gamma
    """
    wanted = _smoothed(onehot, smoothing) * quality[..., None] ** gamma
    weight = torch.where(onehot > 0, 1.0, logits.detach().sigmoid() ** gamma)
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="none").flatten(1).sum(1)


def _smoothed(onehot: Tensor, smoothing: float) -> Tensor:
    """Targets 0 and 1 of a matched query moved towards one half by a share; those of other queries stay 0."""
    if not smoothing:
        return onehot
    return torch.where(onehot.amax(-1, keepdim=True) > 0, onehot * (1 - smoothing) + smoothing / 2, onehot)
