"""Write a model repository of Triton Inference Server: NAME/{config.pbtxt, labels.txt, 1/model.onnx or model.plan}.

The fields of config.pbtxt are those of triton-inference-server/common, protobuf/model_config.proto. Where the batch is
fixed, max_batch_size is 0 and the dimensions are the whole shape. Where it is open, the server may batch requests, if a
check has passed: an image must have the same detections in every row of a batch as alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from edgedetr.artifacts import INT8_CPU
from edgedetr.bundle import Bundle, Manifest
from edgedetr.errors import ExportError, UsageError
from edgedetr.evaluation.agreement import detections_allclose
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.printable import shown
from edgedetr.runtime.arguments import check_count, check_text
from edgedetr.runtime.backends.base import RawOutputs
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import Geometry
from edgedetr.runtime.tensorrt.select import Engine
from edgedetr.serving.labels import label, write_labels
from edgedetr.storage.atomic import atomic_write

log = logging.getLogger(__name__)

LARGEST_BATCH = 8  # requests in one batch where the batch is open, as in runtime.load
LARGEST_COUNT = 1024  # instances; a typing error must not start thousands of sessions
LONGEST = 200  # characters of a name that is made from a folder's name
SCORE, PIXELS = 1e-3, 0.5  # accepted differences between rows; float32 kernels of two batch sizes: 1e-5
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT32: "TYPE_INT32",
}
ONNX_NAME, ENGINE_NAME = "model.onnx", "model.plan"  # Triton's own names of the file in a version's folder


@dataclass(frozen=True)
class Repository:
    """The written model: its folder, its name, the platform, and the largest batch (0: no batching)."""

    folder: Path
    name: str
    platform: str
    max_batch_size: int


@dataclass(frozen=True)
class Tensor:
    """An input or output: name, Triton's type, dimensions with the batch first (-1 where it is open)."""

    name: str
    data_type: str
    dims: tuple[int, ...]


def write_repository(
    bundle: Bundle,
    root: Path,
    source: str,
    *,
    engine: Engine | None = None,
    name: str | None = None,
    instances: int = 1,
) -> Repository:
    """Add the model to the repository `root`.

    source      which of the bundle's graphs
    engine      an engine built from it, to be served instead
    instances   copies of the model that run at the same time, on each GPU or on the CPU
    """
    check_text(source, "source", "the name of a graph of the bundle")
    name = model_name(bundle, source) if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,249}", name):
        raise UsageError(f"the model's name is {shown(name)}; expected letters, digits, '_', '-' and '.', at most 250")
    check_count(instances, "instances", LARGEST_COUNT)
    path = bundle.require(source)
    model = read_bundle_graph(path, ExportError)
    inputs, outputs = signature(model.graph.input), signature(model.graph.output)
    if engine is None:
        # ONNX Runtime serves the float graph on whatever the server has, and INT8 in its CPU form on the CPU.
        kind = "KIND_CPU" if source == INT8_CPU.file else "KIND_AUTO"
        platform, target = "onnxruntime_onnx", ONNX_NAME
        largest = LARGEST_BATCH if inputs[0].dims[0] == -1 and batching_is_exact(model, bundle.manifest) else 0
    else:
        platform, kind, target, path = "tensorrt_plan", "KIND_GPU", ENGINE_NAME, engine.path
        least, _, most = engine.metadata.arguments.batch
        # The server may batch only what edgedetr verify, which runs equal images through the engine, has passed.
        verified = engine.measured is not None and engine.measured.passed
        largest = most if least == 1 < most and verified else 0
        first = least if least == most else -1
        inputs, outputs = (
            [Tensor(t.name, t.data_type, (first, *t.dims[1:])) for t in side] for side in (inputs, outputs)
        )
    folder = root / name
    with atomic_write(folder / "1" / target) as temporary:
        shutil.copyfile(path, temporary)
    write_labels(folder / "labels.txt", bundle.manifest.classes)
    with atomic_write(folder / "config.pbtxt") as temporary:
        config = ModelConfig(name, platform, kind, largest, instances, tuple(inputs), tuple(outputs))
        temporary.write_text(config.text(bundle.manifest), encoding="utf-8")
    return Repository(folder, name, platform, largest)


