"""The table of artifacts: complete, free of contradictions, and the only module that names the files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgedetr
from edgedetr import artifacts
from edgedetr.artifacts import ARTIFACTS, BACKENDS, GRAPHS
from edgedetr.runtime import bundle_detector

PACKAGE = Path(edgedetr.__file__).parent


def test_ids_and_files_are_unique():
    assert len({item.id for item in ARTIFACTS}) == len({item.file for item in ARTIFACTS}) == len(ARTIFACTS)


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda item: item.id)
def test_an_entry_is_complete_and_names_known_things(artifact):
    assert artifact.about
    assert artifact.command.startswith("edgedetr ")
    made_before = [item.file for item in ARTIFACTS[: ARTIFACTS.index(artifact)]]
    assert set(artifact.made_from) <= set(made_before)
    assert set(artifact.verified) | set(artifact.benched) <= set(artifact.backends) <= set(BACKENDS)
    assert bool(artifact.target) == (artifact.precision == "int8")


def test_the_backends_of_the_table_are_those_that_exist():
    assert tuple(bundle_detector.BACKENDS) == BACKENDS


def test_every_graph_is_verified_somewhere_and_float_before_what_is_compared_with_it():
    pairs = artifacts.verified_pairs()
    assert {artifact for artifact, _ in pairs} == set(GRAPHS)
    assert pairs[0] == ("onnx", "onnxruntime")
    for artifact, backend in artifacts.benched_pairs():
        assert ("onnx", backend) in artifacts.benched_pairs(), f"{artifact} on {backend} has no float32 pair"


def test_one_graph_of_each_precision_becomes_engines():
    assert {precision: graph.file for precision, graph in artifacts.ENGINE_GRAPHS.items()} == {
        "int8": "model.int8.onnx",
        "fp16": "model.fp16.onnx",
        "fp32": "model.onnx",
    }


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=lambda item: item.id)
def test_the_name_of_a_frame_graph_is_read_back(graph):
    frame = artifacts.FrameGraph(graph, 1080, 1920)
    assert frame.file.endswith(".frame-1080x1920.onnx")
    assert artifacts.frame_graph(frame.file) == frame
    assert artifacts.making_command(frame.file) == f"{graph.command} --frame 1080x1920"


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.int4.frame-2x3.onnx", "ranges.frame-2x3.onnx", "model.frame.onnx"]
)
def test_other_names_are_no_frame_graphs(name):
    assert artifacts.frame_graph(name) is None


@pytest.mark.parametrize(
    "name, command",
    [
        ("model.int8-cpu.onnx", "edgedetr export {path} --int8"),
        ("weights.safetensors", "edgedetr train --data DIR"),
        ("results/detections-int8-openvino.npz", "edgedetr verify {path}"),
        ("results/verify-orin-trt10.3.0.json", "edgedetr verify {path}"),
        ("something-else", "edgedetr export {path}"),
    ],
)
def test_each_file_of_a_bundle_has_a_command_that_makes_it(name, command):
    assert artifacts.making_command(name) == command


def test_no_other_module_names_a_file_of_a_bundle():
    """Another tool's own file names are excepted: Triton's, and the copy that DeepStream's configuration names."""
    files = {item.file for item in ARTIFACTS}
    excepted = {PACKAGE / "serving" / "triton.py", PACKAGE / "serving" / "deepstream.py", PACKAGE / "artifacts.py"}
    for path in sorted(set(PACKAGE.rglob("*.py")) - excepted):
        constants = [
            node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)
        ]
        assert not files & {value for value in constants if isinstance(value, str)}, path
