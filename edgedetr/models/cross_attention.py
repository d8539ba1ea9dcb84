"""Cross-attention of every kind behind one call: (queries, memory) -> [B, N, C]; see protocols.CrossAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.layers.conditional_attention import ConditionalAttention
from edgedetr.layers.deformable_attention import DeformableAttention
from edgedetr.layers.dynamic_convolution import DynamicInteraction
from edgedetr.layers.roi_align import RoiAlign
from edgedetr.layers.row_column_attention import RowColumnAttention
from edgedetr.models.records import Memory, Queries, with_pos_embed

if TYPE_CHECKING:
    from edgedetr.models.roles import Role


class DenseCrossAttention(MultiHeadAttention):
    """Every query attends to every token."""

    ROLES: ClassVar[dict[str, Role]] = {"k": "memory_projection", "v": "memory_projection"}

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, position_on_value: bool = False) -> None:
        """position_on_value  values carry the tokens' position as well as keys do (not so in DETR)"""
        super().__init__(dim, heads, dropout)
        self.position_on_value = position_on_value

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        mask = None if memory.padding is None else memory.padding[:, None, None]
        query = with_pos_embed(queries.content, queries.position)
        key = with_pos_embed(memory.tokens, memory.position)
        return super().forward(query, key, key if self.position_on_value else memory.tokens, mask)


class DeformableCrossAttention(DeformableAttention):
    """Every query samples a few points around its reference box."""

    ROLES: ClassVar[dict[str, Role]] = {"value": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.reference is None:
            raise ModelError("deformable attention samples around a reference; this selector gives none")
        query = with_pos_embed(queries.content, queries.position)
        return super().forward(query, queries.reference, memory.tokens, memory.shapes, memory.padding, memory.valid)


class ConditionalCrossAttention(ConditionalAttention):
    """Every query attends to every token; content and position are compared separately."""

    ROLES: ClassVar[dict[str, Role]] = {"k": "memory_projection", "v": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.spatial is None or memory.position is None:
            raise ModelError("conditional attention compares positions; this decoder or encoder gives none")
        return super().forward(
            queries.content, queries.position, queries.spatial, memory.tokens, memory.position, memory.padding
        )


class RowColumnCrossAttention(RowColumnAttention):
    """Every query attends to the columns and to the rows of the one map.

    k_x and k_y have no role of their own: they read H + W tokens where v reads H x W.
    """

    ROLES: ClassVar[dict[str, Role]] = {"v": "memory_projection"}

    def forward(self, queries: Queries, memory: Memory) -> Tensor:  # type: ignore[override]  # the protocol's arguments
        if queries.spatial is None or memory.axes is None:
            raise ModelError("row-column attention needs positions along each axis; selector or encoder gives none")
        x, y = queries.spatial.chunk(2, dim=-1)
        return super().forward(
            queries.content + x, queries.content + y, memory.tokens, memory.axes, memory.shapes[0], memory.padding
        )


class RoiCrossAttention(nn.Module):
    """Every query reads the content of its box alone, with weights that it predicts (Sparse R-CNN, section 3.3).

    The two large Linears are most of a decoder's weights, so they have a role of their own.
    """

    ROLES: ClassVar[dict[str, Role]] = {"interaction.weights": "dynamic_head", "interaction.out": "dynamic_head"}

    def __init__(self, roi: RoiAlign, interaction: DynamicInteraction) -> None:
        super().__init__()
        self.roi, self.interaction = roi, interaction

    def forward(self, queries: Queries, memory: Memory) -> Tensor:
        if queries.reference is None or queries.reference.shape[-1] != 4:
            raise ModelError("a dynamic head reads the content of boxes; this selector gives no boxes")
        features = self.roi(memory.tokens, memory.shapes, memory.strides, queries.reference)
        return self.interaction(queries.content, features)
