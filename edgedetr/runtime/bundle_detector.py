"""Load a bundle and detect: `detector = load("cells.bundle"); detector([image])`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedetr.artifacts import BACKENDS, GRAPHS, INT8_CPU, ONNX
from edgedetr.bundle import Bundle, ClassInfo, InputContract, OutputContract
from edgedetr.errors import BundleError, DataError, DeviceError, EngineError, MissingDependency, UsageError
from edgedetr.printable import shown
from edgedetr.runtime import preprocess
from edgedetr.runtime.arguments import check_count, check_word, kind
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.base import Backend, RawOutputs, Runner
from edgedetr.runtime.cpu import int8_dot_product, int8_saturates
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.tensorrt import select
from edgedetr.runtime.tensorrt.trt_runner import TrtRunner

log = logging.getLogger(__name__)

LARGEST_BATCH = 8  # images per run where the batch size is dynamic: larger batches are not faster on a CPU


class Detector:
    """Images in, detections out.

    stage, backend   id of the artifact and name of the backend, e.g. "int8-cpu", "onnxruntime"
    description      both as text, with the reason of the choice
    class_names      names in the order of class_id
    """

    def __init__(
        self,
        runner: Runner,
        classes: Sequence[ClassInfo],
        contract: InputContract,
        output: OutputContract,
        *,
        stage: str = "onnx",
        description: str = "",
    ) -> None:
        self.runner, self.classes, self.contract, self.output = runner, tuple(classes), contract, output
        self.stage, self.backend, self.description = stage, runner.name, description or f"{stage} on {runner.name}"
        self.class_names = [c.name for c in classes]
        if (runner.height, runner.width) != (contract.height, contract.width):
            raise BundleError(
                f"the graph takes {runner.height} x {runner.width} pixels, bundle.json has "
                f"{contract.height} x {contract.width}; run: edgedetr export BUNDLE"
            )

    def __repr__(self) -> str:
        return f"Detector({self.description}, {len(self.classes)} classes)"

    def __call__(self, images: Iterable[np.ndarray]) -> list[Detections]:
        """Detections of each image; images are uint8 RGB arrays [H, W, 3] of any sizes.

        Any iterable is accepted; all its images are in memory at the same time. An empty one gives an empty list.
        edgedetr.data.images.decode reads files.
        """
        if isinstance(images, np.ndarray) and images.ndim == 3:
            raise UsageError("one image was given; expected a list of them: detector([image])")
        if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, (Iterable, np.ndarray)):
            raise UsageError(
                f"images is {kind(images)}; expected a list of uint8 RGB arrays [H, W, 3] "
                "(edgedetr.data.images.decode reads files)"
            )
        images = list(images)
        for index, image in enumerate(images):
            check_image(image, f"images[{index}]")
        found: list[Detections] = []
        step = self.runner.batch or LARGEST_BATCH
        for start in range(0, len(images), step):
            batch, geometries = preprocess.prepare(images[start : start + step], self.contract)
            found += decode(self.run_raw(batch), geometries, self.classes, self.output)
        return found

    def run_raw(self, batch: np.ndarray) -> RawOutputs:
        """batch [B, 3, height, width] float32 RGB 0..255, as `preprocess.prepare` returns it -> RawOutputs.

        TensorRT also accepts an array on the device: anything with __cuda_array_interface__.
        """
        if self.backend == "tensorrt" and hasattr(batch, "__cuda_array_interface__"):
            return self.runner.run(batch)
        expected = (3, self.contract.height, self.contract.width)
        if not isinstance(batch, np.ndarray):
            raise UsageError(
                f"batch is {kind(batch)}; expected a float32 array [B, 3, {expected[1]}, {expected[2]}], "
                "as runtime.preprocess.prepare returns it"
            )
        if not len(batch.shape) or not len(batch):
            raise UsageError("batch has no images; expected at least one")
        if batch.dtype != np.float32 or batch.ndim != 4 or batch.shape[1:] != expected:
            raise UsageError(
                f"batch is {batch.dtype} {list(batch.shape)}; expected float32 [B, 3, "
                f"{expected[1]}, {expected[2]}], as runtime.preprocess.prepare returns it"
            )
        return base.run_in_batches(self.runner.run, np.ascontiguousarray(batch), self.runner.batch)


def check_image(image: object, what: str) -> None:
    """Check that `image` is a uint8 array [H, W, 3] with pixels. Errors: UsageError, DataError."""
    if not isinstance(image, np.ndarray):
        raise UsageError(
            f"{what} is {type(image).__name__}; expected a uint8 RGB array [H, W, 3] "
            f"(edgedetr.data.images.decode reads files)"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(
            f"{what} is {image.dtype} {list(image.shape)}; expected uint8 RGB [H, W, 3] with at least one pixel"
        )


def load(
    bundle: str | Path | Bundle,
    *,
    backend: str | None = None,
    stage: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    trust: bool = False,
) -> Detector:
    """Open a bundle and load the best artifact for this machine, or the requested one.

    backend   "onnxruntime", "openvino", "onnxruntime-cuda" or "tensorrt"; None = an engine that fits this device, else
              ONNX Runtime, on a GPU where possible
    stage     "onnx" (float32), "fp16", "int8" or "int8-cpu"
    threads   threads of one inference on the CPU; None = all cores
    batch     batch size of the engine; None = one for single images
    trust     accept an engine that was built on another machine; it is executable code, so you must trust its author

    The detector's `description` has the choice with its reason, and the reason why an engine was not used.
    """
    bundle = Bundle.open(bundle)
    _check_arguments(backend, stage, threads, batch, trust)
    refused: tuple[str, ...] = ()
    on_files = [known for known in base.backends() if not known.runs_engines]
    engines_only = backend is not None and base.get(backend).runs_engines
    if engines_only or (backend is None and (stage is None or not any(map(_on_cpu, on_files)))):
        detector, refused = _load_engine(bundle, stage, batch, trust)
        if detector is not None:
            warn_of_threads(bundle, threads)
            return detector
        if engines_only:
            raise EngineError(
                f"{bundle.path}: no engine for {stage or 'any stage'} that fits here"
                f"{''.join(f'; {reason}' for reason in refused)}; run: edgedetr build {bundle.path}"
            )
    if backend is not None:
        chosen = base.get(backend)
        stage, reason = (stage, "as requested") if stage is not None else _stage_for(bundle, chosen)
        return _on_file(bundle, chosen, stage, threads, [reason, *refused])
    for gpu in on_files:
        if gpu.device != "cpu" and gpu.name in GRAPHS[stage or ONNX.id].backends and not gpu.unavailable():
            reason = "as requested" if stage else "float32: this ONNX Runtime can use the GPU"
            try:
                return _on_file(bundle, gpu, stage or ONNX.id, threads, [reason, *refused])
            except DeviceError as error:  # the CPU can run it too
                log.warning("%s", error)
                refused = (*refused, f"the GPU not used: {error}")
    cpu = _first_on_cpu(on_files)
    stage, reason = (stage, "as requested") if stage is not None else _stage_for(bundle, cpu)
    return _on_file(bundle, cpu, stage, threads, [reason, *refused])


def warn_of_threads(bundle: Bundle, threads: int | None) -> None:
    """Where only engines run: a number of threads that was asked for has no effect."""
    if threads is not None:
        log.warning("%s: an engine runs on the GPU, where threads=%d has no effect", bundle.path, threads)


def _check_arguments(
    backend: str | None, stage: str | None, threads: int | None, batch: int | None, trust: bool
) -> None:
    for word, known, what in ((backend, BACKENDS, "backend"), (stage, GRAPHS, "stage")):
        if word is not None:
            check_word(word, known, what)
    for number, what in ((threads, "threads"), (batch, "batch")):
        check_count(number, what)
    if not isinstance(trust, bool):  # "no" and "false" are true
        raise UsageError(f"trust is {shown(trust)}; expected True or False")


def _first_on_cpu(on_files: Sequence[Backend]) -> Backend:
    for backend in on_files:
        if _on_cpu(backend):
            return backend
    names = " nor ".join(backend.name for backend in on_files if backend.device == "cpu")
    raise MissingDependency(
        f"neither {names} is installed, and no engine fits; run: pip install {base.reference().library}"
    )


def _on_cpu(backend: Backend) -> bool:
    return backend.device == "cpu" and not backend.unavailable()


def _on_file(bundle: Bundle, backend: Backend, stage: str, threads: int | None, reasons: Sequence[str]) -> Detector:
    """The detector on one of the bundle's ONNX files."""
    path = bundle.require(GRAPHS[stage].file)
    description = f"{stage} on {backend.name} ({'; '.join(reasons)})"
    log.info("%s: %s", bundle.path, description)
    runner = backend.open(path, threads=threads)
    if backend.name not in GRAPHS[stage].backends and backend.caveat:
        caveat = backend.caveat.format(bundle=bundle.path)
        log.warning("%s: %s on %s, which %s", bundle.path, stage, backend.name, caveat)
    if int8_saturates() and (problem := _saturation(runner, backend, stage, bundle)):
        log.warning("%s: this CPU has no 8-bit dot product, %s", bundle.path, problem)
    return _detector(bundle, runner, stage, description)


