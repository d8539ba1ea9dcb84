"""Shows images in a window on this machine's display, by OpenCV."""

from __future__ import annotations

import os
import sys
from types import TracebackType

import numpy as np

from edgedetr.errors import DeviceError, MissingDependency
from edgedetr.packages import missing

TITLE = "edgedetr: a key goes on, q ends"
INSTEAD = "write the images into a folder instead: --save"
END = (ord("q"), ord("Q"), 27)  # 27 is Esc
POLL_MS = 50  # between looks at whether a still image's window was closed


class Window:
    """A window for images; it closes with the block.

    Errors: DeviceError where this machine or this OpenCV has no window, MissingDependency without OpenCV.
    """

    def __init__(self) -> None:
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise DeviceError(f"--show needs a display, and none is set here (DISPLAY, WAYLAND_DISPLAY); {INSTEAD}")
        try:
            import cv2
        except ImportError as error:
            raise MissingDependency(f"--show needs OpenCV; {missing('cv2', error)}; or {INSTEAD}") from error
        self._cv2 = cv2
        try:
            cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise DeviceError(
                f"--show: OpenCV {cv2.__version__} has no windows here (opencv-python-headless, or no access to the "
                f"display); {INSTEAD}"
            ) from error

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cv2.destroyAllWindows()

    def show(self, image: np.ndarray, *, still: bool) -> bool:
        """Show an image [H, W, 3] uint8 RGB; False where the user ends: q, Esc, or a closed window.

        still   wait for a key; else the next frame follows at once
        """
        cv2 = self._cv2
        cv2.imshow(TITLE, np.ascontiguousarray(image[..., ::-1]))
        while True:
            key = cv2.waitKey(POLL_MS if still else 1)
            if key != -1:
                return key & 0xFF not in END
            if cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) < 1:
                return False
            if not still:
                return True
