"""Files of the Hugging Face hub: looked up in the folders of its cache, and downloaded into them.

The folders are those of huggingface_hub, so that each program finds what the other has downloaded:
models--ORG--NAME/refs/main holds a commit, snapshots/COMMIT/ its files, .no_exist/COMMIT/ an empty file for each file
that the hub was asked for and does not have.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgedetr.errors import ModelError, first_line
from edgedetr.packages import missing
from edgedetr.progress import Progress
from edgedetr.published import download as downloads
from edgedetr.published.network import offline_by_choice, why_unreachable
from edgedetr.storage.atomic import atomic_write

log = logging.getLogger(__name__)

MAIN = "main"  # the branch that is taken where no revision is asked for
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 10.0  # seconds for one answer of the hub


@dataclass(frozen=True)
class HubFile:
    """One file of one commit.

    path    None: the hub has no such file at this commit
    commit  "" where it is not known
    """

    path: Path | None
    commit: str = ""


class NotHere(ModelError):
    """A file is not in the cache, and cannot be downloaded now; the message is the reason."""


def hub_cache() -> Path:
    """The folder of the hub's cache: of huggingface_hub if it is installed, else where it would be."""
    try:
        from huggingface_hub import constants
    except ImportError:
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return Path(constants.HF_HUB_CACHE)


def model_folder(repo: str, cache: Path) -> Path:
    """The folder of one model in a cache."""
    return cache / f"models--{repo.replace('/', '--')}"


def cached(repo: str, file: str, revision: str, cache: Path) -> HubFile | None:
    """What the cache knows about a file; None: nothing.

    revision   a commit, a branch, or "" for main
    """
    folder = model_folder(repo, cache)
    commit = _commit_of(folder, revision or MAIN)
    if commit and (folder / "snapshots" / commit / file).is_file():
        return HubFile(folder / "snapshots" / commit / file, commit)
    return HubFile(None, commit) if commit and (folder / ".no_exist" / commit / file).is_file() else None


def has_commit(repo: str, revision: str, cache: Path) -> bool:
    """Whether the cache holds any file of a commit or branch."""
    folder = model_folder(repo, cache)
    commit = _commit_of(folder, revision)
    return bool(commit) and (folder / "snapshots" / commit).is_dir()


def _commit_of(folder: Path, revision: str) -> str:
    """The commit of a branch, as it was when the cache was last online; a commit is its own."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return revision if COMMIT.fullmatch(revision) else ""


def why_offline() -> str:
    """Why the hub cannot be asked; "" where it can."""
    if reason := offline_by_choice():
        return reason
    constants = _constants()
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not constants.ENDPOINT.startswith(downloads.SCHEME):
        raise ModelError(
            f"HF_ENDPOINT is {constants.ENDPOINT}; expected https://: over http, anybody on the way could read the "
            "token and replace the weights"
        )
    return why_unreachable(constants.ENDPOINT)


def hub_file(
    repo: str, file: str, revision: str = "", cache: Path | None = None, progress: Progress | None = None
) -> HubFile:
    """One file of a model: from the cache, or downloaded into it.

    A commit never changes, so a file of one is not asked for again. A branch is: the newest commit is taken where the
    hub answers, and the one in the cache where it does not.

    Errors: NotHere where it is not in the cache and the hub does not answer; ModelError for a model, a revision or a
    permission that the user does not have.
    """
    cache = cache or hub_cache()
    here = cached(repo, file, revision, cache)
    if here is not None and COMMIT.fullmatch(revision):
        return here
    if reason := why_offline():
        if here is not None:
            return here
        raise NotHere(reason)
    try:
        return _from_hub(repo, file, revision, cache, progress)
    except NotHere:
        if here is None:
            raise
        return here


def _from_hub(repo: str, file: str, revision: str, cache: Path, progress: Progress | None) -> HubFile:
    """Ask the hub for a file, and download it unless the cache has it."""
    _constants()  # NotHere where huggingface_hub is not installed
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        build_hf_headers,
    )

    folder = model_folder(repo, cache)
    try:
        url = address(repo, file, revision or MAIN)
        about = get_hf_file_metadata(url, timeout=TIMEOUT)
    except GatedRepoError as error:
        raise ModelError(
            f"{repo} on the hub is given only to those who ask: open https://huggingface.co/{repo}, accept its terms, "
            "then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{repo} on the hub has no revision {revision} any more; take another model, or its newest files: download "
            "them by hand and name their folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {repo!r}, or you may not read it (hf auth login)") from error
    except EntryNotFoundError:
        log.info("%s has no %s", repo, file)
        commit = _commit_of(folder, revision or MAIN)
        if commit:
            _note(folder / ".no_exist" / commit / file, "")
        return HubFile(None, commit)
    except Exception as error:  # of the transport, of which huggingface_hub has had three
        raise NotHere(f"{type(error).__name__}: {first_line(error)}") from error
    commit = about.commit_hash or ""
    if not COMMIT.fullmatch(commit):
        raise ModelError(f"{url}: the answer does not say of which commit {file} is; expected that of a hub")
    path = folder / "snapshots" / commit / file
    if not path.is_file():
        etag = about.etag or ""
        downloads.download(
            address(repo, file, commit),
            path,
            sha256=etag if re.fullmatch(r"[0-9a-f]{64}", etag) else "",  # of large files; of small ones it is git's
            headers=build_hf_headers(),
            what=f"{repo} {file}",
            progress=progress,
        )
    if not COMMIT.fullmatch(revision):
        _note(folder / "refs" / (revision or MAIN), commit)
    elif not (folder / "refs" / MAIN).exists():
        _note(folder / "refs" / MAIN, commit)  # so that other programs find it without a network
    return HubFile(path, commit)


def advice(name: str, repo: str, file: str, reason: str) -> str:
    """What to do where a file of the hub is not here and cannot be downloaded; `edgedetr fetch` takes `name`."""
    shown = repo if name == repo else f"{name} ({repo})"
    return f"{shown}: {file} is not on this machine and {copy_advice(name, reason)}"


def copy_advice(name: str, reason: str) -> str:
    """The end of a sentence: why nothing can be downloaded, and how the files come here from another machine."""
    return (
        f"could not be downloaded ({reason}); on a machine with a network run: edgedetr fetch {name} --to DIR; then "
        f"copy what is in DIR into {hub_cache()} here; or start without them: --start random"
    )


def address(repo: str, file: str, revision: str) -> str:
    """The address of a file of the hub."""
    return f"{_constants().ENDPOINT}/{repo}/resolve/{quote(revision, safe='')}/{quote(file)}"


def _note(path: Path, text: str) -> None:
    """Write a small file of the cache."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _constants() -> Any:
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise NotHere(missing("huggingface_hub", error)) from error
    return constants
