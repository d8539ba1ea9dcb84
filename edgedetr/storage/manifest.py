"""The content of bundle.json as dataclasses, read strictly, with a digest of its own content."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgedetr.errors import BundleError
from edgedetr.image_size import LARGEST_SIDE
from edgedetr.printable import shown
from edgedetr.storage.atomic import name_problem

SCHEMA = 2  # 1 is the same without `digest`
DIGEST = "digest"
LARGEST_AREA = 1 << 25  # pixels of the input: a frame of 8k video; the maps of a larger one would not fit into memory
LARGEST_TOP_K = 100_000
MOST_CLASSES = 100_000
LONGEST = 4096  # characters of a path; other texts are shorter
INTEGER = 1 << 63
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ClassInfo:
    """One class: `index` is contiguous from 0 and is what the model predicts; id and name are the data set's own."""

    index: int
    category_id: int
    name: str


@dataclass(frozen=True)
class InputContract:
    """What the graph takes: `images` [B, 3, height, width], RGB, values 0..255, normalization inside the graph."""

    height: int
    width: int
    resize: str = "stretch"  # "stretch" or "letterbox" (keep aspect, pad right and bottom with 114)

    def __post_init__(self) -> None:
        if self.resize not in ("stretch", "letterbox"):
            raise BundleError(f"input.resize is {self.resize!r}; expected 'stretch' or 'letterbox'")
        if not (isinstance(self.height, int) and isinstance(self.width, int) and min(self.height, self.width) > 0):
            raise BundleError(f"input size is {self.height} x {self.width}; expected two positive whole numbers")


