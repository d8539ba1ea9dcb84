"""Run ONNX graphs in memory on the CPU with ONNX Runtime: all their outputs, or chosen inner tensors.

Telemetry is off, and a graph that keeps weights in another file is refused: see runtime/backends/onnxruntime.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from edgedetr.errors import ExportError, first_line
from edgedetr.onnx_graph.graph_walk import captured
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.options import one_of
from edgedetr.runtime.backends.onnxruntime import plain_session

EXPORT_AGAIN = "export the model again"
# Operators whose output sizes depend on values, not on sizes.
_SIZED_BY_VALUES = {
    "NonZero",
    "Unique",
    "Compress",
    "NonMaxSuppression",
    "If",
    "Loop",
    "Scan",
    "SequenceMap",
    "SplitToSequence",
    "SequenceAt",
    "ConcatFromSequence",
    "RandomUniform",
    "RandomNormal",
    "Bernoulli",
    "StringSplit",
}
_SIDE = 1000  # value of inputs that are no image: sizes in pixels


class GraphSession:
    """A graph in an ONNX Runtime session.

    model      or its bytes, with `outputs` among its outputs: a caller that drops the model first needs less memory
    outputs    names of the tensors to compute, which may be inner ones; None = the graph's own outputs
    optimize   False: every node runs as written; "basic": quick optimizations; True: all of them
    threads    None = one per core
    spin       whether threads wait busily for the next run
    integers   False: Q/DQ pairs are computed as written, in float arithmetic, while the rest is optimized
    lean, in_order   as `plain_session`
    fix        what the user can do where the graph cannot be loaded or run
    """

    def __init__(
        self,
        model: ModelProto | bytes,
        outputs: Sequence[str] | None = None,
        *,
        optimize: bool | Literal["basic"] = False,
        threads: int | None = None,
        spin: bool = True,
        integers: bool = True,
        lean: bool = False,
        in_order: bool = False,
        fix: str = EXPORT_AGAIN,
    ) -> None:
        one_of("optimize", optimize, (False, "basic", True))
        self.outputs = list(outputs or ())
        self.fix = fix
        if isinstance(model, bytes):
            data = model
        else:
            if outputs is None:
                self.outputs = [item.name for item in model.graph.output]
            data = with_outputs(model, self.outputs).SerializeToString()
        self._session = plain_session(
            data,
            optimize=optimize,
            threads=threads,
            spin=spin,
            integers=integers,
            lean=lean,
            in_order=in_order,
            error=ExportError,
            fix=fix,
        )

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{output: value}. Errors: ExportError where the graph does not run on these inputs."""
        if not self.outputs:
            return {}
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, dict(feed))))
        except Exception as error:  # the library's exceptions share no public base class
            raise ExportError(f"the graph does not run in ONNX Runtime ({first_line(error)}); {self.fix}") from error


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy whose outputs are these tensors; the graph itself where they are its outputs already."""
    if [item.name for item in model.graph.output] == list(names):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    typed = {item.name: item for item in model.graph.output}
    del result.graph.output[:]
    result.graph.output.extend(typed.get(name) or helper.make_empty_tensor_value_info(name) for name in names)
    return result


def shapes_by_running(model: ModelProto, names: Sequence[str]) -> dict[str, list[int]]:
    """Sizes of tensors of a graph with fixed inputs, from one run; without those whose sizes depend on values."""
    graph = GraphIndex(model)
    by_values = _sized_by_values(graph)
    wanted = [name for name in dict.fromkeys(names) if name and name not in by_values]
    if not wanted:
        return {}
    feed = {item.name: _example(item) for item in model.graph.input if item.name not in graph.constants}
    fix = f"name another size with --input HxW, or {EXPORT_AGAIN}"
    values = GraphSession(model, [name for name in wanted if name in graph.producers], threads=1, fix=fix).run(feed)
    values |= {name: feed[name] for name in wanted if name in feed}
    return {name: list(value.shape) for name, value in values.items() if isinstance(value, np.ndarray)}


def _sized_by_values(graph: GraphIndex) -> set[str]:
    """Tensors whose sizes may depend on the values of the image."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type in _SIZED_BY_VALUES or any(name in found for name in [*node.input, *captured(node)]):
            found.update(node.output)
    return found


def _example(item: ValueInfoProto) -> np.ndarray:
    """A value for an input: noise for an image, a size in pixels for anything else."""
    kind = item.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = [dim.dim_value or 1 for dim in kind.shape.dim]
    if len(shape) == 4:
        return np.random.default_rng(0).uniform(0, 1, shape).astype(dtype)
    return np.full(shape, _SIDE, dtype)
