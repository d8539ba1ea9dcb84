"""Files for other programs that run the detector: graphs for camera frames, Triton's repository, DeepStream's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgedetr.artifacts import FP16, INT8, INT8_CPU, ONNX
from edgedetr.bundle import Bundle
from edgedetr.image_size import check_size
from edgedetr.runtime.tensorrt import select
from edgedetr.serving.deepstream import DeepStreamFiles, write_deepstream
from edgedetr.serving.frame_graph import write_frames
from edgedetr.serving.triton import Repository, write_repository


@dataclass(frozen=True)
class ServingFiles:
    """What was written for servers and cameras; empty where nothing was asked for.

    frame        (height, width) of the camera frames that `frame_graphs` take, pixels
    frame_graphs names of files of the bundle
    """

    frame: tuple[int, int] | None = None
    frame_graphs: tuple[str, ...] = ()
    triton: Repository | None = None
    deepstream: DeepStreamFiles | None = None

    def lines(self) -> list[str]:
        """One sentence about each thing that was written."""
        lines = []
        if self.frame is not None:
            lines.append(f"for frames of {self.frame[0]} x {self.frame[1]}: {', '.join(self.frame_graphs)}")
        if self.triton is not None:
            largest = self.triton.max_batch_size
            batches = f"up to {largest} requests joined" if largest else "requests one by one"
            lines.append(f"for Triton: {self.triton.folder} ({self.triton.platform}, {batches})")
        if self.deepstream is not None:
            lines.append(f"for DeepStream: {self.deepstream.config}; build its engine first, as described in that file")
        return lines


def write_serving_files(
    bundle: Bundle,
    *,
    fp16: bool = False,
    int8: bool = False,
    frame: tuple[int, int] | None = None,
    triton: str | Path | None = None,
    deepstream: str | Path | None = None,
) -> ServingFiles:
    """Write frame graphs, a model of a Triton repository, DeepStream's files: whatever is asked for.

    fp16, int8   which of the bundle's graphs: INT8, else FP16, else float32; frames get one of each
    frame        height and width of the camera's frames, pixels
    """
    size = check_size(frame, "frame") if frame is not None else None
    sources = [ONNX, *([FP16] if fp16 else []), *([INT8] if int8 else [])]
    chosen = sources[-1]
    frames = write_frames(bundle, *size, [source.file for source in sources]) if size is not None else []
    return ServingFiles(
        size,
        tuple(frames),
        None if triton is None else _repository(bundle, Path(triton), chosen.id, frames[-1] if frames else chosen.file),
        None if deepstream is None else write_deepstream(bundle, Path(deepstream), chosen.file, size),
    )


def _repository(bundle: Bundle, root: Path, stage: str, source: str) -> Repository:
    """An engine that fits this machine where there is one, else the graph, in ONNX Runtime."""
    engine = select.pick(select.find_engines(bundle, {stage: source}).fitting)
    if engine is None and source == INT8.file:
        source = INT8_CPU.file  # the form that ONNX Runtime runs fast, and that edgedetr verify has judged there
    return write_repository(bundle, root, source, engine=engine)
