"""Whether the default numbers of fine-tuning are good ones: they beside three that others pick by hand.

usage: python tests/benchmarks/fine_tuning_defaults.py --start BUNDLE --data BCCD CARDS --out FOLDER
       [--minutes 5 | --epochs N] [--batch 8] [--seeds 0 1] [--settings default rf-detr ...] [--threads 1]

Every training starts from the whole detector in BUNDLE, with its model and input size, and takes the same batch and
augmentation (the defaults). For each set the first training measures how many epochs the minutes have time for, and all
others are given that number. The settings differ in learning rates, warm-up, schedule, moving average, weight decay,
clipping and sizes. Only the default may stop early, by its own rule; the others do not (ultralytics waits for 100
epochs, and in rf-detr and D-FINE it is off). AP is of the split "test"; the best epoch is chosen on "val", where a set
has it, else it is the last. With several seeds, AP is their mean. Finished trainings are kept, so that the script can
be stopped; two of them with other --data may share FOLDER. The last lines are a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from recorded_training import Length, add_options, train_row

from edgedetr.bundle import Bundle
from edgedetr.data.layouts import load as load_split
from edgedetr.recipe import Recipe

DEFAULT = "default"


def ultralytics(classes: int, steps_per_epoch: int) -> dict[str, object]:
    """cfg/default.yaml, and `optimizer: auto` of engine/trainer.py for up to 10,000 steps; read in November 2026.

    Its rate falls on a line; the schedule here that ends at the same hundredth is the cosine (its `cos_lr`).
    """
    return {
        "lr": round(0.002 * 5 / (4 + classes), 6),
        "backbone_lr_factor": 1.0,
        "betas": [0.9, 0.999],
        "weight_decay": 5e-4,
        "clip": 10.0,
        "warmup_steps": max(3 * steps_per_epoch, 100),
        "schedule": "cosine",
        "final_lr_factor": 0.01,
        "ema_decay": 0.9999,
        "ema_warmup": 2000,
        "sizes": [],
    }


def rf_detr(classes: int, steps_per_epoch: int) -> dict[str, object]:
    """rfdetr/config.py, TrainConfig; read in November 2026.

    The rate falls after the last of its 100 epochs. `expanded_scales`: five steps of 64 px up and down from 640. Its
    decay from layer to layer of a ViT, and its smaller rate of the decoder, are left out.
    """
    return {
        "lr": 1e-4,
        "backbone_lr_factor": 1.5,
        "weight_decay": 1e-4,
        "clip": 0.1,
        "warmup_steps": 0,
        "schedule": "constant",
        "ema_decay": 0.993,
        "ema_warmup": 100,
        "sizes": [round(0.5 + 0.1 * step, 1) for step in range(11)],
    }


def d_fine(classes: int, steps_per_epoch: int) -> dict[str, object]:
    """configs/dfine/custom/dfine_hgnetv2_s_custom.yml and include/optimizer.yml of D-FINE; read in November 2026."""
    around = [0.75, 0.8, 0.85, 0.9, 0.95]
    return {
        "lr": 2.5e-4,
        "backbone_lr_factor": 0.5,
        "weight_decay": 1.25e-4,
        "clip": 0.1,
        "warmup_steps": 500,
        "schedule": "constant",
        "ema_decay": 0.9999,
        "ema_warmup": 1000,
        "sizes": [*around, *[1.0] * 20, *(2 - fraction for fraction in around)],
    }


BY_HAND = {"ultralytics": ultralytics, "rf-detr": rf_detr, "d-fine": d_fine}


def recipe_of(bundle: Path, out: Path) -> Path:
    """A recipe with the model and the input of a bundle, and defaults for all else."""
    path = out / "model-of-the-start.toml"
    path.write_text(Recipe.from_bundle(Bundle.open(bundle)).to_toml(("model", "input")))
    return path


def settings_of(name: str, data: Path, batch: int) -> list[str]:
    """The keys of [train] of one of the compared settings."""
    if name == DEFAULT:
        return []
    train = load_split(data, "train")
    values = BY_HAND[name](len(train.classes), max(len(train) // batch, 1))
    return [f"train.{key}={json.dumps(value)}" for key, value in {**values, "patience": 0}.items()]


def aps_of(options: argparse.Namespace, data: Path, recipe: Path) -> tuple[int, dict[str, float]]:
    """Epochs, and AP of every setting on one set."""
    length, found = Length(options.minutes, options.epochs), {}
    for name in options.settings:
        rows = []
        for seed in options.seeds:
            sets = [f"train.start={json.dumps(str(options.start))}", f"train.batch={options.batch}"]
            row = train_row(
                f"{data.name}-{name}-{seed}",
                data,
                recipe,
                [*sets, f"train.seed={seed}", *settings_of(name, data, options.batch)],
                length=length,
                out=options.out,
                threads=options.threads,
            )
            length = Length(options.minutes, row.epochs)
            rows.append(row)
        found[name] = mean(row.ap for row in rows)
    return length.epochs, found


def main() -> None:
    names = (DEFAULT, *BY_HAND)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    add_options(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(options.start, options.out)
    table = {data.name: aps_of(options, data, recipe) for data in options.data}
    compared = [name for name in options.settings if name != DEFAULT]
    columns = ("set", "epochs", *options.settings, "default minus best")
    print(f"AP on test\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, (epochs, aps) in table.items():
        best = max((aps[one] for one in compared), default=float("nan"))
        cells = [f"{aps[one]:.1f}" for one in options.settings]
        print(f"| {name} | {epochs} | {' | '.join(cells)} | {aps.get(DEFAULT, float('nan')) - best:+.1f} |")


if __name__ == "__main__":
    main()
