"""Decode image files to EXIF-upright RGB arrays: fixed formats, limits before decoding, errors with the file name.

- The content decides the format, not the name. Only formats that Pillow decodes within this process are opened: a
  PostScript file named photo.jpg would make Pillow start Ghostscript.
- EXIF orientation (tag 274; also from XMP) is applied; 0, invalid or unreadable means no rotation. In a PNG only
  chunks before the pixel data count, so that the header is enough to know the size.
- Alpha and palette transparency are dropped and the stored colors kept, as OpenCV and other detectors' loaders do.
- Gray becomes three equal channels; 16-bit gray is scaled (v / 257), not clipped. CMYK and YCbCr go through Pillow.
- The first frame of an animation, page of a TIFF or image of an MPO is taken.
- Float pixels have no defined white and are refused.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from edgedetr.errors import DataError, EdgedetrError

MAX_PIXELS = 64_000_000  # 8000 x 8000; 192 MB as RGB. Pillow's own limit is 179 million
ORIENTATION = 0x0112
TAIL = 4096  # bytes searched for an end marker; some cameras append data after it
BAND = 256  # rows converted at a time, so that memory holds no second copy of the image

# None of these starts another program. EPS (Ghostscript), WMF (a Windows renderer) and the stubs of HDF5, GRIB and
# BUFR, which other packages implement, are left out on purpose.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "QOI",
    "PCX",
    "SGI",
    "SUN",
)
NAMED_FORMATS = {
    ".tga": "TGA",
    ".icb": "TGA",
    ".vda": "TGA",
    ".vst": "TGA",
}  # TGA has no signature: only the name identifies it
NOT_IMAGES = frozenset({".bw", ".rgb", ".rgba"})  # registered by SGI; in practice raw pixels or masks of other programs
# Formats that Pillow reads with another package: where it is missing, the message says what to install.
PLUGINS = {
    "HEIC": ("pillow_heif", "register_heif_opener", "pillow-heif", ("HEIF",)),
    "JPEG XL": ("pillow_jxl", "", "pillow-jxl-plugin", ("JXL",)),
    "AVIF": ("pillow_avif", "", "'pillow>=11.3'", ("AVIF",)),
}
# Brands in the "ftyp" box of HEIF (ISO/IEC 23008-12, annex B and C); other brands are videos.
HEIF_BRANDS = frozenset(
    {
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"hevx",
        b"hevm",
        b"hevs",
        b"mif1",
        b"mif2",
        b"msf1",
        b"miaf",
        b"heif",
    }
)
PLUGIN_SUFFIXES = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".jxl": "JPEG XL", ".avif": "AVIF"}


class ImageMissing(DataError):
    """There is no such file."""


class ImageTooLarge(DataError):
    """The header has more pixels than the limit (a decompression bomb, or an image that must be tiled)."""


class ImageUnreadable(DataError):
    """The file is not an image, is truncated or damaged, or has pixels that are not colors."""


class OutOfMemory(EdgedetrError):
    """Not enough memory for the pixels. The file is fine, so this is not a DataError, which readers skip."""


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Suffixes of image files: those that Pillow registers for FORMATS, TGA's, and those that need a package."""
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return frozenset(registered - NOT_IMAGES | NAMED_FORMATS.keys() | PLUGIN_SUFFIXES.keys())


def is_image(path: Path) -> bool:
    """Whether the name has the suffix of an image (.jpg, .JPG, .jfif, .png, ...)."""
    return path.suffix.lower() in suffixes()


