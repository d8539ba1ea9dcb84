"""Render a detection set for demos and tests: flat shapes on cluttered ground, with occlusion, noise and distractors.

It is drawn with numpy and Pillow from one seed, in COCO layout, and marked as synthetic in its files. The box of an
object is the tight extent of its whole shape, clipped to the image; an object of which less than 30 % is visible is not
annotated.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from edgedetr.errors import DataError, did_you_mean

VERSION = 1  # of the drawing; part of the digest, so that an older set is rendered again
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")  # drawn by default; ALL_SHAPES has more
OVERSAMPLE = 2  # masks are drawn at this scale and averaged, for smooth edges
VISIBLE = 0.3  # smallest visible fraction of an annotated shape
QUALITY = 92  # JPEG

Point = tuple[float, float]


@dataclass(frozen=True)
class SceneParams:
    """Parameters of a rendered set; written into it as params.json."""

    train: int  # images to train on
    val: int  # images to select the best epoch
    verify: int  # images of the split "test"
    classes: tuple[str, ...]
    size: int  # pixels per side
    seed: int
    objects: int = 5  # most in an image
    sides: tuple[float, float] = (0.15, 0.5)  # smallest and largest diameter, as fractions of the image's side
    version: int = VERSION
    synthetic: bool = True

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class RenderedImage:
    """One image and its objects.

    pixels   [size, size, 3]  uint8
    boxes    [T, 4]           float64, x0, y0, x1, y1
    labels   [T]              int64
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def render(
    root: str | Path,
    *,
    train: int = 1600,
    verify: int = 800,
    val: int = 100,
    classes: tuple[str, ...] = SHAPES,
    size: int = 192,
    seed: int = 0,
    objects: int = 5,
    sides: tuple[float, float] = (0.15, 0.5),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the set to `root` in COCO layout (splits train, val and test) and return the path.

    classes   some of ALL_SHAPES
    size      pixels of a side of the square images
    objects   most objects in an image
    sides     smallest and largest diameter of an object, as fractions of `size`

    An existing set with the same parameters is kept. A new one is rendered in a folder next to `root` and renamed, so
    that `root` is never incomplete. `progress` is called with (images done, total images).
    Errors: DataError where `root` contains anything else than a rendered set.
    """
    root = Path(root)
    params = SceneParams(train, val, verify, tuple(classes), size, seed, objects, sides)
    _check(params)
    if _digest_of(root) == params.digest():
        return root
    if root.exists() and _digest_of(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root}: contains something else than a rendered set; expected a new or empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".tmp", dir=root.parent))
    try:
        done, total = 0, train + val + verify
        for number, (split, count) in enumerate((("train", train), ("val", val), ("test", verify))):
            (work / "images" / split).mkdir(parents=True)
            drawn = []
            for index in range(count):
                # One generator per image: images do not depend on how many others there are.
                generator = np.random.default_rng([seed, number, index])
                scene = draw(generator, params.classes, size, objects, sides)
                Image.fromarray(scene.pixels).save(work / "images" / split / _file_name(index), quality=QUALITY)
                drawn.append((scene.boxes, scene.labels))
                done += 1
                if progress is not None:
                    progress(done, total)
            _write_coco(work / "annotations" / f"{split}.json", drawn, params)
        (work / "params.json").write_text(json.dumps({**asdict(params), "digest": params.digest()}, indent=1) + "\n")
        work.chmod(0o755)
        if root.exists():
            shutil.rmtree(root)  # an older rendered set, or an empty folder
        work.rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def draw(
    rng: np.random.Generator,
    classes: tuple[str, ...],
    size: int,
    objects: int = 5,
    sides: tuple[float, float] = (0.15, 0.5),
) -> RenderedImage:
    """One image of `size` x `size` pixels: 1 to `objects` shapes, later ones over earlier ones."""
    canvas = _background(rng, size)
    for _ in range(rng.integers(2, 6)):
        _draw_distractor(rng, canvas, size)
    count = int(rng.integers(1, objects + 1))
    labels = rng.integers(0, len(classes), count)
    owner = np.full((size, size), -1)
    boxes, whole = [], []
    for index, label in enumerate(labels):
        window, mask, box = _shape(rng, classes[label], size, sides)
        _paint(rng, canvas[window], mask)
        solid = mask > 0.5
        owner[window][solid] = index
        boxes.append(box)
        whole.append(int(solid.sum()))
    visible = np.bincount(owner[owner >= 0], minlength=count) / np.maximum(whole, 1)
    keep = (visible >= VISIBLE) & (np.array(whole) > 0)
    noise = np.float32(rng.uniform(2, 9))  # of the sensor, levels
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * noise
    pixels = np.clip(np.rint(canvas, out=canvas), 0, 255, out=canvas).astype(np.uint8)
    return RenderedImage(pixels, np.array(boxes, dtype=np.float64).reshape(-1, 4)[keep], labels[keep].astype(np.int64))


def _check(params: SceneParams) -> None:
    if min(params.train, params.val, params.verify) < 1 or not 32 <= params.size <= 2048:
        raise DataError(
            f"a rendered set of {params.train} + {params.val} + {params.verify} images of {params.size} "
            "px; expected at least one image in each split, of 32 to 2048 px"
        )
    if params.objects < 1 or not 0 < params.sides[0] <= params.sides[1] <= 1:
        raise DataError(
            f"at most {params.objects} objects with diameters of {params.sides} of the image; expected at least one "
            "object, and two ascending fractions above 0 and at most 1"
        )
    for name in params.classes:
        if name not in ALL_SHAPES:
            known = ", ".join(ALL_SHAPES)
            raise DataError(f"cannot draw {name!r}; expected some of {known}{did_you_mean(name, ALL_SHAPES)}")
    if not params.classes or len(set(params.classes)) != len(params.classes):
        raise DataError(f"classes {params.classes}; expected at least one, each once")


def _digest_of(root: Path) -> str | None:
    try:
        found = json.loads((root / "params.json").read_text(encoding="utf-8"))
        return str(found["digest"]) if found.get("synthetic") is True else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _file_name(index: int) -> str:
    return f"{index + 1:06d}.jpg"


def _write_coco(file: Path, drawn: list[tuple[np.ndarray, np.ndarray]], params: SceneParams) -> None:
    annotations: list[dict[str, object]] = []
    for image, (boxes, labels) in enumerate(drawn, start=1):
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                }
            )
    tables = {
        "info": {"description": "rendered shapes", "synthetic": True, "digest": params.digest()},
        "images": [
            {"id": image, "file_name": _file_name(image - 1), "height": params.size, "width": params.size}
            for image in range(1, len(drawn) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(params.classes)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tables))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A background [size, size, 3] float32: soft color clouds plus fine grain, muted so that shapes stand out."""
    cells = int(rng.integers(3, 8))
    clouds = rng.integers(30, 226, (cells, cells, 3), dtype=np.int64)
    muted = (clouds.mean(axis=2, keepdims=True) + clouds) / 2
    soft = Image.fromarray(muted.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.integers(0, 256, (size // 4, size // 4), dtype=np.uint8)
    fine = np.asarray(Image.fromarray(grain).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    return np.asarray(soft, dtype=np.float32) + ((fine - 128) * np.float32(rng.uniform(0.05, 0.3)))[..., None]


def _draw_distractor(rng: np.random.Generator, canvas: np.ndarray, size: int) -> None:
    """Draw a line, an arc or a blob that belongs to no class."""
    layer = Image.new("L", (size, size))
    pen = ImageDraw.Draw(layer)
    x, y = rng.uniform(0, size, 2)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.6) * size
    kind = rng.integers(0, 3)
    if kind == 0:
        end = (x + math.cos(angle) * length, y + math.sin(angle) * length)
        pen.line([(x, y), end], fill=255, width=int(rng.integers(1, 5)))
    elif kind == 1:
        reach = length / 2
        pen.arc(
            [x - reach, y - reach, x + reach, y + reach],
            math.degrees(angle),
            math.degrees(angle) + 100,
            fill=255,
            width=int(rng.integers(1, 4)),
        )
    else:
        angles = np.sort(rng.uniform(0, 2 * math.pi, 7))
        reaches = rng.uniform(0.02, 0.07, 7) * size
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, reaches)], fill=255)
    color, opacity = rng.uniform(20, 235, 3).astype(np.float32), rng.uniform(0.5, 1.0)
    left, top, right, bottom = layer.getbbox() or (0, 0, 0, 0)
    part = canvas[top:bottom, left:right]
    mask = np.asarray(layer, dtype=np.float32)[top:bottom, left:right, None] * np.float32(opacity / 255)
    part += (color - part) * mask


def _shape(
    rng: np.random.Generator, name: str, size: int, sides: tuple[float, float] = (0.15, 0.5)
) -> tuple[tuple[slice, slice], np.ndarray, tuple[float, ...]]:
    """A window of the image, the coverage 0..1 of one shape in it, and the box of its extent, clipped to the image."""
    radius = rng.uniform(*sides) * size / 2
    # The center stays inside: at most about a third of a shape is beyond the border.
    center = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
    squeeze, rotation = rng.uniform(0.8, 1.0), rng.uniform(0, 2 * math.pi)
    outlines = [_transformed(outline, center, radius, squeeze, rotation) for outline in _OUTLINES[name]()]
    layer = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
    pen = ImageDraw.Draw(layer)
    for fill, outline in zip((255, 0), outlines):  # a second outline is a hole
        pen.polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in outline.tolist()], fill=fill)
    coverage = np.asarray(layer.reduce(OVERSAMPLE), dtype=np.float32) / 255
    low, high = np.clip(outlines[0].min(axis=0), 0, size), np.clip(outlines[0].max(axis=0), 0, size)
    window = (slice(int(low[1]), math.ceil(high[1]) + 1), slice(int(low[0]), math.ceil(high[0]) + 1))
    return window, coverage[window], (*low.tolist(), *high.tolist())


