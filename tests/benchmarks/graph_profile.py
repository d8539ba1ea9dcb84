"""Where the time of the float32 and the INT8 graph goes: per operator, per part of the detector, per node, as Markdown.

usage: python tests/benchmarks/graph_profile.py BUNDLE [--backend onnxruntime openvino] [--rounds 10] [--json]
       python tests/benchmarks/graph_profile.py --member rt_detr --pixels 640     # random weights, made-up ranges

ONNX Runtime: every node of the optimized graph is run as a graph of its own, in one thread, on the values that it gets
in the whole graph; its time is the smallest CPU time of a few runs, so that other work on the machine matters little.
"alone" is their sum, "products" the part of convolutions and matrix products: the floor while the kernels stay as they
are. "whole" is the CPU time of the whole graphs, run in turns: what is more than "alone" is memory traffic between the
nodes. OpenVINO: its own profile, the smallest of all rounds per node; this is wall time and needs an idle machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from int8_latency import CONFIGS
from onnx import ModelProto, NodeProto, helper

from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.models import FAMILY, build
from edgedetr.models.deploy import DeployGraph
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.qdq import insert_qdq, runnable
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.target import CPU, TENSORRT

CLASSES = 80
MADE_UP_RANGE = 4.0  # of every activation: times do not depend on it
PARTS = ("backbone", "encoder", "selector", "decoder")
PRODUCTS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul")
PRODUCTS += ("QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "FullyConnected", "Convolution")
LEAST, MOST = 3, 30  # runs of a node: until they have taken ENOUGH seconds
ENOUGH = 0.05
FILES = {"onnxruntime": ("model.onnx", "model.int8-cpu.onnx"), "openvino": ("model.onnx", "model.int8-cpu.onnx")}


@dataclass(frozen=True)
class Time:
    """A node of an optimized graph: its operator (with OpenVINO's kernel) and its milliseconds."""

    node: str
    operator: str
    ms: float

    @property
    def part(self) -> str:
        return next((part for part in PARTS if f"/{part}" in self.node), "other")

    @property
    def is_product(self) -> bool:
        return self.operator.split()[0] in PRODUCTS


@dataclass(frozen=True)
class Profile:
    """Of one graph: its nodes, and the CPU time of the whole in milliseconds."""

    file: str
    backend: str
    whole: float
    nodes: tuple[Time, ...]

    @property
    def alone(self) -> float:
        return sum(node.ms for node in self.nodes)

    @property
    def products(self) -> float:
        return sum(node.ms for node in self.nodes if node.is_product)


# ------------------------------------------------------------------------------------------------------------- graphs


def graphs_of_bundle(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for names in FILES.values() for name in names}


def graphs_of_member(member: str, pixels: int) -> dict[str, bytes]:
    """model.onnx and both INT8 graphs of a member with random weights; what is INT8 follows from the default policy."""
    torch.manual_seed(0)
    detector = build(member, FAMILY[member].config(backbone_weights="random", **CONFIGS.get(member, {})), CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(DeployGraph(detector.eval(), pixels, pixels), path)
        model = onnx.load(path)
    found = {"model.onnx": model.SerializeToString()}
    graph = GraphIndex(split_concats(model))
    plan = make_plan(graph, load_policy("default"))
    amax = dict.fromkeys(tensors_to_observe(graph, plan), MADE_UP_RANGE)
    for target in (CPU, TENSORRT):
        found[target.artifact.file] = runnable(insert_qdq(graph, plan, amax, target), target).SerializeToString()
    return found


# -------------------------------------------------------------------------------------------------------- ONNX Runtime


def session(model: bytes, *, optimize: bool, save: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def optimized(model: bytes) -> ModelProto:
    """The graph that ONNX Runtime runs."""
    with tempfile.TemporaryDirectory() as folder:
        session(model, optimize=True, save=Path(folder) / "optimized.onnx")
        return onnx.load(Path(folder) / "optimized.onnx")


def values_of(model: ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor that a node of an optimized graph makes, on these images."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    present = {item.name for item in exposed.graph.output}
    names = [name for node in exposed.graph.node for name in node.output if name]
    exposed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in present)
    found = session(exposed.SerializeToString(), optimize=False).run(names, {"images": images})
    return {"images": images, **dict(zip(names, found))}


def node_times(model: ModelProto, images: np.ndarray) -> tuple[Time, ...]:
    """The CPU time of every node of an optimized graph, alone."""
    values = values_of(model, images)
    constants = {item.name: item for item in model.graph.initializer}
    empty = _alone(helper.make_node("Identity", ["x"], ["y"], "empty"), {"x": np.zeros(1, np.float32)}, {}, model)
    found = []
    for node in model.graph.node:
        ms = max(_alone(node, values, constants, model) - empty, 0.0)
        found.append(Time(node.name or node.output[0], node.op_type, ms))
    return tuple(found)


def _alone(
    node: NodeProto, values: dict[str, np.ndarray], constants: dict[str, onnx.TensorProto], model: ModelProto
) -> float:
    """Milliseconds of one node as a graph of its own."""
    feeds = {name: values[name] for name in node.input if name and name not in constants}
    outputs = [name for name in node.output if name]
    graph = helper.make_graph(
        [node],
        "alone",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [constants[name] for name in dict.fromkeys(node.input) if name in constants],
    )
    opsets = {item.domain: item for item in model.opset_import}
    part = helper.make_model(graph, opset_imports=list(opsets.values()), ir_version=model.ir_version)
    run = session(part.SerializeToString(), optimize=False)
    binding = run.io_binding()  # outputs are allocated once
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for name in outputs:
        if name in values:
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(values[name])))
        else:
            binding.bind_output(name)
    return _least(lambda: run.run_with_iobinding(binding))


def _least(run: Callable[[], object]) -> float:
    """The smallest CPU time of a few runs, in milliseconds."""
    run()
    times: list[float] = []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < ENOUGH):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times) * 1e3


