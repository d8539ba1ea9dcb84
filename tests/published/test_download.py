"""Downloads, from a server on this machine: whole or not at all, resumed, checked, and never over http."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from edgedetr.errors import ModelError
from edgedetr.published import download as module
from edgedetr.published.download import download

CONTENT = bytes(range(256)) * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """GET with ranges; /cut ends after a part of the bytes, /moved leads to another host."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range") or "all")
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/w.pth")
            self.end_headers()
            return
        if "localhost" in self.headers["Host"] and self.headers.get("Authorization"):
            self.send_error(400, "the token went to another host")
            return
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if begin >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client may have seen enough
            self.wfile.write(CONTENT[begin : begin + 70_000 if self.path == "/cut" else None])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "SCHEME", "http://")  # no certificate for this machine
    Handler.asked = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: running.serve_forever(0.02), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_the_digest_that_was_asked_for(server: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = tmp_path / "w.pth"
    download(f"{server}/w.pth", path, sha256=SHA[:8], progress=lambda _, done, all_: seen.append((done, all_)))
    assert path.read_bytes() == CONTENT and left(tmp_path) == ["w.pth"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_download_that_broke_off_goes_on_where_it_was(server: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(ModelError, match="broke off .*run the same command again: it goes on"):
        download(f"{server}/cut", path, sha256=SHA)
    assert left(tmp_path) == [".w.pth.part"], "nothing that could be taken for the file"
    download(f"{server}/w.pth", path, sha256=SHA)
    assert path.read_bytes() == CONTENT and Handler.asked == ["all", "bytes=70000-"]


def test_a_part_that_is_already_whole_is_checked_and_taken(server: str, tmp_path: Path) -> None:
    (tmp_path / ".w.pth.part").write_bytes(CONTENT)
    download(f"{server}/w.pth", tmp_path / "w.pth", sha256=SHA)
    assert left(tmp_path) == ["w.pth"]
    (tmp_path / ".v.pth.part").write_bytes(CONTENT + b"more")
    with pytest.raises(ModelError, match="has changed since a part of it was downloaded; try again"):
        download(f"{server}/w.pth", tmp_path / "v.pth")
    assert left(tmp_path) == ["w.pth"]


def test_another_digest_leaves_nothing(server: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"has sha256 {SHA}, and expected is {'0' * 64}; nothing was kept"):
        download(f"{server}/w.pth", tmp_path / "w.pth", sha256="0" * 64)
    assert left(tmp_path) == []


def test_a_full_disk_is_said_before_anything_is_written(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"1,280,000 bytes are still to be downloaded, and .* has room for 1,000"):
        download(f"{server}/w.pth", tmp_path / "w.pth")
    assert left(tmp_path) == []


def test_a_file_that_is_gone_is_one_error(server: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"w: http://\S+/gone answers 404"):
        download(f"{server}/gone", tmp_path / "w.pth", what="w")
    assert left(tmp_path) == []


def test_a_token_goes_to_the_first_host_alone(server: str, tmp_path: Path) -> None:
    download(f"{server}/moved", tmp_path / "w.pth", headers={"Authorization": "Bearer secret"})
    assert (tmp_path / "w.pth").read_bytes() == CONTENT


def test_only_https_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected https://: over http, anybody on the way could replace"):
        download("http://example.org/w.pth", tmp_path / "w.pth")


def test_a_redirection_to_http_is_refused() -> None:
    handler = module._OnlyHttps()

    class Request(NamedTuple):
        host: str = "a"

    with pytest.raises(module.urllib.error.URLError, match="is not https://"):
        handler.redirect_request(Request(), None, 302, "", {}, "http://b/w.pth")
