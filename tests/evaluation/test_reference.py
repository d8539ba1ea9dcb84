"""reference.npz: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedetr.data import layouts
from edgedetr.errors import BundleError
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.reference import GroundTruth, Reference, load_detections, save_detections
from edgedetr.runtime.postprocess import Detections

COLUMNS = ("image_ids", "names", "digests", "sizes", "image", "boxes", "labels", "crowd", "areas")


@pytest.fixture
def reference(random_set) -> Reference:
    truth, found = random_set(1)
    found = {
        i: Detections(d.xyxy.astype(np.float32), d.confidence.astype(np.float32), d.class_id) for i, d in found.items()
    }
    return Reference(truth, found, "test", "ab" * 32)


def test_a_round_trip_changes_nothing(reference, tmp_path):
    reference.save(tmp_path / "reference.npz")
    back = Reference.load(tmp_path / "reference.npz")
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(back.truth, name), getattr(reference.truth, name))
    assert (back.truth.classes, back.split, back.model) == (reference.truth.classes, "test", "ab" * 32)
    assert back.detections.keys() == reference.detections.keys()
    for image_id, detections in reference.detections.items():
        np.testing.assert_array_equal(back.detections[image_id].xyxy, detections.xyxy)
        np.testing.assert_array_equal(back.detections[image_id].class_id, detections.class_id)
    assert evaluate(back.truth, back.detections).ap == evaluate(reference.truth, reference.detections).ap


def test_the_same_content_gives_the_same_bytes(reference, tmp_path):
    reference.save(tmp_path / "a.npz")
    reference.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_detections_alone_come_back_with_names(reference, tmp_path):
    save_detections(tmp_path / "x.npz", reference.detections)
    back = load_detections(tmp_path / "x.npz", reference.truth.classes)
    for image_id, detections in reference.detections.items():
        np.testing.assert_array_equal(back[image_id].confidence, detections.confidence)
        assert back[image_id].data["class_name"].tolist() == [f"class {1 + k}" for k in detections.class_id]
        assert back[image_id].data["category_id"].tolist() == [5 * (1 + k) for k in detections.class_id]


def test_a_split_is_taken_as_it_is_with_the_digests_of_its_files(colors):
    truth = GroundTruth.of(layouts.load(colors, "test"), digests=True)
    assert len(truth) == len(truth.labels) == 24
    assert truth.names[0] == "images/test/00.png"
    assert truth.digests[3] == hashlib.sha256((colors / "images" / "test" / "03.png").read_bytes()).hexdigest()
    assert truth.sizes[0].tolist() == [32, 48]
    np.testing.assert_allclose(truth.boxes[0], [4.8, 6.4, 19.2, 25.6])  # worked by hand from conftest
    assert truth.image.tolist() == list(range(24))


def test_every_image_needs_an_entry(colors):
    dataset = layouts.load(colors, "test")
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    with pytest.raises(BundleError, match="no detections for image id 2"):
        Reference.of(dataset, {1: empty})
    assert len(Reference.of(dataset, {s.image_id: empty for s in dataset.samples}).truth) == 24


def test_a_subset_is_the_set_without_the_others(reference):
    ids = reference.truth.image_ids[[2, 5, 6]].tolist()
    part = reference.truth.subset(ids)
    assert part.image_ids.tolist() == ids
    for new, old in enumerate([2, 5, 6]):
        np.testing.assert_array_equal(
            part.boxes[part.image == new], reference.truth.boxes[reference.truth.image == old]
        )


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive", pickle.dumps(Evil())])
def test_files_of_another_kind_are_refused_and_never_executed(tmp_path, content):
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"reference.npz: damaged or of another kind.*edgedetr export"):
        Reference.load(tmp_path / "reference.npz")


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(BundleError, match="no such file; run: edgedetr export"):
        Reference.load(tmp_path / "reference.npz")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_refused(reference, tmp_path, keep):
    path = tmp_path / "reference.npz"
    reference.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BundleError, match="damaged"):
        Reference.load(path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("schema", lambda v: v + 1, "schema 2, this version reads 1"),
        ("truth_boxes", lambda v: v[:-1], "truth_boxes is float64"),
        ("truth_boxes", lambda v: v * np.nan, "truth_boxes has NaN"),
        ("truth_labels", lambda v: v + 3, "truth_labels runs from 3"),
        ("truth_labels", lambda v: v.astype(float), "truth_labels is float64"),
        ("found_class", lambda v: v - 1, "found_class runs from -1"),
        ("found_image", lambda v: v[::-1], "found_image is not in order"),
        ("image_id", lambda v: np.zeros_like(v), "image_id is not unique"),
        ("image_sha256", lambda v: v[1:], "image_sha256"),
        ("class_name", lambda v: v[1:], "zip"),
        ("truth_crowd", None, "truth_crowd"),
        ("split", lambda v: np.array([Evil()], object), "allow_pickle"),
    ],
)
def test_each_wrong_column_is_named(reference, tmp_path, name, change, message):
    path = tmp_path / "reference.npz"
    reference.save(path)
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match=message):
        Reference.load(path)


def zipped(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def peak(work) -> int:
    tracemalloc.start()
    work()
    try:
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("member", ["found_boxes.npy", "of_nobody.npy"])
def test_a_bomb_takes_no_memory_be_it_in_an_array_that_is_read_or_in_another(reference, tmp_path, member):
    path, count = tmp_path / "reference.npz", 5 << 20  # 80 MiB of zeros in 80 kB
    reference.save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    zipped(path, {**members, member: header("<f4", f"{count}, 4") + bytes(16 * count)})
    assert path.stat().st_size < 200_000

    def load() -> None:
        if member == "of_nobody.npy":
            assert Reference.load(path).split == "test"
        else:
            with pytest.raises(BundleError, match="more than the"):
                Reference.load(path)

    assert peak(load) < 8 << 20


def test_a_list_of_a_million_members_is_not_read(tmp_path):
    path = tmp_path / "reference.npz"
    entries = b"PK\x01\x02" + bytes(42)
    path.write_bytes(entries * 2000 + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 2000, 2000, 92_000, 0, 0))
    with pytest.raises(BundleError, match="a list of 92000 bytes of members"):
        Reference.load(path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x93NUMPY\x02\x00" + bytes(200), "format 1.0"),
        (header("<i8", "3,") + bytes(16), "expected 152"),
        (header("<i8", "3, 3") + bytes(72), r"image_id is int64 \[3, 3\], expected kind 'i' \['\?'\]"),
        (header("<f8", "3,") + bytes(24), "image_id is float64"),
        (header("<i8", "999999999999999, ") + bytes(24), "has 152 bytes"),
        (header("|O8", "3,") + bytes(24), "Python objects"),
        (header("<i8", "__import__,") + bytes(24), "not a plain array"),
        (b"", "format 1.0"),
    ],
)
def test_what_an_array_claims_is_checked_before_it_is_read(reference, tmp_path, data, message):
    path = tmp_path / "x.npz"
    save_detections(path, reference.detections)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    zipped(path, {**members, "image_id.npy": data})
    with pytest.raises(BundleError, match=rf"{message}.*run: edgedetr verify BUNDLE"):
        load_detections(path, reference.truth.classes)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "reference.npz")
    with pytest.raises(BundleError, match="not a plain file"):
        Reference.load(tmp_path / "reference.npz")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_are_one_error_or_the_same_set(reference, tmp_path, data):
    path = tmp_path / "reference.npz"
    reference.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(BundleError):
        np.testing.assert_array_equal(Reference.load(path).truth.boxes, reference.truth.boxes)
