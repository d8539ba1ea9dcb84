"""Sources, JSON lines and annotated output."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from edgedetr.errors import DataError, MissingDependency, UsageError
from edgedetr.runtime import load
from edgedetr.runtime.draw import color_of, draw
from edgedetr.runtime.postprocess import Detections
from edgedetr.runtime.predict import frames, predict


@pytest.fixture
def folder(tmp_path, red, blue):
    """b.png red, sub/a.JPG blue, notes.txt, broken.png"""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.fromarray(red).save(root / "b.png")
    Image.fromarray(blue).save(root / "sub" / "a.JPG", quality=95)
    (root / "notes.txt").write_text("no image")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return root


@pytest.fixture
def detector(make_bundle):
    return load(make_bundle(), backend="onnxruntime", stage="onnx", threads=1)


def test_a_json_line_holds_everything_in_pixels_and_with_the_original_ids(detector, folder):
    line = json.loads(next(predict(detector, [folder / "b.png"], confidence=0.5)))
    assert set(line) == {"source", "frame", "height", "width", "detections"}
    assert (line["source"], line["frame"], line["height"], line["width"]) == (str(folder / "b.png"), None, 64, 96)
    assert line["detections"][0] == {
        "xyxy": [9.6, 12.8, 38.4, 51.2],
        "confidence": pytest.approx(0.9526, abs=1e-4),
        "class_id": 0,
        "class_name": "red cell",
        "category_id": 7,
    }
    assert len(line["detections"]) == 2  # logits 3, 1, -1: two above one half


def test_folders_are_searched_in_order_and_broken_files_are_left_out_with_a_warning(folder, caplog):
    found = [frame.source.name for frame in frames([folder])]
    assert found == ["b.png", "a.JPG"]
    assert "broken.png" in caplog.text


@pytest.mark.parametrize("name, options", [("a.gif", {}), ("a.tiff", {}), ("a.webp", {"lossless": True})])
def test_frames_of_an_animation_after_the_first_are_said(tmp_path, red, caplog, name, options):
    pages = [Image.fromarray(pixels) for pixels in (red, 255 - red, red)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **options)
    (frame,) = frames([tmp_path / name])
    assert np.abs(frame.image.astype(int) - red).max() <= 2  # a GIF has a palette
    assert "has 3 frames or pages, and the first alone is read" in caplog.text


def test_dropping_late_frames_of_images_alone_is_said_to_have_no_effect(folder, caplog):
    assert len(list(frames([folder / "b.png"], drop_late=True))) == 1
    assert "no effect on images" in caplog.text


def test_a_number_is_no_camera_and_the_name_of_one_is_said():
    with pytest.raises(DataError, match="a camera is /dev/video0"):
        list(frames(["0"]))


def test_a_broken_file_that_was_named_is_an_error(folder):
    with pytest.raises(DataError, match="broken.png"):
        list(frames([folder / "broken.png"]))


def test_globs_match(folder):
    assert [f.source.name for f in frames([folder / "*.png"])] == ["b.png"]
    assert [f.source.name for f in frames([str(folder / "**" / "*.JPG")])] == ["a.JPG"]


@pytest.mark.parametrize("name", ["nothing.png", "*.gif", "sub/none"])
def test_a_source_that_is_not_there_is_named(folder, name):
    with pytest.raises(DataError, match="no such file, folder or match"):
        list(frames([folder / name]))


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without images or videos"):
        list(frames([tmp_path / "empty"]))


def test_annotated_images_keep_the_size_and_two_of_one_name_are_both_kept(detector, folder, tmp_path, red):
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(red[:50]).save(other / "b.png")
    list(predict(detector, [folder / "b.png", other / "b.png"], out=tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b-2.jpg", "b.jpg"]
    assert Image.open(tmp_path / "out" / "b.jpg").size == (96, 64)
    assert Image.open(tmp_path / "out" / "b-2.jpg").size == (96, 50)


def test_sources_are_never_written_over(detector, folder):
    before = (folder / "b.png").read_bytes()
    with pytest.raises(UsageError, match="must not be written over"):
        list(predict(detector, [folder / "b.png"], out=folder))
    assert (folder / "b.png").read_bytes() == before


@pytest.fixture
def video(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV, as reading videos does")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for n in range(5):
        rgb = np.zeros((64, 96, 3), np.uint8)
        rgb[..., 0 if n < 3 else 2] = 255
        writer.write(rgb[..., ::-1].copy())
    writer.release()
    return path


def test_a_video_gives_every_frame_in_rgb_and_an_annotated_video(detector, video, tmp_path):
    lines = [json.loads(line) for line in predict(detector, [video], out=tmp_path / "out", confidence=0.5)]
    assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["detections"][0]["class_name"] for line in lines] == ["red cell"] * 3 + ["platelet"] * 2
    written = list(frames([tmp_path / "out" / "clip.mp4"]))
    assert len(written) == 5
    assert written[0].image.shape == (64, 96, 3)


def test_a_damaged_video_and_a_missing_opencv_say_so(tmp_path, video, monkeypatch):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="no frame could be read"):
        list(frames([tmp_path / "bad.mp4"]))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependency, match="run: pip install opencv-python-headless"):
        list(frames([video]))


def one(box: list[float], confidence: float = 0.9, class_id: int = 0, name: str = "cell") -> Detections:
    return Detections(
        np.array([box], np.float32),
        np.array([confidence], np.float32),
        np.array([class_id]),
        {"class_name": np.array([name])},
    )


def test_a_box_is_drawn_where_it_is_and_the_input_stays_as_it_was():
    image = np.full((200, 300, 3), 90, np.uint8)
    drawn = draw(image, one([50, 60, 150, 120]))
    assert (image == 90).all()
    for y, x in [(60, 100), (120, 100), (90, 50), (90, 150)]:  # the middle of each side
        assert tuple(drawn[y, x]) == color_of(0)
    assert tuple(drawn[90, 100]) == (90, 90, 90)
    assert tuple(drawn[160, 250]) == (90, 90, 90)


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (30, 40), (1200, 1600)])
@pytest.mark.parametrize("box", [[0, 0, 5000, 5000], [-50, -50, -10, -10], [20, 20, 20, 20], [5, 9, 2, 3]])
def test_any_box_on_any_image_can_be_drawn(size, box):
    image = np.zeros((*size, 3), np.uint8)
    drawn = draw(image, one(box, name="a very long class name that goes on and on <b>&"))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8


def test_weak_detections_are_not_drawn():
    image = np.zeros((50, 50, 3), np.uint8)
    assert (draw(image, one([5, 5, 40, 40], confidence=0.2), confidence=0.5) == 0).all()
    assert (draw(image, one([5, 5, 40, 40], confidence=0.6), confidence=0.5) > 0).any()


def test_classes_have_their_own_colors():
    assert len({color_of(k) for k in range(60)}) == 60


def test_a_user_who_ends_the_window_ends_the_detection(detector, folder, monkeypatch):
    from edgedetr.runtime import predict as module

    shown = []

    class Window:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            shown.append("closed")

        def show(self, image, *, still):
            shown.append((image.shape, still))
            return len(shown) < 2

    monkeypatch.setattr(module, "Window", Window)
    names = [folder / "b.png"] * 3
    assert len(list(predict(detector, names, show=True))) == 2
    assert [still for _, still in shown[:2]] == [True, True] and shown[2:] == ["closed"]