@dataclass(frozen=True)
class OutputContract:
    """How `logits` [B, N, K*] and `boxes` [B, N, 4] become detections.

    activation  "sigmoid" (K* = K; best top_k of N*K) or "softmax" (K* = K + 1, last = no object; best class per query)
    """

    activation: str = "sigmoid"
    top_k: int = 100

    def __post_init__(self) -> None:
        if self.activation not in ("sigmoid", "softmax"):
            raise BundleError(f"output.activation is {self.activation!r}; expected 'sigmoid' or 'softmax'")
        if not isinstance(self.top_k, int) or not 0 < self.top_k <= LARGEST_TOP_K:
            raise BundleError(f"output.top_k is {self.top_k!r}; expected a whole number from 1 to {LARGEST_TOP_K}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: digest, size in bytes, the step that made it (`stage`), digests of its sources."""

    sha256: str
    size: int
    stage: str
    made_from: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecord:
    """The folder of this bundle's data set, and the splits for verification and calibration."""

    path: str
    verify_split: str
    calib_split: str = "train"


@dataclass(frozen=True)
class Manifest:
    """bundle.json, typed."""

    model: str
    classes: tuple[ClassInfo, ...]
    input: InputContract
    output: OutputContract
    config: dict[str, object] = field(default_factory=dict)  # the model's own configuration, as in its dataclass
    data: DataRecord | None = None
    budget: float = 1.0  # largest accepted AP drop, points
    synthetic: bool = False  # the images are rendered, not photographs
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA


def manifest_to_text(manifest: Manifest) -> str:
    """bundle.json of a manifest; ValueError for one that could not be read back."""
    raw = json.loads(json.dumps({**asdict(manifest), "schema": SCHEMA}, allow_nan=False))
    manifest_from_json(raw)
    return json.dumps({**raw, DIGEST: _digest(raw)}, indent=1) + "\n"


def manifest_from_json(raw: Any) -> Manifest:
    """The manifest of parsed JSON; ValueError (or BundleError) that names the first key that is wrong."""
    raw = dict(_mapping(raw, "it"))
    recorded = raw.pop(DIGEST, None)
    if recorded is not None and recorded != _digest(raw):
        raise ValueError(
            f"its content does not match its {DIGEST}: damaged, or edited by hand; to keep your edit, remove "
            f'the line "{DIGEST}"'
        )
    _keys(raw, Manifest, "it")
    if raw.get("schema") not in (1, SCHEMA) or isinstance(raw["schema"], bool):
        raise ValueError(f"schema is {raw.get('schema')!r}, this version reads 1 to {SCHEMA}")
    for key in ("model", "classes", "input", "output", "budget"):
        if key not in raw:
            raise ValueError(f"{key!r} is missing")
    budget = raw["budget"]
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 100:
        raise ValueError(f"budget is {shown(budget)}; expected points of AP from 0 to 100")
    synthetic = raw.get("synthetic", False)
    if not isinstance(synthetic, bool):
        raise ValueError(f"synthetic is {shown(synthetic)}; expected true or false")
    return Manifest(
        model=_text(raw["model"], "model", 200),
        classes=_classes(raw["classes"]),
        input=input_from_json(raw["input"]),
        output=OutputContract(**_output(raw["output"])),
        config=_config(raw.get("config")),
        data=_data(raw.get("data")),
        budget=float(budget),
        synthetic=synthetic,
        files=_files(raw.get("files", {})),
    )


def _digest(raw: Mapping[str, Any]) -> str:
    """sha256 of the content: of keys and values, not of spaces and their order."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _classes(raw: Any) -> tuple[ClassInfo, ...]:
    listed = _list(raw, "classes", MOST_CLASSES)
    classes = []
    for number, item in enumerate(listed):
        where = f"classes[{number}]"
        _keys(_mapping(item, where), ClassInfo, where)
        index, category = (
            _integer(item.get(key), f"{where}.{key}", -INTEGER, INTEGER - 1) for key in ("index", "category_id")
        )
        classes.append(ClassInfo(index, category, _text(item.get("name"), f"{where}.name", 1000, empty=True)))
    if [c.index for c in classes] != list(range(len(classes))):
        raise ValueError("class indices are not 0, 1, 2, ...")
    return tuple(classes)


def input_from_json(raw: Any) -> InputContract:
    """From what json.loads gave. Errors: ValueError for a key, a type or a number that no input can have."""
    _keys(_mapping(raw, "input"), InputContract, "input")
    height, width = (_integer(raw.get(key), f"input.{key}", 1, LARGEST_SIDE) for key in ("height", "width"))
    if height * width > LARGEST_AREA:
        raise ValueError(f"input is {height} x {width}; expected at most {LARGEST_AREA:,} pixels")
    return InputContract(height, width, _text(raw.get("resize", "stretch"), "input.resize", 200))


def _output(raw: Any) -> dict[str, Any]:
    _keys(_mapping(raw, "output"), OutputContract, "output")
    if "top_k" in raw:
        _integer(raw["top_k"], "output.top_k", 1, LARGEST_TOP_K)
    return {**raw, "activation": _text(raw.get("activation", "sigmoid"), "output.activation", 200)}


def _config(raw: Any) -> dict[str, object]:
    config = dict(_mapping({} if raw is None else raw, "config"))
    _numbers(config, "config")
    return config


def _numbers(value: Any, where: str) -> None:
    """Numbers that a model's configuration may hold, however deep: finite, and of at most 64 bits."""
    if isinstance(value, (int, float)) and not (
        math.isfinite(value) if isinstance(value, float) else abs(value) < INTEGER
    ):
        raise ValueError(f"{where} is {shown(value)}; expected a finite number of at most 64 bits")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        _numbers(item, f"{where}.{key}")


def _data(raw: Any) -> DataRecord | None:
    if raw is None or raw == {}:
        return None
    _keys(_mapping(raw, "data"), DataRecord, "data")
    return DataRecord(
        _text(raw.get("path"), "data.path", LONGEST),
        _text(raw.get("verify_split"), "data.verify_split"),
        _text(raw.get("calib_split", "train"), "data.calib_split"),
    )


def _files(raw: Any) -> dict[str, FileEntry]:
    files = {}
    for name, entry in _mapping(raw, "files").items():
        where = f"files[{shown(name)}]"
        if problem := name_problem(name):
            raise ValueError(f"file name {shown(name)} {problem}")
        _keys(_mapping(entry, where), FileEntry, where)
        sources = dict(_mapping(entry.get("made_from", {}), f"{where}.made_from"))
        for source, old in sources.items():
            _sha256(old, f"{where}.made_from[{shown(source)}]")
        files[name] = FileEntry(
            _sha256(entry.get("sha256"), f"{where}.sha256"),
            _integer(entry.get("size"), f"{where}.size", 0, INTEGER),
            _text(entry.get("stage"), f"{where}.stage"),
            sources,
        )
    return files


def _sha256(value: Any, where: str) -> str:
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise ValueError(f"{where} is {shown(value)}; expected 64 hexadecimal digits")
    return value


def _text(value: Any, where: str, longest: int = 255, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty) or len(value) > longest or "\0" in value:
        raise ValueError(f"{where} is {shown(value)}; expected text of at most {longest} characters")
    _encodable(value, where)
    return value


def _encodable(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is {shown(value)}; expected valid Unicode") from error


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{where} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {shown(value)}; expected an object of keys and values")
    return value


def _list(value: Any, where: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{where} is {shown(value)}; expected a list of at most {most}")
    return value


def _keys(raw: Mapping[str, Any], kind: Any, where: str) -> None:
    unknown = set(raw) - {item.name for item in fields(kind)}
    if unknown:
        raise ValueError(f"unknown key {shown(min(unknown))} in {where}")
