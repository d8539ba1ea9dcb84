"""The one table of what a bundle can hold: each file's name, precision, source, and the backends that run it.

To add an artifact, add one entry to ARTIFACTS; the code that writes it uses the entry. Commands, loading, verification,
timing, engines and servers read this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Names of the backends, in the order in which they are preferred for an ONNX file, the CPU before the GPU.
ORT, OPENVINO, ORT_CUDA, TENSORRT = "onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt"
BACKENDS = (ORT, OPENVINO, ORT_CUDA, TENSORRT)


@dataclass(frozen=True)
class Artifact:
    """One kind of file in a bundle.

    id           short name; for a graph what `--stage` takes and what verdicts call it
    file         its name in the bundle
    about        one line for people
    step         the step that makes it, as bundle.json records it ("train", "export", ...); imports record "import"
    command      the command that makes it; "{path}" is the bundle
    made_from    names of the files it is made from: when one of them changes, this one is stale
    precision    of a graph: "fp32", "fp16" or "int8"; "" for other files
    target       of an INT8 graph: whose form of Q/DQ it has, "tensorrt" or "cpu"
    quantizer    of an INT8 graph that another quantizer made: its name, as `export --quantizer` takes it. It is
                 measured beside ours; it is never delivered to a device and has no part in the verdict
    fp16_inside  it computes in FP16 where it does not compute in INT8, so a CPU must simulate the rounding
    backends     the backends that compute it exactly as the graph is written
    verified     those of `backends` on which `edgedetr verify` judges the file (engines are judged on their device)
    benched      those of `backends` on which `edgedetr bench` times the file
    """

    id: str
    file: str
    about: str
    step: str
    command: str
    made_from: tuple[str, ...] = ()
    precision: str = ""
    target: str = ""
    quantizer: str = ""
    fp16_inside: bool = False
    backends: tuple[str, ...] = ()
    verified: tuple[str, ...] = ()
    benched: tuple[str, ...] = ()

    @property
    def is_graph(self) -> bool:
        """Whether it is an ONNX graph `images` -> `logits`, `boxes`."""
        return bool(self.precision)


EXPORT = "edgedetr export {path}"
VERIFY = "edgedetr verify {path}"
TRAIN = "edgedetr train --data DIR"


def _of_quantizer(name: str, about: str, target: str) -> Artifact:
    """The INT8 graph of another quantizer: float32 where it is not INT8, so both CPU libraries run it as it is."""
    return Artifact(
        f"int8-{name}",
        f"model.int8-{name}.onnx",
        about,
        "quantize",
        f"{EXPORT} --int8 --quantizer {name}",
        made_from=(ONNX.file,),
        precision="int8",
        target=target,
        quantizer=name,
        backends=(ORT, OPENVINO),
        verified=(ORT, OPENVINO),
        benched=(ORT, OPENVINO),
    )


ARTIFACTS: tuple[Artifact, ...] = (
    RECIPE := Artifact("recipe", "recipe.toml", "the fully resolved recipe", "train", TRAIN),
    WEIGHTS := Artifact(
        "weights", "weights.safetensors", "weights of the PyTorch model", "train", TRAIN, made_from=(RECIPE.file,)
    ),
    REFERENCE := Artifact(
        "reference",
        "reference.npz",
        "detections of the PyTorch model on the verify split, with ground truth and image digests",
        "export",
        EXPORT,
        made_from=(WEIGHTS.file,),  # of an imported graph: ONNX.file
    ),
    ONNX := Artifact(
        "onnx",
        "model.onnx",
        "the deployed graph in float32",
        "export",
        EXPORT,
        made_from=(WEIGHTS.file,),
        precision="fp32",
        backends=(ORT, OPENVINO, ORT_CUDA, TENSORRT),
        verified=(ORT, ORT_CUDA),
        # The float32 of each library is what its INT8 is compared with.
        benched=(ORT, OPENVINO, ORT_CUDA),
    ),
    FP16 := Artifact(
        "fp16",
        "model.fp16.onnx",
        "FP16 for TensorRT; some nodes stay float32",
        "half",
        EXPORT + " --trt",
        made_from=(ONNX.file,),
        precision="fp16",
        fp16_inside=True,
        # OpenVINO removes the simulation of FP16, so it never scores FP16.
        backends=(ORT, ORT_CUDA, TENSORRT),
        verified=(ORT, ORT_CUDA),
        benched=(ORT_CUDA,),
    ),
    PLACEMENT := Artifact(
        "placement",
        "placement.json",
        "which layers are INT8, and with which observers, where that is not the policy's choice",
        "search",
        EXPORT + " --int8",
        made_from=(ONNX.file,),
    ),
    RANGES := Artifact(
        "ranges",
        "ranges.json",
        "largest magnitude of each tensor over the calibration images",
        "calibrate",
        EXPORT + " --int8",
        made_from=(ONNX.file,),
    ),
    INT8 := Artifact(
        "int8",
        "model.int8.onnx",
        "INT8 for TensorRT and OpenVINO, FP16 elsewhere",
        "quantize",
        EXPORT + " --int8",
        made_from=(ONNX.file, RANGES.file),
        precision="int8",
        target="tensorrt",
        fp16_inside=True,
        backends=(ORT, OPENVINO, TENSORRT),
        verified=(ORT, OPENVINO),
        benched=(OPENVINO,),
    ),
    INT8_CPU := Artifact(
        "int8-cpu",
        "model.int8-cpu.onnx",
        "INT8 in the form that ONNX Runtime and OpenVINO run fast on a CPU",
        "quantize",
        EXPORT + " --int8",
        made_from=(ONNX.file, RANGES.file),
        precision="int8",
        target="cpu",
        backends=(ORT, OPENVINO),
        verified=(ORT, OPENVINO),
        benched=(ORT, OPENVINO),
    ),
    INT8_PROFILED := Artifact(
        "int8-profiled",
        "model.int8-profiled.onnx",
        "every group of layers in INT8, whose engine `edgedetr build --profile` times; it is never delivered",
        "search",
        EXPORT + " --int8 --max-drop POINTS --target tensorrt",
        made_from=(ONNX.file,),
    ),
    PROFILE := Artifact(
        "profile",
        "results/profile.json",
        "times of every layer of the TensorRT engines on the device, in FP16 and in INT8",
        "profile",
        "edgedetr build {path} --profile",
        made_from=(FP16.file, INT8_PROFILED.file),
    ),
    # Other quantizers; how each is called is in quantization/peers.
    _of_quantizer("modelopt", "INT8 by NVIDIA ModelOpt, entropy calibration", "tensorrt"),
    _of_quantizer("modelopt-max", "INT8 by NVIDIA ModelOpt, max calibration", "tensorrt"),
    _of_quantizer("onnxruntime", "INT8 by ONNX Runtime's quantize_static, defaults", "cpu"),
    _of_quantizer("onnxruntime-s8s8", "INT8 by ONNX Runtime's quantize_static, signed and symmetric", "tensorrt"),
    _of_quantizer("nncf", "INT8 by NNCF for transformers", "cpu"),
    _of_quantizer("nncf-mixed", "INT8 by NNCF, preset MIXED", "cpu"),
    SENSITIVITY := Artifact(
        "sensitivity",
        "results/sensitivity.json",
        "how far each group of layers alone in INT8 moves the detections",
        "sensitivity",
        "edgedetr sensitivity {path}",
        made_from=(ONNX.file,),
    ),
    IMPORT_RECORD := Artifact(
        "import-record",
        "results/import.json",
        "where imported weights came from",
        "import",
        "edgedetr import SOURCE --model NAME --out {path}",
    ),
    START := Artifact(
        "start",
        "results/start.json",
        "the weights that a training started from: source, revision, digests, license, classes kept",
        "train",
        TRAIN,
    ),
    SEARCH := Artifact(
        "search",
        "results/search.json",
        "the search for the fastest INT8 within an accuracy budget: costs, front, every look",
        "search",
        EXPORT + " --int8 --max-drop POINTS",
        made_from=(ONNX.file, REFERENCE.file),
    ),
    VERDICT := Artifact("verdict", "results/verify.json", "the verdict on each graph", "verify", VERIFY),
    REPORT := Artifact("report", "report/index.html", "the report as one page", "report", "edgedetr report {path}"),
)

GRAPHS = {artifact.id: artifact for artifact in ARTIFACTS if artifact.is_graph}
DELIVERED = {name: graph for name, graph in GRAPHS.items() if not graph.quantizer}  # ours
QUANTIZERS = {graph.quantizer: graph for graph in GRAPHS.values() if graph.quantizer}  # by the other quantizer's name
# Engines are built from these, by precision; best guess first: INT8 until a measurement says otherwise.
ENGINE_GRAPHS: dict[str, Artifact] = {
    precision: artifact
    for precision in ("int8", "fp16", "fp32")
    for artifact in GRAPHS.values()
    if artifact.precision == precision and TENSORRT in artifact.backends
}

BY_FILE = {artifact.file: artifact for artifact in ARTIFACTS}
_FRAME = re.compile(r"(?P<stem>model(?:\.[a-z0-9-]+)?)\.frame-(?P<height>[0-9]+)x(?P<width>[0-9]+)\.onnx")


def verified_pairs() -> tuple[tuple[str, str], ...]:
    """(artifact id, backend) of everything that `edgedetr verify` judges without an engine; CPU backends first."""
    return _pairs((artifact.id, artifact.verified) for artifact in GRAPHS.values())


def benched_pairs() -> tuple[tuple[str, str], ...]:
    """(artifact id, backend) of everything that `edgedetr bench` times without an engine; CPU backends first."""
    return _pairs((artifact.id, artifact.benched) for artifact in GRAPHS.values())


def _pairs(of: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, str], ...]:
    pairs = [(name, backend) for name, backends in of for backend in backends]
    return tuple(sorted(pairs, key=lambda pair: pair[1] == ORT_CUDA))


@dataclass(frozen=True)
class FrameGraph:
    """A graph for whole camera frames of height x width pixels, made from the graph `source`."""

    source: Artifact
    height: int
    width: int

    @property
    def file(self) -> str:
        """model.int8.onnx for frames of 1080 x 1920 -> model.int8.frame-1080x1920.onnx."""
        return f"{self.source.file.removesuffix('.onnx')}.frame-{self.height}x{self.width}.onnx"


def frame_graph(name: str) -> FrameGraph | None:
    """The frame graph whose file has this name; None for other files."""
    found = _FRAME.fullmatch(name)
    source = BY_FILE.get(f"{found['stem']}.onnx") if found else None
    if found is None or source is None or not source.is_graph:
        return None
    return FrameGraph(source, int(found["height"]), int(found["width"]))


def detections_file(stage: str, backend: str) -> str:
    """Name of the recorded detections of one artifact on one backend: results/detections-int8-openvino.npz."""
    return f"results/detections-{stage}-{backend}.npz"


def making_command(name: str) -> str:
    """The command that makes the file `name`, with "{path}" for the bundle."""
    if (frame := frame_graph(name)) is not None:
        return f"{frame.source.command} --frame {frame.height}x{frame.width}"
    if (artifact := BY_FILE.get(name)) is not None and artifact.step != VERDICT.step:
        return artifact.command
    return VERIFY if name.startswith("results/") else EXPORT
