"""ONNX Runtime's own static quantization, `onnxruntime.quantization.quantize_static`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from edgedetr.quantization.peers.peer import CalibrationBatches, CalibrationReader, Peer
from edgedetr.telemetry import import_onnxruntime


def quantize(model: Path, images: CalibrationBatches, out: Path, settings: Mapping[str, Any]) -> None:
    import_onnxruntime()  # the library itself first, because it decides about telemetry when it is imported
    quantization: Any = import_module("onnxruntime.quantization")
    quantization.quantize_static(str(model), str(out), CalibrationReader(images), **settings)


PEERS = (
    Peer("onnxruntime", "onnxruntime", ("onnxruntime", "onnx"), {}, quantize),
    # What its documentation advises for GPUs and TensorRT, with Q/DQ where TensorRT expects them: in front of products
    # only, and float biases. TensorRT takes signed integers with zero point 0.
    Peer(
        "onnxruntime-s8s8",
        "onnxruntime",
        ("onnxruntime", "onnx"),
        {
            "per_channel": True,
            "op_types_to_quantize": ["Conv", "MatMul", "Gemm"],
            "extra_options": {
                "ActivationSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul", "Gemm"],
            },
        },
        quantize,
    ),
)
