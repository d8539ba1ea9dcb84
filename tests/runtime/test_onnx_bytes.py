"""Nothing that a graph names is opened: one reader, before any library sees the graph, wherever the name hides."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import edgedetr
from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError, ExportError
from edgedetr.onnx_graph.io import open_onnx, read_bundle_graph
from edgedetr.onnx_graph.summary import inspect_onnx
from edgedetr.runtime import load, onnx_bytes
from edgedetr.runtime.backends.onnxruntime import OrtFrameRunner, OrtRunner, plain_session
from edgedetr.runtime.backends.onnxruntime import tensors as ort_tensors
from edgedetr.runtime.backends.openvino import OpenVinoRunner
from edgedetr.runtime.backends.openvino import tensors as openvino_tensors
from edgedetr.runtime.frame_detector import load_frames
from edgedetr.serving.frame_graph import write_frames

PACKAGE = Path(edgedetr.__file__).parent
SECRET = np.arange(18, dtype=np.float32)


# --- where a name can hide -------------------------------------------------------------------------------------------
def in_an_initializer(model: ModelProto) -> TensorProto:
    return next(item for item in model.graph.initializer if item.name == "weight")


def in_a_constant(model: ModelProto) -> TensorProto:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(SECRET, "k")))
    return model.graph.node[0].attribute[0].t


def in_a_list_of_tensors(model: ModelProto) -> TensorProto:
    attribute = model.graph.node[0].attribute.add(name="all", type=onnx.AttributeProto.TENSORS)
    return attribute.tensors.add(name="k", data_type=TensorProto.FLOAT, dims=[18])


def in_a_sparse_initializer(model: ModelProto) -> TensorProto:
    sparse = model.graph.sparse_initializer.add(dims=[18])
    sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(18), ""))
    sparse.values.CopyFrom(numpy_helper.from_array(SECRET, "s"))
    return sparse.values


def in_the_indices_of_a_sparse_attribute(model: ModelProto) -> TensorProto:
    attribute = model.graph.node[0].attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(numpy_helper.from_array(SECRET, "s"))
    return attribute.sparse_tensor.indices


def in_a_subgraph_of_a_subgraph(model: ModelProto) -> TensorProto:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["k"], ["o"])], "inner", [], [], [numpy_helper.from_array(SECRET, "k")]
    )
    inside = helper.make_node("If", ["c"], ["o2"], then_branch=inner, else_branch=inner)
    outer = helper.make_graph([inside], "outer", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["o3"], then_branch=outer, else_branch=outer))
    return model.graph.node[-1].attribute[1].g.node[0].attribute[0].g.initializer[0]


def in_a_function(model: ModelProto) -> TensorProto:
    node = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(SECRET, "k"))
    model.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 19)]))
    return model.functions[0].node[0].attribute[0].t


def in_a_default_of_a_function(model: ModelProto) -> TensorProto:
    function = model.functions.add(name="F", domain="own")
    function.attribute_proto.add(name="d", type=onnx.AttributeProto.TENSOR).t.CopyFrom(numpy_helper.from_array(SECRET))
    return function.attribute_proto[0].t


def in_a_training_graph(model: ModelProto) -> TensorProto:
    graph = model.training_info.add().algorithm
    graph.initializer.append(numpy_helper.from_array(SECRET, "k"))
    return graph.initializer[0]


HIDDEN = [
    in_an_initializer,
    in_a_constant,
    in_a_list_of_tensors,
    in_a_sparse_initializer,
    in_the_indices_of_a_sparse_attribute,
    in_a_subgraph_of_a_subgraph,
    in_a_function,
    in_a_default_of_a_function,
    in_a_training_graph,
]


# --- what the name leads to ------------------------------------------------------------------------------------------
def locations(folder: Path) -> dict[str, str]:
    """Location -> what is there, all of it readable and long enough."""
    outside = folder.parent / "secret.bin"
    outside.write_bytes(SECRET.tobytes() * 4)
    (folder / "plain.bin").write_bytes(SECRET.tobytes() * 4)
    for name in ("link.bin", "hard.bin", "sub"):
        (folder / name).unlink(missing_ok=True)
    (folder / "link.bin").symlink_to(outside)
    os.link(outside, folder / "hard.bin")
    (folder / "sub").symlink_to(folder.parent)
    with open(folder / "sparse.bin", "wb") as stream:
        stream.truncate(1 << 31)
    return {
        "above": "../secret.bin",
        "absolute": str(outside),
        "link": "link.bin",
        "hard link": "hard.bin",
        "linked folder": "sub/secret.bin",
        "over 2 GB": "sparse.bin",
        "beside": "plain.bin",
        "nowhere": "",
    }


WHERE = ["above", "absolute", "link", "hard link", "linked folder", "over 2 GB", "beside", "nowhere"]


def planted(bundle: Bundle, find: Callable[[ModelProto], TensorProto], where: str, name: str = "model.onnx") -> Path:
    """The bundle's graph with a tensor in another file, listed with its digest as an attacker would."""
    path = bundle.path / name
    model = onnx.load(str(path))
    tensor = find(model)
    for field in ("raw_data", "float_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    location = locations(bundle.path)[where]
    if location:
        tensor.external_data.add(key="location", value=location)
    with bundle.add(name, stage="export") as temporary:
        temporary.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("find", HIDDEN, ids=lambda find: find.__name__)
def test_weights_elsewhere_are_refused_wherever_the_name_hides(make_bundle, find):
    path = planted(make_bundle("model.onnx"), find, "above")
    with pytest.raises(EdgedetrError, match=r"keeps weights in another file \('../secret.bin'\)"):
        onnx_bytes.read(path)
    assert open_onnx(path).faults == ("weights in '../secret.bin', outside the folder of the model",)


@pytest.mark.parametrize("where", WHERE)
def test_a_bundle_with_weights_elsewhere_is_refused_by_every_path_that_opens_it(make_bundle, where, tmp_path):
    bundle = make_bundle("model.onnx", "model.int8-cpu.onnx", "model.frame-32x48.onnx")
    path = planted(bundle, in_an_initializer, where)
    planted(bundle, in_an_initializer, where, "model.frame-32x48.onnx")
    data, images = path.read_bytes(), np.zeros((1, 3, 32, 48), np.float32)
    from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
    from edgedetr.quantization.quantize import read_onnx
    from edgedetr.serving.deepstream import write_deepstream
    from edgedetr.serving.triton import write_repository

    openers: dict[str, Callable[[], object]] = {
        "load": lambda: load(bundle, backend="onnxruntime", stage="onnx"),
        "load openvino": lambda: load(bundle, backend="openvino", stage="onnx"),
        "onnxruntime": lambda: OrtRunner(path),
        "onnxruntime bytes": lambda: OrtRunner(data),
        "openvino": lambda: OpenVinoRunner(path),
        "plain": lambda: plain_session(data),
        "tensors": lambda: ort_tensors(data, images, ["logits"], optimize=True),
        "openvino tensors": lambda: openvino_tensors(data, images, ["logits"]),
        "frames": lambda: write_frames(bundle, 64, 96),
        "triton": lambda: write_repository(bundle, tmp_path, "model.onnx"),
        "deepstream": lambda: write_deepstream(bundle, tmp_path),
        "simulated FP16": lambda: simulate_fp16(path),
        "quantize": lambda: read_onnx(path),
        "load_frames": lambda: load_frames(bundle, make=OrtFrameRunner),
    }
    for name, opens in openers.items():
        with pytest.raises(EdgedetrError, match="keeps weights in another file"):
            opens()
            pytest.fail(f"{name} opened it")


@pytest.mark.parametrize("where", [where for where in WHERE if where != "beside"])
def test_looking_into_such_a_file_says_so_and_opens_nothing(make_bundle, where):
    path = planted(make_bundle("model.onnx"), in_an_initializer, where)
    found = inspect_onnx(path)
    assert len(found.faults) == 1 and ["refused", found.faults[0]] in found.rows()


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path, other: path.symlink_to(other), "symbolic link"),
        (lambda path, other: os.link(other, path), "2 names"),
        (lambda path, other: os.mkfifo(path), "not a plain file"),
        (lambda path, other: path.mkdir(), "not a plain file"),
        (lambda path, other: os.truncate(path.write_bytes(b"") or path, 3 << 30), "more than the 2147483647"),
        (lambda path, other: os.truncate(path.write_bytes(b"") or path, 2**31 - 1), "begins with 0x00"),
        (lambda path, other: path.write_bytes(b"\x89PNG\r\n"), "not an ONNX file"),
    ],
)
@pytest.mark.parametrize("opens", [OrtRunner, OpenVinoRunner, read_bundle_graph])
def test_a_graph_that_is_no_plain_file_is_refused(make_bundle, tmp_path, harm, words, opens):
    other, path = make_bundle("model.onnx").path / "model.onnx", tmp_path / "m.onnx"
    harm(path, other)
    with pytest.raises(EdgedetrError, match=words):
        opens(path)


