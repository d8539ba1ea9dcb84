"""Weight files of published detectors that are not on the hub: downloaded from an address, or put there by a person."""

from __future__ import annotations

from pathlib import Path

from edgedetr.errors import ModelError
from edgedetr.progress import Progress
from edgedetr.published.download import download
from edgedetr.published.hub_files import copy_advice, hub_cache
from edgedetr.published.network import why_unreachable
from edgedetr.published.published_detectors import PublishedDetector

SUFFIXES = (".pth", ".pt", ".safetensors", ".bin")


def address_folder(row: PublishedDetector, cache: Path | None = None) -> Path:
    """The folder of a detector's files beside those of the hub: files--NAME."""
    return (cache or hub_cache()) / f"files--{row.name}"


def address_file(row: PublishedDetector, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The weight file of a detector, downloaded where it is missing.

    Errors: ModelError without a network, and for a file that only a person can download.
    """
    folder = address_folder(row, cache)
    if row.page:
        return _put_there(row, folder)
    path = folder / row.weight_file
    if path.is_file():
        return path
    if reason := why_unreachable(row.url):
        raise ModelError(f"{row.name} is not on this machine and {copy_advice(row.name, reason)}")
    download(row.url, path, sha256=row.sha256, what=row.name, progress=progress)
    return path


def _put_there(row: PublishedDetector, folder: Path) -> Path:
    """The file that a person downloaded into the folder. Errors: ModelError that says how."""
    found = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())
    if row.file:
        found = [path for path in found if path.name == row.file]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(f"{folder}: {', '.join(path.name for path in found)}; expected one weight file, of {row.name}")
    raise ModelError(
        f"{row.name}: its authors give it on a page that only a browser can download from; open {row.page}, save "
        f"{row.file or 'its weight file'} into {folder}, then run the same command again; or name the "
        "file itself; or train without it: --start none"
    )
