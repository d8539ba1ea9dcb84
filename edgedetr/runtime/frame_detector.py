"""Detect in whole camera frames: one graph resizes, detects and selects the best detections.

`edgedetr export BUNDLE --frame HxW` writes such a graph for one size of frame: `frames` [1, H, W, 3] uint8 RGB in,
`boxes`, `scores` and `labels` out. On a GPU the frame is copied once, as bytes, and the CPU computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from edgedetr.artifacts import ONNX, frame_graph
from edgedetr.bundle import Bundle, ClassInfo
from edgedetr.errors import BundleError, DataError, ModelError, UsageError, did_you_mean
from edgedetr.image_size import check_size
from edgedetr.printable import shown
from edgedetr.runtime.arguments import check_count
from edgedetr.runtime.backends.onnxruntime import OrtFrameRunner
from edgedetr.runtime.bundle_detector import check_image
from edgedetr.runtime.postprocess import Detections, named
from edgedetr.runtime.tensorrt import select
from edgedetr.runtime.tensorrt.trt_runner import TrtFrameRunner


class FrameRunner(Protocol):
    """A loaded graph for frames.

    name            the backend's, e.g. "onnxruntime"
    height, width   of the frame, pixels
    """

    name: str
    height: int
    width: int

    def run(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        """frame [1, H, W, 3] uint8 RGB -> boxes [1, k, 4], scores [1, k], labels [1, k]."""
        ...


class FrameDetector:
    """Frames of one size in, detections out: `detector(frame)`."""

    def __init__(self, runner: FrameRunner, classes: Sequence[ClassInfo], *, description: str = "") -> None:
        self.runner, self.classes = runner, tuple(classes)
        self.height, self.width = runner.height, runner.width
        self.description = description or f"frames of {self.height} x {self.width} on {runner.name}"

    def __repr__(self) -> str:
        return f"FrameDetector({self.description}, {len(self.classes)} classes)"

    def __call__(self, frame: np.ndarray) -> Detections:
        """Detections in pixels of the frame; frame is uint8 RGB [H, W, 3] of the fixed size of the graph."""
        check_image(frame, "the frame")
        if frame.shape[:2] != (self.height, self.width):
            height, width = frame.shape[:2]
            raise DataError(
                f"the frame is {height} x {width} pixels (height x width); expected {self.height} x "
                f"{self.width}; run: edgedetr export BUNDLE --frame {height}x{width}"
            )
        found = self.runner.run(np.ascontiguousarray(frame)[None])
        boxes, scores, labels = (found[name][0] for name in ("boxes", "scores", "labels"))
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not scores.shape == labels.shape == boxes.shape[:1]:
            raise BundleError(
                f"the graph gives boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels "
                f"{list(labels.shape)}; expected [k, 4], [k] and [k]; "
                f"run: edgedetr export BUNDLE --frame {self.height}x{self.width}"
            )
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise ModelError("the model gave NaN or infinity; run: edgedetr verify BUNDLE to see which artifact does")
        return named(boxes, scores, labels.astype(np.int64), self.classes)


def load_frames(
    bundle: str | Path | Bundle,
    *,
    size: tuple[int, int] | None = None,
    precision: str | None = None,
    threads: int | None = None,
    make: Callable[..., FrameRunner] | None = None,
) -> FrameDetector:
    """The detector for whole frames of a bundle: an engine that fits this device, else the graph in ONNX Runtime.

    size        height and width of the frames; optional where the bundle has graphs for one size only
    precision   "float32", "fp16" or "int8"; None = float32 where the bundle has it, else the first of the others
    make        opens the graph, and no engine is searched for: OrtFrameRunner, or another FrameRunner
    """
    if size is not None:
        size = check_size(size)
    check_count(threads, "threads")
    bundle = Bundle.open(bundle)
    there = [found for name in bundle.manifest.files if (found := frame_graph(name))]
    if not there:
        raise BundleError(
            f"{bundle.path}: no graph for whole frames; run: edgedetr export {bundle.path} --frame HxW, "
            "with the height and width of the camera's frames"
        )
    sizes = sorted({(found.height, found.width) for found in there})
    listed = ", ".join(f"{height}x{width}" for height, width in sizes)
    if size is None:
        if len(sizes) > 1:
            raise UsageError(f"{bundle.path} has graphs for frames of {listed}; give one of them: size=(height, width)")
        size = sizes[0]
    fitting = {
        "float32" if found.source is ONNX else found.source.id: found.file
        for found in there
        if (found.height, found.width) == tuple(size)
    }
    if not fitting:
        raise BundleError(
            f"{bundle.path}: graphs for frames of {listed}, none for {size[0]}x{size[1]}; "
            f"run: edgedetr export {bundle.path} --frame {size[0]}x{size[1]}"
        )
    if precision is not None and (not isinstance(precision, str) or precision not in fitting):
        raise UsageError(
            f"precision is {shown(precision)}; for frames of {size[0]}x{size[1]} this bundle has "
            f"{', '.join(fitting)}{did_you_mean(str(precision)[:60], fitting)}"
        )
    if make is None:
        wanted = {precision: fitting[precision]} if precision is not None else fitting
        engine = select.pick(select.find_engines(bundle, wanted).fitting)
        if engine is not None:
            return FrameDetector(
                TrtFrameRunner(engine.path, onnx_sha256=engine.metadata.onnx_sha256),
                bundle.manifest.classes,
                description=f"{engine.stage} for frames of {size[0]} x {size[1]} on tensorrt "
                f"({engine.path.name} {select.reason_for(engine)})",
            )
        make = OrtFrameRunner
    precision = precision or ("float32" if "float32" in fitting else next(iter(fitting)))
    runner = make(bundle.require(fitting[precision]), threads=threads)
    return FrameDetector(
        runner, bundle.manifest.classes, description=f"{precision} for frames of {size[0]} x {size[1]} on {runner.name}"
    )
