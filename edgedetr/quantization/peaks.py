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
        steps = (("Abs", [name], "magnitude"), ("ReduceMax", [f"{name}_magnitude"], "largest"),
                 # A maximum passes over NaN, a sum does not.
                 ("ReduceSum", [f"{name}_magnitude"], "sum"), ("Sub", [f"{name}_sum", f"{name}_sum"], "zero"),
                 ("Add", [f"{name}_largest", f"{name}_zero"], "peak"))
        for kind, read, given in steps:
            node = helper.make_node(kind, read, [f"{name}_{given}"], f"{given}_{number}")
            if kind.startswith("Reduce"):
                node.attribute.append(helper.make_attribute("keepdims", 0))
            probe.graph.node.append(node)
        probe.graph.output.append(helper.make_empty_tensor_value_info(f"{name}_peak"))
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(probe.SerializeToString(), settings, providers=["CPUExecutionProvider"])
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