def _saturation(runner: Runner, backend: Backend, stage: str, bundle: Bundle) -> str | None:
    """What goes wrong with an artifact on a CPU whose 8-bit products saturate, and what to do; None: nothing."""
    if stage in backend.saturates:
        return (
            f"and the INT8 of {backend.name} saturates on it: detections may be far from what the graph computes; "
            "take stage onnx or int8-cpu"
        )
    if stage == INT8_CPU.id and getattr(runner, "weight_bits", None) == 8:
        return (
            f"and sums of 8-bit weights saturate on it: detections are lost; run: edgedetr export {bundle.path} "
            "--int8 --set quant.cpu_weights=7bit"
        )
    return None


def load_engine(bundle: Bundle, engine: select.Engine, *, trust: bool = False) -> Detector:
    """The detector on one engine of the bundle. Errors: EngineError where it must not or cannot be loaded."""
    metadata = engine.metadata
    runner = TrtRunner(engine.path, onnx_sha256=metadata.onnx_sha256, trust=trust)
    description = (
        f"{engine.stage} on tensorrt ({engine.path.name} {select.reason_for(engine)}: "
        f"{metadata.device}, TensorRT {metadata.tensorrt})"
    )
    log.info("%s: %s", bundle.path, description)
    return _detector(bundle, runner, engine.stage, description)


