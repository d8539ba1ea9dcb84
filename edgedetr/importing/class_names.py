"""Names of the class logits of a model made elsewhere, and which of its logits a bundle keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgedetr.bundle import ClassInfo
from edgedetr.data.coco_classes import UNUSED
from edgedetr.errors import UsageError
from edgedetr.storage.reading import read_text


@dataclass(frozen=True)
class ClassColumns:
    """The class logits that the bundle keeps.

    columns   their indices among the file's logits, in the order of `classes`; that of "no object" last
    """

    activation: str
    classes: tuple[ClassInfo, ...]
    columns: tuple[int, ...]


def read_names(path: Path) -> list[str]:
    """Names in a text file, one per line; "-" for a class logit that is not used, also if it is "N/A" there.

    Errors: UsageError.
    """
    text = read_text(path, UsageError, fix="expected a text file with one class name per line")
    names = ["-" if line.strip() == UNUSED else line.strip() for line in text.splitlines()]
    names = names[: len(names) - next((i for i, name in enumerate(reversed(names)) if name), len(names))]
    used = [name for name in names if name != "-"]
    if not used or "" in names or len(set(used)) < len(used):
        raise UsageError(
            f"{path}: {len(used)} names, of which some are empty or repeated; expected one line for "
            "each class logit of the file, in order, `-` for one that is not used"
        )
    return names


def class_columns(
    width: int,
    activation: Literal["sigmoid", "softmax"],
    names: Sequence[str] | None,
    known: tuple[ClassInfo, ...] | None,
    order: str,
    source: str = "--classes",
) -> ClassColumns:
    """The classes of the file's `width` class logits, and which of the logits the bundle keeps.

    names    of the logits in order, from `source`; None: the logits have the classes `known` in the given order
    known    classes of the data set; None without
    order    "index" or "category-id": where a class of the data set is among the logits, if there are no names
    Errors: UsageError if the classes do not fit the logits under this activation.
    """
    usable = width - (activation == "softmax")
    if names is not None:
        given = {name: index for index, name in enumerate(names) if name != "-"}
        lost = [item.name for item in known or () if item.name not in given]
        if lost:
            way = "" if source == "--classes" else "; or give --columns index if they are in the data set's order"
            raise UsageError(
                f"{source} does not name {', '.join(lost[:5])}, which the data set has; expected one "
                f"line of --classes for each class logit of the file, in order, `-` for one that is not "
                f"used{way}"
            )
        known = known or tuple(ClassInfo(index, column, name) for index, (name, column) in enumerate(given.items()))
        columns, count = [given[item.name] for item in known], len(names)
    else:
        known = known or tuple(ClassInfo(index, index, f"class {index}") for index in range(usable))
        columns, count = [item.category_id if order == "category-id" else item.index for item in known], len(known)
    if not columns or min(columns) < 0 or max(columns) >= usable:
        raise UsageError(
            f"the file has {usable} class logits{' besides no object' if usable < width else ''}, and a "
            f"class is at index {max(columns, default=0)}; expected one line of --classes for each "
            "logit of the file, or --columns index"
        )
    if width > count + 1 and order == "index":
        raise UsageError(
            f"the file has {width} class logits for {count} classes; say which is which: --classes FILE, "
            "or --columns category-id if they are at the category ids (COCO: 91 for 80)"
        )
    return ClassColumns(activation, known, tuple(columns + ([width - 1] if activation == "softmax" else [])))
