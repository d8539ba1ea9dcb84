"""A source of pretrained weights: a file, a folder, or a model on the Hugging Face hub, at one revision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.checkpoints import weight_files
from edgedetr.models.checkpoints.weight_files import NAMES
from edgedetr.packages import missing
from edgedetr.storage.digests import digest

log = logging.getLogger(__name__)

SCRATCH = "--set model.backbone_weights=random --set model.backbone_norm=trainable --set model.frozen_stages=0"


class WeightSource:
    """Weights, and the files next to them.

    revision   commit on the hub of all files; "" for files on disk
    files      every file that was read for the weights, by name
    notes      which weights were read, if a file holds several sets
    """

    def __init__(self, source: str) -> None:
        self.source, self.path = source, Path(source)
        self.revision = ""
        self.notes: list[str] = []
        self.files: dict[str, Path] = {}
        try:
            self.on_disk = self.path.exists()
        except (OSError, ValueError) as error:  # a name that no file system takes
            raise ModelError(f"{source!r:.80}: no file and no name on the hub ({error})") from error
        if not self.on_disk and (
            self.path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")
            or self.path.suffix in weight_files.NOT_WEIGHTS
            or self.path.is_absolute()
        ):
            raise ModelError(f"{self.path}: no such file; expected weights there, or train from scratch: {SCRATCH}")

    def weights(self) -> dict[str, Tensor]:
        """All tensors. Errors: ModelError for a file that holds no tensors, or that cannot be read or downloaded."""
        path = self._main()
        if path.name.endswith(".index.json"):
            parts = {name: self._part(path, name) for name in weight_files.shards(path)}
            self.files = {path.name: path, **parts}
            return weight_files.read_shards(path, parts)
        self.files = {path.name: path}
        return weight_files.load(path, self.notes)

    def file_next_to(self, name: str) -> Path | None:
        """Another file of the same folder or revision; None if it does not exist."""
        if self.on_disk:
            found = (self.path if self.path.is_dir() else self.path.parent) / name
            return found if found.is_file() else None
        return self._download(name)

    def record(self) -> dict[str, Any]:
        """The origin of the weights, for the bundle: source, revision and the SHA-256 of every weight file."""
        # A path describes this machine rather than the weights, so a bundle gets the file name only.
        source = self.path.name if self.on_disk else self.source
        return {
            "source": source,
            "revision": self.revision or None,
            "files": {name: digest(path) for name, path in self.files.items()},
        }

    def _main(self) -> Path:
        if self.on_disk:
            path = weight_files.find_weight_file(self.path) if self.path.is_dir() else self.path
            if not path.is_file():
                raise ModelError(f"{path}: not a plain file; expected weights")
            return path
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
        try:
            from huggingface_hub import constants, hf_hub_download
            from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
        except ImportError as error:
            raise ModelError(
                f"{self.source} is no file here but a name on the Hugging Face hub, and "
                f"{missing('huggingface_hub', error)}; or train from scratch: {SCRATCH}"
            ) from error
        if not constants.ENDPOINT.startswith("https://"):
            raise ModelError(
                f"HF_ENDPOINT is {constants.ENDPOINT}; expected https://: over http, anybody on the way "
                "could read the token and replace the weights"
            )
        try:
            path = Path(hf_hub_download(self.source, file, revision=self.revision or None))
        except LocalEntryNotFoundError as error:
            if _known_missing(self.source, file, self.revision):
                return None
            raise self._unreachable(file, error) from error
        except EntryNotFoundError:
            log.info("%s has no %s", self.source, file)
            return None
        except Exception as error:  # offline, no such name, no access: the hub client's and its transport's own kinds
            raise self._unreachable(file, error) from error
        parts = path.parts
        self.revision = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1] if "snapshots" in parts else ""
        return path

    def _unreachable(self, file: str, error: Exception) -> ModelError:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        return ModelError(
            f"weights {self.source!r}: {file} could not be downloaded "
            f"({type(error).__name__}: {reason}); go online once, name a .safetensors file, or train "
            f"from scratch: {SCRATCH}"
        )


def _known_missing(source: str, file: str, revision: str) -> bool:
    """Whether the cache has recorded, when it was last online, that the hub has no such file."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, file, revision=revision or None)
    return found is not None and not isinstance(found, str)
