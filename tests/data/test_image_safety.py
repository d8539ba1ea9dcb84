"""Image files that want to start programs, block a reader, eat memory, or that another package must read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from edgedetr.data import images
from edgedetr.errors import DataError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.skipif(os.name == "nt", reason="the planted interpreter is a shell script")
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.tga", "photo.eps"])
def test_postscript_under_any_name_starts_no_interpreter(tmp_path, monkeypatch, name):
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    for read in (images.decode, images.probe):
        with pytest.raises(images.ImageUnreadable, match="PostScript"):
            read(tmp_path / name)
    with pytest.raises(images.ImageUnreadable, match="PostScript"):
        images.decode(POSTSCRIPT)
    assert not (tmp_path / "started").exists()


def test_only_formats_decoded_within_this_process_are_opened():
    assert not {"EPS", "WMF", "PSD", "FITS", "HDF5", "GRIB", "BUFR", "FPX", "MIC", "ICNS"} & set(images.FORMATS)


def test_the_content_decides_and_not_the_name(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(stream, "PNG")
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    assert images.decode(tmp_path / "a.jpg").tolist() == [[[9, 8, 7]] * 6] * 4


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "dib", "tif", "apng", "pnm", "j2k", "qoi", "tga", "TGA", "pcx"])
def test_every_ending_of_a_format_that_is_opened_counts_and_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    form = Image.registered_extensions()[f".{suffix.lower()}"]
    Image.new("RGB", (6, 4), (200, 0, 0)).save(path, form)
    assert images.is_image(path)
    assert np.abs(images.decode(path).astype(int) - [200, 0, 0]).max() < 8


@pytest.mark.parametrize("name", ["a.eps", "a.pdf", "a.mpg", "a.h5", "a.psd", "a.txt", "a.rgb", "a.svg", "a"])
def test_other_endings_are_no_images(tmp_path, name):
    assert not images.is_image(tmp_path / name)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
@pytest.mark.parametrize("name", ["IMG_1.heic", "IMG_1.jpg"])
def test_heic_is_named_with_what_to_install(tmp_path, monkeypatch, brand, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    assert images.is_image(tmp_path / name)
    with pytest.raises(images.ImageUnreadable, match="this is HEIC.*pip install pillow-heif"):
        images.decode(tmp_path / name)


def test_jpeg_xl_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    assert images.is_image(tmp_path / "a.jxl")
    with pytest.raises(images.ImageUnreadable, match="pip install pillow-jxl-plugin"):
        images.size(tmp_path / "a.jxl")


def test_pipes_devices_and_impossible_names_are_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, said in (
        (tmp_path / "pipe.jpg", "not a plain file"),
        ("/dev/zero", "not a plain file"),
        (tmp_path / "a\0b.jpg", "cannot be read"),
        (tmp_path / ("n" * 300 + ".jpg"), "cannot be read"),
        (tmp_path, "a directory"),
    ):
        for read in (images.decode, images.size, images.probe):
            with pytest.raises(images.ImageMissing, match=said):
                read(path)


def test_low_memory_is_not_called_a_bad_image(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(images.OutOfMemory, match=r"a\.png: no memory left to decode 40 x 30") as error:
        images.decode(tmp_path / "a.png")
    assert not isinstance(error.value, DataError)  # which readers skip


PEAK = """
    import resource, sys
    from edgedetr.data import images
    images.decode(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images.decode(sys.argv[2]).shape[2] == 3
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("mode, most", [("I;16", 7.5), ("RGB", 8.5)])
def test_decoding_takes_the_array_and_the_decoder_s_own_copy(tmp_path, mode, most):
    # By count: 3 bytes a pixel for the array, and 2 (16-bit gray) or 4 (RGB) for Pillow's. It was 19 for 16 bits.
    Image.new(mode, (8, 8)).save(tmp_path / "small.png")
    Image.new(mode, (4000, 3000)).save(tmp_path / "large.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), tmp_path / "small.png", tmp_path / "large.png"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert int(done.stdout) * 1024 / 12e6 < most


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_one_pixel_is_an_image(mode):
    stream = io.BytesIO()
    Image.new(mode, (1, 1)).save(stream, "TIFF")
    assert images.decode(stream.getvalue()).shape == (1, 1, 3)


def test_bands_join_without_a_seam():
    pixels = np.random.default_rng(0).integers(0, 65536, (2 * images.BAND + 3, 5)).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    assert (images.decode(stream.getvalue())[..., 1] == (pixels.astype(int) + 128) // 257).all()
