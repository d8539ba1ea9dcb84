"""The family: every member by name. Each declares itself by a record MEMBER in its file under models/members/."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from edgedetr.errors import ModelError, did_you_mean
from edgedetr.models import members
from edgedetr.models.detector import DetrModel
from edgedetr.models.member import Member


def _declared() -> list[Member]:
    """The records of all files of the folder, by the date of their papers."""
    files = [import_module(f"{members.__name__}.{found.name}") for found in iter_modules(members.__path__)]
    return sorted((file.MEMBER for file in files), key=lambda member: member.published)


FAMILY: dict[str, Member] = {member.name: member for member in _declared()}


def member(name: str) -> Member:
    """A member by its name; ModelError that names the known ones otherwise."""
    if not isinstance(name, str) or name not in FAMILY:
        near = did_you_mean(name, FAMILY) if isinstance(name, str) else ""
        raise ModelError(f"model.name is {name!r:.200}; expected one of {', '.join(FAMILY)}{near}")
    return FAMILY[name]


def build(name: str, config: object, num_classes: int) -> DetrModel:
    """A model with random weights; `edgedetr.models.checkpoints.pretrained` loads pretrained ones into it.

    config  an instance of `member(name).config`
    """
    return member(name).build(config, num_classes)
