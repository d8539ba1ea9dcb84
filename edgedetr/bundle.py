"""The bundle: one directory that holds a detector from weights to INT8, with a digest of every file.

Stages only add. A file is written under a temporary name, flushed to disk and renamed; `bundle.json` is
replaced last, so a crash leaves either the old state or the new one, never half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedetr.errors import BundleError

SCHEMA = 1
MANIFEST = "bundle.json"

# Which command makes which file, for the "run: ..." half of an error message.
COMMANDS = {
    "recipe.toml": "edgedetr train --data DIR",
    "weights.safetensors": "edgedetr train --data DIR",
    "reference.npz": "edgedetr export {path}",
    "model.onnx": "edgedetr export {path}",
    "model.fp16.onnx": "edgedetr export {path} --trt",
    "ranges.json": "edgedetr export {path} --int8",
    "model.int8.onnx": "edgedetr export {path} --int8",
    "model.int8-cpu.onnx": "edgedetr export {path} --int8",
    "results/verify.json": "edgedetr verify {path}",
}


@dataclass(frozen=True)
class ClassInfo:
    """One class: `index` is contiguous from 0 and is what the model predicts; id and name are the data set's own."""

    index: int
    category_id: int
    name: str


@dataclass(frozen=True)
class InputContract:
    """What the graph takes: `images` [B, 3, height, width], RGB, values 0..255, normalisation inside the graph."""

    height: int
    width: int
    resize: str = "stretch"         # "stretch" or "letterbox" (keep aspect, pad right and bottom with 114)

    def __post_init__(self) -> None:
        if self.resize not in ("stretch", "letterbox"):
            raise BundleError(f"input.resize is {self.resize!r}; expected 'stretch' or 'letterbox'")
        if not (isinstance(self.height, int) and isinstance(self.width, int) and min(self.height, self.width) > 0):
            raise BundleError(f"input size is {self.height} x {self.width}; expected two positive whole numbers")


