"""What leaves for TensorRT is linted first: a graph with an error never enters a bundle."""

from __future__ import annotations

from onnx import ModelProto

from edgedetr.errors import ExportError
from edgedetr.lint.lint import lint


def refuse_errors(model: ModelProto, name: str) -> None:
    """ExportError that names the first faults of a graph which some supported TensorRT would refuse or get wrong."""
    errors = [finding for finding in lint(model) if finding.worst == "error"]
    if errors:
        told = "; ".join(str(finding) for finding in errors[:3])
        raise ExportError(
            f"{name} has {len(errors)} faults for TensorRT: {told}. It was not written; edgedetr lint "
            "says more about model.onnx, and a policy with fewer INT8 or FP16 nodes may pass"
        )