def _load_engine(
    bundle: Bundle, stage: str | None, batch: int | None, trust: bool
) -> tuple[Detector | None, tuple[str, ...]]:
    """The best engine that can be opened, or the reasons why there is none."""
    found = select.find_engines(bundle, trust=trust)
    fitting, refused = list(found.fitting), list(found.refused)
    while (engine := select.pick(fitting, stage=stage, batch=batch)) is not None:
        try:
            return load_engine(bundle, engine, trust=trust), ()
        except (EngineError, DeviceError) as error:
            log.warning("%s", error)
            refused.append(f"{engine.path.name} not used: {error}")
            fitting.remove(engine)
    return None, tuple(refused)


def _detector(bundle: Bundle, runner: Runner, stage: str, description: str) -> Detector:
    manifest = bundle.manifest
    return Detector(runner, manifest.classes, manifest.input, manifest.output, stage=stage, description=description)


def _stage_for(bundle: Bundle, backend: Backend) -> tuple[str, str]:
    """(artifact id, reason) for a backend that runs ONNX files, where no artifact was requested."""
    if backend.name not in INT8_CPU.backends:
        return ONNX.id, "float32, the default of this backend"
    instruction = int8_dot_product()
    if not instruction:
        return ONNX.id, "float32: this CPU has no 8-bit dot product, so INT8 would not be faster"
    if INT8_CPU.file not in bundle.manifest.files:
        return ONNX.id, "float32: no INT8 in this bundle yet"
    return INT8_CPU.id, f"INT8: this CPU has {instruction}"
