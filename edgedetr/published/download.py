"""Downloads a file by https: it goes on where it broke off, is checked, and then renamed into place."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedetr.errors import ModelError, first_line
from edgedetr.progress import Progress
from edgedetr.storage.atomic import move_into_place, with_path_in_errors
from edgedetr.storage.digests import digest
from edgedetr.storage.locks import locked

SCHEME = "https://"
BLOCK = 1 << 20  # bytes read at a time
SILENCE = 30.0  # seconds without a byte after which a download is given up
WAIT = 3600.0  # seconds for another process that downloads the same file
# Headers that say who asks; they go to the first host alone, and not to where it leads.
PRIVATE = ("authorization", "cookie")


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https alone, and sends no token to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not newurl.startswith(SCHEME):
            raise urllib.error.URLError(f"it leads to {newurl[:80]}, which is not {SCHEME}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and request.host != req.host:
            for name in [name for name in request.headers if name.lower() in PRIVATE]:
                request.remove_header(name)
        return request


def download(
    url: str,
    path: Path,
    *,
    sha256: str = "",
    headers: Mapping[str, str] | None = None,
    what: str = "",
    progress: Progress | None = None,
) -> None:
    """Download `url` to `path`, which is written completely or not at all.

    What has arrived before a failure stays in a hidden file ending in .part, and the next call goes on from there.

    sha256   of the file, or its first digits; "" = unknown
    headers  sent to the host of `url` alone where they say who asks
    what     for messages: whose file it is

    Errors: ModelError for an address that is not https, a file that is not there, that breaks off, or whose digest
    differs, and for a disk without room.
    """
    if not url.startswith(SCHEME):
        raise ModelError(f"{url[:100]}: expected {SCHEME}: over http, anybody on the way could replace the weights")
    path.parent.mkdir(parents=True, exist_ok=True)

    def busy(owner: str) -> ModelError:
        return ModelError(f"{path}: {owner} downloads it; wait for that, or end it")

    with locked(path.with_name(f".{path.name}.lock"), wait=WAIT, busy=busy):
        if path.exists():
            return  # another process was faster
        part = path.with_name(f".{path.name}.part")
        _complete(url, part, headers or {}, what or path.name, progress)
        if sha256:
            found = digest(part)
            if not found.startswith(sha256):
                part.unlink()
                raise ModelError(
                    f"{what or path.name}: {url} has sha256 {found}, and expected is {sha256}; nothing was kept: the "
                    "file was replaced, or changed on the way"
                )
        part.chmod(0o644)
        move_into_place(part, path)


def _complete(url: str, part: Path, headers: Mapping[str, str], what: str, progress: Progress | None) -> None:
    """Download what is missing of `part`. Errors: ModelError."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "edgedetr", **headers})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.build_opener(_OnlyHttps()).open(request, timeout=SILENCE) as answer:
            have, total = _extent(answer, have)
            _require_room(part, what, total - have if total else 0)
            _copy(answer, part, have, total, what, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or the file has become shorter
            length = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if length and int(length[1]) == have:
                return
            part.unlink()
            raise ModelError(f"{what}: {url} has changed since a part of it was downloaded; try again") from error
        raise ModelError(f"{what}: {url} answers {error.code} ({error.reason}); it may have moved") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        why = first_line(reason) if isinstance(reason, Exception) else reason
        raise ModelError(
            f"{what}: the download of {url} broke off ({why}); run the same command again: it goes on from there"
        ) from error


def _extent(answer: Any, have: int) -> tuple[int, int]:
    """From which byte on an answer goes, and the size of the whole file; 0 = unknown."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
    if answer.status == 206 and found and int(found[1]) == have:
        return have, int(found[2])
    length = answer.headers.get("Content-Length") or "0"
    return 0, int(length) if length.isdecimal() else 0


def _require_room(part: Path, what: str, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise ModelError(
            f"{what}: {needed:,} bytes are still to be downloaded, and {part.parent} has room for {free:,}; free some "
            "space, or choose another folder (edgedetr fetch --to DIR, or the variable HF_HUB_CACHE)"
        )


def _copy(answer: Any, part: Path, have: int, total: int, what: str, progress: Progress | None) -> None:
    """Append the bytes of an answer from byte `have` on, and flush them to disk."""
    with with_path_in_errors(part), open(part, "r+b" if have else "wb") as stream:
        stream.seek(have)
        try:
            while block := answer.read(BLOCK):
                stream.write(block)
                have += len(block)
                if progress:
                    progress(what, have, total)
        finally:
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())
    if total and have != total:
        raise ConnectionError(f"{have:,} of {total:,} bytes arrived")
