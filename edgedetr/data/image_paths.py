"""Where a file lies that an annotation names: inside the data set's folder, however the name is written.

Names come from other machines. They are tried as they stand, then in the other Unicode form and case (a Mac writes é as
two characters, Windows knows no case), then without leading folders that are not here. Nothing outside of the data
set's folder is ever returned; a link inside it may lead elsewhere.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from edgedetr.data.listing import files, fold
from edgedetr.data.split_names import canonical

SPLITS = ("train", "val", "test")


class Places:
    """The folders that names are relative to, in order; all of them inside `root`."""

    def __init__(self, root: Path, folders: Sequence[Path]) -> None:
        self.root, self.folders = root, list(folders)
        self._own = Path(os.path.abspath(root))

    def find(self, text: object, *, folder: bool = False) -> Path | None:
        """The file that `text` names, or the place where it should be; None where the name leaves the data set.

        folder   a folder will do as well
        """
        if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > 4096:
            return None
        there = os.path.exists if folder else os.path.isfile
        exact = list(self._candidates(text.strip().replace("\\", "/"), folder))
        for path, _ in exact:
            if there(path):
                return path
        for path, _ in exact:
            other = self._other_form(path)
            if other is not None:
                return other
        return next((path for path, stands in exact if stands), None)

    def _candidates(self, text: str, folder: bool) -> Iterator[tuple[Path, bool]]:
        """Paths inside the root, and whether each is what the text says (and not a guess that must exist)."""
        drive = len(text) > 1 and text[1] == ":" and text[0].isalpha()
        if not text.startswith("/") and not drive:
            for base in self.folders:
                inner = self._inside(base, text)
                if inner is not None:
                    yield inner, True
            # Roboflow writes ../train/images for a folder that lies beside data.yaml.
            if text.startswith("../") and (inner := self._inside(self.root, text[3:])) is not None:
                yield inner, False
            yield from self._without_leading(text, folder)
            return
        for base in (self._own, self._own.resolve()):
            normal = PurePosixPath(os.path.normpath(text))
            if not drive and normal.is_relative_to(base.as_posix()):
                yield self.root / normal.relative_to(base.as_posix()), True
        # Another machine's copy of this very folder: /home/me/pets/images/1.jpg, where this folder is called pets.
        parts = PurePosixPath(text).parts
        for place in (n for n, part in enumerate(parts) if part == self._own.name):
            if inner := self._inside(self.root, "/".join(parts[place + 1 :])):
                yield inner, False

    def _without_leading(self, text: str, folder: bool) -> Iterator[tuple[Path, bool]]:
        """The same without leading folders that are not here, as in CVAT's data/obj_train_data/1.jpg."""
        parts = [part for part in PurePosixPath(text).parts if part != "."]
        # Label Studio writes ../../label-studio/data/media/upload/1/a.jpg for the images/a.jpg beside its file.
        while len(parts) > 1 and parts[0] == "..":
            parts = parts[1:]
        if not parts or ".." in parts or any(os.path.exists(base / parts[0]) for base in self.folders):
            return
        for start in range(1, len(parts)):
            # Without its split's name a folder is another: test/images would be the images of all splits.
            if folder and canonical(parts[start - 1]) in SPLITS:
                return
            for base in self.folders:
                yield base.joinpath(*parts[start:]), False

    def _inside(self, base: Path, text: str) -> Path | None:
        """base / text without its detours, or None where it leaves the root."""
        whole = os.path.normpath(os.path.join(os.path.abspath(base), text or "."))
        if not PurePosixPath(whole).is_relative_to(self._own.as_posix()):
            return None
        return self.root / os.path.relpath(whole, self._own)

    @cached_property
    def _index(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Every file of the root by its path in NFC, and by its folded path where that is unique."""
        listed = [(path.relative_to(self.root).as_posix(), path) for path in files(self.root)]
        exact = {unicodedata.normalize("NFC", name): path for name, path in listed}
        folded: dict[str, Path] = {}
        twice = set()
        for name, path in listed:
            if fold(name) in folded:
                twice.add(fold(name))
            folded[fold(name)] = path
        return exact, {name: path for name, path in folded.items() if name not in twice}

    def _other_form(self, path: Path) -> Path | None:
        name = path.relative_to(self.root).as_posix()
        exact, folded = self._index
        return exact.get(unicodedata.normalize("NFC", name)) or folded.get(fold(name))
