"""The slots that members fill differently, as protocols: query selection, cross-attention, box update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from edgedetr.models.records import Memory, Queries, Sides


class QuerySelector(Protocol):
    """Where the decoder's queries come from: learned, or selected in the memory."""

    def __call__(self, memory: Memory) -> Queries: ...


@runtime_checkable
class DenoisingSelector(Protocol):
    """A selector whose member can be trained with noised queries.

    Its attribute denoising_class_embed has one vector per class and one for filling, or is None: built without
    model.denoising.
    """

    def noised(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of known objects: labels [B, D] (K = filling), boxes [B, D, 4]."""
        ...


@runtime_checkable
class ProposalSelector(Protocol):
    """A selector that scores every token of the memory (two-stage)."""

    @property
    def class_agnostic(self) -> bool:
        """Whether its proposals know one class, 0, for every object."""
        ...

    def progress(self, fraction: float) -> None:
        """Sets the number of queries for a fraction (0..1) of the training."""
        ...


@runtime_checkable
class GroupSelector(Protocol):
    """A selector that trains several groups of queries, of which one is deployed (group DETR)."""

    def every_group(self, memory: Memory) -> Queries:
        """The queries of all groups, one group after the other."""
        ...


class CrossAttention(Protocol):
    """How queries read the memory."""

    def __call__(self, queries: Queries, memory: Memory) -> Tensor:
        """-> what is added to the content, [B, N, C]."""
        ...


class BoxUpdate(Protocol):
    """The class and box heads, and how a layer's box follows from their output.

    iterative           every layer moves the box of the layer before, so each needs its delta, also where only the last
                        layer is asked for
    look_forward_twice  the loss of a layer reaches the box of the layer before as well (DINO, section 3.5)
    """

    iterative: bool
    look_forward_twice: bool

    def classify(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> logits [B, N, K*]."""
        ...

    def delta(self, layer: int, features: Tensor) -> Tensor:
        """features [B, N, C] -> what `move` takes, [B, N, 4]."""
        ...

    def move(self, delta: Tensor, reference: Tensor | None) -> Tensor:
        """The reference [B, N, 2|4] moved by the delta -> boxes [B, N, 4], cx, cy, w, h in 0..1."""
        ...


@dataclass
class BoxState:
    """What a layer of a `StatefulBoxUpdate` leaves to the next one.

    logits    [B, N, K*], or None where they were not asked for
    boxes     [B, N, 4]   cx, cy, w, h in 0..1; the next layer samples around them
    features  [B, N, C]   the layer's, without gradient
    sides     [B, N, 4 (R + 1)]   logits of the distributions of the sides, accumulated over the layers
    start     [B, N, 4]   the boxes whose sides move, without gradient
    matrix    [4 (R + 1), 4]   from the distributions to what they mean
    first     (logits, boxes) of the plain head before the first layer's distributions; logits as above
    """

    logits: Tensor | None
    boxes: Tensor
    features: Tensor
    sides: Tensor
    start: Tensor
    matrix: Tensor
    first: tuple[Tensor | None, Tensor]


@runtime_checkable
class StatefulBoxUpdate(Protocol):
    """A box update that carries a state from layer to layer, in place of `BoxUpdate`."""

    def refine(
        self, layer: int, features: Tensor, reference: Tensor | None, state: BoxState | None, *, shown: bool
    ) -> BoxState:
        """A layer's features [B, N, C], the box that it sampled around, the state of the layer before -> its own.

        shown   class logits are asked for; the state and the boxes are computed in any case
        """
        ...

    def sides(self, states: Sequence[BoxState]) -> Sides:
        """What the losses need, of the states of all layers."""
        ...


class Declaration(Protocol):
    """What a model knows of its member: the part of `models.member.Member` that is asked of a built model."""

    @property
    def name(self) -> str:
        """Of the recipe key model.name."""
        ...

    def role_of(self, path: str) -> str | None:
        """The role of a module by its dotted path, or None."""
        ...

    def is_slow(self, parameter: str) -> bool:
        """Whether a parameter's learning rate is multiplied by train.slow_lr_factor."""
        ...

    def is_per_class(self, parameter: str) -> bool:
        """Whether the size of a parameter depends on the number of classes."""
        ...
