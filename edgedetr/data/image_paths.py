"""Resolve file names written in annotations to paths inside the data set's folder.

Names come from other machines. They are tried unchanged, then in another Unicode form and case (macOS writes é as two
characters, Windows ignores case), then without leading folders that do not exist here. No path outside of the data
set's folder is returned; a link inside of it may lead elsewhere.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from edgedetr.data.detection_set import canonical_split_name
from edgedetr.data.listing import files, fold

SPLITS = ("train", "val", "test")


class PathResolver:
    """Resolves names relative to `folders`, in this order; all of them are inside `root`."""

    def __init__(self, root: Path, folders: Sequence[Path]) -> None:
        self.root, self.folders = root, list(folders)
        self._own = Path(os.path.abspath(root))

    def find(self, text: object, *, folder: bool = False) -> Path | None:
        """The existing file that `text` names, else the path where it is expected; None where it leaves the data set.

        folder   folders are accepted too
        """
        if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > 4096:
            return None
        exists = os.path.exists if folder else os.path.isfile
        exact = list(self._candidates(text.strip().replace("\\", "/"), folder))
        for path, _ in exact:
            if exists(path):
                return path
        for path, _ in exact:
            other = self._other_form(path)
            if other is not None:
                return other
        return next((path for path, is_exact in exact if is_exact), None)

    def _candidates(self, text: str, folder: bool) -> Iterator[tuple[Path, bool]]:
        """Paths inside the root, and whether each is exactly `text` (True) or a guess that must exist (False)."""
        drive = len(text) > 1 and text[1] == ":" and text[0].isalpha()
        if not text.startswith("/") and not drive:
            for base in self.folders:
                inner = self._inside(base, text)
                if inner is not None:
                    yield inner, True
            # Roboflow writes ../train/images for a folder next to data.yaml.
            if text.startswith("../") and (inner := self._inside(self.root, text[3:])) is not None:
                yield inner, False
            yield from self._without_leading(text, folder)
            return
        for base in (self._own, self._own.resolve()):
            normal = PurePosixPath(os.path.normpath(text))
            if not drive and normal.is_relative_to(base.as_posix()):
                yield self.root / normal.relative_to(base.as_posix()), True
        # An absolute path of another machine: /home/me/pets/images/1.jpg, where this folder is called pets.
        parts = PurePosixPath(text).parts
        for index in (n for n, part in enumerate(parts) if part == self._own.name):
            if inner := self._inside(self.root, "/".join(parts[index + 1 :])):
                yield inner, False

    def _without_leading(self, text: str, folder: bool) -> Iterator[tuple[Path, bool]]:
        """`text` without leading folders that do not exist here, as in CVAT's data/obj_train_data/1.jpg."""
        parts = [part for part in PurePosixPath(text).parts if part != "."]
        # Label Studio writes ../../label-studio/data/media/upload/1/a.jpg for the images/a.jpg next to its file.
        while len(parts) > 1 and parts[0] == "..":
            parts = parts[1:]
        if not parts or ".." in parts or any(os.path.exists(base / parts[0]) for base in self.folders):
            return
        for start in range(1, len(parts)):
            # The split's name must stay: test/images without it would be the images of all splits.
            if folder and canonical_split_name(parts[start - 1]) in SPLITS:
                return
            for base in self.folders:
                yield base.joinpath(*parts[start:]), False

    def _inside(self, base: Path, text: str) -> Path | None:
        """base / text, normalized, or None where it leaves the root."""
        whole = os.path.normpath(os.path.join(os.path.abspath(base), text or "."))
        if not PurePosixPath(whole).is_relative_to(self._own.as_posix()):
            return None
        return self.root / os.path.relpath(whole, self._own)

    @cached_property
    def _index(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Every file of the root by its path in NFC, and by its case-folded path where that is unique."""
        listed = [(path.relative_to(self.root).as_posix(), path) for path in files(self.root)]
        exact = {unicodedata.normalize("NFC", name): path for name, path in listed}
        folded: dict[str, Path] = {}
        repeated = set()
        for name, path in listed:
            if fold(name) in folded:
                repeated.add(fold(name))
            folded[fold(name)] = path
        return exact, {name: path for name, path in folded.items() if name not in repeated}

    def _other_form(self, path: Path) -> Path | None:
        name = path.relative_to(self.root).as_posix()
        exact, folded = self._index
        return exact.get(unicodedata.normalize("NFC", name)) or folded.get(fold(name))
