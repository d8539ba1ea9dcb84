"""One row of a table of trainings: trained, exported, measured on the split "test", and kept in a file.

Trainings that are compared take equal epochs. Where only minutes are given, the first of them measures how many epochs
fit, and the others are given that number: a machine that is busy later does not decide.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import edgedetr
from edgedetr.data import images as image_files
from edgedetr.data.layouts import load as load_split
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.recipe import Recipe
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import prepare
from edgedetr.training.output import CHECKPOINT, FOLDER, read_state


@dataclass(frozen=True)
class Row:
    """What a training gave.

    epochs    that were planned; early stop may end it before
    ap, ap50  of model.onnx on the split "test", points
    """

    name: str
    epochs: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class Length:
    """How long every training of a comparison is: `epochs`, or as many as fit `minutes` where it is 0."""

    minutes: float
    epochs: int = 0

    @property
    def settings(self) -> list[str]:
        return [f"train.epochs={self.epochs}"] if self.epochs else [f"train.minutes={self.minutes}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script that compares trainings."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings; finished ones are kept")
    parser.add_argument("--minutes", type=float, default=5, help="of the first training, which chooses the epochs")
    parser.add_argument("--epochs", type=int, default=0, help="of every training; 0 = as --minutes has time for")
    parser.add_argument("--threads", type=int, default=2, help="of torch; 1 where two scripts share two cores")


def train_row(
    name: str, data: Path, recipe: Recipe | Path, sets: list[str], *, length: Length, out: Path, threads: int
) -> Row:
    """Train, export and measure; a finished row is read from its file, an interrupted training goes on.

    Errors: SystemExit where the finished row has another number of epochs than asked for.
    """
    record = out / f"{name}.json"
    if record.exists():
        row = Row(**json.loads(record.read_text()))
        if length.epochs not in (0, row.epochs):
            sys.exit(f"{record}: {row.epochs} epochs, and {length.epochs} are asked for; expected another --out")
        return row
    folder = out / f"{name}.bundle"
    given = [*length.settings, f"train.threads={threads}", *sets]
    bundle = edgedetr.train(data, folder, recipe=recipe, sets=given, resume=True)
    edgedetr.export(bundle)
    epochs = length.epochs or read_state(folder / FOLDER / CHECKPOINT).epochs
    row = Row(name, epochs, *test_ap(bundle, data, threads))
    partial = record.with_suffix(".part")
    partial.write_text(json.dumps(asdict(row)))
    partial.replace(record)
    print(row, file=sys.stderr, flush=True)
    return row


def test_ap(bundle: edgedetr.Bundle, data: Path, threads: int) -> tuple[float, float]:
    """AP and AP50 of model.onnx on the split "test", points."""
    runner, manifest, found = OrtRunner(bundle.require("model.onnx"), threads=threads), bundle.manifest, {}
    samples = load_split(data, "test")
    for sample in samples.samples:
        batch, geometry = prepare([image_files.decode(sample.path)], manifest.input)
        found[sample.image_id] = decode(runner.run(batch), geometry, manifest.classes, manifest.output)[0]
    result = evaluate(samples, found, by_size=False)
    return result.ap, result.ap50
