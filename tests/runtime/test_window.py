"""predict --show: images in a window in the right colors, until the user ends it, or an error that names --save."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from edgedetr.errors import DeviceError
from edgedetr.runtime.window import Window

NO_KEY = -1


class FakeCv2(types.ModuleType):
    """OpenCV's windows; a key is pressed after some polls."""

    WINDOW_NORMAL, WND_PROP_VISIBLE = 0, 4

    class error(Exception):
        pass

    def __init__(self, keys: list[int], windows: bool = True, closed_after: int = 10**9) -> None:
        super().__init__("cv2")
        self.__version__ = "5.0.0"
        self.keys, self.windows, self.closed_after = keys, windows, closed_after
        self.shown: list[np.ndarray] = []
        self.polls = self.closed = 0

    def namedWindow(self, title, flags):
        if not self.windows:
            raise self.error("The function is not implemented. Rebuild the library with GTK+ support")

    def imshow(self, title, image):
        self.shown.append(image.copy())

    def waitKey(self, milliseconds):
        assert milliseconds > 0  # 0 would wait for ever, also after the window was closed
        self.polls += 1
        return self.keys.pop(0) if self.keys else NO_KEY

    def getWindowProperty(self, title, prop):
        return 0.0 if self.polls >= self.closed_after else 1.0

    def destroyAllWindows(self):
        self.closed += 1


def install(monkeypatch, **options) -> FakeCv2:
    fake = FakeCv2(**options)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "cv2", fake)
    return fake


IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_a_still_waits_for_a_key_and_is_shown_in_its_colors(monkeypatch):
    fake = install(monkeypatch, keys=[NO_KEY, NO_KEY, ord(" ")])
    with Window() as window:
        assert window.show(IMAGE, still=True)
    assert fake.polls == 3 and fake.closed == 1
    assert (fake.shown[0] == IMAGE[:, :, [2, 1, 0]]).all()  # OpenCV's order is blue, green, red


def test_a_frame_of_a_video_does_not_wait(monkeypatch):
    fake = install(monkeypatch, keys=[])
    with Window() as window:
        assert window.show(IMAGE, still=False) and window.show(IMAGE, still=False)
    assert fake.polls == 2


@pytest.mark.parametrize("key", [ord("q"), 27])
def test_q_and_escape_end(key, monkeypatch):
    install(monkeypatch, keys=[key])
    assert not Window().show(IMAGE, still=True)


def test_a_closed_window_ends(monkeypatch):
    install(monkeypatch, keys=[], closed_after=2)
    assert not Window().show(IMAGE, still=True)


def test_without_a_display_the_error_names_save(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(DeviceError, match="needs a display.*--save"):
        Window()


def test_an_opencv_without_windows_is_an_error_that_names_save(monkeypatch):
    install(monkeypatch, keys=[], windows=False)
    with pytest.raises(DeviceError, match="OpenCV 5.0.0 has no windows here.*--save"):
        Window()
