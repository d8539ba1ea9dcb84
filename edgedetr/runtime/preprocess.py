"""The one resize: how an image becomes the input of a model, and how boxes go back.

Evaluation, calibration, verification and the device all call this file; `edgedetr.serving.pre_post_graph` is the same
in ONNX. The definition for one axis, with S source pixels and T target pixels:

1. if S / T > 2, the axis is cut to a multiple of k = floor(S / T) (fewer than k pixels fall off at the right or bottom)
   and every k pixels are averaged, to avoid aliasing;
2. half-pixel bilinear interpolation resizes the rest to T (without low-pass; the factor is below 2);
3. the result is rounded to whole levels 0..255.

"stretch" takes T from the contract. "letterbox" keeps the aspect, takes the T that fits, and pads right and bottom with
114.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import numpy as np

from edgedetr.bundle import InputContract
from edgedetr.errors import DataError, MissingDependency, UsageError
from edgedetr.options import one_of
from edgedetr.runtime.arguments import kind

PADDING = 114  # gray of the letterbox border, as YOLO-family tools use it
OPENCV_LIMIT = 32766  # pixels per side; OpenCV's fixed-point resize indexes with 16 bits
Backend = Literal["auto", "numpy", "opencv"]


@dataclass(frozen=True)
class Geometry:
    """How an image was placed into the input: the used part of the image fills the content part of the input.

    source_*    the EXIF-upright image, pixels
    used_*      its part that was sampled, from the top-left corner (see step 1 above)
    content_*   the part of the input that is image, from the top-left corner; the rest is padding
    height, width   the input, pixels
    """

    source_height: int
    source_width: int
    used_height: int
    used_width: int
    content_height: int
    content_width: int
    height: int
    width: int

    @classmethod
    def of(cls, source_height: int, source_width: int, contract: InputContract) -> Geometry:
        """The geometry of an image of this size under this contract; no pixels needed."""
        if source_height < 1 or source_width < 1:
            raise DataError(
                f"an image of {source_height} x {source_width} pixels (height x width); expected at least 1 x 1"
            )
        content_height, content_width = contract.height, contract.width
        if contract.resize == "letterbox":
            scale = min(contract.height / source_height, contract.width / source_width)
            content_height = min(contract.height, max(1, math.floor(source_height * scale + 0.5)))
            content_width = min(contract.width, max(1, math.floor(source_width * scale + 0.5)))
        rows, columns = averaged(source_height, content_height), averaged(source_width, content_width)
        return cls(
            source_height,
            source_width,
            source_height // rows * rows,
            source_width // columns * columns,
            content_height,
            content_width,
            contract.height,
            contract.width,
        )

    def to_source(self, boxes: np.ndarray) -> np.ndarray:
        """xyxy boxes [..., 4] from pixels of the input to pixels of the source image (not clipped to it)."""
        return np.asarray(boxes) * self._factors(boxes)

    def _factors(self, boxes: np.ndarray) -> np.ndarray:
        x, y = self.used_width / self.content_width, self.used_height / self.content_height
        dtype = np.asarray(boxes).dtype
        return np.array([x, y, x, y], dtype=dtype if np.issubdtype(dtype, np.floating) else np.float64)


def averaged(source: int, target: int) -> int:
    """k: how many source pixels of an axis are averaged into one before the interpolation."""
    return source // target if source > 2 * target else 1


def resize(image: np.ndarray, contract: InputContract, *, backend: Backend = "auto") -> tuple[np.ndarray, Geometry]:
    """One image at the size of the input.

    image     [H, W, 3]            uint8, RGB, EXIF-upright
    backend   "auto" takes OpenCV where it is installed (within 1 of 255 of the definition), otherwise numpy
    return    [height, width, 3]   uint8, RGB, and the geometry that maps boxes back
    """
    _require_image(image)
    one_of("backend", backend, get_args(Backend))
    geometry = Geometry.of(image.shape[0], image.shape[1], contract)
    used = image[: geometry.used_height, : geometry.used_width]
    cv2 = None if backend == "numpy" else _opencv(required=backend == "opencv")
    size = geometry.content_height, geometry.content_width
    if used.shape[:2] == size:
        content = used.copy()
    elif cv2 is not None and max(image.shape) <= OPENCV_LIMIT:
        content = _resize_opencv(cv2, used, *size)
    else:
        content = _resize_numpy(used, *size)
    if size == (contract.height, contract.width):
        return np.ascontiguousarray(content), geometry
    padded = np.full((contract.height, contract.width, 3), PADDING, dtype=np.uint8)
    padded[: size[0], : size[1]] = content
    return padded, geometry


def prepare(
    images: list[np.ndarray], contract: InputContract, *, backend: Backend = "auto"
) -> tuple[np.ndarray, list[Geometry]]:
    """Images of any sizes as one batch.

    images   B arrays [H, W, 3]       uint8, RGB, EXIF-upright
    return   [B, 3, height, width]    float32, RGB, 0..255 in whole levels, and B geometries
    """
    if not isinstance(images, (list, tuple, np.ndarray)):
        raise UsageError(f"images is {kind(images)}; expected a list of uint8 RGB arrays [H, W, 3]")
    batch = np.empty((len(images), 3, contract.height, contract.width), dtype=np.float32)
    geometries = []
    for row, image in zip(batch, images):
        pixels, geometry = resize(image, contract, backend=backend)
        row[:] = pixels.transpose(2, 0, 1)
        geometries.append(geometry)
    return batch, geometries


def _require_image(image: np.ndarray) -> None:
    valid = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if not valid or image.size == 0:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"an image is {found}; expected a uint8 array [H, W, 3] in RGB order, "
            "as edgedetr.data.images.decode(path) returns it"
        )


def _resize_numpy(used: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = averaged(used.shape[0], height), averaged(used.shape[1], width)
    # A sum of k*k bytes fits 16 bits up to k*k = 257.
    total: type = np.uint16 if rows * columns <= 257 else np.uint32
    if rows > 1:
        used = _sum_strided([used[i::rows] for i in range(rows)], total)
    if columns > 1:
        used = _sum_strided([used[:, i::columns] for i in range(columns)], total)
    pixels = used.astype(np.float32)
    if rows * columns > 1:
        pixels /= rows * columns
    low, high, weight = _taps(pixels.shape[0], height)
    pixels = _mix(pixels[low], pixels[high], weight[:, None, None])
    low, high, weight = _taps(pixels.shape[1], width)
    pixels = _mix(pixels[:, low], pixels[:, high], weight[None, :, None])
    return np.rint(pixels, out=pixels).astype(np.uint8)


def _sum_strided(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    total: np.ndarray = parts[0].astype(dtype)
    for part in parts[1:]:
        total += part
    return total


def _mix(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    high -= low  # both are new copies, made by the indexing
    high *= weight
    low += high
    return low


@lru_cache(maxsize=256)
def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of T target pixels: its two source pixels [T] and the weight of the second [T], half-pixel centers."""
    position = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32)


def _resize_opencv(cv2: ModuleType, used: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = averaged(used.shape[0], height), averaged(used.shape[1], width)
    if rows * columns > 1:  # with whole factors, INTER_AREA is the mean, rounded
        used = cv2.resize(used, (used.shape[1] // columns, used.shape[0] // rows), interpolation=cv2.INTER_AREA)
    if used.shape[:2] != (height, width):
        used = cv2.resize(used, (width, height), interpolation=cv2.INTER_LINEAR)
    return used


@lru_cache(maxsize=2)
def _opencv(required: bool) -> ModuleType | None:
    try:
        import cv2
    except ImportError as error:  # also a broken install, which must not stop the numpy path
        if required:
            raise MissingDependency(
                "OpenCV was requested and is not installed; run: pip install opencv-python-headless"
            ) from error
        return None
    return cv2
