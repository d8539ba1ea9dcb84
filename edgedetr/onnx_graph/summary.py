"""Summarize an ONNX file: opset, inputs and outputs, operators, and how much of it is quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from edgedetr.onnx_graph.index import opset_of, type_name
from edgedetr.onnx_graph.io import open_onnx

QUANTIZABLE = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class GraphContents:
    """The contents of one ONNX file.

    quantized     number of Conv, MatMul and Gemm nodes whose data and weight come from Q/DQ
    quantizable   number of all such nodes
    external      files next to it that hold weights
    faults        why these must not be read
    """

    path: str
    size: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    quantized: int
    quantizable: int
    metadata: dict[str, str]
    external: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def rows(self) -> list[list[object]]:
        pairs = [self.operators.get(name, 0) for name in ("QuantizeLinear", "DequantizeLinear")]
        lines: list[list[object]] = [["file", self.path], ["size", f"{self.size / 1e6:.2f} MB"], ["opset", self.opset]]
        lines += [["weights in", name] for name in self.external]
        lines += [["refused", fault] for fault in self.faults]
        lines += [["input", text] for text in self.inputs]
        lines += [["output", text] for text in self.outputs]
        lines += [
            ["nodes", sum(self.operators.values())],
            ["Q / DQ", f"{pairs[0]} / {pairs[1]}"],
            ["quantized Conv, MatMul, Gemm", f"{self.quantized} of {self.quantizable}"],
        ]
        short = {key: value if len(value) < 80 else value[:77] + "..." for key, value in self.metadata.items()}
        lines += [[f"metadata {key}", value] for key, value in short.items()]
        return lines


def inspect_onnx(path: Path) -> GraphContents:
    """Errors: ExportError where the file is no ONNX graph."""
    opened = open_onnx(path, weights=False)
    model, graph = opened.model, opened.model.graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    quantizable = [node for node in graph.node if node.op_type in QUANTIZABLE]
    quantized = [n for n in quantizable if all(producer.get(name) == "DequantizeLinear" for name in n.input[:2])]
    return GraphContents(
        path=str(path),
        size=path.stat().st_size,
        opset=opset_of(model),
        inputs=tuple(_signature(graph.input)),
        outputs=tuple(_signature(graph.output)),
        operators=dict(Counter(node.op_type for node in graph.node)),
        quantized=len(quantized),
        quantizable=len(quantizable),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        external=opened.external,
        faults=opened.faults,
    )


def _signature(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    """One line for each input or output: `images float32 [1, 3, 640, 640]`."""
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
        lines.append(f"{value.name} {type_name(tensor.elem_type)} [{shape}]")
    return lines
