"""What a search has evaluated so far, in the bundle's folder search/: one file per result, named by its content.

A search that was interrupted at any point goes on where it stopped, and a second search with another budget finds what
the first has measured. Each file is written completely or not at all. Deleting the folder loses nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedetr.bundle import Bundle, ClassInfo
from edgedetr.errors import BundleError
from edgedetr.evaluation.reference import load_detections, save_detections
from edgedetr.runtime.postprocess import Detections
from edgedetr.storage.atomic import atomic_write, remove_leftovers
from edgedetr.storage.reading import read_json

log = logging.getLogger(__name__)

FOLDER = "search"
IDENTITY = "identity.json"
SCHEMA = 1


class SearchState:
    """Cached results of one model, policy and set of images.

    identity   {what it is: digest or value}: everything that all results depend on
    """

    def __init__(self, bundle: Bundle, identity: Mapping[str, str]) -> None:
        self.folder = bundle.inside(FOLDER)
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        wanted = {"schema": str(SCHEMA), **identity}
        present = self._identity()
        if present != wanted:
            if present is not None:
                changed = sorted(key for key in wanted.keys() | present.keys() if wanted.get(key) != present.get(key))
                log.warning(
                    "%s holds a search with another %s: it is begun anew", self.folder, " and ".join(changed) or "model"
                )
            for path in self.folder.iterdir():
                if path.is_file():
                    path.unlink()
            with atomic_write(self.folder / IDENTITY) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")

    def _identity(self) -> dict[str, str] | None:
        """What the folder's results are of; None for an empty folder; {} for one that cannot be read."""
        path = self.folder / IDENTITY
        if not path.exists():
            return {} if any(self.folder.iterdir()) else None
        try:
            raw = read_json(path, BundleError)
        except BundleError:
            return {}
        return raw if isinstance(raw, dict) else {}

    def value(self, about: Sequence[object], make: Callable[[], Any]) -> Any:
        """The JSON value that is kept under `about`, or made and kept now.

        about   what it is, in one word, then what it depends on beside the identity
        """
        path = self._path(about, "json")
        if path.exists():
            try:
                return read_json(path, BundleError)["value"]
            except (BundleError, KeyError, TypeError):
                log.warning("%s is damaged; it is made again", path)
        value = make()
        with atomic_write(path) as temporary:
            temporary.write_text(
                json.dumps({"about": list(map(str, about)), "value": value}, allow_nan=False), encoding="utf-8"
            )
        return value

    def has(self, about: Sequence[object]) -> bool:
        return self._path(about, "json").exists()

    def detections(
        self, about: Sequence[object], classes: Sequence[ClassInfo], make: Callable[[], dict[int, Detections]]
    ) -> dict[int, Detections]:
        """Detections by image id, kept like `value`."""
        path = self._path(about, "npz")
        if path.exists():
            try:
                return load_detections(path, classes)
            except BundleError:
                log.warning("%s is damaged; it is made again", path)
        found = make()
        with atomic_write(path) as temporary:
            save_detections(temporary, found)
        return found

    def file(self, about: Sequence[object], suffix: str, make: Callable[[], bytes]) -> Path:
        """The path of a file that is kept under `about`, made now where it is missing."""
        path = self._path(about, suffix)
        if not path.exists():
            data = make()
            with atomic_write(path) as temporary:
                temporary.write_bytes(data)
        return path

    def _path(self, about: Sequence[object], suffix: str) -> Path:
        name = hashlib.sha256(json.dumps(list(map(str, about))).encode()).hexdigest()[:32]
        return self.folder / f"{about[0]}-{name}.{suffix}"