def _transformed(
    outline: list[Point], center: np.ndarray, radius: float, squeeze: float, rotation: float
) -> np.ndarray:
    """An outline of radius 1 -> points [n, 2] in pixels: squeezed along one axis, rotated, scaled, moved."""
    points = np.array(outline) * [1.0, squeeze]
    matrix = np.array([[math.cos(rotation), math.sin(rotation)], [-math.sin(rotation), math.cos(rotation)]])
    return points @ matrix * radius + center


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray) -> None:
    """Fill a shape with a color that differs from the background, unevenly lit; both arrays are its window."""
    under = canvas.mean(axis=(0, 1))
    colors = rng.uniform(10, 245, (6, 3))
    color = colors[np.abs(colors - under).sum(axis=1).argmax()]
    slope = rng.uniform(-20, 20, 2)
    down, along = (np.linspace(-0.5, 0.5, count) for count in mask.shape)
    light = (slope[0] * down[:, None] + slope[1] * along[None]).astype(np.float32)
    canvas += (color.astype(np.float32) + light[..., None] - canvas) * mask[..., None]


def _regular(count: int, radius: float = 1.0) -> list[Point]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> list[Point]:
    return [(r * math.cos(math.pi * i / 5), r * math.sin(math.pi * i / 5)) for i, r in enumerate([1.0, 0.42] * 5)]


