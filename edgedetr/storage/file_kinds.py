"""Recognizes what a file or folder is, so that a wrong path gets a helpful error: by its content, then by its name.

`recognize` opens only plain files, reads at most 64 kB of each, and executes nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgedetr.errors import BundleError, DataError, EdgedetrError, ModelError, RecipeError

HEAD = 64 << 10  # bytes that are read
MOST = 2000  # names that are read of a folder
IMPORT = "edgedetr import FILE.onnx --out NEW.bundle"


@dataclass(frozen=True)
class Kind:
    """A kind of file or folder.

    name    one word
    words   what it is, with an article, for messages
    use     what to do with it; "{path}" is its path
    """

    name: str
    words: str
    use: str


BUNDLE = Kind("bundle", "a bundle", "it is what export, verify, predict and report take")
PART = Kind("part", "a part of the bundle {parent}", "name the bundle itself: {parent}")
BUNDLES = Kind("bundles", "a folder of bundles", "name one of them: {inside}")
DATA = Kind("data", "a data set", "run: edgedetr train --data {path}")
DATA_FILE = Kind("data-file", "a list of a data set", "name the folder of the data set: {folder}")
DATA_YAML = Kind("data-yaml", "the description of a YOLO data set", "run: edgedetr train --data {path}")
IMAGES = Kind("images", "a folder of images", "run: edgedetr predict BUNDLE {path}")
IMAGE = Kind("image", "an image", "run: edgedetr predict BUNDLE {path}")
VIDEO = Kind("video", "a video", "run: edgedetr predict BUNDLE {path}")
RECIPE = Kind("recipe", "a recipe", "run: edgedetr train --data DIR --recipe {path}")
ONNX = Kind("onnx", "an ONNX model", "run: edgedetr import {path} --out NEW.bundle")
ENGINE = Kind(
    "engine",
    "a TensorRT engine, built elsewhere",
    "an engine is code, and is only loaded from the bundle that it was built for: name that bundle, or build the "
    "engine on its device: edgedetr build BUNDLE",
)
WEIGHTS = Kind("weights", "a file of weights", "run: edgedetr import {path} --model MEMBER --out NEW.bundle")
CHECKPOINT = Kind(
    "weights",
    "a PyTorch checkpoint",
    "weights of the family: edgedetr import {path} --model MEMBER --out NEW.bundle; another model: "
    f"export it to ONNX with the tool that trained it, then {IMPORT}",
)
MODEL_FOLDER = Kind(
    "weights", "a model folder of transformers", "run: edgedetr import {path} --model MEMBER --out NEW.bundle"
)
TRAINING = Kind(
    "training",
    "the output folder of a training",
    f"export its best weights to ONNX with the tool that trained them, then {IMPORT}",
)
OUR_TRAINING = Kind(
    "training",
    "the checkpoint folder of a training",
    "its bundle is the folder around it; go on training with: edgedetr train --data DIR --resume --out BUNDLE",
)
ARRAYS = Kind("arrays", "a file of numpy arrays", "in a bundle, reference.npz is made by: edgedetr export BUNDLE")
ARCHIVE = Kind("archive", "an archive", "unpack it, and name the folder that comes out")


def other(words: str) -> Kind:
    """A model in a form that no command takes."""
    return Kind("other", words, f"no command takes it; export its model to ONNX, then {IMPORT}")


# Offset in the file, bytes there, what they mean.
MAGIC: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"ftrt", ENGINE),
    (0, b"ptrt", ENGINE),
    (4, b"TFL3", other("a TensorFlow Lite model")),
    (0, b"RKNN", other("a Rockchip model")),
    (0, b"\x89HDF", other("a Keras or HDF5 file")),
    (0, b"GGUF", other("a GGUF model")),
    (0, b"\xff\xd8\xff", IMAGE),
    (0, b"\x89PNG", IMAGE),
    (0, b"GIF8", IMAGE),
    (0, b"BM", IMAGE),
    (0, b"II*\0", IMAGE),
    (0, b"MM\0*", IMAGE),
    (8, b"WEBP", IMAGE),
    (8, b"AVI ", VIDEO),
    (4, b"ftyp", VIDEO),
    (0, b"\x1aE\xdf\xa3", VIDEO),
    (0, b"\x1f\x8b", ARCHIVE),
    (0, b"7z\xbc\xaf", ARCHIVE),
    (0, b"\xfd7zXZ", ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", ARCHIVE),
    (257, b"ustar", ARCHIVE),
    (0, b"\x93NUMPY", ARRAYS),
)
# By suffix, where the content does not decide.
SUFFIXES = {
    ".onnx": ONNX,
    ".engine": ENGINE,
    ".plan": ENGINE,
    ".trt": ENGINE,
    ".safetensors": WEIGHTS,
    ".pt": CHECKPOINT,
    ".pth": CHECKPOINT,
    ".ckpt": CHECKPOINT,
    ".bin": CHECKPOINT,
    ".toml": RECIPE,
    ".npz": ARRAYS,
    ".tflite": other("a TensorFlow Lite model"),
    ".pb": other("a TensorFlow graph"),
    ".hef": other("a Hailo model"),
    ".mlmodel": other("a Core ML model"),
    ".mlpackage": other("a Core ML model"),
    ".xml": other("an OpenVINO model"),
    ".jpg": IMAGE,
    ".jpeg": IMAGE,
    ".png": IMAGE,
    ".mp4": VIDEO,
    ".zip": ARCHIVE,
    ".tar": ARCHIVE,
}
TRAINED = re.compile(r"(best|last|checkpoint|model_final|epoch)[\w.=-]*\.(pt|pth|ckpt)|events\.out\.tfevents.*")
# For each expected kind: the kinds that are accepted, words for messages, and the error.
EXPECTED: dict[str, tuple[frozenset[str], str, Callable[[str], EdgedetrError]]] = {
    "bundle": (frozenset({"bundle"}), "a bundle", BundleError),
    "data": (frozenset({"data", "data-yaml", "images"}), "the folder of a data set, or its data.yaml", DataError),
    "recipe": (frozenset({"recipe"}), "a recipe: a TOML file, or the name of a shipped one", RecipeError),
    "source": (frozenset({"image", "images", "video", "data"}), "an image, a video or a folder of them", DataError),
    "model": (frozenset({"onnx", "weights"}), "an ONNX file, or weights of the family", ModelError),
    "start": (frozenset({"bundle", "weights"}), "a bundle, or weights of the family", ModelError),
}


def require(path: str | Path, expected: str) -> None:
    """Refuse a path that is recognized as another kind than `expected` (a key of EXPECTED); unknown kinds pass.

    Errors: that of EXPECTED, with what the path is and what to do with it.
    """
    accepted, wanted, error = EXPECTED[expected]
    path = Path(path)
    if expected == "recipe" and path.is_dir():
        return  # a folder may have the name of a shipped recipe
    kind = recognize(path)
    if kind is PART and expected != "bundle" and path.name != "bundle.json":
        return  # of an unknown kind, in the folder of a bundle
    if expected == "bundle" and kind is not BUNDLE and path.exists() and _bundle_above(path) is not None:
        kind = PART
    if kind is not None and kind.name not in accepted:
        raise error(f"{path}: this is {_filled(kind.words, path)}; expected {wanted}; {_filled(kind.use, path)}")


def recognize(path: str | Path) -> Kind | None:
    """The kind of a file or folder; None for a missing one, and for an unknown kind."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
        own = _folder(path) if stat.S_ISDIR(mode) else _file(path) if stat.S_ISREG(mode) else None
        return PART if own is None and _bundle_above(path) is not None else own
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return None


