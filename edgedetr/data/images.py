"""Image files to EXIF-upright RGB arrays: every mode of Pillow, limits before decoding, errors that name the file.

- EXIF orientation (tag 274; also from XMP) is applied; 0, invalid or unreadable means no rotation. In a PNG only what
  stands before the pixel data counts, so that a header is enough to know the size.
- Alpha and palette transparency are dropped and the stored colours kept, as OpenCV and other detectors' loaders do.
- Gray becomes three equal channels; 16-bit gray is scaled (v / 257), not clipped. CMYK and YCbCr go through Pillow.
- The first frame of an animation, page of a TIFF or picture of an MPO is taken.
- Float pixels have no defined white and are refused.
"""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from edgedetr.errors import DataError

MAX_PIXELS = 64_000_000             # 8000 x 8000; 192 MB as RGB. Pillow itself refuses above 179 million
ORIENTATION = 0x0112
TAIL = 4096                         # bytes looked at for an end marker; some cameras append a few of their own
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm",
                      ".mpo", ".avif", ".jp2", ".tga"})

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageMissing(DataError):
    """There is no such file."""


class ImageTooLarge(DataError):
    """The file claims more pixels than the limit (a decompression bomb, or a picture to be tiled first)."""


class ImageUnreadable(DataError):
    """The file is no image, is truncated or damaged, or has pixels that cannot be read as colours."""


def is_image(path: Path) -> bool:
    """Whether the name ends like an image's (.jpg, .JPG, .png, ...)."""
    return path.suffix.lower() in SUFFIXES


def decode(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels of an image file or of its bytes.

    return   [H, W, 3]  uint8, RGB, EXIF-upright
    Errors: ImageMissing, ImageTooLarge, ImageUnreadable, all of them DataError.
    """
    name = _name(source)
    with closing(_open(source, max_pixels)) as image:
        orientation = _orientation(image)
        try:
            image.load()
            pixels = _rgb(image, name)
            if orientation in _TRANSPOSE:
                pixels = pixels.transpose(_TRANSPOSE[orientation])
            return np.array(pixels)
        except DataError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for bad bytes
            raise ImageUnreadable(f"{name}: cannot be decoded ({_reason(error)}); expected a whole image file; "
                                  "replace the file or take it out of the data set") from error


def size(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of the EXIF-upright picture, from the header alone."""
    with closing(_open(source, max_pixels)) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def probe(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) like `size`; a JPEG or PNG without its end marker is decoded too, so that truncation is seen."""
    found = size(path, max_pixels=max_pixels)
    with open(path, "rb") as stream:
        head = stream.read(8)
        length = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, length - TAIL))
        tail = stream.read()
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(head[:2])
    if ends is not None and ends not in tail:
        decode(path, max_pixels=max_pixels)
    return found


def _name(source: str | Path | bytes) -> str:
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _open(source: str | Path | bytes, max_pixels: int) -> Image.Image:
    name = _name(source)
    if isinstance(source, bytes):
        empty = not source
    else:
        if not Path(source).is_file():
            kind = "a directory" if Path(source).is_dir() else "missing"
            raise ImageMissing(f"{name}: {kind}; expected an image file")
        empty = Path(source).stat().st_size == 0
    if empty:
        raise ImageUnreadable(f"{name}: empty (0 bytes); expected an image file")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{name}: refused before decoding ({error}); "
                            f"expected at most {max_pixels} pixels") from error
    except Exception as error:      # as above: header parsers raise many types
        raise ImageUnreadable(f"{name}: not a readable image ({_reason(error)}); expected JPEG, PNG, WebP, BMP, "
                              "TIFF or another format of Pillow") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageTooLarge(f"{name}: {width} x {height} pixels (width x height), refused before decoding; "
                            f"expected at most {max_pixels}; tile the picture or make it smaller")
    if width < 1 or height < 1:
        image.close()
        raise ImageUnreadable(f"{name}: {width} x {height} pixels; expected at least 1 x 1")
    return image


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"


def _orientation(image: Image.Image) -> int:
    """1..8; 1 where there is none, where it is invalid, and for TIFF, which Pillow turns by itself."""
    if image.format == "TIFF":
        return 1
    try:
        # The base class's method: PNG's own would decode the whole picture to look for chunks after it.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # parsers of EXIF raise many types, and a damaged block leaves the pixels usable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageUnreadable(f"{name}: float pixels have no defined white; expected 8 or 16 bits per channel; "
                              "convert the file")
    if image.mode.startswith("I"):
        return _sixteen_bit(image, name).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageUnreadable(f"{name}: gray values {values.min()}..{values.max()}; expected 8 or 16 bits per channel; "
                              "convert the file")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
