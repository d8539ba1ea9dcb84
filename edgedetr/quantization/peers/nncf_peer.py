"""NNCF's post-training quantization of ONNX graphs, `nncf.quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.quantization.peers.peer import CalibrationBatches, Peer
from edgedetr.telemetry import import_nncf


def quantize(model: Path, images: CalibrationBatches, out: Path, settings: Mapping[str, Any]) -> None:
    nncf: Any = import_nncf()
    words = {"model_type": nncf.ModelType, "preset": nncf.QuantizationPreset}
    data = nncf.Dataset(images.paths, lambda path: {"images": images.read(path)})
    # The subset is all images, so that every quantizer sees the same ones.
    options = {name: words[name](value) for name, value in settings.items()}
    result = nncf.quantize(read_bundle_graph(model), data, subset_size=len(images), **options)
    out.write_bytes(result.SerializeToString())


PEERS = (
    # The model type that its documentation asks for where a network has attention.
    Peer("nncf", "nncf", ("nncf", "onnx"), {"model_type": "transformer"}, quantize),
    Peer("nncf-mixed", "nncf", ("nncf", "onnx"), {"preset": "mixed"}, quantize),
)
