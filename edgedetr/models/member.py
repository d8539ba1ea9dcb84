"""The record by which a member declares itself, at the end of its one file under models/members/.

Whatever is true of one member alone is declared here and read by the rest of the package: how it is built, which of its
layers may be INT8, which of its parameters learn more slowly or depend on the classes, and which files of pretrained
weights it reads. A block that several members share declares the roles of its own layers in a class attribute
ROLES; `at` puts them under the path where a member uses the block, and `Member.build` those of its backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

from edgedetr.errors import ModelError
from edgedetr.models.checkpoints.config_from_state_dict import Reader
from edgedetr.models.checkpoints.rename_rules import Layout
from edgedetr.models.checkpoints.transformers_keys import TransformersClass
from edgedetr.models.detector import DetrModel
from edgedetr.models.initialization import InitRule, redraw
from edgedetr.models.roles import ROLES, Role
from edgedetr.options import one_of

# The slots of every DetrModel; a member's own roles go before these.
SLOT_ROLES: dict[str, Role] = {"decoder": "decoder", "selector": "query_selection"}
# The parameters whose size depends on the number of classes, in the blocks that all members share.
PER_CLASS = ("selector.score.*", "selector.denoising_class_embed.*", "decoder.boxes.score.*")


class Block(Protocol):
    """A class of modules that declares the roles of its layers: attribute path within the block -> role."""

    ROLES: ClassVar[dict[str, Role]]


def at(path: str, block: type[Block]) -> dict[str, Role]:
    """The roles that a block declares, under the path (or pattern of paths) where a member puts it."""
    return {f"{path}.{inside}": role for inside, role in block.ROLES.items()}


@dataclass(frozen=True)
class PublishedResize:
    """How images reached the published models: stretched to a square, or scaled by their sides. Pixels."""

    square: int = 0  # both sides; 0: the aspect is kept
    shortest: int = 800  # DETR and its heirs
    longest: int = 1333


@dataclass(frozen=True)
class Member:
    """One detector of the family.

    name             of the recipe key model.name
    config           a frozen dataclass, a TransformerConfig
    builder          (configuration, number of classes) -> the model with random weights
    paper            authors, year, arXiv number
    published        year and month of the paper's first version: the order of the family
    roles            pattern of module paths -> role; it holds for the module and for all modules inside. The first
                     pattern that fits decides; the slots of the model (SLOT_ROLES) follow
    slow_parameters  patterns of the parameters whose learning rate is multiplied by train.slow_lr_factor
    per_class        patterns of the parameters whose size depends on the number of classes
    original_init    pattern of parameter names -> the authors' first weights; None: they published no code
    layouts          how files name the tensors; the first whose mark fits is taken
    transformers     model_type in config.json -> the class of transformers that is read
    readers          field of the configuration -> its value from the sizes of the tensors, beside those of all members
    unreadable       fields that change detections and follow from no tensor, in the order of the note about them
    resize           how images reached the published models
    resize_by        the same where the sizes differ: from the configuration that was read in the tensors
    refuse_import    configuration read from other people's tensors -> why such a model is not computed here, or ""
    """

    name: str
    config: type[Any]
    builder: Callable[[Any, int], DetrModel]
    paper: str
    published: tuple[int, int]
    roles: Mapping[str, Role] = field(default_factory=dict)
    slow_parameters: tuple[str, ...] = ()
    per_class: tuple[str, ...] = PER_CLASS
    original_init: Mapping[str, InitRule] | None = None
    layouts: tuple[Layout, ...] = ()
    transformers: Mapping[str, TransformersClass] = field(default_factory=dict)
    readers: Mapping[str, Reader] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ("heads", "dilate_last")
    resize: PublishedResize = PublishedResize()
    resize_by: Callable[[Mapping[str, Any]], PublishedResize] | None = None
    refuse_import: Callable[[Mapping[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        for role in self.roles.values():
            one_of(f"a role of {self.name}", role, ROLES, ModelError)

    def build(self, config: Any, num_classes: int) -> DetrModel:
        """The model with random weights. Errors: ModelError for another member's configuration, or without a class."""
        if not isinstance(config, self.config):
            raise ModelError(f"{self.name} takes a {self.config.__name__}; got {type(config).__name__}")
        if num_classes < 1:
            raise ModelError(f"{num_classes} classes; expected at least one")
        model = self.builder(config, num_classes)
        backbone: Any = type(model.backbone)
        declared = at("backbone", backbone) if hasattr(backbone, "ROLES") else {}
        model.member = replace(self, roles={**self.roles, **declared}) if declared else self
        if config.init == "original":
            if self.original_init is None:
                raise ModelError(
                    f"model.init is 'original', but the authors of {self.name} published no code; expected 'default'"
                )
            redraw(model, self.original_init)
        return model

    def resize_of(self, values: Mapping[str, Any]) -> PublishedResize:
        """How images reached the published model with this configuration, as far as its tensors show it."""
        return self.resize if self.resize_by is None else self.resize_by(values)

    def role_of(self, path: str) -> Role | None:
        """The role of a module by its dotted path in the DetrModel, for example "decoder.layers.0.self_attention.q".

        None for a layer without a special role: those of the backbone and most of the encoder.
        """
        for pattern, role in {**self.roles, **SLOT_ROLES}.items():
            if fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*"):
                return role
        return None

    def is_slow(self, parameter: str) -> bool:
        """Whether a parameter's learning rate is multiplied by train.slow_lr_factor."""
        return any(fnmatchcase(parameter, pattern) for pattern in self.slow_parameters)

    def is_per_class(self, parameter: str) -> bool:
        """Whether the size of a parameter depends on the number of classes."""
        return any(fnmatchcase(parameter, pattern) for pattern in self.per_class)