def test_a_location_without_the_flag_does_not_reach_a_library_through_an_import(make_bundle):
    path = make_bundle("model.onnx").path / "model.onnx"
    model = onnx.load(str(path))
    in_an_initializer(model).external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())
    opened = open_onnx(path)
    assert not opened.faults and plain_session(opened.model.SerializeToString(), error=ExportError)


# The only functions that hand a graph to a library, each behind the reader: (file, call).
ALLOWED = {
    ("runtime/backends/onnxruntime.py", "InferenceSession"),
    ("runtime/backends/openvino.py", "read_model"),
    ("runtime/backends/openvino.py", "compile_model"),
    ("lint/rtx_worker.py", "parse_from_file"),
    ("onnx_graph/io.py", "load"),
    ("onnx_graph/io.py", "load_model_from_string"),
}
OPENS = {
    "InferenceSession",
    "read_model",
    "compile_model",
    "parse_from_file",
    "load_model",
    "load_model_from_string",
    "load_external_data_for_model",
    "convert_model",
    "import_model",
    "add_extension",
}


def test_nothing_else_in_the_package_opens_a_graph():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("onnx", "onnxruntime", "openvino"):
                assert not {name.name for name in node.names} & (OPENS | {"load"}), path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, of = node.func.attr, ast.unparse(node.func.value)
            if of in ("io_contract", "edgedetr"):  # functions of this package with the same names
                continue
            if called in OPENS or (called == "load" and of.split(".")[-1] == "onnx"):
                found.add((path.relative_to(PACKAGE).as_posix(), called))
            if called.startswith(("check_model", "infer_shapes")):
                assert not called.endswith("_path"), path
    assert found == ALLOWED


def test_the_real_parser_never_sees_a_file_that_names_others(make_bundle, monkeypatch):
    from edgedetr.lint import rtx

    path = planted(make_bundle("model.onnx"), in_an_initializer, "above")
    monkeypatch.setattr(rtx, "_run", lambda *_: pytest.fail("the library was started"))
    found = rtx.check(path)
    assert not found.ok and found.errors == ("weights in '../secret.bin', outside the folder of the model",)
