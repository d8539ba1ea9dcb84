"""DetrModel, the network of every member: encode images to memory, select queries, decode them. Start reading here."""

from __future__ import annotations

from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models.backbones.backbone import SIZE_MULTIPLE
from edgedetr.models.decoder import Decoder
from edgedetr.models.protocols import Declaration, DenoisingSelector, GroupSelector, ProposalSelector, QuerySelector
from edgedetr.models.records import Memory, Outputs, Queries


class DetrModel(nn.Module):
    """backbone -> neck and encoder -> query selection -> decoder.

    encoder    images' feature maps -> Memory        (neck, position encoding and encoder layers)
    selector   Memory -> Queries
    decoder    (Queries, Memory) -> Outputs            (layers, box update, heads)
    normalize  pixels 0..255 -> the backbone's input; called by the owner of the pixels (training, DeployGraph)
    size_multiple  what both sides of the input are multiples of, in pixels
    member     the member's record; `Member.build` sets it
    """

    member: Declaration
    selector: QuerySelector
    decoder: Decoder

    def __init__(
        self, backbone: nn.Module, encoder: nn.Module, selector: QuerySelector, decoder: Decoder, normalize: nn.Module
    ) -> None:
        super().__init__()
        self.backbone, self.encoder, self.selector, self.decoder = backbone, encoder, selector, decoder
        self.normalize = normalize
        self.size_multiple: int = getattr(backbone, "size_multiple", SIZE_MULTIPLE)

    def encode(self, images: Tensor, padding: Tensor | None = None) -> Memory:
        """images [B, 3, H, W], normalized; padding [B, H, W] bool, True = padding."""
        return self.encoder(self.backbone(images), padding)

    def select(self, memory: Memory) -> Queries:
        return self.selector(memory)

    def select_to_train(self, memory: Memory) -> Queries:
        """As `select`, with the groups of queries that training alone has (Queries.groups)."""
        return self.selector.every_group(memory) if isinstance(self.selector, GroupSelector) else self.selector(memory)

    def decode(self, queries: Queries, memory: Memory, *, last_only: bool = False) -> Outputs:
        """last_only: predictions of the last layer alone, L = 1."""
        return self.decoder(queries, memory, last_only=last_only)

    def forward(self, images: Tensor, padding: Tensor | None = None, *, last_only: bool = False) -> Outputs:
        memory = self.encode(images, padding)
        return self.decode(self.select(memory), memory, last_only=last_only)

    def progress(self, fraction: float) -> None:
        """Informs the selector how far training is, 0..1: some select fewer queries towards the end."""
        if isinstance(self.selector, ProposalSelector):
            self.selector.progress(fraction)

    @property
    def class_agnostic_proposals(self) -> bool:
        """Whether the proposals in `Outputs.encoder` know one class, 0, for every object."""
        return isinstance(self.selector, ProposalSelector) and self.selector.class_agnostic

    @property
    def denoises(self) -> bool:
        """Whether the model was built with vectors for noised labels (model.denoising)."""
        return getattr(self.selector, "denoising_class_embed", None) is not None

    def noised_queries(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries of known objects, for denoising: labels [B, D] (K = filling), boxes [B, D, 4].

        Errors: ModelError where the model has no vectors for noised labels.
        """
        if not isinstance(self.selector, DenoisingSelector):
            raise ModelError(f"{self.member.name} has no noised queries; use train.denoising=0")
        return self.selector.noised(labels, boxes)
