"""The bundle: one directory that holds a detector from weights to INT8, with a digest of every file.

Commands only add files. A file is written under a temporary name, flushed to disk and renamed, and `bundle.json` is
replaced last: after a crash the bundle has either its old or its new state. Commands may run at the same time: each
reads bundle.json again under a lock before it adds an entry. edgedetr/artifacts.py lists what a bundle can hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedetr import artifacts
from edgedetr.errors import BundleError, EdgedetrError, TrainingError, UsageError
from edgedetr.storage import file_kinds
from edgedetr.storage.atomic import (
    atomic_write,
    flush_to_disk,
    move_into_place,
    path_inside,
    remove_leftovers,
    temporary_file_for,
)
from edgedetr.storage.digests import DigestCache, digest
from edgedetr.storage.locks import locked
from edgedetr.storage.manifest import (
    SCHEMA,
    ClassInfo,
    DataRecord,
    FileEntry,
    InputContract,
    Manifest,
    OutputContract,
    manifest_from_json,
    manifest_to_text,
)
from edgedetr.storage.reading import MEBIBYTE, read_json

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "Bundle",
    "ClassInfo",
    "DataRecord",
    "FileEntry",
    "InputContract",
    "Manifest",
    "OutputContract",
]

MANIFEST = "bundle.json"
LOCK = ".lock"  # hidden file, held while bundle.json is read, merged and written
TRAINING_LOCK = ".training"  # hidden file, held during a whole training
WAIT = 60.0  # seconds to wait for LOCK
LIMIT = 64 * MEBIBYTE  # bytes of bundle.json; that of the demo has 6 kB
# What the folder of a bundle may hold before it has a bundle.json: files of a training, of the demo, hidden files.
BEFORE_MANIFEST = frozenset({"train", "data", "engines", "report", "results", LOCK, TRAINING_LOCK, ".DS_Store"})
WRITTEN_FOLDERS = ("", "results", "report", "train")  # where killed commands may leave temporary files


class Bundle:
    """An open bundle directory: `manifest`, `add` and `require`.

    `manifest` is a copy in memory; what other commands add appears with the next `add`, `update` or `require`. A whole
    file is hashed once while it does not change (see DigestCache), however often it is required.
    Errors: BundleError for a path that is not a bundle, a damaged manifest, a missing, damaged or stale file, and a
    lock that another command does not release.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._used: dict[str, str] = {}  # digests of the files that this object returned or wrote, by name
        self._digests = DigestCache()
        self._clean = False

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Bundle:
        """Create the directory, or replace the description of an existing bundle; its files stay listed."""
        path = Path(path)
        _make_folder(path)
        bundle = cls(path, manifest)
        with bundle._lock():
            if os.path.lexists(path / MANIFEST):
                bundle.manifest = replace(manifest, files=_read(path).files)
            bundle._write()
        return bundle

    @classmethod
    def open(cls, bundle: str | Path | Bundle) -> Bundle:
        """Read and check bundle.json; an open bundle is returned unchanged.

        Errors: BundleError; UsageError for anything that is neither a path nor a Bundle.
        """
        if isinstance(bundle, Bundle):
            return bundle
        if not isinstance(bundle, (str, os.PathLike)):
            kind = "None" if bundle is None else f"of type {type(bundle).__name__}"
            raise UsageError(f"bundle is {kind}; expected the path of a bundle, or an open Bundle")
        path = Path(bundle)
        return cls(path, _read(path))

    @staticmethod
    @contextmanager
    def training(path: str | Path) -> Iterator[None]:
        """Hold the lock for a training into the bundle at `path`, which is created where it is missing.

        Only the main process of a training holds it; its workers and other ranks do not.
        Errors: TrainingError at once, with the process that trains, where a training runs already.
        """
        path, there = Path(path), os.path.lexists(path)
        _make_folder(path)
        for name in ("train", artifacts.WEIGHTS.file):
            path_inside(path, name)

        def busy(owner: str) -> EdgedetrError:
            return TrainingError(
                f"{path}: another training writes here ({owner}); let it finish, end it, or choose another --out"
            )

        try:
            with locked(path / TRAINING_LOCK, wait=0, busy=busy):
                remove_leftovers(path)
                remove_leftovers(path / "train")
                yield
        finally:
            if not there:
                with suppress(OSError):  # not empty: it was trained
                    path.rmdir()

    def refresh(self) -> None:
        """Read bundle.json again: what other commands have added since."""
        self.manifest = _read(self.path)

    def update(self, **changes: Any) -> None:
        """Replace fields of the manifest (budget, data, ...) on disk."""
        with self._lock():
            self.manifest = replace(_read(self.path), **changes)
            self._write()

    @contextmanager
    def add(
        self, name: str, *, stage: str, made_from: Sequence[str] = (), still_good: Sequence[str] = ()
    ) -> Iterator[Path]:
        """Yield a temporary path to write `name` to; on success the file appears, listed with its digest.

        made_from   names of files in this bundle. Recorded are the digests that they had when `require` last returned
                    them (otherwise their digests now), so that `require` notices stale files
        still_good  files made from `name` that do not depend on what changes in it: they stay fresh if they were fresh
        """
        sources = {source: self._used.get(source) or self._entry(source).sha256 for source in made_from}
        target = self.inside(name)
        self.clean()
        with temporary_file_for(target) as temporary:
            yield temporary
            entry = FileEntry(digest(temporary), temporary.stat().st_size, stage, sources)
            flush_to_disk(temporary)
            with self._lock():
                # Others may have added since this object read it.
                manifest = _read(self.path)
                files, old = dict(manifest.files), manifest.files.get(name)
                for other in still_good:
                    if old is not None and other in files and files[other].made_from.get(name) == old.sha256:
                        files[other] = replace(files[other], made_from={**files[other].made_from, name: entry.sha256})
                self.inside(name)
                move_into_place(temporary, target)
                self.manifest = replace(manifest, files={**files, name: entry})
                self._write()
        self._used[name] = entry.sha256

    def has(self, name: str) -> bool:
        """Whether `name` is listed, present, undamaged and not stale."""
        try:
            self.require(name)
        except BundleError:
            return False
        return True

    def require(self, name: str) -> Path:
        """The path of a file that is listed, present, undamaged, and made from what is in the bundle now."""
        try:
            return self._require(name)
        except BundleError:
            before = self.manifest
            self.refresh()  # another command may have written it meanwhile
            if self.manifest == before:
                raise
            return self._require(name)

    def _require(self, name: str) -> Path:
        entry, path = self._entry(name), self.inside(name)
        if not path.is_file():
            raise BundleError(f"{self.path}: {name} is listed but missing; {self._fix(name)}")
        if path.stat().st_size != entry.size or self._digests.digest(path) != entry.sha256:
            raise BundleError(
                f"{path}: damaged or edited (its sha256 is not the recorded {entry.sha256:.8}); {self._fix(name)}"
            )
        for source, old in entry.made_from.items():
            new = self.manifest.files[source].sha256 if source in self.manifest.files else "missing"
            if new != old:
                raise BundleError(
                    f"{self.path}: {name} was made from {source} {old:.8}, which is now {new:.8}; {self._fix(name)}"
                )
        self._used[name] = entry.sha256
        return path

    def inside(self, name: str) -> Path:
        """The path of a file of this bundle, listed or not; BundleError for a name or a link that leads out of it."""
        return path_inside(self.path, name)

    def clean(self) -> None:
        """Remove the temporary files of killed commands; `add` does it once."""
        if not self._clean:
            for folder in WRITTEN_FOLDERS:
                remove_leftovers(self.inside(folder) if folder else self.path)
            self._clean = True

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} has not been made yet; {self._fix(name)}")
        return self.manifest.files[name]

    def _fix(self, name: str) -> str:
        entry = self.manifest.files.get(name)
        if name == artifacts.ONNX.file and entry is not None and entry.stage == "import":
            return f"run: edgedetr import FILE.onnx --out {self.path}"
        return f"run: {artifacts.making_command(name).format(path=self.path)}"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """No other command changes bundle.json meanwhile."""
        with locked(self.path / LOCK, wait=WAIT, busy=_busy(self.path)):
            yield

    def _write(self) -> None:
        try:
            text = manifest_to_text(self.manifest)
        except (ValueError, BundleError) as error:
            raise BundleError(
                f"{self.path}: the new {MANIFEST} could not be read back, so it was not written: {error}"
            ) from error
        with atomic_write(self.inside(MANIFEST)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _make_folder(path: Path) -> None:
    """Create the folder of a bundle, or check that it holds nothing but a bundle, so that no other file is replaced."""
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path} is a file; expected a directory to write the bundle to")
    path.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path / MANIFEST):
        return
    other = sorted(
        entry.name for entry in path.iterdir() if entry.name not in BEFORE_MANIFEST and entry.suffix != ".tmp"
    )
    if other:
        raise BundleError(
            f"{path} holds {other[0]!r} and is not a bundle; expected a new or empty folder, or a bundle, "
            "so that none of your files is replaced; choose another --out"
        )


def _busy(path: Path) -> Callable[[str], EdgedetrError]:
    return lambda owner: BundleError(
        f"{path}: {owner} has been changing this bundle for {WAIT:.0f} s; wait for it or "
        "end it, then run the same command again"
    )


def _read(path: Path) -> Manifest:
    """The manifest of the bundle at `path`."""
    try:
        there = path.is_dir() and os.path.lexists(path / MANIFEST)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); expected the folder of a bundle"
        ) from error
    if not there:
        file_kinds.require(path, "bundle")
        raise BundleError(f"{path}: no {MANIFEST} here, so this is not a bundle; run: edgedetr train --data DIR")
    where = path_inside(path, MANIFEST)
    fix = "restore it from a copy, or train again"
    raw = read_json(where, BundleError, limit=LIMIT, fix=fix)
    try:
        return manifest_from_json(raw)
    except (ValueError, RecursionError, BundleError) as error:
        raise BundleError(
            f"{where}: damaged, or not written by edgedetr ({error}); expected the JSON object that edgedetr "
            f"writes ({SCHEMA=}); {fix}"
        ) from error
