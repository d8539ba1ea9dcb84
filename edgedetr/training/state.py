"""The state of a training in one safetensors file: written atomically, read without pickle, refused for another recipe.

No random state is stored: every random number is a function of the seed and the step (see train.py and dataset.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgedetr.bundle import atomic_write
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import TrainingError
from edgedetr.recipe import Recipe
from edgedetr.storage.reading import parse_json
from edgedetr.training.ema import Ema

SCHEMA = 2  # 1 had no digest; it is still read
DECIDE = ("model", "input", "data", "train", "augment")  # sections of a recipe that decide the weights


@dataclass
class Position:
    """How far a training is.

    step        optimizer steps done; with steps per epoch it says the epoch and the place in it
    best        best AP on the select split in points, -1 before any
    best_epoch  epochs done when it was reached
    stale       evaluations since then, for early stopping
    done        nothing is left to do
    scale       of the fp16 gradient scaler, and its steps since it last grew; 0 for other precisions
    epochs      that train.minutes has time for; 0 where it is not set, or nothing was measured yet
    sums, summed    of the losses since the last line of the record, and over how many steps
    skipped, in_row steps that changed nothing, because the loss or the gradient was NaN or infinite: all, and at last
    """

    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    done: bool = False
    scale: float = 0.0
    growth: int = 0
    epochs: int = 0
    sums: list[float] = field(default_factory=list)
    summed: int = 0
    skipped: int = 0
    in_row: int = 0


def fingerprint(recipe: Recipe, samples: DetectionSet) -> str:
    """Digest of what decides the weights: sections of the recipe, and what is trained on; a resume must find the same.

    How the graph is exported, quantized and verified is none of it, so that such settings, and new ones of later
    versions, may change between the first start and a resume; so is a later option that is at its default.
    """
    state = hashlib.sha256(recipe.to_toml(DECIDE, later=False).encode())
    for sample in samples.samples:
        state.update(f"{sample.path.name}|{sample.image_id}|".encode())
        state.update(sample.boxes.tobytes() + sample.labels.tobytes() + sample.crowd.tobytes())
    return state.hexdigest()


def save(
    path: Path, position: Position, fingerprint: str, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer
) -> None:
    """Write everything that a resume needs; a kill at any moment leaves the old file or the new one."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    about = {"schema": str(SCHEMA), "fingerprint": fingerprint, "position": json.dumps(asdict(position))}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, about | {"digest": digest(about, tensors)})


def digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of everything in a checkpoint: metadata, names, types, shapes and numbers, so that no bit can flip."""
    state = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        state.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load(path: Path, fingerprint: str, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> Position:
    """Put a saved state back in place.

    Errors: TrainingError for a damaged file, another version, another recipe or other data.
    """
    restart = f"take it away to start from the beginning, or restore it from a copy: {path}"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        position = _position(about["position"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, TrainingError) as error:
        raise TrainingError(f"the checkpoint is damaged or of another kind ({error}); {restart}") from error
    if about.get("schema") not in ("1", str(SCHEMA)):
        raise TrainingError(
            f"the checkpoint has schema {about.get('schema')}, this version reads 1 and {SCHEMA}; {restart}"
        )
    if about["schema"] != "1":
        told = about.pop("digest", None)
        if told != digest(about, tensors):
            raise TrainingError(
                f"the checkpoint is damaged: its content is not what was written (digest {told}); {restart}"
            )
    if about.get("fingerprint") != fingerprint:
        raise TrainingError(
            f"{path} was made by another recipe or on other training data, so it cannot be continued; "
            "resume with the recipe.toml beside it and the same data, or train into another --out"
        )
    try:
        model.load_state_dict(_part(tensors, "model."))
        ema.model.load_state_dict(_part(tensors, "ema."))
        _load_optimizer(optimizer, _part(tensors, "optimizer."))
    except (RuntimeError, KeyError, ValueError) as error:
        raise TrainingError(f"the checkpoint does not fit this model ({error}); {restart}") from error
    return position


def _position(text: str) -> Position:
    """Errors: TrainingError or TypeError for what is no position."""
    raw = parse_json(text, "position", TrainingError)
    position = Position(**raw)
    for item in fields(Position):
        value, usual = getattr(position, item.name), getattr(Position(), item.name)
        kinds = (int, float) if isinstance(usual, float) else (type(usual),)
        if type(value) not in kinds or (item.name == "sums" and not all(isinstance(one, float) for one in value)):
            raise TypeError(f"its {item.name} is {value!r}")
    return position


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in the parameter's memory format: a fused step walks over both at once
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