def _filled(text: str, path: Path) -> str:
    inside = next(iter(sorted(path.glob("*/bundle.json"))), path).parent if "{inside}" in text else path
    folder = path.parent.parent if path.parent.name == "annotations" else path.parent
    return text.format(path=path, parent=_bundle_above(path), inside=inside, folder=folder)


def _bundle_above(path: Path) -> Path | None:
    """The bundle that contains a file or folder, at most three folders up."""
    above = [*list(path.parents)[:3], *list(Path(os.path.abspath(path)).parents)[:3]]
    return next((folder for folder in above if (folder / "bundle.json").is_file()), None)


def _folder(path: Path) -> Kind | None:
    with os.scandir(path) as entries:
        names = {entry.name for _, entry in zip(range(MOST), entries)}
    if "bundle.json" in names:
        return BUNDLE
    if _is_data(path, names):
        return DATA
    if "config.json" in names and any(
        name.endswith((".safetensors", ".bin", ".safetensors.index.json")) for name in names
    ):
        return MODEL_FOLDER
    if {"last.safetensors", "metrics.jsonl"} & names:
        return OUR_TRAINING
    if any((path / "weights" / name).is_file() for name in ("best.pt", "last.pt")) or any(
        TRAINED.fullmatch(name) for name in names
    ):
        return TRAINING
    if "saved_model.pb" in names:
        return other("a TensorFlow model")
    if any((path / name / "bundle.json").is_file() for name in sorted(names)[:200]):
        return BUNDLES
    if any(name.lower().endswith((".jpg", ".jpeg", ".png")) for name in names):
        return IMAGES
    return None


def _is_data(path: Path, names: set[str]) -> bool:
    """Whether the folder has annotations in one of the three layouts."""
    if (
        names & {"data.yaml", "data.yml", "dataset.yaml", "_annotations.coco.json"}
        or {"Annotations", "JPEGImages"} <= names
    ):
        return True
    if {"images", "labels"} <= names or any(
        (path / name / "_annotations.coco.json").is_file() for name in ("train", "valid", "val", "test")
    ):
        return True
    return "annotations" in names and any((path / "annotations").glob("*.json"))


def _file(path: Path) -> Kind | None:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with os.fdopen(handle, "rb") as stream:
        head = stream.read(HEAD)
    if path.name == "bundle.json":
        return PART
    suffix = path.suffix.lower()
    for offset, magic, kind in MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return CHECKPOINT if b"data.pkl" in head else ARRAYS if first.endswith(b".npy") else ARCHIVE
    if re.match(rb".{8}\{\s*\"", head, re.DOTALL) and int.from_bytes(head[:8], "little") < 100 << 20:
        return WEIGHTS
    # Protocol buffers of ONNX: the version first, then the producer or the graph.
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", head):
        return ONNX
    if re.match(rb"\x80[\x02-\x05]", head):
        return CHECKPOINT
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    if text.startswith(b"{") and (b'"annotations"' in head or b'"images"' in head):
        return DATA_FILE
    if suffix in (".yaml", ".yml") and re.search(rb"^\s*(names|nc|train|val)\s*:", head, re.MULTILINE):
        return DATA_YAML
    if suffix == ".xml" and b"<net" not in head:
        return None
    return SUFFIXES.get(suffix)
