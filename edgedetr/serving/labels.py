"""labels.txt: the class names by index, one per line, as Triton and DeepStream read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgedetr.bundle import ClassInfo
from edgedetr.printable import one_line
from edgedetr.storage.atomic import atomic_write


def label(name: str) -> str:
    """A name as one line; its semicolons become commas, because nvinfer separates fields by semicolons."""
    return one_line(name.replace(";", ","))


def write_labels(path: Path, classes: Sequence[ClassInfo]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{label(item.name)}\n" for item in classes), encoding="utf-8")
