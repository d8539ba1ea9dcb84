"""Small ONNX graphs for tests, and their results in ONNX Runtime."""

from __future__ import annotations

import numpy as np
from external_models import open_session
from onnx import ModelProto, TensorProto, helper, numpy_helper


def run_model(model: ModelProto, **feed) -> list[np.ndarray]:
    return open_session(model.SerializeToString()).run(None, feed)


def graph_of(nodes, constants, shape=(1, 4, 6, 6), opset=17, name="x") -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
