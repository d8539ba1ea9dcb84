"""Triton's repository: config.pbtxt read with Triton's own schema, and its ONNX file loaded with it."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import patch_detector
import pytest
from onnx import helper, numpy_helper

from edgedetr.bundle import Bundle, InputContract
from edgedetr.errors import BundleError, ExportError, UsageError
from edgedetr.serving.frame_graph import write_frames
from edgedetr.serving.triton import model_name, write_repository

NUMPY = {
    "TYPE_FP32": ("tensor(float)", np.float32),
    "TYPE_UINT8": ("tensor(uint8)", np.uint8),
    "TYPE_INT32": ("tensor(int32)", np.int32),
}


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """model_config_pb2 of NVIDIA's client, without the client (which would import grpc)."""
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("needs the schema of Triton's model configuration: pip install tritonclient")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(schema: ModuleType, folder: Path):
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def dims(config, tensor) -> list[int]:
    """The whole shape of a tensor: where the server batches, the batch comes before the configured dimensions."""
    return [-1, *tensor.dims] if config.max_batch_size else list(tensor.dims)


def shape(value) -> list[int]:
    return [dim if isinstance(dim, int) else -1 for dim in value.shape]


def require_fits(schema: ModuleType, config, path: Path) -> None:
    """Names, types and shapes of the configuration are those of the file, and it runs with the configuration."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name_of = schema.DataType.Name
    for stated, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [item.name for item in stated] == [item.name for item in real]
        assert [NUMPY[name_of(item.data_type)][0] for item in stated] == [item.type for item in real]
        assert [dims(config, item) for item in stated] == [shape(item) for item in real]
    batch = config.max_batch_size or 1
    feed = {
        item.name: np.full([batch if d == -1 else d for d in dims(config, item)], 90, NUMPY[name_of(item.data_type)][1])
        for item in config.input
    }
    for item, value in zip(config.output, session.run(None, feed)):
        assert list(value.shape) == [batch if d == -1 else d for d in dims(config, item)]


@pytest.mark.parametrize("source, kind", [("model.onnx", "KIND_AUTO"), ("model.int8-cpu.onnx", "KIND_CPU")])
def test_a_fixed_batch_is_served_one_by_one(tmp_path, schema, source, kind):
    made = patch_detector.bundle(tmp_path / "red cells.bundle", files=("model.onnx", "model.int8-cpu.onnx"))
    found = write_repository(made, tmp_path / "models", source, instances=2)
    config = parse(schema, found.folder)
    assert (config.name, config.platform, config.max_batch_size) == (found.folder.name, "onnxruntime_onnx", 0)
    assert not config.HasField("dynamic_batching")
    assert found.folder.name == ("red-cells" if source == "model.onnx" else "red-cells-int8-cpu")
    groups = [(group.count, schema.ModelInstanceGroup.Kind.Name(group.kind)) for group in config.instance_group]
    assert groups == [(2, kind)]
    assert sorted(str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
        "labels.txt",
    ]
    require_fits(schema, config, found.folder / "1" / "model.onnx")


def test_classes_and_contracts_are_parameters_of_the_model(tmp_path, schema):
    made = patch_detector.bundle(tmp_path / "b.bundle", contract=InputContract(96, 64, "letterbox"))
    found = write_repository(made, tmp_path / "models", "model.onnx")
    stated = {key: value.string_value for key, value in parse(schema, found.folder).parameters.items()}
    assert stated["labels"].split("\n") == (found.folder / "labels.txt").read_text().splitlines()
    assert json.loads(stated["input"]) == {
        "height": 96,
        "width": 64,
        "resize": "letterbox",
        "color": "RGB",
        "range": [0, 255],
    }
    assert json.loads(stated["output"]) == {"activation": "sigmoid", "top_k": 20}


def test_any_name_of_a_class_survives(tmp_path, schema):
    made = patch_detector.bundle(tmp_path / "b.bundle", classes=1)
    name = 'Zelle "rot" \\ ß;\n細胞'
    made.update(classes=(made.manifest.classes[0].__class__(0, 1, name),))
    found = write_repository(made, tmp_path / "models", "model.onnx")
    assert parse(schema, found.folder).parameters["labels"].string_value == 'Zelle "rot" \\ ß, 細胞'


def test_frames_are_served_as_bytes(tmp_path, schema):
    made = patch_detector.bundle(tmp_path / "b.bundle")
    name = write_frames(made, 70, 100)[0]
    found = write_repository(made, tmp_path / "models", name)
    config = parse(schema, found.folder)
    assert found.name == "b-frame-70x100"
    assert list(config.input[0].dims) == [1, 70, 100, 3]
    assert schema.DataType.Name(config.input[0].data_type) == "TYPE_UINT8"
    require_fits(schema, config, found.folder / "1" / "model.onnx")


def test_an_open_batch_whose_rows_are_equal_is_batched(tmp_path, schema):
    made = patch_detector.bundle(tmp_path / "b.bundle", batch="batch")
    found = write_repository(made, tmp_path / "models", "model.onnx")
    config = parse(schema, found.folder)
    assert config.max_batch_size == found.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    require_fits(schema, config, found.folder / "1" / "model.onnx")


def test_rows_that_differ_are_not_batched(tmp_path, schema, caplog):
    """A fault as in TensorRT issue 4813: the other rows of the batch get other results."""
    made = patch_detector.bundle(tmp_path / "b.bundle", batch="batch")
    with made.add("model.onnx", stage="export") as temporary:
        patch_detector.write(temporary, made.manifest.input, 3, batch="batch")
        model = onnx.load(str(temporary))
        nodes = [  # 0, 1, 2, ... for the rows, added to the logits
            helper.make_node("Shape", ["images"], ["size"], start=0, end=1),
            helper.make_node("Squeeze", ["size"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["number"]),
            helper.make_node("Cast", ["number"], ["real"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Reshape", ["real", "column"], ["by_row"]),
            helper.make_node("Add", ["logits_of_row", "by_row"], ["logits"]),
        ]
        split = next(node for node in model.graph.node if node.op_type == "Split")
        split.output[0] = "logits_of_row"
        for name, value in (("zero", np.int64(0)), ("one", np.int64(1)), ("column", np.array([-1, 1, 1]))):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        model.graph.node.extend(nodes)
        temporary.write_bytes(model.SerializeToString())
    with caplog.at_level(logging.WARNING):
        found = write_repository(made, tmp_path / "models", "model.onnx")
    assert "7 of 8 rows" in caplog.text
    config = parse(schema, found.folder)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    require_fits(schema, config, found.folder / "1" / "model.onnx")  # the shapes say the open batch


def engine(path: Path, batch: tuple[int, int, int], passed: bool | None) -> SimpleNamespace:
    """As runtime.engines.survey gives it: the plan, what it was built for, and what verify found of it."""
    path.write_bytes(b"a plan")
    return SimpleNamespace(
        path=path,
        metadata=SimpleNamespace(arguments=SimpleNamespace(batch=batch)),
        measured=None if passed is None else SimpleNamespace(passed=passed),
    )


@pytest.mark.parametrize(
    "batch, passed, largest, first",
    [
        ((1, 1, 1), True, 0, [1]),
        ((4, 4, 4), True, 0, [4]),
        ((1, 4, 8), True, 8, []),
        ((1, 4, 8), False, 0, [-1]),
        ((1, 4, 8), None, 0, [-1]),
        ((2, 4, 8), True, 0, [-1]),
    ],
)
def test_an_engine_is_batched_only_when_verify_passed_it(tmp_path, schema, batch, passed, largest, first):
    made = patch_detector.bundle(tmp_path / "b.bundle", files=("model.int8.onnx",))
    found = write_repository(
        made, tmp_path / "models", "model.int8.onnx", engine=engine(tmp_path / "e.plan", batch, passed)
    )
    config = parse(schema, found.folder)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", largest)
    assert config.HasField("dynamic_batching") == bool(largest)
    assert list(config.input[0].dims) == [*first, 3, 64, 96]
    assert [list(item.dims) for item in config.output] == [[*first, 16, 3], [*first, 16, 4]]
    assert schema.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert (found.folder / "1" / "model.plan").read_bytes() == b"a plan"
    assert not (found.folder / "1" / "model.onnx").exists()


def test_what_cannot_be_served_is_an_error(tmp_path):
    made = patch_detector.bundle(tmp_path / "b.bundle")
    with pytest.raises(UsageError, match="expected letters"):
        write_repository(made, tmp_path, "model.onnx", name="../up")
    with pytest.raises(UsageError, match="instances is 0"):
        write_repository(made, tmp_path, "model.onnx", instances=0)
    with pytest.raises(BundleError, match="model.fp16.onnx has not been made yet"):
        write_repository(made, tmp_path, "model.fp16.onnx")
    with made.add("model.onnx", stage="export") as temporary:
        model = onnx.load(str(made.path / "model.onnx"))
        model.graph.output.append(helper.make_tensor_value_info("text", onnx.TensorProto.STRING, [1]))
        temporary.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="text has type STRING"):
        write_repository(made, tmp_path, "model.onnx")
    assert not list(tmp_path.glob("*/config.pbtxt"))


@pytest.mark.parametrize(
    "folder, source, name",
    [
        ("cells.bundle", "model.onnx", "cells"),
        ("cells.bundle", "model.int8.onnx", "cells-int8"),
        ("my cells!", "model.fp16.frame-5x6.onnx", "my-cells-fp16-frame-5x6"),
        ("...", "model.onnx", "model"),
    ],
)
def test_the_name_is_that_of_the_bundle_and_the_graph(tmp_path, folder, source, name):
    assert model_name(Bundle(tmp_path / "x" / folder, None), source) == name
