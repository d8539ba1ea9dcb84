"""docs/recipe-keys.md: written from the source, complete, and up to date."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")

from edgedetr import options, recipe_reference
from edgedetr.models import FAMILY
from edgedetr.recipe import Recipe
from edgedetr.recipe_reference import Key, keys_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_up_to_date():
    written = (ROOT / recipe_reference.PAGE).read_text(encoding="utf-8")
    assert written == recipe_reference.page(), "run: make docs"


def test_the_page_names_every_key_of_every_section_and_member():
    page = recipe_reference.page()
    sections = {part.name: part.default_factory for part in fields(Recipe) if part.name != "model"}
    for section, kind in sections.items():
        table = page.split(f"## [{section}]\n")[1].split("\n## [")[0]
        assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == [
            item.name for item in fields(kind)
        ]
    model = page.split("## [model]\n")[1].split("\n## [")[0]
    for member in FAMILY.values():
        assert all(f"| `{item.name}` |" in model for item in fields(member.config) if item.init)


@dataclass(frozen=True)
class Settings:
    """An example."""

    least: float = 0.5  # a reason
    sizes: tuple[int, ...] = ()  # a reason that goes on
    # below, in small letters
    # A reason above, of the next field.
    word: Literal["a|b", "c"] = field(default="c", metadata=options.renamed("term"))
    limit: int | None = None  # on the line
    on: bool = True
    steps: int | Literal["auto"] = "auto"  # a number or a word

    def __post_init__(self) -> None:
        options.check(self, "example", {"least": (0, 1), "limit": (1, 9), "steps": (0, 9)})


def test_keys_have_their_default_their_values_and_the_reason_in_the_source():
    assert keys_of(Settings) == [
        Key("least", "0.5", "number, 0 to 1", "a reason"),
        Key("sizes", "[]", "list of any length: whole number", "a reason that goes on below, in small letters"),
        Key("word", '"c"', '`"a|b"`, `"c"`', "A reason above, of the next field. (named `term` in 0.1)"),
        Key("limit", "not set", "whole number, 1 to 9, or not set", "on the line"),
        Key("on", "true", "true, false", ""),
        Key("steps", '"auto"', 'whole number, 0 to 9, or `"auto"`', "a number or a word"),
    ]


def test_ranges_are_recorded_only_while_they_are_asked_for():
    assert options.ranges_of(Settings) == {"least": (0, 1), "limit": (1, 9), "steps": (0, 9)}
    Settings()
    assert options.ranges_of(Settings) == {"least": (0, 1), "limit": (1, 9), "steps": (0, 9)}
