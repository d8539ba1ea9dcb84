"""Frames through a bounded queue: all of them, or the newest ones for a detector that is too slow."""

from __future__ import annotations

import json
import signal
import threading
import time

import numpy as np
import pytest

from edgedetr import cli
from edgedetr.errors import DataError
from edgedetr.runtime import video
from edgedetr.runtime.bundle_detector import Detector
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.predict import frames, predict
from edgedetr.runtime.video import WAITING, is_live, play, shown

cv2 = pytest.importorskip("cv2", reason="needs OpenCV, as reading videos does")

COUNT, RATE = 40, 100.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 frames, 100 a second; frame n is gray level 5 * n + 20."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), RATE, (64, 48))
    for n in range(COUNT):
        writer.write(np.full((48, 64, 3), 5 * n + 20, np.uint8))
    writer.release()
    return path


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader of")]


def number(frame) -> int:
    return round((float(frame.image.mean()) - 20) / 5)  # JPEG is off by less than a level


def test_a_file_gives_every_frame_in_order_however_slow_the_detector_is(clip):
    found = []
    for frame in play(clip):
        if len(found) == 3:
            time.sleep(0.3)  # the reader must wait, not run ahead
        found.append(frame)
    assert [frame.index for frame in found] == list(range(COUNT)) == [number(frame) for frame in found]
    assert {frame.rate for frame in found} == {RATE}
    assert readers() == []


def test_the_queue_is_bounded(clip, monkeypatch):
    read = []
    original = cv2.VideoCapture

    class Counting:
        def __init__(self, *arguments):
            self.real = original(*arguments)

        def read(self):
            read.append(1)
            return self.real.read()

        def __getattr__(self, name):
            return getattr(self.real, name)

    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    playing = play(clip)
    next(playing)
    time.sleep(0.3)
    assert len(read) <= WAITING + 2  # those that wait, the one that was taken, the one that finds no room
    playing.close()
    assert readers() == []


def test_late_frames_give_way_to_newer_ones(clip, caplog):
    found = []
    for frame in play(clip, drop_late=True):
        found.append(frame)
        time.sleep(0.05)  # five frames' time
    indices = [frame.index for frame in found]
    assert indices == sorted(set(indices)) == [number(frame) for frame in found]
    assert indices[-1] == COUNT - 1, "the newest frame is never dropped"
    assert len(found) < COUNT
    assert f"{COUNT - len(found)} of {COUNT} frames came while the detector was busy" in caplog.text


def test_a_fast_detector_loses_nothing_by_dropping(clip, caplog, monkeypatch):
    monkeypatch.setattr(video, "WAITING", COUNT)  # room for all: a busy machine may stall this very test
    assert len(list(play(clip, drop_late=True))) == COUNT
    assert "dropped" not in caplog.text


def test_a_file_that_is_played_for_dropping_keeps_its_own_time(clip, monkeypatch):
    monkeypatch.setattr(video, "WAITING", COUNT)
    begun = time.monotonic()
    assert len(list(play(clip, drop_late=True))) == COUNT
    assert time.monotonic() - begun >= (COUNT - 1) / RATE


@pytest.mark.parametrize("leave", ["break", "error", "interrupt"])
def test_whoever_leaves_early_leaves_no_thread_behind(clip, leave):
    def take():
        for frame in frames([str(clip)]):
            if frame.index == 2:
                if leave == "break":
                    return
                raise ZeroDivisionError if leave == "error" else KeyboardInterrupt

    if leave == "break":
        take()
    else:
        with pytest.raises(ZeroDivisionError if leave == "error" else KeyboardInterrupt):
            take()
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert readers() == []


def test_an_annotated_video_is_whole_after_an_interrupt(clip, tmp_path):
    seen = []

    class Interrupted:
        def __call__(self, images):
            seen.append(1)
            if len(seen) == 6:
                raise KeyboardInterrupt
            names = {"class_name": np.array([], str), "category_id": np.array([], np.int64)}
            return [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), names)]

    with pytest.raises(KeyboardInterrupt):
        list(predict(Interrupted(), [str(clip)], out=tmp_path / "out"))
    written = list(play(tmp_path / "out" / "clip.mp4"))
    assert len(written) == 5
    assert written[0].rate == RATE


