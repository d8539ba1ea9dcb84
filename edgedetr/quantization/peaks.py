"""The largest magnitude of every float tensor of a graph over a few pictures: what says whether FP16 can hold it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime
from onnx import ModelProto, helper

from edgedetr.errors import ExportError
from edgedetr.quantization.half import float_tensors


def peaks(model: ModelProto, batches: Iterable[np.ndarray]) -> dict[str, float]:
    """{tensor: largest magnitude}; an ExportError that names the tensor where one is NaN or infinite.

    batches   [B, 3, H, W] float32, as the graph takes them
    The maxima are taken inside the graph, so that no tensor has to be kept.
    """
    names = sorted(float_tensors(model))
    probe = ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for number, name in enumerate(names):
        magnitude, peak = f"{name}_magnitude", f"{name}_peak"
        probe.graph.node.append(helper.make_node("Abs", [name], [magnitude], f"magnitude_{number}"))
        probe.graph.node.append(helper.make_node("ReduceMax", [magnitude], [peak], f"peak_{number}", keepdims=0))
        probe.graph.output.append(helper.make_empty_tensor_value_info(peak))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, 0.0)
    wanted = [f"{name}_peak" for name in names]
    for batch in batches:
        for name, value in zip(names, session.run(wanted, {"images": batch})):
            if value == -np.inf:            # the maximum of nothing: an empty tensor
                continue
            if not np.isfinite(value):
                raise ExportError(f"tensor {name!r} is {float(value)} on a picture; expected finite activations; "
                                  "train again from the last good checkpoint: edgedetr train --data DIR --resume")
            found[name] = max(found[name], float(value))
    return found
