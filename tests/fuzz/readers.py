"""Every reader of a file that a stranger may have written, with the files that it reads when nothing is wrong.

A reader is tried by its public door where that is cheap, and has to answer within SECONDS, by a result or by an
EdgedetrError. Anything else that it raises is a fault.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FIXTURES = Path(__file__).parents[1] / "fixtures"
BUNDLE, SCENES = FIXTURES / "bundle-0.1", FIXTURES / "scenes-0.1"


@dataclass(frozen=True)
class Reader:
    """`prepare(folder)` lays out what stands around the file; `read(folder)` reads the file that was put at `name`.

    weight   fraction of a long run; slow readers get less
    """

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    prepare: Callable[[Path], None] = lambda folder: None
    weight: int = 10


def _bytes(*paths: Path) -> Callable[[], list[bytes]]:
    return lambda: [path.read_bytes() for path in paths]


def _bundle_folder(folder: Path) -> None:
    for name in ("recipe.toml", "ranges.json", "reference.npz", "bundle.json"):
        shutil.copy(BUNDLE / name, folder / name)


def _open_bundle(folder: Path) -> None:
    from edgedetr.bundle import Bundle
    from edgedetr.reporting.contents import inspect_bundle

    inspect_bundle(Bundle.open(folder))


def _recipe(folder: Path) -> None:
    from edgedetr.recipe import Recipe

    Recipe.load(folder / "recipe.toml")


def _set(folder: Path) -> None:
    from edgedetr.recipe import Recipe

    Recipe.load(BUNDLE / "recipe.toml", [(folder / "word").read_bytes().decode("utf-8", "surrogateescape")])


def _ranges(folder: Path) -> None:
    from edgedetr.quantization.ranges import Ranges

    Ranges.load(folder / "ranges.json")


def _policy(folder: Path) -> None:
    from edgedetr.quantization.policy import load_policy

    load_policy(folder / "policy.toml")


def _reference(folder: Path) -> None:
    from edgedetr.evaluation.reference import Reference

    Reference.load(folder / "reference.npz")


def _detections(folder: Path) -> None:
    from edgedetr.bundle import Bundle
    from edgedetr.evaluation.reference import load_detections

    load_detections(folder / "found.npz", Bundle.open(BUNDLE).manifest.classes)


def _verdict(folder: Path) -> None:
    from edgedetr.evaluation.verdict import read_verdict
    from edgedetr.reporting.tables import artifact_rows, verdict_sentence

    found = read_verdict(folder / "verify.json", folder)
    artifact_rows(found)
    verdict_sentence(found)


def _engine(folder: Path) -> None:
    from edgedetr.runtime.tensorrt import engine_metadata

    (folder / "e.plan").touch()
    engine_metadata.read(folder / "e.plan")


def _engine_seeds() -> list[bytes]:
    from dataclasses import asdict

    from edgedetr.runtime.tensorrt.engine_layers import LayerSummary
    from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments, EngineMetadata

    made = EngineMetadata(
        "e.plan",
        "0" * 64,
        10,
        "model.onnx",
        "1" * 64,
        "10.3.0",
        "12.6",
        "12.6",
        "",
        "Orin",
        87,
        "host",
        BuildArguments("int8", (1, 1, 1), 1024, 3, "strong"),
        "strong",
        1.0,
        LayerSummary({"int8": 3}, {"int8": 1}, 0),
    )
    return [json.dumps({"schema": 1, **asdict(made)}).encode()]


def _layers(folder: Path) -> None:
    from edgedetr.runtime.tensorrt.engine_layers import summarize_layers

    summarize_layers((folder / "layers.json").read_bytes().decode("utf-8", "replace"))


def _layer_seeds() -> list[bytes]:
    layer = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
    }
    return [json.dumps({"Layers": [layer, layer], "Bindings": ["images"]}).encode(), b'{"Layers": ["conv", "add"]}']


def _split(folder: Path) -> None:
    from edgedetr.data import layouts

    for split in layouts.splits(folder):
        layouts.load(folder, split)


def _check(folder: Path) -> None:
    from edgedetr.data.check import check

    check(folder)


def _image(width: int = 40, height: int = 30) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _coco_folder(folder: Path) -> None:
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name in ("a.png", "b.png"):
        (folder / "images" / "val" / name).write_bytes(_image())


def _coco_seeds() -> list[bytes]:
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
    ]
    boxes = [
        {"id": i, "image_id": 1 + i % 2, "category_id": 1 + i % 2, "bbox": [1, 2, 10, 12], "area": 120, "iscrowd": 0}
        for i in range(4)
    ]
    polygon = {"id": 9, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0}
    coded = {
        "id": 10,
        "image_id": 2,
        "category_id": 2,
        "segmentation": {"size": [30, 40], "counts": [5, 10, 1185]},
        "iscrowd": 1,
    }
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    whole = {"images": images, "annotations": [*boxes, polygon, coded], "categories": categories}
    return [json.dumps(whole).encode(), json.dumps({**whole, "annotations": boxes}).encode()]


def _yolo_folder(folder: Path) -> None:
    for part in ("images", "labels"):
        (folder / part / "val").mkdir(parents=True)
    (folder / "images" / "val" / "a.png").write_bytes(_image())
    (folder / "labels" / "val" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.3 0.3 0.1 0.1\n")
    (folder / "data.yaml").write_text("path: .\nval: images/val\nnames:\n  0: cat\n  1: dog\n")


def _voc_folder(folder: Path) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "JPEGImages" / "a.png").write_bytes(_image())
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a\n")


VOC = (
    b"<annotation><filename>a.png</filename><size><width>40</width><height>30</height><depth>3</depth></size>"
    b"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>21</ymax>"
    b"</bndbox></object></annotation>"
)


def _decode(folder: Path) -> None:
    from edgedetr.data import images

    images.size(folder / "image.jpg")
    images.decode(folder / "image.jpg")


def _image_seeds() -> list[bytes]:
    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = []
    for form, mode in (
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("WEBP", "RGB"),
        ("PPM", "RGB"),
        ("JPEG", "CMYK"),
        ("TIFF", "L"),
        ("PNG", "I;16"),
    ):
        stream = io.BytesIO()
        deep = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32))
        (deep if mode == "I;16" else pixels.convert(mode)).save(stream, form)
        found.append(stream.getvalue())
    return found


def _onnx(folder: Path) -> None:
    from edgedetr.lint.lint import lint_file
    from edgedetr.onnx_graph.io import open_onnx
    from edgedetr.onnx_graph.summary import inspect_onnx

    opened = open_onnx(folder / "model.onnx")
    if not opened.faults:
        inspect_onnx(folder / "model.onnx")
        lint_file(folder / "model.onnx")


def _device_onnx(folder: Path) -> None:
    from edgedetr.runtime.onnx_bytes import facts

    facts((folder / "model.onnx").read_bytes())


def _onnx_seeds() -> list[bytes]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def model(nodes: list, extra: list | None = None, opset: int = 19) -> bytes:
        weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
        taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
        graph = helper.make_graph(
            nodes, "g", [taken], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weight, *(extra or [])]
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        return made.SerializeToString()

    conv = helper.make_node("Conv", ["images", "w"], ["c"], "conv", kernel_shape=[3, 3])
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    branch = helper.make_graph(
        [helper.make_node("Relu", ["c"], ["r"])], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    )
    flag = numpy_helper.from_array(np.array(True), "flag")
    return [
        model([conv, helper.make_node("Relu", ["c"], ["y"])]),
        model(
            [
                conv,
                helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
            ],
            [scale, zero],
        ),
        model([conv, helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)], [flag]),
        model(
            [
                conv,
                helper.make_node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(np.ones(3, np.int64))),
                helper.make_node("TopK", ["c", "k"], ["v", "y"]),
            ]
        ),
    ]


def _weights(folder: Path) -> None:
    from edgedetr.models.checkpoints.pretrained import read_weights

    read_weights(str(folder / next(iter(sorted(p.name for p in folder.iterdir())))))


def _pth_seeds() -> list[bytes]:
    import torch

    found = []
    for content in (
        {"model": {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}, "epoch": 3},
        {"state_dict": {"model.a": torch.arange(6.0)}},
    ):
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    return found


def _safetensors_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [
        save({"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}),
        save({"b": torch.arange(3)}, {"format": "pt"}),
    ]


def _metrics(folder: Path) -> None:
    from edgedetr.training.output import read_metrics

    read_metrics(folder / "metrics.jsonl")


def _size(folder: Path) -> None:
    from edgedetr.image_size import parse_size

    parse_size((folder / "word").read_bytes().decode("utf-8", "surrogateescape"))


READERS = (
    Reader("bundle.json", "bundle.json", _bytes(BUNDLE / "bundle.json"), _open_bundle, _bundle_folder, 12),
    Reader("recipe.toml", "recipe.toml", _bytes(BUNDLE / "recipe.toml"), _recipe, weight=8),
    Reader(
        "--set",
        "word",
        lambda: [b"train.lr=2e-4", b"augment.mosaic=0.5", b"model.points=[4, 4, 4]", b"train.precision=bf16"],
        _set,
        weight=8,
    ),
    Reader("--frame", "word", lambda: [b"1080x1920", b"64x64"], _size, weight=4),
    Reader("ranges.json", "ranges.json", _bytes(BUNDLE / "ranges.json"), _ranges),
    Reader(
        "policy.toml", "policy.toml", _bytes(Path(__file__).parents[2] / "calib" / "policy" / "default.toml"), _policy
    ),
    Reader("reference.npz", "reference.npz", _bytes(BUNDLE / "reference.npz"), _reference, weight=8),
    Reader(
        "detections.npz",
        "found.npz",
        _bytes(BUNDLE / "results" / "detections-onnx-onnxruntime.npz"),
        _detections,
        weight=6,
    ),
    Reader("verify.json", "verify.json", _bytes(BUNDLE / "results" / "verify.json"), _verdict),
    Reader("engine metadata", "e.json", _engine_seeds, _engine),
    Reader("engine layers", "layers.json", _layer_seeds, _layers, weight=6),
    Reader("COCO", "annotations/val.json", _coco_seeds, _split, _coco_folder, 12),
    Reader("COCO, data check", "annotations/val.json", _coco_seeds, _check, _coco_folder, 4),
    Reader(
        "YOLO label",
        "labels/val/a.txt",
        lambda: [b"0 0.5 0.5 0.2 0.2\n1 0.3 0.3 0.1 0.1\n", b"0 0.1 0.1 0.4 0.1 0.4 0.4\n"],
        _split,
        _yolo_folder,
    ),
    Reader(
        "data.yaml",
        "data.yaml",
        lambda: [
            b"path: .\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
            b"train: images/val\nval: images/val\nnc: 2\nnames: [cat, dog]\n",
        ],
        _split,
        _yolo_folder,
    ),
    Reader("VOC XML", "Annotations/a.xml", lambda: [VOC], _split, _voc_folder),
    Reader("image", "image.jpg", _image_seeds, _decode, weight=12),
    Reader("ONNX", "model.onnx", _onnx_seeds, _onnx, weight=6),
    Reader("ONNX on a device", "model.onnx", _onnx_seeds, _device_onnx, weight=12),
    Reader(".pth", "w.pth", _pth_seeds, _weights, weight=4),
    Reader(".safetensors", "w.safetensors", _safetensors_seeds, _weights, weight=8),
    Reader(
        "metrics.jsonl",
        "metrics.jsonl",
        lambda: [b'{"kind": "val", "step": 3, "ap": 1.5}\n{"kind": "train"}\n'],
        _metrics,
        weight=4,
    ),
)