@pytest.mark.parametrize(
    "source, live",
    [
        ("rtsp://camera/1", True),
        ("RTSP://u:p@camera/1", True),
        ("http://host/a.m3u8", True),
        ("/dev/video0", True),
        ("nvarguscamerasrc ! nvvidconv ! appsink", True),
        ("clip.mp4", False),
        ("/dev/video", False),
        ("a!b.mp4", False),
    ],
)
def test_live_sources_are_known_by_their_names(source, live):
    assert is_live(source) is live


def test_passwords_are_never_shown(caplog):
    assert shown("rtsp://admin:s3cret@camera:554/1") == "rtsp://camera:554/1"
    with pytest.raises(DataError, match="rtsp://127.0.0.1:9/1: OpenCV .* cannot open it") as error:
        list(play("rtsp://admin:s3cret@127.0.0.1:9/1"))  # port 9: nobody answers
    assert "s3cret" not in str(error.value) + caplog.text


def test_a_camera_that_is_not_there_says_so():
    with pytest.raises(DataError, match="/dev/video97: OpenCV .* cannot open it"):
        list(frames(["/dev/video97"]))


def test_a_stream_is_written_under_a_name_without_its_password(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(video._Reader, "_open", lambda self: cv2.VideoCapture(str(clip)))

    def detector(images):
        names = {"class_name": np.array([], str), "category_id": np.array([], np.int64)}
        return [Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), names)]

    lines = list(predict(detector, ["rtsp://admin:s3cret@camera:554/stream"], out=tmp_path / "out"))
    assert {json.loads(line)["source"] for line in lines} == {"rtsp://camera:554/stream"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rtsp-camera-554-stream.mp4"]


@pytest.mark.parametrize(
    "source, opened",
    [
        ("/dev/video3", (3,)),
        ("rtsp://camera/1", ("rtsp://camera/1",)),
        ("nvarguscamerasrc ! appsink", ("nvarguscamerasrc ! appsink", cv2.CAP_GSTREAMER)),
    ],
)
@pytest.mark.parametrize("drop_late", [False, True])
def test_live_sources_are_opened_as_opencv_wants_them_and_keep_no_old_frames(monkeypatch, source, opened, drop_late):
    asked = []

    class Camera:
        def __init__(self, *arguments):
            asked.append(arguments)
            self.left = 3

        def isOpened(self):
            return True

        def set(self, key, value):
            asked.append((key, value))

        def get(self, key):
            return float("inf")  # as some drivers answer for frames per second

        def read(self):
            self.left -= 1
            return self.left >= 0, np.zeros((4, 4, 3), np.uint8)

        def release(self):
            asked.append("released")

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    found = list(play(source, drop_late=drop_late))
    assert [frame.index for frame in found] == [0, 1, 2]  # three fit into the queue, so none is late
    assert {frame.rate for frame in found} == {video.USUAL_RATE}
    assert asked == [opened, *([(cv2.CAP_PROP_BUFFERSIZE, 1)] if drop_late else []), "released"]


def test_an_error_of_the_reader_reaches_whoever_takes_the_frames(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="no frame could be read"):
        list(play(tmp_path / "bad.mp4"))
    assert readers() == []


@pytest.fixture
def heeded():
    """Ctrl-C as a shell's foreground has it: what runs in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("source, code", [("rtsp://camera/1", None), ("clip", 128)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_predict_cleanly_and_a_stream_ends_no_other_way(
    clip, make_bundle, tmp_path, monkeypatch, capsys, source, code, number
):
    monkeypatch.setattr(video._Reader, "_open", lambda self: cv2.VideoCapture(str(clip)))
    bundle, seen = make_bundle("model.onnx"), []
    detect = Detector.__call__

    def interrupted(self, images):
        seen.append(1)
        if len(seen) == 4:
            signal.raise_signal(number)
        return detect(self, images)

    monkeypatch.setattr(Detector, "__call__", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    named = str(clip) if source == "clip" else source
    expected = 0 if code is None else code + number
    assert cli.run(["predict", str(bundle.path), named, "--out", str(tmp_path / "out"), "--drop-late"]) == expected
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3 and "stopped after 3 images" in captured.err
    written = next((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert len(list(play(written))) == 3
    assert readers() == [] and signal.getsignal(signal.SIGTERM) is before
