"""docs/architecture.md lists the files of each walk, in order; the lists are true and short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import edgedetr

PACKAGE = Path(edgedetr.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
LIMITS = {"Train": 18, "Export to INT8": 14, "Detect": 6, "Build a TensorRT engine": 8}


def walks() -> dict[str, list[str]]:
    """Heading -> the files of its numbered list, as paths below the package."""
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index("## The walks") : text.index("## The bundle")]
    found = {}
    for section in part.split("\n### ")[1:]:
        heading, _, body = section.partition("\n")
        found[heading.strip()] = re.findall(r"^\d+\. `([\w/]+\.py)`", body, re.MULTILINE)
    return found


def imported(path: Path) -> set[str]:
    """Files of the package that a file imports anywhere, as paths below the package.

    Also by name: "edgedetr.api" in a table of lazy imports, and every module of "edgedetr.runtime.backends.".
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("edgedetr."):
            names.add(node.value.partition(":")[0])
    files = set()
    for name in names:
        if not name.startswith("edgedetr"):
            continue
        inside = name.split(".")[1:]
        if name.endswith("."):
            files |= {str(found.relative_to(PACKAGE)) for found in PACKAGE.joinpath(*inside[:-1]).glob("*.py")}
        for candidate in ("/".join(inside) + ".py", "/".join([*inside, "__init__.py"])):
            if (PACKAGE / candidate).is_file():
                files.add(candidate)
    return files


@pytest.mark.parametrize("walk", LIMITS)
def test_a_walk_passes_no_more_files_than_it_may(walk):
    files = walks()[walk]
    assert 0 < len(files) <= LIMITS[walk]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("walk", ["Train", "Export to INT8", "Verify", "Detect", "Build a TensorRT engine"])
def test_every_file_of_a_walk_is_imported_by_one_before_it(walk):
    files = walks()[walk]
    reached = {files[0]}
    for file in files:
        assert file in reached, f"{file} is imported by none of the files before it"
        reached |= imported(PACKAGE / file)
        for package in [name for name in reached if name.endswith("__init__.py")]:
            reached |= imported(PACKAGE / package)  # a package hands names on: nobody has to read it


def test_no_two_modules_share_a_name():
    names: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "config.py"):
            names.setdefault(path.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: files for name, files in names.items() if len(files) > 1}
