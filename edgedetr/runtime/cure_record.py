"""What the metadata of an INT8 graph says of the known faults that it was cured of when it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgedetr.bundle import Bundle
from edgedetr.runtime.backends.base import MADE_BY
from edgedetr.runtime.onnx_bytes import metadata, read

CURES = "cures"  # in MADE_BY, of a graph that was cured: a list of [backend, pattern, how, layer]


@dataclass(frozen=True)
class Cure:
    """One layer at which a known pattern was found and cured.

    backend   the one that is known to depart there
    pattern   its name in calib/patterns/known.toml
    how       "another order", "one scale for the inputs, another order" or "a float fallback"
    layer     name of the node
    reason    why it stays float; "" where it does not
    """

    backend: str
    pattern: str
    how: str
    layer: str
    reason: str = ""


def recorded(cures: Sequence[Cure]) -> dict[str, object]:
    """What MADE_BY says of the cures of a graph; nothing where there are none."""
    return {CURES: [[cure.backend, cure.pattern, cure.how, cure.layer] for cure in cures]} if cures else {}


def cures_in(properties: Mapping[str, str]) -> tuple[Cure, ...]:
    """The cures that a graph's metadata names; none where it names none, or cannot be read."""
    try:
        return tuple(Cure(*map(str, entry)) for entry in json.loads(properties[MADE_BY])[CURES])
    except (ValueError, KeyError, TypeError):
        return ()


def about_cures(bundle: Bundle, file: str) -> list[str]:
    """A line for each pattern that was cured in a graph of a bundle, and how."""
    cures = cures_in(metadata(read(bundle.require(file))[0]))
    layers: dict[tuple[str, str, str], list[str]] = {}
    for cure in cures:
        layers.setdefault((cure.pattern, cure.backend, cure.how), []).append(cure.layer)
    return [
        f"{pattern}, a known fault of {backend}, is cured by {how} at {', '.join(names)}"
        for (pattern, backend, how), names in layers.items()
    ]
