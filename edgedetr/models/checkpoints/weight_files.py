"""Read weight files of unknown origin, without executing anything and within memory of about their size.

Reads safetensors, whole or in shards, and torch files. The names that the pickle of a torch file refers to are checked
before anything is loaded, and it is loaded with `weights_only`.
"""

from __future__ import annotations

import argparse
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.storage.reading import read_json

Weights = dict[str, Tensor]

# Weight files of a folder, in the order of preference.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Keys of published files under which the tensors are; averaged weights first, because those were evaluated.
AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
WRAPPERS = (*AVERAGED, "module", "model", "state_dict", "model_state_dict")
SHARDS = 500
PICKLE_LIMIT = 64 << 20  # bytes of a torch file's structure, without its tensors
SLACK = 1 << 20  # bytes that a torch file may declare beyond its size
# Names in a pickle of tensors and plain values. A Namespace holds the arguments of a training.
SAFE_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch device",
    "argparse Namespace",
    "torch.serialization _get_layout",
}
NOT_WEIGHTS = {  # other files by suffix: what they are, and what to do with them
    ".onnx": "an ONNX graph; run: edgedetr import {path} --out BUNDLE, without --model",
    ".engine": "a TensorRT engine, which belongs to one device; import the ONNX file that it was built from",
    ".plan": "a TensorRT engine, which belongs to one device; import the ONNX file that it was built from",
    ".tflite": "a TensorFlow Lite model; export the PyTorch model to ONNX and import that",
    ".h5": "TensorFlow's weights; save the model with PyTorch, or export it to ONNX and import that",
    ".msgpack": "Flax's weights; save the model with PyTorch, or export it to ONNX and import that",
    ".pkl": 'a pickle, which could execute anything; save the tensors alone: torch.save(model.state_dict(), "w.pth")',
    ".xml": "an OpenVINO model; import the ONNX file that it was made from",
    ".npz": "arrays of NumPy; expected .safetensors, or a .pth of torch",
}


def find_weight_file(folder: Path) -> Path:
    """The weight file in a folder. Errors: ModelError that lists what the folder holds instead."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (PEFT), which changes another model's weights; merge it into them "
            "first: model.merge_and_unload().save_pretrained(DIR)"
        )
    if (folder / "bundle.json").is_file():
        raise ModelError(
            f"{folder} is a bundle of edgedetr already; run: edgedetr export {folder}, or train from it: "
            f"--set train.start={folder}"
        )
    deeper = sorted(path.parent.name for name in NAMES for path in folder.glob(f"*/{name}"))
    if deeper:
        raise ModelError(f"{folder} holds no weights, but {', '.join(deeper[:5])} in it do; name {folder / deeper[-1]}")
    there = sorted(path.name for path in folder.iterdir())
    raise ModelError(
        f"{folder} holds none of {', '.join(NAMES)}; it holds {', '.join(there[:8]) or 'nothing'}; name "
        "the weight file itself"
    )


def shards(index: Path) -> dict[str, set[str]]:
    """Files that an index names, and the tensors which it lists for each."""
    content = read_json(index, ModelError)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise ModelError(f"{index}: no weight_map of tensors and files; expected the index that save_pretrained writes")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if Path(file).name != file or file in (".", ".."):
            raise ModelError(f"{index}: {tensor} is in {file!r}; expected a file in the folder of the index")
        files.setdefault(file, set()).add(tensor)
    if len(files) > SHARDS:
        raise ModelError(f"{index}: {len(files)} files; expected at most {SHARDS}")
    return files


def read_shards(index: Path, files: Mapping[str, Path]) -> Weights:
    """All tensors of the files that an index names. Errors: ModelError for a file that differs from it."""
    weights: Weights = {}
    for name, tensors in shards(index).items():
        found = load(files[name])
        if set(found) != tensors:
            different = sorted(set(found) ^ tensors)
            raise ModelError(
                f"{files[name]}: {different[0]} is {'missing' if different[0] in tensors else 'not in the index'} "
                f"({len(different)} such tensors); expected the files that belong to {index}"
            )
        weights.update(found)
    return weights


def is_whole(path: Path) -> bool:
    """Whether a weight file or an index ends where it should, as far as its first or last bytes tell."""
    if path.suffix == ".json":
        return True  # its readers say what is wrong
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path) or path.stat().st_size > PICKLE_LIMIT  # torch's older files have no end mark
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def load(path: Path, notes: list[str] | None = None) -> Weights:
    """Tensors of one file, without their wrappers; `notes` gets a sentence if it holds several sets.

    Errors: ModelError for a file that holds no tensors.
    """
    if path.suffix in NOT_WEIGHTS:
        raise ModelError(f"{path} is {NOT_WEIGHTS[path.suffix].format(path=path)}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # safetensors has no common base class of its errors
            raise ModelError(
                f"{path}: not readable as weights ({_first(error)}); expected a whole file of safetensors"
            ) from error
    _check_torch_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types, and its message advises to execute the file
        raise ModelError(
            f"{path}: not readable as weights ({type(error).__name__}); expected safetensors, or a torch "
            "file that holds nothing but tensors"
        ) from error
    return _tensors(content, path, [] if notes is None else notes)


def wrapped_in(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The mapping inside of all known wrappers, and the keys that lead to it."""
    way: list[str] = []
    while len(way) < 8:
        key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
        way.append(key)
    return content, way


