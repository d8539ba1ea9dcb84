"""A wrong kind of file or folder is named for what it is, with the command that takes it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError
from edgedetr.storage.file_kinds import recognize, require

FIXTURES = Path(__file__).parents[1] / "fixtures"


def content(name: str) -> bytes:
    """Bytes as such a file has them; for .onnx, .safetensors and .npz of a real one."""
    old = FIXTURES / "bundle-0.1"
    return {
        "onnx": lambda: (old / "model.onnx").read_bytes(),
        "safetensors": lambda: (old / "weights.safetensors").read_bytes(),
        "npz": lambda: (old / "reference.npz").read_bytes(),
        "engine": lambda: b"ftrt" + bytes(100),
        "tflite": lambda: struct.pack("<I", 28) + b"TFL3" + bytes(100),
        "pth": lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100),
        "keras": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
        "toml": lambda: b"[train]\nepochs = 3\n",
        "yaml": lambda: b"train: images/train\nnames: [cell]\n",
        "json": lambda: json.dumps({"images": [], "annotations": []}).encode(),
        "png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(50),
        "mp4": lambda: b"\0\0\0 ftypisom" + bytes(50),
        "gz": lambda: b"\x1f\x8b\x08" + bytes(50),
    }[name]()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with one thing of every kind, where the commands run."""
    for name, form in (
        ("model.onnx", "onnx"),
        ("a.safetensors", "safetensors"),
        ("a.npz", "npz"),
        ("a.engine", "engine"),
        ("a.tflite", "tflite"),
        ("a.pth", "pth"),
        ("a.h5", "keras"),
        ("a.toml", "toml"),
        ("data.yml", "yaml"),
        ("a.json", "json"),
        ("a.png", "png"),
        ("a.mp4", "mp4"),
        ("a.gz", "gz"),
    ):
        (tmp_path / name).write_bytes(content(form))
    (tmp_path / "nameless").write_bytes(content("engine"))
    (tmp_path / "lies.onnx").write_bytes(content("tflite"))
    with zipfile.ZipFile(tmp_path / "best.pt", "w") as archive:
        archive.writestr("best/data.pkl", b"\x80\x02}.")
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.writestr("b.bundle/bundle.json", "{}")
    for name, file in (
        ("yolo/weights", "best.pt"),
        ("ours", "last.safetensors"),
        ("authors", "checkpoint0011.pth"),
        ("hf", "config.json"),
        ("hf", "model.safetensors"),
        ("set/annotations", "train.json"),
        ("yolo-set/images/train", "a.jpg"),
        ("yolo-set/labels/train", "a.txt"),
        ("photos", "a.jpg"),
    ):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text("{}")
    shutil.copytree(FIXTURES / "bundle-0.1", tmp_path / "runs" / "cells.bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOT_A_BUNDLE = [
    ("model.onnx", "an ONNX model", "run: edgedetr import model.onnx --out NEW.bundle"),
    ("a.engine", "a TensorRT engine, built elsewhere", "edgedetr build BUNDLE"),
    ("nameless", "a TensorRT engine, built elsewhere", "edgedetr build BUNDLE"),
    ("a.tflite", "a TensorFlow Lite model", "no command takes it; export its model to ONNX"),
    ("lies.onnx", "a TensorFlow Lite model", "no command takes it"),
    ("a.safetensors", "a file of weights", "run: edgedetr import a.safetensors --model MEMBER"),
    ("best.pt", "a PyTorch checkpoint", "edgedetr import best.pt --model MEMBER"),
    ("a.pth", "a PyTorch checkpoint", "edgedetr import a.pth --model MEMBER"),
    ("a.h5", "a Keras or HDF5 file", "no command takes it"),
    ("a.npz", "a file of numpy arrays", "edgedetr export BUNDLE"),
    ("a.toml", "a recipe", "edgedetr train --data DIR --recipe a.toml"),
    ("data.yml", "the description of a YOLO data set", "run: edgedetr train --data data.yml"),
    ("a.json", "a list of a data set", "name the folder of the data set"),
    ("a.png", "an image", "edgedetr predict BUNDLE a.png"),
    ("a.mp4", "a video", "edgedetr predict BUNDLE a.mp4"),
    ("bundle.zip", "an archive", "unpack it"),
    ("a.gz", "an archive", "unpack it"),
    ("yolo", "the output folder of a training", "edgedetr import FILE.onnx"),
    ("authors", "the output folder of a training", "edgedetr import FILE.onnx"),
    ("ours", "the checkpoint folder of a training", "--resume"),
    ("hf", "a model folder of transformers", "edgedetr import hf --model MEMBER"),
    ("set", "a data set", "edgedetr train --data set"),
    ("yolo-set", "a data set", "edgedetr train --data yolo-set"),
    ("photos", "a folder of images", "edgedetr predict BUNDLE photos"),
    ("runs", "a folder of bundles", "name one of them: runs/cells.bundle"),
    ("runs/cells.bundle/train", "a part of the bundle runs/cells.bundle", "name the bundle itself: runs/cells.bundle"),
    ("runs/cells.bundle/model.onnx", "a part of the bundle runs/cells.bundle", "name the bundle itself"),
    ("runs/cells.bundle/bundle.json", "a part of the bundle runs/cells.bundle", "name the bundle itself"),
    ("runs/cells.bundle/results", "a part of the bundle runs/cells.bundle", "name the bundle itself"),
]


