"""Read the frames of a video file, a camera or a stream in a second thread, through a queue of fixed length.

While one frame is detected, the next ones are decoded. A full queue makes the reader wait, so that no frame of a file
is lost; with `drop_late` the oldest waiting frame is dropped instead, so that a slow detector always gets new frames.

A frame that cannot be decoded is skipped and counted. After the last frame of a file whose end is missing, or of which
more than a tenth cannot be decoded, an error with the numbers is raised.
"""

from __future__ import annotations

import logging
import os
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
from edgedetr.runtime.arguments import as_path
from edgedetr.runtime.video_container import Container, read_container

log = logging.getLogger(__name__)

VIDEOS = frozenset(
    {
        ".mp4",
        ".m4v",
        ".avi",
        ".mov",
        ".qt",
        ".mkv",
        ".webm",
        ".mpg",
        ".mpeg",
        ".m2v",
        ".vob",
        ".wmv",
        ".asf",
        ".3gp",
        ".3g2",
        ".ts",
        ".mts",
        ".m2ts",
        ".flv",
        ".f4v",
        ".ogv",
        ".mxf",
        ".mjpeg",
        ".mjpg",
    }
)
WAITING = 4  # frames between reader and detector: hides a slow frame, and is 24 MB at 1080p
USUAL_RATE = 25.0  # frames per second where the container has no rate
FASTEST = 240.0  # frames per second; a higher rate is an error of the container
STREAM = re.compile(r"^(rtsps?|rtmps?|https?|udp|tcp|srt)://", re.I)
CAMERA = re.compile(r"^/dev/video(\d+)$")
PATIENCE = 16  # failed reads in a row that are the end of a file without a plausible frame count
MOST_FAILED = 5000  # failed reads in a row that are the end of any file: a damaged count can be thousands of millions
HARMLESS = 0.1  # fraction of lost frames up to which there is no error
ESTIMATED = 0.1  # relative error of a frame count, or a duration, that was not counted
RETRIES, PAUSE = 5, 0.05  # reads of a live source, and seconds between them: a camera can miss a frame
PIPELINE = re.compile(r"\s!\s")  # GStreamer's, as the cameras on a Jetson's CSI connector need it
CREDENTIALS = re.compile(r"//[^/@\s]*@")


@dataclass(frozen=True)
class VideoFrame:
    """index from 0, with gaps where frames were dropped or lost; image [H, W, 3] uint8 RGB; rate in frames per second.

    lost   frames before this one that could not be decoded
    """

    index: int
    image: np.ndarray
    rate: float
    lost: int = 0


class VideoDamaged(DataError):
    """A video file was played to its end, and frames are missing.

    read, lost, claimed   frames that were decoded, that could not be decoded, and in the file's header (0: no count)
    """

    def __init__(self, message: str, read: int, lost: int, claimed: int) -> None:
        super().__init__(message)
        self.read, self.lost, self.claimed = read, lost, claimed


def is_live(source: str | Path) -> bool:
    """Whether it is a camera, a stream or a GStreamer pipeline, which cannot be read again."""
    text = str(source)
    return bool(CAMERA.match(text)) or (isinstance(source, str) and bool(STREAM.match(text) or PIPELINE.search(text)))


def shown(source: str | Path) -> str:
    """The source for messages: without user name and password."""
    return CREDENTIALS.sub("//", str(source))


