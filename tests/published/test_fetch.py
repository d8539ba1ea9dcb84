"""edgedetr fetch, from a hub on this machine: into the cache's layout, resumed, checked, with licenses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
constants = pytest.importorskip("huggingface_hub.constants")

from safetensors.torch import save  # noqa: E402

from edgedetr import cli  # noqa: E402
from edgedetr.errors import ModelError  # noqa: E402
from edgedetr.models.checkpoints.weight_source import WeightSource  # noqa: E402
from edgedetr.published import download, network, published_detectors  # noqa: E402

COMMIT, LATER = "a" * 40, "b" * 40
WEIGHTS = save({"w": torch.arange(30_000.0)})
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"model_type": "x"}', "preprocessor_config.json": b"{}"}
ROWS = published_detectors.published()
# A row like those of the table: with a revision and a digest that some source gave.
ROW = replace(
    ROWS["rtdetrv2-r18"], name="small", hub="someone/small", revision=COMMIT, sha256=hashlib.sha256(WEIGHTS).hexdigest()
)


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for one model; `cut` bytes of a file arrive, where it is not 0."""

    cut: ClassVar[int] = 0
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        _, org, name, _, revision, file = self.path.split("/", 5)
        self.asked.append(f"{self.command} {file}")
        error = "RepoNotFound" if (org, name) != ("someone", "small") else ""
        error = error or ("RevisionNotFound" if revision not in ("main", COMMIT) else "")
        error = error or ("EntryNotFound" if file not in FILES else "")
        if error:
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = FILES[file]
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if with_body:
            self.wfile.write(content[begin : begin + self.cut if self.cut else None])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on this machine and an empty cache; the table has the row of its model."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", *network.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=lambda: running.serve_forever(0.02), daemon=True).start()
    monkeypatch.setattr(download, "SCHEME", "http://")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(published_detectors, "published", lambda: {**ROWS, "small": ROW})
    monkeypatch.setattr(Hub, "cut", 0)
    Hub.asked.clear()
    yield tmp_path / "cache"
    running.shutdown()
    running.server_close()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_filled_that_another_machine_reads_without_a_network(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["fetch", "small", "--to", str(tmp_path / "stick"), "--json"]) == 0
    printed = capsys.readouterr()
    (record,) = json.loads(printed.out)
    assert record["revision"] == COMMIT and record["files"] == {"model.safetensors": ROW.sha256}
    assert record["license"] == "Apache-2.0" and "copy what is in" in printed.err
    folder = f"models--someone--small/snapshots/{COMMIT}"
    assert {f"{folder}/{name}" for name in FILES} <= set(files(tmp_path / "stick"))
    assert not hub.exists(), "nothing was written elsewhere"
    shutil.copytree(tmp_path / "stick", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Hub.asked.clear()
    origin = WeightSource("small")
    assert torch.equal(origin.weights()["w"], torch.arange(30_000.0)) and origin.revision == COMMIT
    assert origin.file_next_to("config.json") is not None and origin.file_next_to("processor_config.json") is None
    assert Hub.asked == []


def test_transformers_and_the_hubs_client_find_what_was_fetched(hub: Path) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    assert cli.run(["fetch", "small"]) == 0
    path = hf_hub_download("someone/small", "model.safetensors", cache_dir=hub, local_files_only=True)
    assert Path(path).read_bytes() == WEIGHTS
    missing = try_to_load_from_cache("someone/small", "processor_config.json", cache_dir=hub)
    assert missing is not None and not isinstance(missing, str), "the hub was asked, and has no such file"


def test_a_download_that_broke_off_is_one_error_and_goes_on(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hub, "cut", 100_000)
    assert cli.run(["fetch", "small"]) == 1
    assert capsys.readouterr().err.count("run the same command again: it goes on from there") == 1
    assert not any(name.endswith("model.safetensors") for name in files(hub))
    assert cli.run(["fetch", "small"]) == 0
    assert WeightSource("small").weights()


def test_a_damaged_file_in_the_cache_is_refused_and_replaced(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["fetch", "small"]) == 0
    path = hub / "models--someone--small" / "snapshots" / COMMIT / "model.safetensors"
    path.write_bytes(WEIGHTS[:50_000])  # a copy to a stick that was pulled out
    with pytest.raises(ModelError, match=r"its sha256 is .*incomplete or another file; run: edgedetr fetch small"):
        WeightSource("small").weights()
    assert cli.run(["fetch", "small"]) == 0
    assert path.read_bytes() == WEIGHTS


def test_weights_that_changed_on_the_hub_are_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ROW, sha256="0" * 64)
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": other})
    with pytest.raises(ModelError, match=rf"that of small is {'0' * 64}"):
        WeightSource("small").weights()