def in_turns(models: dict[str, bytes], images: np.ndarray, rounds: int) -> dict[str, float]:
    """Median CPU time of the whole graphs in one thread, one after the other, in milliseconds."""
    sessions = {name: session(model, optimize=True) for name, model in models.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, one in sessions.items():
            start = time.process_time()
            one.run(None, {"images": images})
            if turn:  # the first run allocates
                times[name].append((time.process_time() - start) * 1e3)
    return {name: float(np.median(found)) for name, found in times.items()}


def profile_onnxruntime(graphs: dict[str, bytes], images: np.ndarray, rounds: int) -> list[Profile]:
    files = FILES["onnxruntime"]
    whole = in_turns({name: graphs[name] for name in files}, images, rounds)
    return [Profile(name, "onnxruntime", whole[name], node_times(optimized(graphs[name]), images)) for name in files]


# ------------------------------------------------------------------------------------------------------------ OpenVINO


def profile_openvino(graphs: dict[str, bytes], images: np.ndarray, rounds: int) -> list[Profile]:
    """Both graphs in turns; nodes by OpenVINO's counters, with the name of the kernel."""
    import openvino

    core = openvino.Core()
    settings = {
        "PERF_COUNT": "YES",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    files = FILES["openvino"]
    requests = {}
    for name in files:
        model = core.read_model(graphs[name])
        model.reshape({"images": images.shape})
        requests[name] = core.compile_model(model, "CPU", settings).create_infer_request()
    whole: dict[str, list[float]] = defaultdict(list)
    nodes: dict[str, dict[str, Time]] = {name: {} for name in files}
    for turn in range(rounds + 1):
        for name, request in requests.items():
            start = time.process_time()
            request.infer({"images": images})
            if turn:
                whole[name].append((time.process_time() - start) * 1e3)
            for info in request.get_profiling_info():
                ms = info.real_time.total_seconds() * 1e3
                known = nodes[name].get(info.node_name)
                kind = f"{info.node_type} {info.exec_type}"
                if ms and (known is None or ms < known.ms):
                    nodes[name][info.node_name] = Time(info.node_name, kind, ms)
    return [Profile(name, "openvino", float(np.median(whole[name])), tuple(nodes[name].values())) for name in files]


# -------------------------------------------------------------------------------------------------------------- tables


def by(key: Callable[[Time], str], nodes: Iterable[Time]) -> dict[str, tuple[int, float]]:
    """{key: (nodes, their milliseconds)}, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for node in nodes:
        count, ms = found.get(key(node), (0, 0.0))
        found[key(node)] = (count + 1, ms + node.ms)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(profiles: list[Profile], top: int) -> str:
    """The tables of one backend: float32 first, then INT8."""
    first, second = profiles
    backend = first.backend
    whole = [
        (one.file, f"{one.whole:.1f}", f"{one.alone:.1f}", f"{one.products:.1f}", f"{one.whole / first.whole:.2f}")
        for one in profiles
    ]
    blocks = [f"## {backend}", table(("graph", "whole ms", "alone ms", "products ms", "of float32"), whole)]
    for title, key in (("part", lambda node: node.part), ("operator", lambda node: node.operator)):
        groups = [by(key, one.nodes) for one in profiles]
        names = sorted({*groups[0], *groups[1]}, key=lambda name: -groups[1].get(name, (0, 0.0))[1])
        rows = []
        for name in names:
            cells = [group.get(name, (0, 0.0)) for group in groups]
            if max(ms for _, ms in cells) >= 0.005 * second.alone:
                rows.append((name, *(text for count, ms in cells for text in (str(count), f"{ms:.1f}"))))
        blocks.append(table((title, "float32 nodes", "ms", "INT8 nodes", "ms"), rows))
    longest = sorted(second.nodes, key=lambda node: -node.ms)[:top]
    blocks.append(table(("INT8 node", "operator", "ms"), [(n.node, n.operator, f"{n.ms:.2f}") for n in longest]))
    return "\n\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--member", choices=sorted(FAMILY), help="instead of a bundle: random weights")
    parser.add_argument("--pixels", type=int, default=640, help="with --member: the size of the input")
    parser.add_argument("--backend", nargs="+", default=list(FILES), choices=list(FILES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--top", type=int, default=15, help="nodes in the last table")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.bundle is None) == (options.member is None):
        parser.error("expected a bundle, or --member NAME")
    graphs = graphs_of_bundle(options.bundle) if options.bundle else graphs_of_member(options.member, options.pixels)
    shape = next(iter(onnx.load_from_string(graphs["model.onnx"]).graph.input)).type.tensor_type.shape.dim
    images = (
        np.random.default_rng(0).integers(0, 256, (1, 3, shape[2].dim_value, shape[3].dim_value)).astype(np.float32)
    )
    kinds = {"onnxruntime": profile_onnxruntime, "openvino": profile_openvino}
    found = {backend: kinds[backend](graphs, images, options.rounds) for backend in options.backend}
    if options.json:
        print(json.dumps({backend: [asdict(one) for one in profiles] for backend, profiles in found.items()}, indent=1))
    else:
        print("\n\n".join(report(profiles, options.top) for profiles in found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
