"""Writes what a training leaves on disk: its checkpoint, its metrics log, and the weights in the bundle.

No random state is stored: every random number is a function of the seed and the step (trainer.py, data/dataset.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgedetr.artifacts import START, WEIGHTS
from edgedetr.bundle import Bundle, ClassInfo, DataRecord, Manifest, OutputContract
from edgedetr.data.detection_set import DataConfig, DetectionSet
from edgedetr.errors import TrainingError
from edgedetr.layers.lora import merged
from edgedetr.models.detector import DetrModel
from edgedetr.packages import missing
from edgedetr.recipe import Recipe
from edgedetr.storage.atomic import atomic_write, with_path_in_errors
from edgedetr.storage.reading import parse_json, read_bytes

log = logging.getLogger(__name__)

FOLDER = "train"  # of the bundle; not needed on the device
CHECKPOINT = "last.safetensors"
METRICS = "metrics.jsonl"
START_RECORD = "start.json"  # what the training started from, until the bundle has it
SCHEMA = 2  # of a checkpoint; 1 had no digest and is still read
DECISIVE_SECTIONS = ("model", "input", "data", "train", "augment")  # of a recipe: they determine the weights


@dataclass
class TrainState:
    """How far a training is; with the weights, everything that a resume needs.

    step          optimizer steps done
    best          best AP on the select split in points, -1 before any
    best_epoch    epochs done when `best` was reached
    epochs_without_improvement  evaluations since then, for early stopping
    done          no step is left
    gradient_scale, gradient_scale_growth  of the fp16 gradient scaler, and its steps since it last grew; else 0
    epochs        the number of epochs that train.minutes has time for; 0 where it is not set, or not measured yet
    loss_sums, summed_steps  losses since the last line of the metrics log, and over how many steps
    chosen        what was chosen for keys of [train] that were "auto" (fine_tuning.py); stored where there are any
    skipped, skipped_in_a_row  steps that changed nothing because the loss or the gradient was NaN or infinite: all of
                  them, and those since the last good step
    """

    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    done: bool = False
    gradient_scale: float = 0.0
    gradient_scale_growth: int = 0
    epochs: int = 0
    loss_sums: list[float] = field(default_factory=list)
    summed_steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "chosen" or value}
        return json.dumps({STORED_KEYS.get(name, name): value for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """Errors: TrainingError, TypeError for text that is not a state."""
        own = {stored: name for name, stored in STORED_KEYS.items()}
        raw = parse_json(text, "position", TrainingError)
        state = cls(**{own.get(key, key): value for key, value in raw.items()})
        for item in fields(cls):
            value, usual = getattr(state, item.name), getattr(cls(), item.name)
            kinds = (int, float) if isinstance(usual, float) else (type(usual),)
            numbers = item.name != "loss_sums" or all(isinstance(one, float) for one in value)
            if type(value) not in kinds or not numbers:
                raise TypeError(f"its {STORED_KEYS.get(item.name, item.name)} is {value!r}")
        return state


# Keys of checkpoints, where they differ from the fields: all versions read and write the same checkpoints.
STORED_KEYS = {
    "epochs_without_improvement": "stale",
    "gradient_scale": "scale",
    "gradient_scale_growth": "growth",
    "loss_sums": "sums",
    "summed_steps": "summed",
    "skipped_in_a_row": "in_row",
}


def fingerprint(recipe: Recipe, samples: DetectionSet, teacher: str = "") -> str:
    """Digest of everything that determines the weights: recipe sections and training data; a resume must match it.

    teacher   digest of the teacher's weights, where there is one

    Settings of export, quantization and verification are not part of it, so they may change before a resume. An option
    that a later version added is not part of it either while it is at its default.
    """
    state = hashlib.sha256(recipe.to_toml(DECISIVE_SECTIONS, later=False).encode())
    state.update(teacher.encode())
    for sample in samples.samples:
        state.update(f"{sample.path.name}|{sample.image_id}|".encode())
        state.update(sample.boxes.tobytes() + sample.labels.tobytes() + sample.crowd.tobytes())
    return state.hexdigest()


def save_checkpoint(
    path: Path,
    state: TrainState,
    fingerprint: str,
    model: nn.Module,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    beside: nn.Module | None = None,
) -> None:
    """Write everything that a resume needs, without pickle; a kill at any moment leaves the old file or the new one.

    beside   a module that is trained with the model and is no part of it
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if beside is not None:
        tensors |= {f"beside.{name}": value for name, value in beside.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema_model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    metadata = {"schema": str(SCHEMA), "fingerprint": fingerprint, "position": state.to_json()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata | {"digest": digest(metadata, tensors)})


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of metadata, names, types, shapes and values of a checkpoint: every flipped bit changes it."""
    state = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(tensors.items()):
        state.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def read_state(path: Path) -> TrainState:
    """How far the training of a checkpoint is. Errors: TrainingError for a damaged file."""
    with _damaged(path), safe_open(path, framework="pt") as file:
        return TrainState.from_json((file.metadata() or {})["position"])


def _restart(path: Path) -> str:
    return f"remove it to start from the beginning, or restore it from a copy: {path}"


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Errors: TrainingError for whatever a file that is no checkpoint raises."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, TrainingError) as error:
        raise TrainingError(f"the checkpoint is damaged or not a checkpoint ({error}); {_restart(path)}") from error


def load_checkpoint(
    path: Path,
    fingerprint: str,
    model: nn.Module,
    ema_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    beside: nn.Module | None = None,
) -> TrainState:
    """Load a checkpoint into model, average and optimizer, and into what is trained beside the model.

    Errors: TrainingError for a damaged file, another version, another recipe or other data.
    """
    restart = _restart(path)
    with _damaged(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        state = TrainState.from_json(metadata["position"])
    if metadata.get("schema") not in ("1", str(SCHEMA)):
        raise TrainingError(
            f"the checkpoint has schema {metadata.get('schema')}, this version reads 1 and {SCHEMA}; {restart}"
        )
    if metadata["schema"] != "1":
        stored = metadata.pop("digest", None)
        if stored != digest(metadata, tensors):
            raise TrainingError(
                f"the checkpoint is damaged: its content differs from what was written (digest {stored}); {restart}"
            )
    if metadata.get("fingerprint") != fingerprint:
        raise TrainingError(
            f"{path} was made by another recipe or on other training data, so it cannot be continued; "
            "resume with the recipe.toml of its bundle and the same data, or train into another --out"
        )
    try:
        model.load_state_dict(_with_prefix(tensors, "model."))
        ema_model.load_state_dict(_with_prefix(tensors, "ema."))
        if beside is not None:
            beside.load_state_dict(_with_prefix(tensors, "beside."))
        _load_optimizer(optimizer, _with_prefix(tensors, "optimizer."))
    except (RuntimeError, KeyError, ValueError) as error:
        raise TrainingError(f"the checkpoint does not fit this model ({error}); {restart}") from error
    return state


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in the parameter's memory format: a fused step iterates over both at once
            value = torch.empty_like(parameter).copy_(value)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class MetricsLog:
    """Appends to metrics.jsonl, one JSON object per line, and writes the same numbers for TensorBoard.

    step  steps done; a resume removes the lines after it, so that no line is written twice
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / METRICS
        self._board = _tensorboard(folder / "tensorboard", step)
        kept = [line for line in read_metrics(self._path) if _step_of(line) <= step] if step else []
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """One line {"kind": "plan", "train", "skip" or "eval", "step": ..., values...}."""
        with with_path_in_errors(self._path), open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what is no JSON object: a kill while writing may leave half a line."""
    lines = []
    for text in read_bytes(path, TrainingError).splitlines() if path.is_file() else []:
        try:
            line = parse_json(text, str(path), TrainingError)
        except TrainingError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _step_of(line: dict[str, Any]) -> float:
    step = line.get("step", 0)
    return step if isinstance(step, (int, float)) else 0


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("only %s is written: %s", METRICS, missing("tensorboard"))
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


@dataclass(frozen=True)
class BundleWriter:
    """Writes the result of a training into the bundle at `out`: manifest, resolved recipe and weights.

    splits  names of the splits, with the defaults filled in
    data    the folder of the data set
    model   gives the moving average with its weights of that moment
    """

    out: Path
    recipe: Recipe
    splits: DataConfig
    data: Path
    classes: tuple[ClassInfo, ...]
    model: Callable[[], DetrModel]

    def write(self) -> None:
        """Write the bundle with the weights as they are now."""
        recipe = self.recipe
        bundle = Bundle.create(
            self.out,
            Manifest(
                recipe.model.name,
                self.classes,
                recipe.input.contract(),
                OutputContract(recipe.model.config.activation),
                config=asdict(recipe.model.config),
                data=DataRecord(str(self.data.resolve()), self.splits.verify_split, self.splits.train_split),
                budget=recipe.verify.budget,
            ),
        )
        recipe.to_bundle(bundle, stage="train")
        with bundle.add(WEIGHTS.file, stage=WEIGHTS.step, made_from=WEIGHTS.made_from) as path:
            save_file({name: value.contiguous() for name, value in merged(self.model()).state_dict().items()}, path)
        started = self.out / FOLDER / START_RECORD
        if started.is_file() and not bundle.has(START.file):
            with bundle.add(START.file, stage=START.step) as path:
                path.write_bytes(read_bytes(started, TrainingError))

    def finish(self) -> None:
        """Write the recipe as it is now: settings that do not determine the weights may have changed since `write`."""
        if not (self.out / WEIGHTS.file).is_file():
            log.warning("%s has lost its weights, which were the best ones; the last ones are written", self.out)
            self.write()
        bundle = Bundle.open(self.out)
        if self.recipe.to_bundle(bundle, stage="train"):  # the checkpoint's fingerprint proves that the weights fit
            bundle.update(budget=self.recipe.verify.budget)
