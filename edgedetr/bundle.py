"""The bundle: one directory that holds a detector from weights to INT8, with a digest of every file.

Stages only add. A file is written under a temporary name, flushed to disk and renamed; `bundle.json` is
replaced last, so a crash leaves either the old state or the new one, never half a file. Commands that run side by side
take turns: each reads bundle.json again, and adds to it, under a lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedetr import artifacts
from edgedetr.errors import BundleError, EdgedetrError, TrainingError
from edgedetr.storage import file_kinds
from edgedetr.storage import manifest as form
from edgedetr.storage.atomic import atomic_write, digest, flush, inside, put, remove_leftovers, temporary_beside
from edgedetr.storage.locks import locked
from edgedetr.storage.manifest import SCHEMA, ClassInfo, DataRecord, FileEntry, InputContract, Manifest, OutputContract
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
    "atomic_write",
    "digest",
]

MANIFEST = "bundle.json"
LOCK, TRAINING = ".lock", ".training"  # of what changes the bundle, and of a whole training; hidden, gone after it
WAIT = 60.0  # seconds; the lock is held for as long as bundle.json is read, merged and written
LIMIT = 64 * MEBIBYTE  # bytes of bundle.json; the one of 0.1's demonstration has 6 kB
# What may lie in the folder of a bundle before it has a bundle.json: of a training, of demo, and hidden.
OWN = frozenset({"train", "data", "engines", "report", "results", LOCK, TRAINING, ".DS_Store"})
OWN_FOLDERS = ("", "results", "report", "train")  # where temporary files of killed commands may lie


class Bundle:
    """An open bundle directory: `manifest`, `add` and `require`.

    `manifest` is as it was read; what other commands add meanwhile appears with the next `add`, `update` or `require`.
    Errors: BundleError for a path that is no bundle, a damaged manifest, a missing, damaged or stale file, and a lock
    that another command does not give back.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._seen: dict[str, str] = {}  # digests of the files that this object gave out or made
        self._clean = False

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Bundle:
        """Make the directory, or take an existing bundle and replace its description; its files stay listed."""
        path = Path(path)
        _make_folder(path)
        bundle = cls(path, manifest)
        with bundle._turn():
            if os.path.lexists(path / MANIFEST):
                bundle.manifest = replace(manifest, files=_read(path).files)
            bundle._write()
        return bundle

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check bundle.json. Errors: BundleError."""
        if not isinstance(path, (str, os.PathLike)):
            raise BundleError(
                f"bundle is {'None' if path is None else f'of type {type(path).__name__}'}; expected the "
                "path of a bundle"
            )
        path = Path(path)
        return cls(path, _read(path))

    @staticmethod
    @contextmanager
    def training(path: str | Path) -> Iterator[None]:
        """Hold the right to train into the bundle at `path`, which is made if it is not there; one process has it.

        Only the main process of a training takes it; its workers and other ranks do not.
        Errors: TrainingError at once, with the other's process, where a training runs already.
        """
        path, there = Path(path), os.path.lexists(path)
        _make_folder(path)
        for name in ("train", artifacts.WEIGHTS.file):
            inside(path, name)

        def busy(owner: str) -> EdgedetrError:
            return TrainingError(
                f"{path}: another training writes here ({owner}); let it finish or end it, or name another --out"
            )

        try:
            with locked(path / TRAINING, wait=0, busy=busy):
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
        with self._turn():
            self.manifest = replace(_read(self.path), **changes)
            self._write()

    @contextmanager
    def add(
        self, name: str, *, stage: str, made_from: Sequence[str] = (), still_good: Sequence[str] = ()
    ) -> Iterator[Path]:
        """Yield a temporary path to write `name` to; on success it appears, listed with its digest.

        made_from   names of files in this bundle; the digests with which `require` last gave them out are recorded (the
                    present ones of those that it did not), so that `require` sees staleness
        still_good  files made from `name` that do not depend on what changes in it: they stay fresh if they were
        """
        sources = {source: self._seen.get(source) or self._entry(source).sha256 for source in made_from}
        target = self.inside(name)
        self.clean()
        with temporary_beside(target) as temporary:
            yield temporary
            entry = FileEntry(digest(temporary), temporary.stat().st_size, stage, sources)
            flush(temporary)
            with self._turn():
                # Others may have added since this object read it.
                manifest = _read(self.path)
                files, old = dict(manifest.files), manifest.files.get(name)
                for other in still_good:
                    if old is not None and other in files and files[other].made_from.get(name) == old.sha256:
                        files[other] = replace(files[other], made_from={**files[other].made_from, name: entry.sha256})
                self.inside(name)
                put(temporary, target)
                self.manifest = replace(manifest, files={**files, name: entry})
                self._write()
        self._seen[name] = entry.sha256

    def has(self, name: str) -> bool:
        """Whether `name` is listed, present, undamaged and not stale."""
        try:
            self.require(name)
        except BundleError:
            return False
        return True

    def require(self, name: str) -> Path:
        """Path of a file that is listed, present, undamaged and made from what is in the bundle now."""
        try:
            return self._require(name)
        except BundleError:
            before = self.manifest
            self.refresh()  # another command may have made it, or made it anew
            if self.manifest == before:
                raise
            return self._require(name)

    def _require(self, name: str) -> Path:
        entry, path = self._entry(name), self.inside(name)
        if not path.is_file():
            raise BundleError(f"{self.path}: {name} is listed but missing; {self._run(name)}")
        if path.stat().st_size != entry.size or digest(path) != entry.sha256:
            raise BundleError(
                f"{path}: damaged or edited (its sha256 is not the recorded {entry.sha256:.8}); {self._run(name)}"
            )
        for source, old in entry.made_from.items():
            new = self.manifest.files[source].sha256 if source in self.manifest.files else "missing"
            if new != old:
                raise BundleError(
                    f"{self.path}: {name} was made from {source} {old:.8}, which is now {new:.8}; {self._run(name)}"
                )
        self._seen[name] = entry.sha256
        return path

    def inside(self, name: str) -> Path:
        """The path of a file of this bundle, listed or not; BundleError for a name or a link that leads out of it."""
        return inside(self.path, name)

    def clean(self) -> None:
        """Remove what killed commands left half-written; `add` does it once."""
        if not self._clean:
            for folder in OWN_FOLDERS:
                remove_leftovers(self.inside(folder) if folder else self.path)
            self._clean = True

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} has not been made yet; {self._run(name)}")
        return self.manifest.files[name]

    def _run(self, name: str) -> str:
        entry = self.manifest.files.get(name)
        if name == artifacts.ONNX.file and entry is not None and entry.stage == "import":
            return f"run: edgedetr import FILE.onnx --out {self.path}"
        return f"run: {artifacts.making_command(name).format(path=self.path)}"

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The bundle to oneself, for the moment in which bundle.json changes."""
        with locked(self.path / LOCK, wait=WAIT, busy=_busy(self.path)):
            yield

    def _write(self) -> None:
        try:
            text = form.to_text(self.manifest)
        except (ValueError, BundleError) as error:
            raise BundleError(
                f"{self.path}: what was to be written to {MANIFEST} could not be read again: {error}"
            ) from error
        with atomic_write(self.inside(MANIFEST)) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _make_folder(path: Path) -> None:
    """The folder of a bundle, made if it is not there; nothing of anybody else's is in it, so nothing is replaced."""
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path} is a file; expected a directory to write the bundle to")
    path.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path / MANIFEST):
        return
    strange = sorted(entry.name for entry in path.iterdir() if entry.name not in OWN and entry.suffix != ".tmp")
    if strange:
        raise BundleError(
            f"{path} holds {strange[0]!r} and is no bundle; expected a new or empty folder, or a bundle, "
            "so that no file of yours is replaced; name another --out"
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
        raise BundleError(f"{path}: no {MANIFEST} here, so this is no bundle; run: edgedetr train --data DIR")
    where = inside(path, MANIFEST)
    fix = "restore it from a copy or run the training again"
    raw = read_json(where, BundleError, limit=LIMIT, fix=fix)
    try:
        return form.from_json(raw)
    except (ValueError, RecursionError, BundleError) as error:
        raise BundleError(
            f"{where}: damaged or of another kind ({error}); expected the JSON object that edgedetr "
            f"writes ({SCHEMA=}); {fix}"
        ) from error
