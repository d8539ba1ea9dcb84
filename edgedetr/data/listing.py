"""Which files lie below a folder: hidden ones are left out, and links are followed once.

Training, calibration, `data check` and `predict` all list through here, so that they see the same images.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from edgedetr.data import images
from edgedetr.errors import DataError

LINK = 200  # bytes of a link that became a text
# Folders that systems make beside people's files: a Mac's zip, a Synology disk, a Windows disk, a Linux disk.
SYSTEM = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


def hidden(name: str) -> bool:
    """Whether a file's or folder's own name is nobody's data (`._a.jpg`, `.ipynb_checkpoints`, `__MACOSX`)."""
    return name.startswith(".") or name.lower() in SYSTEM


def children(folder: Path) -> list[Path]:
    """The visible entries of one folder, sorted. Errors: DataError where it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if not hidden(name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); expected a folder") from error


def files(folder: Path, broken: list[Path] | None = None) -> list[Path]:
    """Every visible plain file below `folder`, sorted by path.

    broken   takes the links that lead nowhere, or to themselves

    A linked folder is followed where its content was not met before: real folders come first, so a link to a folder
    that is listed anyway adds nothing, and a loop ends.

    Errors: DataError where `folder` cannot be read; a folder below it that cannot be read is an error too.
    """
    found: list[Path] = []
    met: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            _walk(start, found, met, links, [] if broken is None else broken)
        waiting = links
    return sorted(found)


def links_as_text(folder: Path) -> list[Path]:
    """Small files whose text is the path of a folder: links, as git on Windows and some archives unpack them."""
    found = []
    for path in files(folder):
        try:
            if (
                not path.suffix
                and 0 < os.path.getsize(path) <= LINK
                and os.path.isdir(path.parent / path.read_text(encoding="utf-8").strip())
            ):
                found.append(path)
        except (OSError, ValueError):  # no text, or no path
            continue
    return found


def images_in(folder: Path, also: Iterable[str] = (), broken: list[Path] | None = None) -> list[Path]:
    """Every visible image below `folder`, by name, sorted.

    also     further endings that count, in lower case (".mp4")
    broken   as of `files`
    """
    wanted = images.suffixes() | frozenset(also)
    return [path for path in files(folder, broken) if path.suffix.lower() in wanted]


def leads_nowhere(path: Path) -> bool:
    """Whether it is a link whose target is not there."""
    return os.path.islink(path) and not os.path.exists(path)


def _walk(start: Path, found: list[Path], met: set[tuple[int, int]], links: list[Path], broken: list[Path]) -> None:
    """Add the files below `start` to `found`, the linked folders to `links`, and links to nothing to `broken`."""
    todo = [start]
    while todo:
        folder = todo.pop()
        try:
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in met:
                continue
            met.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as entries:
                listed = [entry for entry in entries if not hidden(entry.name)]
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}); expected a folder") from error
        for entry in listed:
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                todo.append(path)
            elif os.path.isdir(path):
                links.append(path)
            elif os.path.isfile(path):
                found.append(path)
            elif leads_nowhere(path):
                broken.append(path)
    links.sort()


def child(folder: Path, name: str) -> Path | None:
    """The visible entry of that name, or else the first whose name differs in case or Unicode form alone."""
    exact = folder / name
    if os.path.exists(exact):
        return exact
    if not os.path.isdir(folder):
        return None
    return next((path for path in children(folder) if fold(path.name) == fold(name)), None)


def fold(name: str) -> str:
    """A name without its case and Unicode form: a Mac writes é as two characters, and Windows knows no case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
