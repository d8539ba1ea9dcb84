"""A bad frame is skipped and counted; a cut or damaged video gives what it has, and ends with the numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr import cli
from edgedetr.errors import DataError
from edgedetr.runtime import video
from edgedetr.runtime.predict import frames
from edgedetr.runtime.video import VideoDamaged, play
from edgedetr.runtime.video_container import read_container

cv2 = pytest.importorskip("cv2", reason="needs OpenCV, as reading videos does")

COUNT = 40


def written(path: Path, code: str = "MJPG") -> bytes:
    """40 frames; frame n is gray level 5 * n + 20."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 20.0, (64, 48))
    for n in range(COUNT):
        writer.write(np.full((48, 64, 3), 5 * n + 20, np.uint8))
    writer.release()
    return path.read_bytes()


@pytest.fixture(scope="module")
def avi(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("whole") / "clip.avi")


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """As OpenCV writes it, with the index behind the frames."""
    return written(tmp_path_factory.mktemp("whole") / "clip.mp4", "mp4v")


def spoiled(avi: bytes, *numbers: int) -> bytes:
    """Frames of which nothing is left but zeros."""
    data, at = bytearray(avi), avi.index(b"movi")
    for n in range(COUNT):
        at = avi.index(b"\xff\xd8\xff", at + 1)
        if n in numbers:
            length = int.from_bytes(avi[at - 4 : at], "little")
            data[at : at + length] = bytes(length)
    return bytes(data)


def claiming(avi: bytes, count: int) -> bytes:
    """Both headers that hold the number of frames hold another number."""
    data = bytearray(avi)
    struct.pack_into("<I", data, avi.index(b"avih") + 8 + 16, count)
    struct.pack_into("<I", data, avi.index(b"strh") + 8 + 32, count)
    return bytes(data)


def played(path: Path) -> tuple[list[int], VideoDamaged | None]:
    """Numbers of the frames, and how it ended; each frame is the one with its number."""
    found: list[int] = []
    try:
        for frame in play(path):
            assert abs(float(frame.image.mean()) - 20 - 5 * frame.index) < 2.5, "the number is another frame's"
            found.append(frame.index)
    except VideoDamaged as end:
        return found, end
    return found, None


@pytest.mark.parametrize("bad", [(19,), (0,), (5, 6, 20)])
def test_bad_frames_are_skipped_and_counted_and_the_others_keep_their_numbers(tmp_path, caplog, avi, bad):
    (tmp_path / "bad.avi").write_bytes(spoiled(avi, *bad))
    found, end = played(tmp_path / "bad.avi")
    assert end is None and found == [n for n in range(COUNT) if n not in bad]
    assert f"{COUNT - len(bad)} frames were read, {len(bad)} lost, of {COUNT}" in caplog.text


@pytest.mark.parametrize("bad", [range(10, 30), range(20, COUNT)])
def test_a_file_of_which_much_is_lost_gives_the_rest_and_ends_as_an_error(tmp_path, avi, bad):
    (tmp_path / "bad.avi").write_bytes(spoiled(avi, *bad))
    found, end = played(tmp_path / "bad.avi")
    assert found == [n for n in range(COUNT) if n not in bad]
    assert (end.read, end.lost, end.claimed) == (20, 20, 40)


@pytest.mark.parametrize("part", [0.4, 0.5, 0.9])
def test_a_cut_file_gives_what_it_has_and_ends_with_the_numbers(tmp_path, avi, part):
    (tmp_path / "cut.avi").write_bytes(avi[: int(len(avi) * part)])
    found, end = played(tmp_path / "cut.avi")
    assert 0 < len(found) < COUNT and found == list(range(len(found)))
    assert (end.read, end.lost, end.claimed) == (len(found), COUNT - len(found), COUNT)
    assert f"cut or damaged: {len(found)} frames were read, {COUNT - len(found)} lost, of 40" in str(end)


def test_a_file_that_lacks_its_last_bytes_and_no_frame_is_whole(tmp_path, avi):
    (tmp_path / "cut.avi").write_bytes(avi[:-9])
    assert read_container(tmp_path / "cut.avi").truncated and played(tmp_path / "cut.avi") == (list(range(COUNT)), None)


def test_a_file_whose_index_is_missing_says_so(tmp_path, mp4):
    assert look_at(tmp_path, mp4).truncated == ""
    (tmp_path / "cut.mp4").write_bytes(mp4[: mp4.index(b"moov") - 4])
    with pytest.raises(DataError, match=r"no frame could be read \(it has no index \(moov\).*was not finished"):
        list(play(tmp_path / "cut.mp4"))


