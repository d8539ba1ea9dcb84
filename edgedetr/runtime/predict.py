"""Detect in images, folders, globs, videos and cameras: one JSON line for each image, annotated copies on request."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgedetr.errors import DataError, UsageError
from edgedetr.printable import json_text, shown
from edgedetr.runtime import video
from edgedetr.runtime.arguments import as_path, check_fraction
from edgedetr.runtime.bundle_detector import Detector
from edgedetr.runtime.draw import draw
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.video_container import read_container
from edgedetr.runtime.window import Window
from edgedetr.storage.atomic import atomic_write

log = logging.getLogger(__name__)

MOVING = frozenset({"mp4", "avi", "mkv", "flv", "wmv", "mpeg"})  # kinds of containers; a GIF is read as an image


@dataclass(frozen=True)
class Frame:
    """One image: where it came from, its number in a video (from 0; None for a still), pixels [H, W, 3] uint8 RGB.

    rate   frames per second of the video
    lost   frames of the video before this one that could not be decoded
    """

    source: Path | str
    index: int | None
    image: np.ndarray
    rate: float = video.USUAL_RATE
    lost: int = 0


def predict(
    detector: Detector,
    sources: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    confidence: float = 0.25,
    drop_late: bool = False,
    show: bool = False,
) -> Generator[str, None, None]:
    """JSON lines of the detections at or above `confidence`; `out` is a folder for annotated images and videos.

    drop_late   drop frames of videos and cameras that arrive while the detector is busy
    show        show each image in a window, and end where the user ends it (see runtime/window.py)

    Errors: as `frames`, after the last line.
    """
    check_fraction(confidence, "confidence")
    folder = None if out is None else as_path(out, "out")
    with Window() if show else nullcontext() as window, _Writer(folder) as writer:
        for frame in frames(sources, drop_late=drop_late):
            found = detector([frame.image])[0].above(confidence)
            writer.write(frame, found)
            yield json_line(frame, found)
            if window and not window.show(draw(frame.image, found), still=frame.index is None):
                return


def json_line(frame: Frame, detections: Detections) -> str:
    """{"source", "frame", "height", "width", "detections": [{"xyxy", "confidence", "class_id", ...}]}.

    For a video also "frames_lost": the frames before this one that could not be decoded; their indices are missing.
    xyxy are pixels of the image; class_id is the model's index, category_id the one of the data set.
    """
    rows = zip(
        detections.xyxy,
        detections.confidence,
        detections.class_id,
        detections.data["class_name"],
        detections.data["category_id"],
    )
    return json_text(
        {
            "source": video.shown(frame.source),
            "frame": frame.index,
            "height": frame.image.shape[0],
            "width": frame.image.shape[1],
            **({} if frame.index is None else {"frames_lost": frame.lost}),
            "detections": [
                {
                    "xyxy": [round(float(v), 2) for v in box],
                    "confidence": round(float(score), 4),
                    "class_id": int(class_id),
                    "class_name": str(name),
                    "category_id": int(number),
                }
                for box, score, class_id, name, number in rows
            ],
        }
    )


def frames(sources: Sequence[str | Path], *, drop_late: bool = False) -> Iterator[Frame]:
    """Every image of the sources, in order; folders are searched with their subfolders.

    A source may be an image, a folder, a glob, a video, a camera (/dev/video0), a stream (rtsp://...) or a GStreamer
    pipeline.

    Files that cannot be read are left out with a warning, and counted.

    Errors: DataError at the end where a named source or a video could not be read completely, or no file at all.
    """
    if isinstance(sources, (str, bytes, Path, Mapping)) or not isinstance(sources, Iterable):
        raise UsageError(f"sources is {shown(sources)}; expected a list of them: [source]")
    sources = list(sources)
    for index, source in enumerate(sources):
        as_path(source, f"sources[{index}]", "a path, or the text of a camera, stream or pipeline")
        if not str(source).strip():  # an unset shell variable; Path("") would be this folder
            raise UsageError(f"sources[{index}] is an empty text; expected a path, or . for this folder")
    errors, moved = _ReadErrors(alone=len(sources) == 1), False
    for source in sources:
        try:
            found: list[Path | str] = [source] if video.is_live(source) else [*_files(Path(source))]
        except DataError as error:
            errors.add(error, counts=True)
            continue
        named = len(found) == 1 and str(found[0]) == str(Path(source))
        for file in found:
            moving = video.is_live(file) or _is_video(Path(file), named)
            moved |= moving
            try:
                if moving:
                    yield from _video(file, drop_late)
                else:
                    yield Frame(file, None, _decode(Path(file)))
                errors.complete += 1
            except DataError as error:
                errors.add(error, counts=named or moving)
    if drop_late and not moved:
        log.warning("dropping late frames has no effect on images: no source is a camera, a stream or a video")
    errors.finish()


class _ReadErrors:
    """Files that could not be read: a warning for each, and an error at the end where required."""

    def __init__(self, alone: bool) -> None:
        self.alone, self.complete, self.left_out = alone, 0, 0
        self.errors: list[DataError] = []

    def add(self, error: DataError, *, counts: bool) -> None:
        """counts   whether the whole call fails because of it"""
        self.left_out += 1
        if counts:
            self.errors.append(error)
        if not (counts and self.alone and self.complete + self.left_out == 1):  # else it is raised at the end
            log.warning("left out: %s" if not isinstance(error, video.VideoDamaged) else "%s", error)

    def finish(self) -> None:
        total = self.complete + self.left_out
        if not self.left_out:
            return
        if total == 1 and self.errors:
            raise self.errors[0]
        text = f"{self.left_out} of {total} files could not be read, or not completely"
        if self.errors or not self.complete:
            first = f"; the first: {self.errors[0]}" if self.errors else ""
            raise DataError(f"{text}, see the warnings{first}")
        log.warning("%s, and were left out", text)


def _files(path: Path) -> list[Path]:
    """The file itself, or images and videos of a folder or a glob, sorted. Errors: DataError where there are none."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        # Listed as in training: without hidden files, links are followed once.
        found, what = _listed(path), "a folder without images or videos"
    else:
        inside, what = (Path(name) for name in glob.glob(str(path), recursive=True)), "no such file, folder or match"
        usable = (file for file in inside if _is_image(file) or file.suffix.lower() in video.VIDEOS)
        # A broken link is kept: decoding it raises the error.
        found = sorted(file for file in usable if os.path.isfile(file) or os.path.islink(file))
    if not found:
        hint = f"; a camera is /dev/video{path}" if str(path).isdecimal() else ""
        raise DataError(f"{path}: {what}; expected images, a folder of them, a pattern in quotes or a video{hint}")
    return found


# Files are read by edgedetr.data; a detector takes arrays and needs neither it nor Pillow.
def _decode(path: Path) -> np.ndarray:
    from edgedetr.data.images import decode, frame_count

    if (count := frame_count(path)) > 1:
        log.warning("%s: has %d frames or pages, and the first alone is read; save it as a video for all", path, count)
    return decode(path)


def _listed(folder: Path) -> list[Path]:
    from edgedetr.data.listing import images_in

    broken: list[Path] = []
    return sorted(images_in(folder, also=video.VIDEOS, broken=broken) + broken)


def _is_image(path: Path) -> bool:
    from edgedetr.data.images import is_image

    return is_image(path)


def _is_video(path: Path, named: bool) -> bool:
    """Whether it is a video, by its suffix; for a named file, also by its content."""
    if path.suffix.lower() in video.VIDEOS:
        return True
    if not named:
        return False
    try:
        return read_container(path).kind in MOVING
    except (OSError, ValueError):
        return False  # reading it raises the error


def _video(source: str | Path, drop_late: bool) -> Iterator[Frame]:
    with closing(video.play(source, drop_late=drop_late)) as played:
        for frame in played:
            yield Frame(source, frame.index, frame.image, frame.rate, frame.lost)


class _Writer:
    """Writes annotated stills as JPEG and videos as MP4 into a folder; without a folder, nothing."""

    def __init__(self, folder: Path | None) -> None:
        if folder is not None and os.path.exists(folder) and not os.path.isdir(folder):
            raise UsageError(f"{folder} is a file; expected a folder; name another with --out")
        self.folder = folder
        self.used: set[Path] = set()
        self.video: Any = None
        self.last: int | None = None  # number of the last frame of the video that is being written
        self.playing: Path | str | None = None
        self.size: tuple[int, ...] = ()  # height and width of its frames

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, frame: Frame, detections: Detections) -> None:
        if self.folder is None:
            return
        drawn = draw(frame.image, detections)
        if frame.index is None:
            self._close()
            self._still(self._target(frame.source, ".jpg"), drawn)
            return
        other = self.playing != frame.source or self.last is None or frame.index <= self.last
        if other or self.size != drawn.shape[:2]:  # a video has one size: a new size starts a new file
            self._close()
            self._start(frame, self._target(frame.source, ".mp4"))
        self.last, self.size = frame.index, drawn.shape[:2]
        self.video.write(np.ascontiguousarray(drawn[..., ::-1]))

    def _still(self, target: Path, drawn: np.ndarray) -> None:
        from PIL import Image

        with atomic_write(target) as temporary:
            Image.fromarray(drawn).save(temporary, format="JPEG", quality=92)

    def _start(self, frame: Frame, target: Path) -> None:
        cv2 = video.opencv()
        target.parent.mkdir(parents=True, exist_ok=True)
        height, width = frame.image.shape[:2]
        self.video = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), frame.rate, (width, height))
        if not self.video.isOpened():
            raise DataError(f"{target}: OpenCV {cv2.__version__} cannot write MP4 video here; use no --out for videos")
        self.playing = frame.source

    def _target(self, named: Path | str, suffix: str) -> Path:
        """A path in the folder that no other source of this call uses."""
        folder = self.folder if self.folder is not None else Path()
        source = Path(re.sub(r"[^A-Za-z0-9.]+", "-", video.shown(named))[:80]) if video.is_live(named) else Path(named)
        if not video.is_live(named) and folder.resolve() == source.parent.resolve():
            raise UsageError(
                f"{folder} holds the source {source.name}, which must not be written over; "
                f"name another folder with --out"
            )
        number, target = 1, folder / f"{source.stem}{suffix}"
        while target in self.used:
            number += 1
            target = folder / f"{source.stem}-{number}{suffix}"
        self.used.add(target)
        return target

    def _close(self) -> None:
        if self.video is not None:
            self.video.release()
        self.video = self.playing = None
