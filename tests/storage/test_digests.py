"""Digests: of the content, computed once while a file stays as it is, and again whenever it may have changed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter

import pytest

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import BundleError
from edgedetr.storage import digests
from edgedetr.storage.digests import BLOCK, DigestCache, digest


@pytest.fixture
def hashed(monkeypatch) -> Counter:
    """How often each file was read completely, by name."""
    found: Counter = Counter()

    def counting(path):
        found[path.name] += 1
        return digest(path)

    monkeypatch.setattr(digests, "digest", counting)
    return found


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files count as settled at once, so that a test need not wait."""
    monkeypatch.setattr(digests, "SETTLED", -(10**18))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_a_digest_is_sha256_of_the_content(tmp_path, size, rng):
    content = rng.bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path, hashed, settled):
    path, cache = tmp_path / "file", DigestCache()
    path.write_bytes(b"abc")
    assert {cache.digest(path) for _ in range(5)} == {hashlib.sha256(b"abc").hexdigest()}
    assert hashed["file"] == 1


def _same_size_and_time(path):
    before = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _another_file_of_the_same_size_and_time(path):
    other = path.with_name("other")
    other.write_bytes(b"xyz")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [_same_size_and_time, _another_file_of_the_same_size_and_time])
def test_a_change_that_hides_its_time_is_noticed(tmp_path, settled, change):
    path, cache = tmp_path / "file", DigestCache()
    path.write_bytes(b"abc")
    os.utime(path, ns=(10**18, 10**18))
    cache.digest(path)
    change(path)
    assert cache.digest(path) == hashlib.sha256(b"xyz").hexdigest()


def test_a_file_that_was_just_written_is_read_again(tmp_path, hashed):
    """Its next change may get the same time stamp."""
    path, cache = tmp_path / "file", DigestCache()
    path.write_bytes(b"abc")
    cache.digest(path)
    cache.digest(path)
    assert hashed["file"] == 2


def test_a_bundle_hashes_each_file_once_and_still_notices_damage(tmp_path, hashed, settled):
    manifest = Manifest("rt_detr", (ClassInfo(0, 1, "cell"),), InputContract(32, 32), OutputContract())
    made = Bundle.create(tmp_path / "b", manifest)
    for name, sources in (("model.onnx", []), ("ranges.json", ["model.onnx"])):
        with made.add(name, stage="test", made_from=sources) as path:
            path.write_text(name)
    bundle = Bundle.open(made.path)
    for _ in range(4):
        assert bundle.has("model.onnx") and bundle.has("ranges.json")
    assert hashed == {"model.onnx": 1, "ranges.json": 1}
    (bundle.path / "model.onnx").write_text("MODEL.ONNX")
    with pytest.raises(BundleError, match="damaged or edited"):
        bundle.require("model.onnx")
    assert hashed["ranges.json"] == 1
