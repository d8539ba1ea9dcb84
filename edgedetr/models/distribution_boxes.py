"""The box update whose state is a distribution of every side: each layer adds to the distributions of the layer before.

Peng et al. 2024, "D-FINE", section 4.1 (Fine-grained Distribution Refinement); the order of the steps is that of the
authors' decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.feedforward import Mlp
from edgedetr.layers.full_precision import in_float32
from edgedetr.layers.linear import Linear
from edgedetr.layers.side_distributions import SideBins, SideIntegral, SideQuality
from edgedetr.models.box_heads import move_by_logits
from edgedetr.models.protocols import BoxState
from edgedetr.models.records import Sides

if TYPE_CHECKING:
    from edgedetr.models.roles import Role


class DistributionBoxes(nn.Module):
    """Class heads, heads of the distributions, and the first layer's plain box head, from whose boxes sides move."""

    ROLES: ClassVar[dict[str, Role]] = dict.fromkeys(("first", "box", "integral", "quality"), "box_distribution")

    def __init__(
        self,
        dim: int,
        logits: int,
        layers: int,
        bins: int = 32,
        up: float = 0.5,
        scale: float = 4.0,
        activation: str = "relu",
        shared: bool = False,
    ) -> None:
        """bins  R;  up, scale  of `SideBins`;  activation  of the box heads;  shared  one of them serves all layers"""
        super().__init__()
        self.bins, self.integral = SideBins(bins, up, scale), SideIntegral()
        self.first = Mlp(dim, dim, 4, 3, activation=activation)
        self.score = nn.ModuleList(Linear(dim, logits) for _ in range(layers))
        self.box = nn.ModuleList(
            Mlp(dim, dim, 4 * (bins + 1), 3, activation=activation) for _ in range(1 if shared else layers)
        )
        self.quality = nn.ModuleList(SideQuality(activation=activation) for _ in range(layers))

    def refine(
        self, layer: int, features: Tensor, reference: Tensor | None, state: BoxState | None, *, shown: bool
    ) -> BoxState:
        """See protocols.StatefulBoxUpdate. features [B, N, C], reference [B, N, 4]."""
        score = in_float32(self.score[layer], features) if shown else None
        box = self.box[min(layer, len(self.box) - 1)]
        if state is None:
            if reference is None:
                raise ModelError("sides of boxes move from a box; this selector gives none")
            plain = move_by_logits(in_float32(self.first, features), reference)
            start, first, matrix = plain.detach(), (score, plain), self.bins()
            sides = in_float32(box, features)
        else:
            start, first, matrix = state.start, state.first, state.matrix
            sides = in_float32(box, features + state.features) + state.sides
        probability, boxes = self.integral(sides, matrix, start)
        if score is not None:
            score = score + in_float32(self.quality[layer], probability)
        return BoxState(score, boxes, features.detach(), sides, start, matrix, first)

    def sides(self, states: Sequence[BoxState]) -> Sides:
        logits, boxes = states[0].first
        if logits is None:
            raise ModelError("the losses need the predictions of every layer; only the last one's were computed")
        together = torch.stack([state.sides for state in states]).unflatten(-1, (4, self.bins.bins + 1))
        return Sides(together, states[0].start, (logits, boxes), self.bins.values(), self.bins.scale)
