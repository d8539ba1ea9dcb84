"""Frames of a video file, a camera or a stream: read in a thread of its own, through a queue that cannot grow.

While one frame is detected the next ones are decoded. A full queue makes the reader wait, so that no frame of a file is
lost; with `drop_late` the oldest waiting frame gives way instead, so that a slow detector always sees what is new.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedetr.errors import DataError, MissingDependency
from edgedetr.packages import missing

log = logging.getLogger(__name__)

VIDEOS = frozenset({".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})
WAITING = 4             # frames between reader and detector: hides a slow frame, and is 24 MB at 1080p
USUAL_RATE = 25.0       # frames per second where a container does not say
FASTEST = 240.0         # more is a container's mistake; it would only matter for pacing and for written videos
STREAM = re.compile(r"^(rtsps?|rtmps?|https?|udp|tcp|srt)://", re.I)
CAMERA = re.compile(r"^/dev/video(\d+)$")
PIPELINE = re.compile(r"\s!\s")         # GStreamer's, as the cameras on a Jetson's CSI connector need it
CREDENTIALS = re.compile(r"//[^/@\s]*@")


@dataclass(frozen=True)
class VideoFrame:
    """index from 0, with gaps where frames were dropped; image [H, W, 3] uint8 RGB; rate in frames per second."""

    index: int
    image: np.ndarray
    rate: float


def is_live(source: str | Path) -> bool:
    """Whether it is a camera, a stream or a GStreamer pipeline: what has no end and cannot be read again."""
    text = str(source)
    return bool(CAMERA.match(text)) or (isinstance(source, str) and bool(STREAM.match(text) or PIPELINE.search(text)))


def shown(source: str | Path) -> str:
    """The source as it may be printed: without user name and password."""
    return CREDENTIALS.sub("//", str(source))


def opencv() -> Any:
    """The module cv2, or MissingDependency."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependency(f"video needs OpenCV; {missing('cv2', error)}") from error
    return cv2


def play(source: str | Path, *, drop_late: bool = False) -> Generator[VideoFrame, None, None]:
    """The frames of a source; DataError where none can be read.

    drop_late   a frame that was not taken in time gives way to a newer one; a file then plays at its own rate
    """
    reader = _Reader(source, drop_late)
    try:
        yield from reader
    finally:            # also when the caller stops early: by an error, by closing the iterator, by Ctrl-C
        reader.stop()
    if reader.dropped:
        log.warning("%s: %d of %d frames came while the detector was busy and were dropped", shown(source),
                    reader.dropped, reader.count)


class _Reader:
    """A thread that decodes ahead. `count` frames were read, `dropped` of them never shown."""

    def __init__(self, source: str | Path, drop_late: bool) -> None:
        self.source, self.drop_late, self.live = source, drop_late, is_live(source)
        self.count = self.dropped = 0
        self.waiting: queue.Queue[VideoFrame | BaseException | None] = queue.Queue(WAITING)
        self.stopped = threading.Event()
        self.cv2 = opencv()
        self.capture = self._open()
        rate = self.capture.get(self.cv2.CAP_PROP_FPS)
        self.rate = rate if rate and 0 < rate <= FASTEST else USUAL_RATE
        self.thread = threading.Thread(target=self._read, name=f"reader of {shown(source)}", daemon=True)
        self.thread.start()

    def _open(self) -> Any:
        text = str(self.source)
        if self.live and PIPELINE.search(text):
            capture = self.cv2.VideoCapture(text, self.cv2.CAP_GSTREAMER)
        else:
            camera = CAMERA.match(text)
            capture = self.cv2.VideoCapture(int(camera[1]) if camera else text)
        if self.live and not capture.isOpened():
            capture.release()
            raise DataError(f"{shown(self.source)}: OpenCV {self.cv2.__version__} cannot open it; expected a camera, "
                            "an address or a GStreamer pipeline that this OpenCV plays; is it there? look with: "
                            "ls /dev/video*, or ffplay ADDRESS")
        if self.live and self.drop_late:
            capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)    # old frames must not wait in the driver either
        return capture

    def __iter__(self) -> Iterator[VideoFrame]:
        while (frame := self.waiting.get()) is not None:
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def stop(self) -> None:
        """End the thread, whatever it is doing; it releases the source."""
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.waiting.get_nowait()       # room, in case it waits for some
            except queue.Empty:
                self.thread.join(0.05)

    def _read(self) -> None:
        last: BaseException | None = None
        try:
            begun = time.monotonic()
            while not self.stopped.is_set():
                there, bgr = self.capture.read()
                if not there:
                    break
                if self.drop_late and not self.live:
                    self.stopped.wait(max(0.0, begun + self.count / self.rate - time.monotonic()))
                self._offer(VideoFrame(self.count, np.ascontiguousarray(bgr[..., ::-1]), self.rate))
                self.count += 1
            if not self.count and not self.stopped.is_set():
                raise DataError(f"{shown(self.source)}: no frame could be read; expected a video that OpenCV "
                                f"{self.cv2.__version__} decodes")
        except Exception as error:  # noqa: BLE001  # it belongs to whoever takes the frames
            last = error
        finally:
            self.capture.release()
        self._put(last)

    def _offer(self, frame: VideoFrame) -> None:
        while self.drop_late and self.waiting.full():
            try:
                self.waiting.get_nowait()
                self.dropped += 1
            except queue.Empty:     # it was taken at this very moment
                break
        self._put(frame)

    def _put(self, item: VideoFrame | BaseException | None) -> None:
        while not self.stopped.is_set():
            try:
                return self.waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None
