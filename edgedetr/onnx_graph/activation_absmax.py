"""The largest magnitude of every float tensor of a graph over a few images: what says whether FP16 can hold it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.fp16 import float_tensors
from edgedetr.runtime.backends.onnxruntime import plain_session


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
        # A maximum passes over NaN, a sum does not.
        for kind, read, given in (
            ("Abs", name, "magnitude"),
            ("ReduceMax", f"{name}_magnitude", "largest"),
            ("ReduceSum", f"{name}_magnitude", "sum"),
        ):
            node = helper.make_node(kind, [read], [f"{name}_{given}"], f"{given}_{number}")
            if kind.startswith("Reduce"):
                node.attribute.append(helper.make_attribute("keepdims", 0))
            probe.graph.node.append(node)
    wanted = [f"{name}_{given}" for given in ("largest", "sum") for name in names]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    # For a few images: to optimize a graph in which every tensor is looked at takes longer than it saves.
    session = plain_session(probe.SerializeToString(), error=ExportError)
    found = dict.fromkeys(names, 0.0)
    for batch in batches:
        values = session.run(wanted, {"images": batch})
        for name, largest, total in zip(names, values[: len(names)], values[len(names) :]):
            if not np.isfinite(total):
                raise ExportError(
                    f"tensor {name!r} is {float(total)} on an image; expected finite activations; "
                    "train again from the last good checkpoint: edgedetr train --data DIR --resume"
                )
            if largest > -np.inf:  # which is the maximum of nothing: an empty tensor
                found[name] = max(found[name], float(largest))
    return found
