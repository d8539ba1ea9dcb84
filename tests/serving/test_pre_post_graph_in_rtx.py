"""The pre/post graph in a real TensorRT parser and builder: TensorRT-RTX, on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import patch_detector
import pytest

from edgedetr.bundle import InputContract
from edgedetr.lint.rtx import check_all
from edgedetr.serving.deepstream import write_deepstream
from edgedetr.serving.frame_graph import write_frames

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None and importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT-RTX: make test installs it on x86-64",
)


@needs_rtx
def test_every_form_of_the_pre_post_graph_parses_and_builds(tmp_path):
    """Bytes in, pooled, interpolated, padded or as they are; both activations; DeepStream's outputs."""
    made = patch_detector.bundle(tmp_path / "stretch")
    paths = [made.path / write_frames(made, *size)[0] for size in ((300, 500), (64, 96))]
    paths.append(write_deepstream(made, tmp_path / "ds1").model)
    padded = patch_detector.bundle(
        tmp_path / "letterbox", contract=InputContract(96, 64, "letterbox"), activation="softmax"
    )
    paths.append(padded.path / write_frames(padded, 130, 191)[0])
    paths.append(write_deepstream(padded, tmp_path / "ds2", frame=(300, 210)).model)
    for result in check_all(paths):
        assert result.ok, str(result)


READ = """
import importlib.util, json, sys
name = next(n for n in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(n))
trt = importlib.import_module(name)
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
found = {}
for layer in (network.get_layer(i) for i in range(network.num_layers)):
    if layer.type == trt.LayerType.RESIZE:
        layer.__class__ = trt.IResizeLayer
        found["resize"] = [layer.resize_mode.name, layer.coordinate_transformation.name]
    if layer.type == trt.LayerType.POOLING:
        layer.__class__ = trt.IPoolingLayer
        found["pool"] = [layer.type.name, layer.padding_mode.name]
print(json.dumps(found))
"""


@needs_rtx
def test_the_parser_reads_the_resize_as_it_is_meant(tmp_path):
    """A parser may silently take one mode of GridSample for another; so its results are compared here."""
    made = patch_detector.bundle(tmp_path / "b", contract=InputContract(96, 64, "letterbox"))
    path = made.path / write_frames(made, 130, 191)[0]
    out = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    assert found == {"resize": ["LINEAR", "HALF_PIXEL"], "pool": ["AVERAGE", "EXPLICIT_ROUND_DOWN"]}