REFUSED = {
    "a revision that is gone": (
        replace(ROW, revision=LATER),
        r"someone/small on the hub has no revision b{40} any more",
    ),
    "a model that is gone": (replace(ROW, hub="someone/else", revision=""), "the hub has no model 'someone/else'"),
    "a license that binds": (replace(ROW, license=ROWS["rfdetr-xlarge"].license), "add --accept-license PML-1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fetched_is_one_error(
    case: str, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, message = REFUSED[case]
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": row})
    assert cli.run(["fetch", "small"]) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and not (hub.exists() and files(hub))


def test_weights_at_an_address_go_beside_those_of_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{constants.ENDPOINT}/someone/small/resolve/main/model.safetensors"
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": replace(ROW, hub="", url=url, revision="")})
    assert cli.run(["fetch", "small", "--to", str(tmp_path / "stick")]) == 0
    assert files(tmp_path / "stick") == ["files--small/model.safetensors"]
    shutil.copytree(tmp_path / "stick", hub)
    monkeypatch.setattr(network, "why_unreachable", lambda _: pytest.fail("it is here"))
    assert WeightSource("small").weights().keys() == {"w"}


def test_what_a_person_downloaded_is_found_in_its_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ROW, hub="", page="https://example.org/folder", revision="", sha256="")
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": row})
    with pytest.raises(ModelError, match=r"open https://example.org/folder, save its weight file into \S+files--small"):
        WeightSource("small").weights()
    (hub / "files--small").mkdir(parents=True)
    (hub / "files--small" / "whatever.safetensors").write_bytes(WEIGHTS)
    assert WeightSource("small").weights().keys() == {"w"}


def test_a_license_is_accepted_by_name(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(ROW, license=ROWS["rfdetr-xlarge"].license)
    monkeypatch.setattr(published_detectors, "published", lambda: {"small": row})
    assert cli.run(["fetch", "small", "--accept-licence", "pml-1.0"]) == 0  # in either spelling


def test_a_disk_without_room_is_one_error(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(hub.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    assert cli.run(["fetch", "small"]) == 1
    assert "has room for 500; free some space, or choose another folder (edgedetr fetch --to DIR" in (
        capsys.readouterr().err
    )
    assert not any("safetensors" in name for name in files(hub))


def test_a_host_that_does_not_answer_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LIMIT", 0.2)
    monkeypatch.setattr(network, "_connect", lambda *_: time.sleep(3) or "")
    monkeypatch.setattr(network, "_unreachable", {})
    begun = time.monotonic()
    assert "did not answer within 0.2 s" in network.why_unreachable("https://example.org/x")
    assert "did not answer" in network.why_unreachable("https://example.org/y"), "and is not asked again"
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "proxy, first",
    [("http://10.0.0.1:3128", ("10.0.0.1", 3128)), ("10.0.0.2:80", ("10.0.0.2", 80)), ("", ("x.org", 443))],
)
def test_behind_a_proxy_the_proxy_is_asked(proxy: str, first: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    assert network._first_host("https://x.org/file") == first
