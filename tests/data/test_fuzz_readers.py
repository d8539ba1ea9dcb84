"""Readers of data sets against damaged and unusual files: DataError or a result, within a second."""

from __future__ import annotations

import copy
import io
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from sets import coco, tables, text, voc, xml, yolo

from edgedetr.data import coco_boxes, data_yaml, images, layouts
from edgedetr.errors import DataError

FEW, MANY = 25, 12_000  # examples of each test: in every run, and marked slow
PER_FILE = 1.0  # seconds; five times as much is allowed where the machine is busy

UNUSUAL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(
        [
            -1,
            2**63,
            2**64,
            10**400,
            1e308,
            -1e308,
            "",
            "²",
            "../../x",
            "/etc/hosts",
            "a\0b",
            "n" * 300,
            "1e400",
            "\ud800",
            [],
            {},
            [[]],
            [None],
            {"id": []},
            [1, 2, 3, 4, 5],
            "true",
            [[[]]],
        ]
    ),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3)), max_size=9),
)
BYTES = [
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"<",
    b"[",
    b"{",
    b"&",
    b"*",
    b"!",
    b'"',
    b"'",
    b"\t",
    b"\r\n",
    b":",
    b"- ",
    b"#",
    b"|",
    b"1e999",
    b"9" * 5000,
    b" " * 3000,
    b"[" * 3000,
    b"<a>" * 3000,
    b"<!DOCTYPE a>",
    b"&x;",
    b"\x85",
    "²".encode(),
    b"nan",
    b"-0",
    b"\xe2\x80\xa8",
]


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file after a few cuts, repeats and insertions."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["insert", "cut", "flip", "repeat", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "insert":
            content[at:at] = draw(st.sampled_from(BYTES))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 50))
        elif kind == "end":
            del content[at:]
        elif at < len(content):
            content[at] ^= draw(st.integers(1, 255))
    return bytes(content)


@st.composite
def odd_tables(draw) -> object:
    """COCO tables in which some value, at any depth, is another thing."""
    content = tables()
    content["annotations"][0]["segmentation"] = draw(
        st.one_of(UNUSUAL, st.just([[1, 1, 5, 1, 5, 5]]), st.just({"size": [30, 40], "counts": "52X"}))
    )
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 4)):
                node = node[key]
                continue
            if isinstance(node, dict) and not draw(st.integers(0, 4)):
                del node[key]
            else:
                node[key] = copy.deepcopy(draw(UNUSUAL))  # samples are shared, and would be put into themselves
            break
    return content


def in_time(read) -> None:
    """Only DataError may come out, and soon."""
    begun = time.perf_counter()
    with suppress(DataError):
        read()
    taken = time.perf_counter() - begun
    assert taken < 5 * PER_FILE, f"{taken:.1f} s"


def reads(root: Path):
    def read() -> None:
        for split in layouts.splits(root):
            found = layouts.load(root, split)
            for sample in found.samples:
                assert np.isfinite(sample.boxes).all() and (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
                assert ((sample.labels >= 0) & (sample.labels < len(found.classes))).all()

    return read


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


FORMS = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "PCX", "TGA")
ENCODED = {form: encoded(form) for form in FORMS}


def fuzz(examples: int):
    """Every reader, `examples` times each, as one test for each kind of file."""
    often = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )

    @often
    @given(content=odd_tables())
    def coco_values(root: Path, content: object) -> None:
        text(root / "annotations" / "train.json", json.dumps(content))
        in_time(reads(root))

    @often
    @given(content=damaged(json.dumps(tables()).encode()))
    def coco_bytes(root: Path, content: bytes) -> None:
        text(root / "annotations" / "train.json", content)
        in_time(reads(root))

    @often
    @given(value=UNUSUAL)
    def segmentation(root: Path, value: object) -> None:
        in_time(lambda: coco_boxes.segmentation_box(value))
        in_time(lambda: coco_boxes.segmentation_box({"size": value, "counts": value}))

    @often
    @given(
        content=damaged(
            b"path: .\nnames:\n  0: cat\n  1: 'dog'\nnc: 2\ntrain: [images/train]\nval: list.txt\n"
            b"kpt_shape: [17, 3]\na: &a [x]\nb: *a\n"
        )
    )
    def yaml(root: Path, content: bytes) -> None:
        text(root / "data.yaml", content)
        in_time(lambda: data_yaml.read(root / "data.yaml"))
        in_time(reads(root))

    @often
    @given(content=damaged(b"1 0.5 0.5 0.25 0.2\n0 0.1 0.1 0.3 0.1 0.3 0.4\n\n1 0.5 0.5 0.2 0.2 0.1 0.1 2\n"))
    def labels(root: Path, content: bytes) -> None:
        text(root / "data.yaml", "names: [cat, dog]\ntrain: images/train\n")
        text(root / "labels" / "train" / "a.txt", content)
        in_time(reads(root))

    @often
    @given(content=damaged(b"images/train/a.jpg\n./b.jpg\n/x/y/images/train/a.jpg\n..\\images\\train\\b.jpg\n"))
    def lists(root: Path, content: bytes) -> None:
        text(root / "data.yaml", "names: [cat, dog]\ntrain: list.txt\n")
        text(root / "list.txt", content)
        in_time(reads(root))

    @often
    @given(content=damaged(b'<?xml version="1.0" encoding="utf-8"?>' + xml("a.jpg").encode()))
    def xml_bytes(root: Path, content: bytes) -> None:
        text(root / "Annotations" / "a.xml", content)
        in_time(reads(root))

    @often
    @given(content=damaged(b"a\nb 1\nmy photo (1)\n"), names=damaged(b"dog\ncat\n"))
    def voc_lists(root: Path, content: bytes, names: bytes) -> None:
        text(root / "ImageSets" / "Main" / "train.txt", content)
        text(root / "classes.txt", names)
        in_time(reads(root))

    @often
    @given(content=st.sampled_from(sorted(ENCODED)).flatmap(lambda form: damaged(ENCODED[form])), tga=st.booleans())
    def image_files(root: Path, content: bytes, tga: bool) -> None:
        path = text(root / ("x.tga" if tga else "x.jpg"), content)
        in_time(lambda: images.probe(path, max_pixels=1_000_000))
        in_time(lambda: images.decode(path, max_pixels=1_000_000))

    return {
        "coco_values": (coco, coco_values),
        "coco_bytes": (coco, coco_bytes),
        "segmentation": (coco, segmentation),
        "yaml": (yolo, yaml),
        "labels": (yolo, labels),
        "lists": (yolo, lists),
        "xml": (voc, xml_bytes),
        "voc_lists": (voc, voc_lists),
        "images": (coco, image_files),
    }


@pytest.mark.parametrize("name", fuzz(1))
def test_only_data_errors_come_out_of_a_reader(name, tmp_path):
    make, run = fuzz(FEW)[name]
    run(make(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz(1))
def test_only_data_errors_come_out_of_a_reader_for_long(name, tmp_path):
    make, run = fuzz(MANY)[name]
    run(make(tmp_path))