@dataclass(frozen=True)
class OutputContract:
    """How `logits` [B, N, K*] and `boxes` [B, N, 4] become detections.

    activation  "sigmoid" (K* = K; best top_k of N*K) or "softmax" (K* = K + 1, last = no object; best class per query)
    """

    activation: str = "sigmoid"
    top_k: int = 100


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: digest, size in bytes, the stage that made it, digests of what it was made from."""

    sha256: str
    size: int
    stage: str
    made_from: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecord:
    """Where the data of this bundle lies, and the splits used for verifying and for calibrating."""

    path: str
    verify_split: str
    calib_split: str = "train"


@dataclass(frozen=True)
class Manifest:
    """bundle.json, typed."""

    model: str
    classes: tuple[ClassInfo, ...]
    input: InputContract
    output: OutputContract
    config: dict[str, object] = field(default_factory=dict)     # the model's own configuration, as in its dataclass
    data: DataRecord | None = None
    budget: float = 1.0                                         # largest accepted AP drop, points
    synthetic: bool = False                                     # the data are rendered, not photographed
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream) -> str:  # type: ignore[no-untyped-def]  # Python 3.10 has no hashlib.file_digest
    state = hashlib.sha256()
    while block := stream.read(1 << 20):
        state.update(block)
    return state.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    After an exception the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Bundle:
    """An open bundle directory: `manifest`, `add` and `require`.

    Errors: BundleError for a path that is no bundle, a damaged manifest, a missing, damaged or stale file.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Bundle:
        """Make the directory, or take an existing bundle and replace its description; its files stay listed."""
        path = Path(path)
        if (path / MANIFEST).exists():
            manifest = replace(manifest, files=cls.open(path).manifest.files)
        elif path.exists() and not path.is_dir():
            raise BundleError(f"{path} is a file; expected a directory to write the bundle to")
        bundle = cls(path, manifest)
        bundle._write()
        return bundle

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check bundle.json."""
        path = Path(path)
        where = path / MANIFEST
        if not path.is_dir() or not where.is_file():
            raise BundleError(f"{path}: no {MANIFEST} here, so this is no bundle; run: edgedetr train --data DIR")
        try:
            raw = json.loads(where.read_text(encoding="utf-8"))
            return cls(path, _manifest_from_json(raw))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{where}: damaged or of another kind ({error}); expected the JSON object that "
                              f"edgedetr {SCHEMA=} writes; restore it from a copy or run the training again") from error

    def update(self, **changes: Any) -> None:
        """Replace fields of the manifest (budget, data, ...) on disk."""
        self.manifest = replace(self.manifest, **changes)
        self._write()

    @contextmanager
    def add(self, name: str, *, stage: str, made_from: Sequence[str] = (), still_good: Sequence[str] = ()) \
            -> Iterator[Path]:
        """Yield a temporary path to write `name` to; on success it appears, listed with its digest.

        made_from   names of files in this bundle; their present digests are recorded, so that `require` sees staleness
        still_good  files made from `name` that do not depend on what changes in it: they stay fresh if they were
        """
        sources = {source: self._entry(source).sha256 for source in made_from}
        target = self._inside(name)
        with atomic_write(target) as temporary:
            yield temporary
            entry = FileEntry(digest(temporary), temporary.stat().st_size, stage, sources)
        files = dict(self.manifest.files)
        old = files.get(name)
        for other in still_good:
            if old is not None and other in files and files[other].made_from.get(name) == old.sha256:
                files[other] = replace(files[other], made_from={**files[other].made_from, name: entry.sha256})
        self.manifest = replace(self.manifest, files={**files, name: entry})
        self._write()

    def has(self, name: str) -> bool:
        """Whether `name` is listed, present, undamaged and not stale."""
        try:
            self.require(name)
        except BundleError:
            return False
        return True

    def require(self, name: str) -> Path:
        """Path of a file that is listed, present, undamaged and made from what is in the bundle now."""
        entry, path = self._entry(name), self._inside(name)
        if not path.is_file():
            raise BundleError(f"{self.path}: {name} is listed but missing; {self._run(name)}")
        if path.stat().st_size != entry.size or digest(path) != entry.sha256:
            raise BundleError(f"{path}: damaged or edited (its sha256 is not the recorded {entry.sha256:.8}); "
                              f"{self._run(name)}")
        for source, old in entry.made_from.items():
            new = self.manifest.files[source].sha256 if source in self.manifest.files else "missing"
            if new != old:
                raise BundleError(f"{self.path}: {name} was made from {source} {old:.8}, which is now {new:.8}; "
                                  f"{self._run(name)}")
        return path

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} has not been made yet; {self._run(name)}")
        return self.manifest.files[name]

    def _run(self, name: str) -> str:
        if name == "model.onnx" and name in self.manifest.files and self.manifest.files[name].stage == "import":
            return f"run: edgedetr import FILE.onnx --out {self.path}"
        source, _, frame = name.removesuffix(".onnx").partition(".frame-")      # model.int8.frame-1080x1920.onnx
        command = COMMANDS.get(f"{source}.onnx" if frame else name, "edgedetr export {path}").format(path=self.path)
        return f"run: {command} --frame {frame}" if frame else f"run: {command}"

    def _inside(self, name: str) -> Path:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise BundleError(f"{self.path}: {name!r} points outside the bundle; expected a relative name")
        return self.path / name

    def _write(self) -> None:
        with atomic_write(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(self.manifest), indent=1) + "\n", encoding="utf-8")


def _manifest_from_json(raw: dict) -> Manifest:  # type: ignore[type-arg]  # checked field by field below
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"schema is {raw.get('schema')!r}, this version reads {SCHEMA}")
    unknown = set(raw) - set(Manifest.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    classes = tuple(ClassInfo(int(c["index"]), int(c["category_id"]), str(c["name"])) for c in raw["classes"])
    if [c.index for c in classes] != list(range(len(classes))):
        raise ValueError("class indices are not 0, 1, 2, ...")
    files = {str(name): FileEntry(**entry) for name, entry in raw.get("files", {}).items()}
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file name {name!r} points outside the bundle")
    return Manifest(
        model=str(raw["model"]), classes=classes,
        input=InputContract(**raw["input"]), output=OutputContract(**raw["output"]),
        config=dict(raw.get("config") or {}), data=DataRecord(**raw["data"]) if raw.get("data") else None,
        budget=float(raw["budget"]), synthetic=bool(raw.get("synthetic", False)), files=files,
    )