def model_name(bundle: Bundle, source: str) -> str:
    """cells.bundle, model.int8.onnx -> cells-int8."""
    folder = bundle.path.resolve().name.removesuffix(".bundle")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", folder).strip("-_")[:LONGEST] or "model"
    kind = source.removeprefix("model").removesuffix(".onnx").strip(".").replace(".", "-")
    return f"{stem}-{kind}" if kind else stem


def signature(values: Sequence[onnx.ValueInfoProto]) -> list[Tensor]:
    """Inputs or outputs in Triton's terms; ExportError for types that it cannot serve."""
    found = []
    for value in values:
        kind, dims = value.type.tensor_type.elem_type, value.type.tensor_type.shape.dim
        if kind not in TYPES or not dims:
            raise ExportError(
                f"{value.name} has type {TensorProto.DataType.Name(kind)} and {len(dims)} dimensions; "
                "expected float32, uint8 or int32 with a shape"
            )
        sizes = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
        found.append(Tensor(value.name, TYPES[kind], sizes))
    return found


def batching_is_exact(model: ModelProto, manifest: Manifest) -> bool:
    """Whether an image has the same detections in every row of a batch as alone, in ONNX Runtime."""
    contract = manifest.input
    one = np.random.default_rng(0).integers(0, 256, (1, 3, contract.height, contract.width)).astype(np.float32)
    whole = Geometry.of(contract.height, contract.width, contract)
    session, found = GraphSession(model, ["logits", "boxes"], optimize=True), []
    for batch in (1, LARGEST_BATCH):
        raw = session.run({"images": np.repeat(one, batch, axis=0)})
        found += decode(RawOutputs(raw["logits"], raw["boxes"]), [whole] * batch, manifest.classes, manifest.output)
    different = [row for row in found[1:] if not detections_allclose(row, found[0], pixels=PIXELS, score=SCORE)]
    if different:
        log.warning(
            "%d of %d rows with the same image have other detections than the image alone; "
            "Triton will not batch requests (max_batch_size 0)",
            len(different),
            LARGEST_BATCH,
        )
    return not different


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.pbtxt; `kind` is Triton's KIND_AUTO, KIND_CPU or KIND_GPU."""

    name: str
    platform: str
    kind: str
    max_batch_size: int
    instances: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def text(self, manifest: Manifest) -> str:
        """The text of config.pbtxt; its parameters carry the labels and the input and output contracts."""
        contract = manifest.input
        parameters = {
            "labels": "\n".join(label(item.name) for item in manifest.classes),
            "input": json.dumps(
                {
                    "height": contract.height,
                    "width": contract.width,
                    "resize": contract.resize,
                    "color": "RGB",
                    "range": [0, 255],
                }
            ),
            "output": json.dumps({"activation": manifest.output.activation, "top_k": manifest.output.top_k}),
        }
        batched = bool(self.max_batch_size)
        lines = [f"name: {_text(self.name)}", f"platform: {_text(self.platform)}"]
        lines.append(f"max_batch_size: {self.max_batch_size}")
        lines += [_tensors("input", self.inputs, batched), _tensors("output", self.outputs, batched)]
        lines.append(f"instance_group [\n  {{\n    count: {self.instances}\n    kind: {self.kind}\n  }}\n]")
        if batched:
            lines.append("dynamic_batching {\n}")
        lines += [
            f"parameters {{\n  key: {_text(key)}\n  value {{\n    string_value: {_text(value)}\n  }}\n}}"
            for key, value in parameters.items()
        ]
        return "\n".join(lines) + "\n"


def _tensors(what: str, found: Sequence[Tensor], batched: bool) -> str:
    blocks = []
    for tensor in found:
        dims = ", ".join(map(str, tensor.dims[1:] if batched else tensor.dims))
        blocks.append(
            f"  {{\n    name: {_text(tensor.name)}\n    data_type: {tensor.data_type}\n    dims: [ {dims} ]\n  }}"
        )
    return f"{what} [\n" + ",\n".join(blocks) + "\n]"


def _text(value: str) -> str:
    """A string of protobuf's text format: bytes outside printable ASCII as octal escapes."""
    return (
        '"'
        + "".join(
            chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:03o}"
            for b in value.encode("utf-8", "backslashreplace")
        )
        + '"'
    )
