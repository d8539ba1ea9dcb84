"""Other quantizers write their graph from our float graph and our images, or nothing at all."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgedetr import cli
from edgedetr.artifacts import QUANTIZERS
from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.errors import ExportError, MissingDependency, UsageError
from edgedetr.exporting.export import export
from edgedetr.onnx_graph.session import GraphSession
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.peers import quantize_with
from edgedetr.quantization.peers.registry import PEERS
from edgedetr.quantization.ranges import Ranges
from edgedetr.runtime.backends.base import MADE_BY, PEER_NOTE
from edgedetr.runtime.onnx_bytes import metadata

HEIGHT, WIDTH = 50, 80  # of the images of the fixture `dataset`, so that none is resized
IMAGES, QUERIES = 8, 25 * 40


def detector(first: str = "Conv") -> onnx.ModelProto:
    """images [1, 3, 50, 80] -> Conv, Relu, Conv -> logits [1, 1000, 2], boxes [1, 1000, 4]: quick to quantize."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.02, (8, 3, 3, 3)),
        "w2": rng.normal(0, 0.3, (6, 8, 1, 1)),
        "b2": rng.normal(0, 0.1, 6),
    }
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    constants += [
        numpy_helper.from_array(np.array([1, 6, QUERIES]), "shape"),
        numpy_helper.from_array(np.array([2, 4]), "parts"),
    ]
    make = helper.make_node
    nodes = [
        make(first, ["images", "w1"], ["c1"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Relu", ["c1"], ["r1"], "relu1"),
        make("Conv", ["r1", "w2", "b2"], ["c2"], "conv2"),
        make("Reshape", ["c2", "shape"], ["flat"], "reshape"),
        make("Transpose", ["flat"], ["rows"], "transpose", perm=[0, 2, 1]),
        make("Split", ["rows", "parts"], ["logits", "boxes"], "split", axis=2),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, [1, 3, HEIGHT, WIDTH])],
        [value(name, TensorProto.FLOAT, [1, QUERIES, size]) for name, size in (("logits", 2), ("boxes", 4))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def make_bundle(folder: Path, model: onnx.ModelProto, data: Path) -> Bundle:
    """A bundle with model.onnx, and ranges.json over eight of the ten training images."""
    bundle = Bundle.create(
        folder / "b.bundle",
        Manifest(
            "tiny",
            (ClassInfo(0, 1, "cat"),),
            InputContract(HEIGHT, WIDTH),
            OutputContract(),
            data=DataRecord(str(data), "val", "train"),
        ),
    )
    with bundle.add("model.onnx", stage="export") as path:
        path.write_bytes(model.SerializeToString())
    chosen = choose_images(bundle, None, IMAGES)
    with bundle.add("ranges.json", stage="calibrate", made_from=("model.onnx",)) as path:
        Ranges({"images": 255.0}, "mse", "default", IMAGES, "", chosen.images).save(path)
    return bundle


@pytest.fixture(scope="module")
def with_ort(tmp_path_factory, dataset) -> Bundle:
    """A bundle that ONNX Runtime has quantized; read only."""
    bundle = make_bundle(tmp_path_factory.mktemp("peers"), detector(), dataset)
    quantize_with.quantize_with(bundle, "onnxruntime")
    return bundle


def quantized_file(bundle: Bundle, name: str) -> Path:
    return bundle.require(QUANTIZERS[name].file)


def test_the_graph_is_the_one_that_onnx_runtime_makes_of_the_same_pixels(with_ort, dataset, tmp_path):
    """quantize_static called here, on pixels read by Pillow alone, gives the same scales, zero points and weights."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    # eight of ten, evenly: 9 / 7 apart
    files = [dataset / "images" / "train" / f"train{round(n * 9 / 7)}.png" for n in range(IMAGES)]
    pixels = [np.asarray(Image.open(file), np.float32).transpose(2, 0, 1)[None] for file in files]

    class Reader(CalibrationDataReader):
        left = iter(pixels)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    quantize_static(str(with_ort.path / "model.onnx"), str(tmp_path / "own.onnx"), Reader())
    expected, found = onnx.load(tmp_path / "own.onnx"), onnx.load(quantized_file(with_ort, "onnxruntime"))
    assert found.graph == expected.graph
    assert sum(node.op_type == "QuantizeLinear" for node in found.graph.node) >= 3


def test_the_graph_records_who_made_it_of_which_images_and_whether_tensorrt_takes_it(with_ort):
    import onnxruntime

    properties = metadata(quantized_file(with_ort, "onnxruntime").read_bytes())
    about = json.loads(properties[MADE_BY])
    assert (about["quantizer"], about["version"], about["images"]) == ("onnxruntime", onnxruntime.__version__, IMAGES)
    assert about["image_list"] == Ranges.load(with_ort.path / "ranges.json").image_list
    assert properties[PEER_NOTE].startswith(f"onnxruntime {onnxruntime.__version__}; TensorRT refuses it: ")


def test_a_graph_that_is_up_to_date_is_kept(with_ort, monkeypatch):
    monkeypatch.setattr(quantize_with, "run_peer", None)
    before = quantized_file(with_ort, "onnxruntime").stat()
    quantize_with.quantize_with(Bundle.open(with_ort.path), "onnxruntime")
    assert quantized_file(with_ort, "onnxruntime").stat() == before


@pytest.mark.slow  # each imports for 5 to 15 s
@pytest.mark.parametrize("name", [name for name in PEERS if name != "onnxruntime"])
def test_every_peer_quantizes_the_graph_and_leaves_its_function(name, dataset, tmp_path):
    missing = [module for module in PEERS[name].needs if find_spec(module) is None]
    if missing:
        pytest.skip(f"the extra peers is not installed: {', '.join(missing)}")
    bundle = make_bundle(tmp_path, detector(), dataset)
    quantize_with.quantize_with(bundle, name)
    found = onnx.load(quantized_file(bundle, name))
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in found.graph.node}
    image = np.random.default_rng(2).integers(0, 256, (1, 3, HEIGHT, WIDTH)).astype(np.float32)
    before, after = (GraphSession(model).run({"images": image}) for model in (detector(), found))
    for output in ("logits", "boxes"):
        # Weights and two activations in 8 bits: a few per cent of the spread, where a broken range loses all of it.
        assert np.abs(before[output] - after[output]).mean() < 0.05 * before[output].std()


def test_a_quantizer_that_is_not_installed_is_named_with_all_that_it_needs(with_ort, monkeypatch):
    monkeypatch.setattr(quantize_with, "find_spec", lambda name: None if name in ("modelopt", "lief") else True)
    with pytest.raises(MissingDependency, match=r"modelopt, lief .*\"peers\".*pip install nvidia-modelopt lief"):
        export(with_ort, int8=True, quantizers=["modelopt"])
    assert "model.int8-modelopt.onnx" not in Bundle.open(with_ort.path).manifest.files


def test_a_quantizer_that_fails_gives_its_message_and_leaves_nothing(dataset, tmp_path):
    bundle = make_bundle(tmp_path, detector(first="NoSuchOperator"), dataset)
    before = sorted(path.name for path in bundle.path.iterdir())
    with pytest.raises(ExportError, match="quantizer onnxruntime .* failed: .*NoSuchOperator.*was not written"):
        quantize_with.quantize_with(bundle, "onnxruntime")
    assert sorted(path.name for path in bundle.path.iterdir()) == before


def test_images_that_have_changed_are_not_replaced_by_others_in_silence(dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    bundle = make_bundle(tmp_path, detector(), data)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(data / "images" / "train" / "train0.png")
    with pytest.raises(ExportError, match="calibration images have changed.*--quantizer onnxruntime"):
        quantize_with.quantize_with(bundle, "onnxruntime")


def test_a_quantizer_without_int8_and_an_unknown_one_are_refused_before_anything_is_made(with_ort):
    with pytest.raises(UsageError, match="add --int8"):
        export(with_ort, quantizers=["nncf"])
    with pytest.raises(UsageError, match="did you mean 'nncf'"):
        export(with_ort, int8=True, quantizers=["nnfc"])
    assert cli.app.run(["export", str(with_ort.path), "--quantizer", "nncf"]) == 2