def look_at(folder: Path, data: bytes):
    (folder / "a").write_bytes(data)
    return read_container(folder / "a")


@pytest.mark.parametrize("claim", [1_000_000, 4_000_000_000])
def test_a_wrong_count_ends_soon_and_is_named(tmp_path, avi, claim):
    (tmp_path / "lie.avi").write_bytes(claiming(avi, claim))
    found, end = played(tmp_path / "lie.avi")
    assert len(found) == COUNT and "its header has more frames than were written" in str(end)
    assert end.read == COUNT and end.claimed == claim


@pytest.mark.parametrize("claim", [0, 1, 10, 39])
def test_a_count_that_is_too_small_hides_no_frame(tmp_path, avi, claim):
    (tmp_path / "lie.avi").write_bytes(claiming(avi, claim))
    assert played(tmp_path / "lie.avi") == (list(range(COUNT)), None)


def test_a_trimmed_file_is_whole_although_it_shows_fewer_frames_than_it_has(tmp_path, mp4):
    data, at = bytearray(mp4), mp4.index(b"elst")
    length, first, rate = struct.unpack(">Iii", data[at + 12 : at + 24])
    unit = struct.unpack(">I", data[mp4.index(b"mdhd") + 16 : mp4.index(b"mdhd") + 20])[0]
    data[at + 12 : at + 24] = struct.pack(">Iii", length // 2, first + unit, rate)  # begins after one second of two
    (tmp_path / "trimmed.mp4").write_bytes(data)
    assert read_container(tmp_path / "trimmed.mp4").shown == pytest.approx(0.5)
    found = list(play(tmp_path / "trimmed.mp4"))
    assert 15 <= len(found) < COUNT and not found[-1].lost


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"no video", "it is text"),
        (b"\0" * 4096, "no known kind"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\0\0\0\0", "no known kind"),
    ],
)
def test_what_holds_no_video_says_what_it_is(tmp_path, content, words):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=f"a.mp4: no frame could be read .*{words}"):
        list(play(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.avi\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile 'other.avi'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "\ufeff<?xml version='1.0'?><MPD><BaseURL>other.avi</BaseURL></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.ts", "list.mkv"])
def test_a_playlist_that_calls_itself_a_video_opens_nothing_else(tmp_path, monkeypatch, avi, text, name):
    (tmp_path / "other.avi").write_bytes(avi)
    (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: pytest.fail("OpenCV was given the playlist"))
    with pytest.raises(DataError, match="a playlist is not followed"):
        list(play(tmp_path / name))


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing"])
def test_what_is_no_plain_file_is_one_error_at_once(tmp_path, kind):
    import os

    path = tmp_path / "a.mp4"
    {"pipe": os.mkfifo, "folder": os.mkdir, "missing": lambda _: None}[kind](path)
    with pytest.raises(DataError, match=r"a\.mp4: (cannot be read|no such file)"):
        list(play(path))


@pytest.mark.parametrize("name", ["clip.jpg", "clip.dat", "clip"])
def test_a_named_video_with_the_suffix_of_something_else_is_played(tmp_path, avi, name):
    (tmp_path / name).write_bytes(avi)
    assert len(list(frames([tmp_path / name]))) == COUNT


def test_frames_of_another_size_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    from edgedetr.runtime import predict
    from edgedetr.runtime.postprocess import Detections

    sizes = [(48, 64)] * 3 + [(60, 80)] * 2
    made = [predict.Frame("a.mp4", n, np.zeros((*size, 3), np.uint8), 20.0) for n, size in enumerate(sizes)]
    monkeypatch.setattr(predict, "frames", lambda *_, **__: iter(made))
    nothing = Detections(
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
        {"class_name": np.array([], str), "category_id": np.array([], np.int64)},
    )
    assert len(list(predict.predict(lambda images: [nothing], ["a.mp4"], out=tmp_path / "out"))) == 5
    found = {path.name: len(list(play(path))) for path in (tmp_path / "out").iterdir()}
    assert found == {"a.mp4": 3, "a-2.mp4": 2}


def predicted(capsys, bundle, *sources: object) -> tuple[int, list[dict], str]:
    code = cli.run(["predict", str(bundle.path), "--backend", "onnxruntime", *map(str, sources)])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def test_predict_says_what_was_lost_in_lines_and_message_and_goes_on(tmp_path, capsys, make_bundle, avi):
    (tmp_path / "bad.avi").write_bytes(spoiled(avi, 19))
    code, lines, said = predicted(capsys, make_bundle("model.onnx"), tmp_path / "bad.avi")
    assert code == 0 and [line["frame"] for line in lines] == [*range(19), *range(20, COUNT)]
    assert [line["frames_lost"] for line in lines] == [0] * 19 + [1] * 20
    assert "39 frames were read, 1 lost, of 40" in said