def _cross() -> list[Point]:
    a, b = 0.94, 0.3  # half length and half width of the arms
    return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]


def _arc(start: float, end: float, radius: float = 1.0) -> list[Point]:
    """24 points of a circle around the origin, between two angles in degrees."""
    angles = np.radians(np.linspace(start, end, 24)).tolist()
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _drop() -> list[Point]:
    return [(1.0, 0.0), *_arc(60, 300, 0.6)]


def _crescent() -> list[Point]:
    inner = [(0.75 * x + 0.5, 0.75 * y) for x, y in _arc(230, 130)]
    return [*_arc(50, 310), *inner]


def _heart() -> list[Point]:
    left, right = ([(0.45 * x + shift, 0.45 * y - 0.3) for x, y in _arc(180, 360)] for shift in (-0.45, 0.45))
    return [*left, *right, (0.0, 0.95)]


# Outlines in a circle of radius 1: the shape, then its hole.
_OUTLINES: dict[str, Callable[[], list[list[Point]]]] = {
    "circle": lambda: [_regular(48)],
    "square": lambda: [_regular(4)],
    "triangle": lambda: [_regular(3)],
    "star": lambda: [_star()],
    "ring": lambda: [_regular(48), _regular(48, 0.55)],
    "cross": lambda: [_cross()],
    "pentagon": lambda: [_regular(5)],
    "half_disc": lambda: [[(x, y - 0.42) for x, y in _arc(0, 180, 0.9)]],
    "quarter_disc": lambda: [[(1.3 * x - 0.55, 1.3 * y - 0.55) for x, y in ((0.0, 0.0), *_arc(0, 90))]],
    "crescent": lambda: [_crescent()],
    "drop": lambda: [_drop()],
    "heart": lambda: [_heart()],
    "frame": lambda: [_regular(4), _regular(4, 0.55)],
    "burst": lambda: [
        [(r * math.cos(math.pi * i / 10), r * math.sin(math.pi * i / 10)) for i, r in enumerate([1.0, 0.6] * 10)]
    ],
    "bar": lambda: [[(-0.97, -0.22), (0.97, -0.22), (0.97, 0.22), (-0.97, 0.22)]],
    "ell": lambda: [[(-0.7, -0.7), (-0.2, -0.7), (-0.2, 0.2), (0.7, 0.2), (0.7, 0.7), (-0.7, 0.7)]],
    "tee": lambda: [
        [(-0.8, -0.6), (0.8, -0.6), (0.8, -0.1), (0.25, -0.1), (0.25, 0.9), (-0.25, 0.9), (-0.25, -0.1), (-0.8, -0.1)]
    ],
    "arrow": lambda: [[(1.0, 0.0), (0.2, 0.7), (0.2, 0.25), (-0.9, 0.25), (-0.9, -0.25), (0.2, -0.25), (0.2, -0.7)]],
    "bowtie": lambda: [[(-0.85, -0.5), (0.0, -0.12), (0.85, -0.5), (0.85, 0.5), (0.0, 0.12), (-0.85, 0.5)]],
    "chevron": lambda: [[(-0.8, -0.6), (0.0, 0.0), (0.8, -0.6), (0.8, 0.0), (0.0, 0.6), (-0.8, 0.0)]],
}
ALL_SHAPES = tuple(_OUTLINES)