def _tensors(content: Any, path: Path, notes: list[str]) -> Weights:
    inner, way = wrapped_in(content) if isinstance(content, dict) else ({}, [])
    others = [key for key in WRAPPERS if way and key != way[0] and isinstance(content.get(key), dict)]
    if others:
        notes.append(f"weights under {way[0]!r} were read, and not those under {', '.join(map(repr, others))}")
    found = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        what = "an adapter's or optimizer's file?" if isinstance(content, dict) else type(content).__name__
        raise ModelError(f"{path}: no tensors inside ({what}); expected a state dict")
    if any(".lora_A." in name or ".lora_B." in name for name in found):
        raise ModelError(
            f"{path} holds an adapter (LoRA) next to or without the model's weights; merge it into them "
            "first: model.merge_and_unload()"
        )
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > 16 * path.stat().st_size + SLACK:
        raise ModelError(
            f"{path}: its tensors share far more than the file holds; expected a file of at least a sixteenth of them"
        )
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > _bytes(tensor):
            raise ModelError(f"{path}: {name} {tuple(tensor.shape)} is not stored in full; expected a dense tensor")
    if all(name.startswith("module.") for name in found):  # DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0


def _check_torch_file(path: Path) -> None:
    """ModelError for a torch file that refers to anything but tensors, or declares more bytes than it has."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            if zipfile.is_zipfile(path):
                names = _zip_names(path, size)
            else:
                # The old format is four pickles: a magic number, its version, the system, and what was saved.
                names = set()
                for _ in range(4):
                    names.update(_globals(stream))
                    if stream.peek(1) == b"" or names - SAFE_GLOBALS:
                        break
    except ModelError:
        raise
    except Exception as error:  # a damaged zip or pickle raises errors of any type
        raise ModelError(
            f"{path}: not readable as weights ({_first(error)}); expected safetensors, or a torch file "
            "that holds nothing but tensors"
        ) from error
    unknown = sorted(name for name in names if name not in SAFE_GLOBALS and not _is_torch_type(name))
    if unknown:
        shown = ", ".join(name.replace(" ", ".") for name in unknown[:4])
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ModelError(
            f"{path}: not readable as weights: it holds objects of {shown}{more}, and making them could "
            "execute anything, so nothing was loaded; save its tensors alone, with the library that wrote "
            'it: torch.save(model.state_dict(), "w.pth"); or export it to ONNX and import that'
        )


def _zip_names(path: Path, size: int) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size + SLACK:
            raise ModelError(
                f"{path}: its {size} bytes promise {sum(entry.file_size for entry in entries)}; expected "
                "a file as torch.save writes it, which is not compressed"
            )
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ModelError(
                f"{path} is a TorchScript archive, a program; save its tensors alone: "
                'torch.save(model.state_dict(), "w.pth"); or export it to ONNX and import that'
            )
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if not pickles or sum(entry.file_size for entry in pickles) > PICKLE_LIMIT:
            raise ModelError(
                f"{path}: a zip, but not as torch.save writes it; expected one data.pkl of at most "
                f"{PICKLE_LIMIT >> 20} MiB"
            )
        found: set[str] = set()
        for entry in pickles:
            with archive.open(entry) as stream:
                found.update(_globals(stream))
        return found


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """Names that one pickle refers to, as "module name"; its opcodes are parsed and not executed."""
    for code, value, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            yield str(value)
        elif code.name == "STACK_GLOBAL":
            yield "a newer pickle"


def _is_torch_type(name: str) -> bool:
    """Whether a name is a dtype or a storage class of torch."""
    module, _, kind = name.partition(" ")
    return module == "torch" and (kind.endswith("Storage") or isinstance(getattr(torch, kind, None), torch.dtype))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
