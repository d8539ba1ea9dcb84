"""Files for other programs that run the detector: graphs for camera frames, Triton's repository, DeepStream's files."""

from __future__ import annotations

from pathlib import Path

from edgedetr.artifacts import FP16, INT8, INT8_CPU, ONNX
from edgedetr.bundle import Bundle
from edgedetr.image_size import check_size
from edgedetr.runtime.tensorrt import select
from edgedetr.serving.deepstream import write_deepstream
from edgedetr.serving.frame_graph import write_frames
from edgedetr.serving.triton import Repository, write_repository


def serve(
    bundle: Bundle,
    *,
    fp16: bool = False,
    int8: bool = False,
    frame: tuple[int, int] | None = None,
    triton: Path | None = None,
    deepstream: Path | None = None,
) -> list[str]:
    """Write what was asked for; one sentence about each thing.

    fp16, int8   which of the bundle's graphs: INT8, else FP16, else float32; frames get one of each
    frame        height and width of the camera's frames, pixels
    """
    size = check_size(frame, "frame") if frame is not None else None
    sources = [ONNX, *([FP16] if fp16 else []), *([INT8] if int8 else [])]
    chosen, said = sources[-1], []
    if size is not None:
        made = write_frames(bundle, *size, [source.file for source in sources])
        said.append(f"for frames of {size[0]} x {size[1]}: {', '.join(made)}")
        framed = made[-1]
    if triton is not None:
        found = _repository(bundle, triton, chosen.id, framed if size else chosen.file)
        batches = f"up to {found.max_batch_size} requests joined" if found.max_batch_size else "requests one by one"
        said.append(f"for Triton: {found.folder} ({found.platform}, {batches})")
    if deepstream is not None:
        files = write_deepstream(bundle, deepstream, chosen.file, size)
        said.append(f"for DeepStream: {files.config}; build its engine first, as that file says")
    return said


def _repository(bundle: Bundle, root: Path, stage: str, source: str) -> Repository:
    """An engine that fits this machine where there is one, else the graph, in ONNX Runtime."""
    engine = select.pick(select.survey(bundle, {stage: source}).fitting)
    if engine is None and source == INT8.file:
        source = INT8_CPU.file  # the form that ONNX Runtime runs fast, and that edgedetr verify has judged there
    return write_repository(bundle, root, source, engine=engine)
