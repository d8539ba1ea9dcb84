"""A source of pretrained weights: a file, a folder, a published detector, or a model on the hub at one revision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.checkpoints import weight_files
from edgedetr.models.checkpoints.weight_files import NAMES
from edgedetr.progress import Progress
from edgedetr.published import hub_files
from edgedetr.published.address_files import address_file
from edgedetr.published.hub_files import NotHere
from edgedetr.published.published_detectors import LISTED, known, nearest
from edgedetr.storage.digests import digest

log = logging.getLogger(__name__)

SCRATCH = "--start random"
CONFIGURATIONS = ("config.json", "preprocessor_config.json", "processor_config.json")


class AnotherDigest(ModelError):
    """A file in the cache is not the one of the table of published detectors."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class WeightSource:
    """Weights, and the files next to them.

    published  the detector of the table of published ones; None for other weights
    revision   commit on the hub of all files; "" for other files
    files      every file that was read for the weights, by name
    notes      which weights were read, if a file holds several sets, or the cache another revision
    cache      the folder to look in and to download to; None = the hub's own cache
    """

    def __init__(self, source: str, *, cache: Path | None = None, progress: Progress | None = None) -> None:
        self.source, self.path = source, Path(source)
        self.revision = ""
        self.notes: list[str] = []
        self.files: dict[str, Path] = {}
        self._cache, self._progress = cache, progress
        try:
            self.on_disk = self.path.exists()
        except (OSError, ValueError) as error:  # a name that no file system takes
            raise ModelError(f"{source!r:.80}: no file and no name on the hub ({error})") from error
        self.published = None if self.on_disk else known(source)
        if self.on_disk or self.published is not None:
            return
        if (
            self.path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")
            or self.path.suffix in weight_files.NOT_WEIGHTS
            or self.path.is_absolute()
        ):
            raise ModelError(f"{self.path}: no such file; expected weights there, or train from scratch: {SCRATCH}")
        if source.count("/") != 1:
            raise ModelError(
                f"{source!r:.200}: no such file or bundle, and no published detector{nearest(source)}; they are listed "
                f"by: {LISTED}"
            )

    def weights(self) -> dict[str, Tensor]:
        """All tensors. Errors: ModelError for a file that holds no tensors, or that cannot be read or downloaded."""
        return weight_files.read_shards(*self._shards()) if self._is_sharded() else self._load()

    def download(self) -> None:
        """Load all files into the cache without reading the tensors; a damaged or incomplete one is replaced.

        Errors: ModelError.
        """
        try:
            sharded = self._is_sharded()
        except AnotherDigest as error:
            self._remove(error.path)
            sharded = self._is_sharded()
        if sharded:
            self._shards()
        for name, path in list(self.files.items()):
            if not weight_files.is_whole(path):
                self._remove(path)
                self.files[name] = self._part(path, name) if sharded else self._main()
        if self.on_hub:
            for name in CONFIGURATIONS:
                self.file_next_to(name)

    @property
    def on_hub(self) -> bool:
        """Whether the files are those of a model on the hub."""
        return not self.on_disk and (self.published is None or bool(self.published.hub))

    def file_next_to(self, name: str) -> Path | None:
        """Another file of the same folder or revision; None if it does not exist."""
        if self.on_disk:
            found = (self.path if self.path.is_dir() else self.path.parent) / name
            return found if found.is_file() else None
        if not self.on_hub:
            return None
        try:
            return self._download(name)
        except ModelError as error:
            # The table of published detectors has what the configuration of an image processor says.
            if self.published is not None and isinstance(error.__cause__, NotHere) and name != "config.json":
                return None
            raise

    def record(self) -> dict[str, Any]:
        """The origin of the weights, for the bundle: source, revision and the SHA-256 of every weight file."""
        # A path describes this machine rather than the weights, so a bundle gets the file name only.
        about: dict[str, Any] = {
            "source": self.path.name if self.on_disk else self.source,
            "revision": self.revision or None,
            "files": {name: digest(path) for name, path in self.files.items()},
        }
        if (row := self.published) is not None:
            about |= {
                "published": row.name,
                "where": row.where,
                "license": row.license.name,
                "terms": row.license.terms,
            }
        return about

    def _is_sharded(self) -> bool:
        """Find the weight file, and say whether it is an index of several."""
        path = self._main()
        self.files = {path.name: path}
        self._check_digest(path)
        return path.name.endswith(".index.json")

    def _load(self) -> dict[str, Tensor]:
        (path,) = self.files.values()
        try:
            return weight_files.load(path, self.notes)
        except ModelError as error:
            if self.on_disk or self.published is None:
                raise
            raise ModelError(
                f"{error}; a damaged or incomplete file is replaced by: edgedetr fetch {self.published.name}"
            ) from error

    def _shards(self) -> tuple[Path, dict[str, Path]]:
        """The index, and the files that it names."""
        (index,) = self.files.values()
        parts = {name: self._part(index, name) for name in weight_files.shards(index)}
        self.files = {index.name: index, **parts}
        return index, parts

    def _remove(self, path: Path) -> None:
        """Remove a damaged file of a cache; what the user named by its path stays."""
        if self.on_disk:
            raise ModelError(f"{path}: damaged or incomplete; expected a whole weight file")
        log.warning("%s: damaged or incomplete; it is downloaded again", path)
        target = path.resolve()
        path.unlink()
        target.unlink(missing_ok=True)  # in the hub's own cache, files of a commit are links

    def _check_digest(self, path: Path) -> None:
        """Errors: AnotherDigest for a file that is not the one of the table of published detectors."""
        row = self.published
        if row is None or not row.sha256 or (self.on_hub and self.revision != row.revision):
            return  # of another revision, nothing is known
        found = digest(path)
        if not found.startswith(row.sha256):
            raise AnotherDigest(
                f"{path}: its sha256 is {found}, and that of {row.name} is {row.sha256} ({row.pinned}): it is damaged, "
                f"incomplete or another file; run: edgedetr fetch {row.name}, which replaces it",
                path,
            )

    def _main(self) -> Path:
        if self.on_disk:
            path = weight_files.find_weight_file(self.path) if self.path.is_dir() else self.path
            if not path.is_file():
                raise ModelError(f"{path}: not a plain file; expected weights")
            return path
        if self.published is not None and not self.on_hub:
            return address_file(self.published, self._cache, self._progress)
        for name in NAMES:
            found = self._download(name)
            if found is not None:
                return found
        adapter = (
            " (it holds an adapter, PEFT: merge it into its model first)"
            if self._download("adapter_config.json")
            else ""
        )
        raise ModelError(
            f"{self.source} on the hub has none of {', '.join(NAMES)}{adapter}; name a model with weights of PyTorch"
        )

    def _part(self, index: Path, name: str) -> Path:
        found = index.parent / name if self.on_disk else self._download(name)
        if found is None or not found.is_file():
            raise ModelError(f"{index} names {name}, which is not there; download all of its files")
        return found

    def _download(self, file: str) -> Path | None:
        """A file of a model on the hub; None if the hub has no such file."""
        row = self.published
        repo = self.source if row is None else row.hub
        cache = self._cache or hub_files.hub_cache()
        try:
            found = hub_files.hub_file(
                repo, file, self.revision or self._first_revision(repo, cache), cache, self._progress
            )
        except NotHere as error:
            raise ModelError(hub_files.advice(self.source, repo, file, str(error))) from error
        self.revision = found.commit or self.revision
        return found.path

    def _first_revision(self, repo: str, cache: Path) -> str:
        """The commit that the table names; "" for the newest, and where the cache has another one and nothing can be
        downloaded."""
        row = self.published
        if row is None or not row.revision or hub_files.has_commit(repo, row.revision, cache):
            return row.revision if row else ""
        if hub_files.has_commit(repo, hub_files.MAIN, cache) and (reason := hub_files.why_offline()):
            note = f"{repo}: the cache has another commit than the table ({row.revision:.8}), which is taken ({reason})"
            if note not in self.notes:
                self.notes.append(note)
            return ""
        return row.revision
