"""List the files below a folder, without hidden ones; links are followed once.

Training, calibration, `data check` and `predict` all use these functions, so that they find the same images.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from edgedetr.data import images
from edgedetr.errors import DataError

BROKEN_LINK = "a link whose target does not exist; copy the file, or create the link again"  # for messages
LINK = 200  # most bytes of a text file that is checked for being a link
# Folders that systems create next to the files of users: macOS (zip), Synology, Windows, Linux.
SYSTEM = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


def hidden(name: str) -> bool:
    """Whether the name of a file or folder shows that it is not data (`._a.jpg`, `.ipynb_checkpoints`, `__MACOSX`)."""
    return name.startswith(".") or name.lower() in SYSTEM


def children(folder: Path) -> list[Path]:
    """The visible entries of one folder, sorted. Errors: DataError where it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if not hidden(name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); expected a folder") from error


def files(folder: Path, broken: list[Path] | None = None) -> list[Path]:
    """Every visible plain file below `folder`, sorted by path.

    broken   receives the links whose target does not exist

    A linked folder is followed unless it was listed already: real folders come first, so a link to a listed folder adds
    nothing, and loops end.

    Errors: DataError where `folder` cannot be read; this includes folders below it.
    """
    found: list[Path] = []
    listed_folders: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            _walk(start, found, listed_folders, links, [] if broken is None else broken)
        waiting = links
    return sorted(found)


def links_as_text(folder: Path) -> list[Path]:
    """Small files that contain the path of a folder: git on Windows and some archive tools write links in this way."""
    found = []
    for path in files(folder):
        try:
            if (
                not path.suffix
                and 0 < os.path.getsize(path) <= LINK
                and os.path.isdir(path.parent / path.read_text(encoding="utf-8").strip())
            ):
                found.append(path)
        except (OSError, ValueError):  # not a text, or not a path
            continue
    return found


def images_in(folder: Path, also: Iterable[str] = (), broken: list[Path] | None = None) -> list[Path]:
    """Every visible image below `folder`, by name, sorted.

    also     further suffixes to include, in lower case (".mp4")
    broken   as of `files`
    """
    wanted = images.suffixes() | frozenset(also)
    return [path for path in files(folder, broken) if path.suffix.lower() in wanted]


def is_broken_link(path: Path) -> bool:
    """Whether it is a link whose target does not exist."""
    return os.path.islink(path) and not os.path.exists(path)


def _walk(
    start: Path, found: list[Path], listed_folders: set[tuple[int, int]], links: list[Path], broken: list[Path]
) -> None:
    """Add the files below `start` to `found`, linked folders to `links`, and links without a target to `broken`."""
    todo = [start]
    while todo:
        folder = todo.pop()
        try:
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in listed_folders:
                continue
            listed_folders.add((state.st_dev, state.st_ino))
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
            elif is_broken_link(path):
                broken.append(path)
    links.sort()


def child(folder: Path, name: str) -> Path | None:
    """The visible entry of that name, else the first whose name differs only in case or Unicode form."""
    exact = folder / name
    if os.path.exists(exact):
        return exact
    if not os.path.isdir(folder):
        return None
    return next((path for path in children(folder) if fold(path.name) == fold(name)), None)


def fold(name: str) -> str:
    """A name without differences in case and Unicode form: macOS writes é as two characters, Windows ignores case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
