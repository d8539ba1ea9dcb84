"""Style that no linter knows, checked by `make lint`: `python tests/style.py` lists what is wrong and exits with 1.

- a module opens with a sentence
- no text names a path of the machine it was written on
- nothing is marked as left to do
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("edgedetr", "recipes", "calib", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".toml", ".html")
]
TEXTS = [*SOURCES, *sorted(ROOT.glob("*.md")), ROOT / "Makefile", ROOT / "pyproject.toml"]
PATHS = re.compile(r"/work/|/root/|/tmp/|\.\./shared")
LEFT = re.compile(r"\b(TODO|FIXME|XXX)\b")


def problems() -> Iterator[str]:
    """One line for each."""
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            if PATHS.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: names a path of the machine it was written on"
            if path.suffix == ".py" and LEFT.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: something is left to do"
        if path.suffix == ".py" and path.name != "__init__.py":
            sentence = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
            if not sentence.endswith((".", ":")):
                yield f"{path.relative_to(ROOT)}:1: a module opens with a sentence"


if __name__ == "__main__":
    found = list(problems())
    for problem in found:
        print(problem)
    sys.exit(bool(found))