def decode(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels of an image file or of its bytes.

    return   [H, W, 3]  uint8, RGB, EXIF-upright. Memory at the peak: this and the decoder's own copy (up to 4 bytes a
             pixel)
    Errors: ImageMissing, ImageTooLarge, ImageUnreadable, all of them DataError; OutOfMemory.
    """
    name = _name(source)
    with _open(source, max_pixels) as image:
        orientation = _orientation(image)
        try:
            image.load()
            return _upright(_rgb(image, name), orientation)
        except DataError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for bad bytes
            raise _fault(
                error,
                name,
                image.size,
                "cannot be decoded",
                "expected a whole image file; replace the file or remove it from the data set",
            ) from error


def size(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the EXIF-upright image, from the header alone."""
    with _open(source, max_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def frame_count(path: str | Path) -> int:
    """Frames of an animation or pages of a TIFF, of which `decode` takes the first; 1 for photos, also of several."""
    try:
        with _open(path, MAX_PIXELS) as image:
            return 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001  # counting reads all of a file whose first frame may be whole
        return 1


def probe(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) like `size`; a JPEG or PNG without its end marker is decoded, to detect truncation."""
    found = size(path, max_pixels=max_pixels)
    with open_plain(path) as stream:
        head = stream.read(8)
        length = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, length - TAIL))
        tail = stream.read()
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
    if ends is not None and ends not in tail:
        decode(path, max_pixels=max_pixels)
    return found


def open_plain(path: str | Path) -> IO[bytes]:
    """Open a plain file for reading. Errors: ImageMissing for anything else (a pipe or a device could block)."""
    try:
        state = os.stat(path)
        if stat.S_ISREG(state.st_mode):
            handle = os.open(
                path,
                os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0),
            )
            stream = os.fdopen(handle, "rb")
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return stream
            stream.close()
        kind = "a directory" if stat.S_ISDIR(state.st_mode) else "not a plain file"
    except FileNotFoundError:
        kind = "a link to a file that does not exist" if os.path.islink(path) else "missing"
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        kind = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise ImageMissing(f"{path}: {kind}; expected an image file")


def _name(source: str | Path | bytes) -> str:
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def _open(source: str | Path | bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size within the limit; the file is closed at the end."""
    name = _name(source)
    stream = io.BytesIO(source) if isinstance(source, bytes) else open_plain(source)
    with stream:
        head = stream.read(16)
        if not head:
            raise ImageUnreadable(f"{name}: empty (0 bytes); expected an image file")
        suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
        stream.seek(0)
        try:
            image = Image.open(stream, formats=_formats(suffix, head))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageTooLarge(
                f"{name}: refused before decoding ({error}); expected at most {max_pixels} pixels"
            ) from error
        except Exception as error:  # header parsers raise many types
            raise _fault(error, name, (1, 1), "not a readable image", _expected(head)) from error
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLarge(
                    f"{name}: {width} x {height} pixels (width x height), refused before decoding; "
                    f"expected at most {max_pixels}; tile the image or make it smaller"
                )
            if width < 1 or height < 1:
                raise ImageUnreadable(f"{name}: {width} x {height} pixels; expected at least 1 x 1")
            yield image


def _formats(suffix: str, head: bytes) -> tuple[str, ...]:
    extra = NAMED_FORMATS.get(suffix)
    formats = _installed() if extra is None else (*_installed(), extra)
    plugin = _plugin(head)
    if plugin is None:
        return formats
    module, register, _, names = PLUGINS[plugin]
    try:
        added = import_module(module)
        if register:
            getattr(added, register)()
    except (ImportError, AttributeError):
        return formats
    return (*formats, *(name for name in names if name in Image.OPEN and name not in formats))


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow opens (AVIF came with 11.3; MPO is opened by JPEG's reader)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _plugin(head: bytes) -> str | None:
    """The entry of PLUGINS that matches the first 16 bytes of a file."""
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return None
    return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIC" if head[8:12] in HEIF_BRANDS else None


def _expected(head: bytes) -> str:
    plugin = _plugin(head)
    if plugin is not None:
        return f"this is {plugin}, which needs a package; run: pip install {PLUGINS[plugin][2]} (or save it as JPEG)"
    if head[4:8] == b"ftyp":
        return "this is a video (MP4 or MOV); name it .mp4, and give it to edgedetr predict"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF")):
        return "this is PostScript or PDF, which is never executed; save it as PNG"
    return "expected JPEG, PNG, WebP, BMP, TIFF or another of " + ", ".join(FORMATS)


def _fault(error: Exception, name: str, shape: tuple[int, int], what: str, expected: str) -> EdgedetrError:
    """The error to raise: OutOfMemory only if the memory for the pixels cannot be allocated."""
    out = isinstance(error, MemoryError) or "out of memory" in str(error)
    if out and not _can_allocate(8 * shape[0] * shape[1] + (64 << 20)):
        return OutOfMemory(
            f"{name}: no memory left to decode {shape[0]} x {shape[1]} pixels; "
            "expected about 8 bytes per pixel; end other programs or lower train.workers"
        )
    # Pillow's text for this error shows a Python object and no reason.
    reason = (
        "its content has no known format"
        if isinstance(error, UnidentifiedImageError)
        else f"{type(error).__name__}: {str(error)[:120]}"
    )
    return ImageUnreadable(f"{name}: {what} ({reason}); {expected}")


def _can_allocate(count: int) -> bool:
    try:
        np.empty(count, np.uint8)
    except MemoryError:
        return False
    return True


def _orientation(image: Image.Image) -> int:
    """1..8; 1 where it is missing or invalid, and for TIFF, which Pillow rotates automatically."""
    if image.format == "TIFF":
        return 1
    try:
        # The method of the base class: PNG's would decode the whole image to search chunks after it.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # parsers of EXIF raise many types, and a damaged block leaves the pixels usable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as a viewer displays them for this value of the tag; [H, W, 3]."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    """The stored pixels as [H, W, 3] uint8, converted a band of rows at a time."""
    if image.mode == "F":
        raise ImageUnreadable(
            f"{name}: float pixels have no defined white; expected 8 or 16 bits per channel; convert the file"
        )
    width, height = image.size
    found = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, BAND):
        band = image.crop((0, top, width, min(top + BAND, height)))
        if band.mode.startswith("I"):
            found[top : top + BAND] = _eight_bit(band, name)[..., None]
            continue
        if band.mode in ("La", "RGBa"):
            band = band.convert("LA" if band.mode == "La" else "RGBA")
        found[top : top + BAND] = np.asarray(band.convert("RGB"))
    return found


def _eight_bit(band: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(band).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageUnreadable(
            f"{name}: gray values {values.min()}..{values.max()}; expected 8 or 16 bits per channel; convert the file"
        )
    return ((values + 128) // 257).astype(np.uint8)
