"""Every member of the family as we write it: lint is silent on it, and NVIDIA's own parser and builder take it.

In float32, FP16, and INT8 with FP16; one batch size; samples gathered, and RT-DETR's with GridSample too. Of float32,
which differs from FP16 by its types alone, RT-DETR's is built, and the others in a slow test.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, helper

from edgedetr.lint.lint import lint
from edgedetr.lint.rtx import RtxResult, check_all
from edgedetr.models import FAMILY
from edgedetr.onnx_graph.fp16 import convert_to_fp16, float_tensors
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import TENSORRT

pytest.importorskip("torch")
members = pytest.importorskip("members")

RTX = any(map(find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings")))
CASES = [*((name, "gather") for name in FAMILY), ("rt_detr", "grid_sample")]
PRECISIONS = ("fp32", "fp16", "int8")
# An INT8 file is FP16 where it is not INT8, so it has every operator of the FP16 file. One of each kind of encoder is
# built in FP16 as well; the other files are slow tests.
BUILT = {
    ("detr", "gather"): ("fp16", "int8"),
    ("rf_detr", "gather"): ("fp16", "int8"),
    ("rt_detr", "gather"): PRECISIONS,
}
OLD = ("tensorrt-rtx-cu13-bindings==1.4.0.76", "tensorrt-rtx-cu13-libs==1.4.0.76")  # of the age of TensorRT 10.16


class Written(NamedTuple):
    """A member's file in each precision, and RTX's answer once it has read those of BUILT (None: not installed)."""

    paths: dict[str, Path]
    results: Future[list[RtxResult]] | None


def magnitudes(model: ModelProto) -> dict[str, float]:
    """The largest magnitude of every float tensor on one noise image, node by node: optimizing takes seconds.

    At most 1000, because these weights are noise: what does not fit into FP16 is tested in test_half.py.
    """
    probe, names = ModelProto(), sorted(float_tensors(GraphIndex(model)) - {"images"})
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, members.HEIGHT, members.WIDTH)).astype(np.float32)
    found = zip(names, session.run(names, {"images": noise}))
    return {"images": 255.0, **{name: min(float(np.abs(value).max(initial=0)), 1000.0) for name, value in found}}


def write(name: str, sampling: str, folder: Path) -> dict[str, Path]:
    """A member at micro size as the three files that engines are built from."""
    paths = {precision: folder / f"{name}-{sampling}-{precision}.onnx" for precision in PRECISIONS}
    shutil.copy(members.exported(name, sampling=sampling), paths["fp32"])
    model = onnx.load(str(paths["fp32"]))
    paths["fp16"].write_bytes(convert_to_fp16(model, magnitudes(model)).model.SerializeToString())
    model = split_concats(model)
    graph, seen = GraphIndex(model), magnitudes(model)
    plan = make_plan(graph, load_policy("default"))
    amax = share_pool_ranges(model, {name: seen[name] for name in tensors_to_observe(graph, plan)})
    quantized = insert_qdq(graph, plan, amax, TENSORRT)
    paths["int8"].write_bytes(convert_to_fp16(quantized, seen).model.SerializeToString())
    return paths


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Written]]:
    """(member, sampling) -> its files, made once; RTX begins with them at once, at the same time as the tests of lint.

    One process per member, so that the library starts ten times and not thirty.
    """
    folder = tmp_path_factory.mktemp("graphs")
    pool = ThreadPoolExecutor(1)

    @cache
    def once(name: str, sampling: str) -> Written:
        paths = write(name, sampling, folder)
        built = [paths[precision] for precision in BUILT.get((name, sampling), ("int8",))]
        return Written(paths, pool.submit(check_all, built) if RTX else None)

    yield once
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name, sampling", CASES, ids=map("-".join, CASES))
def test_lint_is_silent_on_what_we_write(name, sampling, written):
    """But for GridSample, where somebody has asked for it."""
    operators = {}
    for precision, path in written(name, sampling).paths.items():
        model = onnx.load(path)
        said = [
            str(finding) for finding in lint(model) if (sampling, finding.rule) != ("grid_sample", "grid-sample-wrong")
        ]
        assert said == [], precision
        operators[precision] = {node.op_type for node in model.graph.node}
        half = any(item.data_type == onnx.TensorProto.FLOAT16 for item in model.graph.initializer)
        pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
        least = 10 if name in members.GROUPED else 20  # a transformer of two blocks has few layers
        assert (half, pairs >= least) == (precision != "fp32", precision == "int8")
    assert operators["fp16"] <= operators["int8"], "BUILT relies on it"


@pytest.mark.skipif(not RTX, reason="needs NVIDIA's parser on a CPU: make test installs it on x86-64")
@pytest.mark.parametrize("name, sampling", CASES, ids=map("-".join, CASES))
def test_every_member_parses_and_builds_without_a_gpu(name, sampling, written):
    for result in written(name, sampling).results.result():
        require_built(result)


@pytest.mark.slow
@pytest.mark.skipif(not RTX, reason="needs NVIDIA's parser on a CPU: make test installs it on x86-64")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_member_builds_in_every_precision(precision, written):
    for result in check_all([written(*case).paths[precision] for case in CASES]):
        require_built(result)


def require_built(result: RtxResult) -> None:
    assert result.version.startswith("1.7."), result.version
    assert result.ok and result.built, str(result)
    assert result.errors == ()
    assert result.layers > 100 and result.plan_bytes > 100_000


@pytest.fixture(scope="module")
def old_parser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtx-1.4.0")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*install, *OLD], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"TensorRT-RTX 1.4.0 cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_every_member_parses_in_the_parser_of_the_10x_age(written, old_parser):
    paths = [path for case in CASES for path in written(*case).paths.values()]
    found = check_all(paths, build=False, packages=old_parser)
    assert {result.version for result in found} == {"1.4.0.76"}
    assert [str(result) for result in found if not result.parsed or result.errors] == []
