"""What every float graph of a bundle is: its inputs and outputs, its opset, and its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict

from onnx import ModelProto

from edgedetr.bundle import Manifest
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.opset import OPSET

METADATA_PREFIX = "edgedetr."  # of our keys in the file's metadata


def check_graph(model: ModelProto, opset: int = OPSET) -> None:
    """ExportError unless the graph has one opset, `images` as its input, `logits` and `boxes` as its outputs."""
    found = {item.domain: item.version for item in model.opset_import}
    if found != {"": opset}:
        raise ExportError(f"the exporter wrote opsets {found}; expected {opset} of the standard domain and no other")
    names = [item.name for item in model.graph.input], [item.name for item in model.graph.output]
    if names != (["images"], ["logits", "boxes"]):
        raise ExportError(f"the graph has inputs {names[0]} and outputs {names[1]}; expected images -> logits, boxes")
    for node in model.graph.node:
        if node.op_type == "GridSample":
            mode = next((item.s for item in node.attribute if item.name == "mode"), b"bilinear")
            if mode != b"bilinear":
                raise ExportError(
                    f"GridSample {node.name} has mode {mode.decode()!r}; expected 'bilinear', the one "
                    "name that all versions of TensorRT read alike"
                )


def model_metadata(manifest: Manifest, weights: str) -> dict[str, str]:
    """Metadata of a file, without the prefix: classes, contracts and the SHA-256 of the weights it was made from."""
    return {
        "model": manifest.model,
        "classes": json.dumps([asdict(item) for item in manifest.classes], ensure_ascii=False),
        "input": json.dumps(asdict(manifest.input)),
        "output": json.dumps(asdict(manifest.output)),
        "weights_sha256": weights,
    }