def opencv() -> Any:
    """The module cv2, or MissingDependency."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependency(f"video needs OpenCV; {missing('cv2', error)}") from error
    return cv2


def play(source: str | Path, *, drop_late: bool = False) -> Generator[VideoFrame, None, None]:
    """The frames of a source.

    Errors: DataError where no frame can be read; VideoDamaged after the last frame of a file whose end is missing, or
    of which more than a tenth could not be decoded.

    drop_late   drop a frame that was not taken in time; a file then plays at its own rate
    """
    reader = _Reader(source, drop_late)
    try:
        yield from reader
    finally:  # also when the caller stops early: an error, a closed iterator, Ctrl-C
        reader.stop()
    if reader.note:
        log.warning("%s", reader.note)
    if reader.dropped:
        log.warning(
            "%s: %d of %d frames came while the detector was busy and were dropped",
            shown(source),
            reader.dropped,
            reader.count,
        )


class _Reader:
    """A thread that decodes ahead.

    count     frames so far, decoded or lost
    lost      those that could not be decoded
    dropped   those that were decoded and dropped
    note      message to log at the end
    """

    def __init__(self, source: str | Path, drop_late: bool) -> None:
        as_path(source, "source", "the path of a video, or the text of a camera, stream or pipeline")
        self.source, self.drop_late, self.live = source, drop_late, is_live(source)
        self.count = self.lost = self.dropped = 0
        self.note = ""
        self.container = Container("") if self.live else _checked_container(source)
        self.waiting: queue.Queue[VideoFrame | BaseException | None] = queue.Queue(WAITING)
        self.stopped = threading.Event()
        self.cv2 = opencv()
        self.capture = self._open()
        rate = self.capture.get(self.cv2.CAP_PROP_FPS)
        self.rate = rate if rate and 0 < rate <= FASTEST else USUAL_RATE
        claimed = self.capture.get(self.cv2.CAP_PROP_FRAME_COUNT)
        # Cameras report -1 or infinity, damaged headers anything; an estimate from an impossible rate is useless.
        believable = not self.live and 0 < claimed < 1 << 40 and (self.container.exact or self.rate == rate)
        self.claimed = int(claimed) if believable else 0
        self.thread = threading.Thread(target=self._read, name=f"reader of {shown(source)}", daemon=True)
        self.thread.start()

    def _open(self) -> Any:
        text = str(self.source)
        if self.live and PIPELINE.search(text):
            capture = self.cv2.VideoCapture(text, self.cv2.CAP_GSTREAMER)
        else:
            camera = CAMERA.match(text)
            # An absolute path: FFmpeg takes the part before a colon for a protocol.
            capture = self.cv2.VideoCapture(int(camera[1]) if camera else text if self.live else os.path.abspath(text))
        if self.live and not capture.isOpened():
            capture.release()
            raise DataError(
                f"{shown(self.source)}: OpenCV {self.cv2.__version__} cannot open it; expected a camera, "
                "an address or a GStreamer pipeline that this OpenCV plays; is it connected? check with: "
                "ls /dev/video*, or ffplay ADDRESS"
            )
        if self.live and self.drop_late:
            capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)  # no old frames in the driver's buffer
        return capture

    def __iter__(self) -> Iterator[VideoFrame]:
        while (frame := self.waiting.get()) is not None:
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def stop(self) -> None:
        """End the thread, which releases the source."""
        self.stopped.set()
        while self.thread.is_alive():
            try:
                self.waiting.get_nowait()  # makes room, in case the thread waits for it
            except queue.Empty:
                self.thread.join(0.05)

    def _read(self) -> None:
        last: BaseException | None = None
        try:
            begun, failed, seconds = time.monotonic(), 0, 0.0
            while not self.stopped.is_set():
                there, bgr = self.capture.read()
                if not there:
                    failed += 1
                    if self._ends(failed):
                        break
                    continue
                self.lost, self.count, failed = self.lost + failed, self.count + failed, 0
                seconds = self.capture.get(self.cv2.CAP_PROP_POS_MSEC) / 1000
                if self.drop_late and not self.live:
                    self.stopped.wait(max(0.0, begun + self.count / self.rate - time.monotonic()))
                self._offer(VideoFrame(self.count, _rgb(bgr), self.rate, self.lost))
                self.count += 1
            if not self.stopped.is_set():
                self._judge(seconds)
        except Exception as error:  # noqa: BLE001  # raised again in the thread that takes the frames
            last = error
        finally:
            self.capture.release()
        self._put(last)

    def _ends(self, failed: int) -> bool:
        """Whether this number of failed reads in a row is the end; a damaged frame is one failed read."""
        if self.live:
            self.stopped.wait(PAUSE)
            return failed > RETRIES
        return failed > min(MOST_FAILED, max(PATIENCE, self.claimed - self.count))

    def _judge(self, seconds: float) -> None:
        """At the end: DataError where nothing was read, VideoDamaged where much is missing, a note where a little is.

        seconds   time of the last frame
        """
        name, read = shown(self.source), self.count - self.lost
        if self.live:
            self.note = f"{name}: ended after {read} frames" if read else ""
            if not read:
                raise DataError(f"{name}: no frame could be read; expected a source that this OpenCV plays")
            return
        if not read:
            raise DataError(
                f"{name}: no frame could be read ({self._why_nothing()}); expected a video that OpenCV "
                f"{self.cv2.__version__} decodes"
            )
        expected, truncated = round(self.claimed * self.container.shown), self.container.truncated
        counted = self.container.exact and self.container.shown == 1.0
        if counted and read >= expected > 0:
            truncated = ""  # the missing part has no frame
        missing = max(0, expected - read) if counted or truncated else 0
        # Long frames make a count from a duration wrong, so only an early last frame proves a missing end.
        late = expected / self.rate - (1.5 / self.rate if counted else max(1.0, ESTIMATED * expected / self.rate))
        if not truncated and (missing > self.lost or not counted) and seconds < late:
            truncated = "the frames at its end are missing, or its header has more frames than were written"
            missing = max(0, expected - read)
        self.lost = lost = max(missing, self.lost)
        numbers = f"{read} frames were read, {lost} lost"
        numbers += f", of {expected} in its header" if expected else ""
        if truncated or lost > HARMLESS * (read + lost):
            why = f"; {truncated}" if truncated else ""
            raise VideoDamaged(
                f"{name}: {'cut or ' if truncated else ''}damaged: {numbers}{why}; expected a whole file; "
                "copy or record it again",
                read,
                lost,
                expected,
            )
        self.note = f"{name}: {numbers}; frames that cannot be decoded were skipped" if lost else ""

    def _why_nothing(self) -> str:
        kinds = {"empty": "the file is empty", "image": "it is an image", "text": "it is a text without a video"}
        if self.container.kind in kinds:
            return kinds[self.container.kind]
        if self.container.truncated:
            return self.container.truncated
        return "there is no video in it, perhaps sound alone" if self.container.kind else "it is no known kind of video"

    def _offer(self, frame: VideoFrame) -> None:
        while self.drop_late and self.waiting.full():
            try:
                self.waiting.get_nowait()
                self.dropped += 1
            except queue.Empty:  # the other thread has just taken it
                break
        self._put(frame)

    def _put(self, item: VideoFrame | BaseException | None) -> None:
        while not self.stopped.is_set():
            try:
                return self.waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None


def _checked_container(source: str | Path) -> Container:
    """The headers of a file. Errors: DataError for files that OpenCV must not open."""
    try:
        container = read_container(source)
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(source)}: cannot be read ({error}); expected a video file") from error
    if container.kind == "text":
        # A playlist: FFmpeg would open the files and addresses in it.
        raise DataError(
            f"{shown(source)}: no frame could be read (it is text, no video; a playlist is not followed); "
            "expected a video file; name the videos themselves"
        )
    return container


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """RGB [H, W, 3] of OpenCV's frame, which is BGR, or gray where a camera's driver does not convert."""
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[..., 2::-1] if pixels.shape[2] > 1 else np.repeat(pixels, 3, axis=2))