@pytest.mark.parametrize("name, words, use", NOT_A_BUNDLE)
def test_what_is_given_instead_of_a_bundle_is_named(folder, name, words, use):
    with pytest.raises(BundleError) as caught:
        Bundle.open(name)
    assert f"{name}: this is {words}; expected a bundle; " in str(caught.value)
    assert use in str(caught.value)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["verify", "model.onnx"], 1, "this is an ONNX model; expected a bundle"),
        (["export", "a.engine"], 1, "this is a TensorRT engine"),
        (["report", "yolo"], 1, "this is the output folder of a training"),
        (["bench", "set"], 1, "this is a data set; expected a bundle"),
        (["predict", "best.pt", "a.png"], 1, "this is a PyTorch checkpoint"),
        (["inspect", "a.tflite"], 1, "this is a TensorFlow Lite model"),
        (["lint", "hf"], 1, "this is a model folder of transformers"),
        (["build", "a.engine"], 1, "this is a TensorRT engine"),
        (["predict", "runs/cells.bundle", "model.onnx"], 1, "this is an ONNX model; expected an image"),
        (["predict", "runs/cells.bundle", "runs/cells.bundle"], 1, "this is a bundle; expected an image"),
        (["train", "--data", "runs/cells.bundle"], 1, "this is a bundle; expected the folder of a data set"),
        (["train", "--data", "yolo"], 1, "this is the output folder of a training; expected the folder of a data set"),
        (["train", "--data", "data.yml"], 1, "train: 'images/train' is not a folder or list inside ."),
        (["train", "--data", "set/annotations/train.json"], 1, "this is"),
        (["data", "check", "model.onnx"], 1, "this is an ONNX model; expected the folder of a data set"),
        (["verify", "runs/cells.bundle", "--data", "a.npz"], 1, "this is a file of numpy arrays"),
        (["export", "runs/cells.bundle", "--int8", "--calib", "hf"], 1, "this is a model folder of transformers"),
        (
            ["train", "--data", "set", "--recipe", "data.yml"],
            2,
            "this is the description of a YOLO data set; expected a recipe",
        ),
        (["train", "--data", "set", "--recipe", "model.onnx"], 2, "this is an ONNX model; expected a recipe"),
        (
            ["train", "--data", "set", "--start", "model.onnx"],
            1,
            "this is an ONNX model; expected a bundle, or weights",
        ),
        (["import", "runs/cells.bundle", "--out", "new"], 1, "this is a bundle; expected an ONNX file, or weights"),
        (["import", "a.engine", "--out", "new"], 1, "this is a TensorRT engine"),
        (["import", "lies.onnx", "--out", "new"], 1, "this is a TensorFlow Lite model"),
        (["import", "yolo", "--out", "new", "--model", "rt_detr"], 1, "this is the output folder of a training"),
        (["import", "model.onnx", "--out", "new", "--data", "runs/cells.bundle"], 1, "this is a bundle"),
    ],
)
def test_every_argument_names_what_it_was_given(folder, words, code, message, capsys):
    (folder / "set" / "annotations" / "train.json").write_bytes(content("json"))
    assert cli.run(words) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (folder / "new").exists()


def test_what_is_meant_is_let_through():
    data = FIXTURES / "scenes-0.1"
    assert recognize(FIXTURES / "bundle-0.1").name == "bundle"
    assert recognize(data).name == "data"
    assert recognize(data / "images" / "test").name == "images"
    assert recognize(next((data / "images" / "test").iterdir())).name == "image"
    assert recognize(FIXTURES / "bundle-0.1" / "recipe.toml").name == "recipe"  # --recipe BUNDLE/recipe.toml
    assert recognize(FIXTURES / "bundle-0.1" / "weights.safetensors").name == "weights"
    assert recognize(FIXTURES / "nowhere") is None


def test_a_folder_with_the_name_of_a_shipped_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "demo" / "annotations").mkdir(parents=True)
    (tmp_path / "demo" / "annotations" / "train.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    require("demo", "recipe")  # raises nothing
    with pytest.raises(BundleError, match="demo: this is a data set"):
        require("demo", "bundle")


def test_images_of_many_formats_are_images(tmp_path):
    for suffix in ("jpg", "png", "gif", "bmp", "tiff", "webp"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"a.{suffix}")
        os.rename(tmp_path / f"a.{suffix}", tmp_path / f"{suffix}-without-suffix")
        assert recognize(tmp_path / f"{suffix}-without-suffix").name == "image"


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    assert recognize(tmp_path / "model.onnx") is None