def test_predict_on_a_cut_video_exits_1_with_the_numbers_behind_all_that_there_is(tmp_path, capsys, make_bundle, avi):
    (tmp_path / "cut.avi").write_bytes(avi[: len(avi) // 2])
    (tmp_path / "whole.avi").write_bytes(avi)
    code, lines, said = predicted(capsys, make_bundle("model.onnx"), tmp_path / "cut.avi", tmp_path / "whole.avi")
    cut = sum(line["source"].endswith("cut.avi") for line in lines)
    assert code == 1 and len(lines) == cut + COUNT and 0 < cut < COUNT
    assert f"{cut} frames were read, {COUNT - cut} lost, of 40" in said
    assert "1 of 2 files could not be read, or not completely" in said


def test_damaged_images_among_many_are_left_out_and_counted(tmp_path, capsys, make_bundle):
    bundle, folder = make_bundle("model.onnx"), tmp_path / "images"
    folder.mkdir()
    for n in range(5):
        Image.fromarray(np.full((40, 60, 3), 40 * n, np.uint8)).save(folder / f"{n}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "3.png").write_text("no image")
    code, lines, said = predicted(capsys, bundle, folder)
    assert code == 0 and len(lines) == 3
    assert (
        "left out: " in said
        and "1.png" in said
        and "2 of 5 files could not be read, or not completely, and were" in said
    )
    # Named by the shell: what was asked for by name and cannot be had is exit 1, behind all the others.
    code, lines, said = predicted(capsys, bundle, *sorted(folder.iterdir()), tmp_path / "none.png")
    assert code == 1 and len(lines) == 3 and "3 of 6 files could not be read" in said and "none.png" in said
    # Nothing at all is no success either.
    for name in ("0.png", "2.png", "4.png"):
        (folder / name).unlink()
    code, lines, said = predicted(capsys, bundle, folder)
    assert code == 1 and not lines and "2 of 2 files could not be read" in said


def test_the_cases_that_people_reported(shared_data, caplog):
    """name -> frames, and what ends it."""
    folder = shared_data / "cases" / "30-video"
    whole = {
        "ok.mp4": 60,
        "mjpeg-badframe.avi": 59,
        "vfr.mp4": 30,
        "clip.ts": 60,
        "clip.mts": 60,
        "clip.3gp": 60,
        "UPPER.MP4": 60,
        "hevc.mp4": 60,
        "odd-161x97.mp4": 10,
        "gray.avi": 20,
        "rot90.mp4": 60,
    }
    right = {
        **{name: (count, "") for name, count in whole.items()},
        "cut-half.mp4": (19, "41 lost, of 60"),
        "corrupt-middle.mp4": (31, "29 lost, of 60"),
        "audio.mp4": (0, "perhaps sound alone"),
    }
    for name, (count, words) in right.items():
        found, said = 0, ""
        try:
            for _ in frames([folder / name]):
                found += 1
        except DataError as error:
            said = str(error)
        assert (found, words in said, bool(said)) == (count, True, bool(words)), name
    assert "59 frames were read, 1 lost, of 60" in caplog.text


class Camera:
    """A live source whose reads succeed as listed."""

    def __init__(self, reads: list[bool]) -> None:
        self.reads = reads

    def isOpened(self) -> bool:
        return True

    def get(self, key: int) -> float:
        return -1.0

    def read(self):
        return (self.reads.pop(0) if self.reads else False), np.zeros((4, 4, 3), np.uint8)

    def release(self) -> None:
        pass


def test_a_camera_may_miss_a_frame_and_its_end_is_said(monkeypatch, caplog):
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Camera([True, False, False, True]))
    assert [(frame.index, frame.lost) for frame in play("/dev/video3")] == [(0, 0), (3, 2)]
    assert "/dev/video3: ended after 2 frames" in caplog.text


def test_gray_frames_and_frames_with_alpha_become_rgb():
    assert video._rgb(np.full((2, 3), 7, np.uint8)).shape == (2, 3, 3)
    assert video._rgb(np.full((2, 3, 1), 7, np.uint8)).shape == (2, 3, 3)
    bgra = np.broadcast_to(np.array([1, 2, 3, 4], np.uint8), (2, 3, 4))
    np.testing.assert_array_equal(video._rgb(bgra)[0, 0], [3, 2, 1])
