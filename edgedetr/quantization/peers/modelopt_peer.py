"""NVIDIA ModelOpt's quantization of ONNX files, `modelopt.onnx.quantization.quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedetr.quantization.peers.peer import CalibrationBatches, CalibrationReader, Peer

NEEDS = (
    "modelopt",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_graphsurgeon",
    "onnxslim",
    "polygraphy",
    "lief",
)
# Its own choices but for two: it looks for GPUs to calibrate on, and it writes FP16 around the INT8 nodes, which a CPU
# would compute in float32 between casts.
SETTINGS = {"quantize_mode": "int8", "calibration_eps": ["cpu"], "high_precision_dtype": "fp32"}


def quantize(model: Path, images: CalibrationBatches, out: Path, settings: Mapping[str, Any]) -> None:
    from modelopt.onnx.quantization import quantize as run

    run(
        str(model),
        calibration_data_reader=CalibrationReader(images),
        output_path=str(out),
        log_level="ERROR",
        **{name: list(value) if isinstance(value, list) else value for name, value in settings.items()},
    )


PEERS = (
    Peer("modelopt", "nvidia-modelopt", NEEDS, {**SETTINGS, "calibration_method": "entropy"}, quantize),
    Peer("modelopt-max", "nvidia-modelopt", NEEDS, {**SETTINGS, "calibration_method": "max"}, quantize),
)
