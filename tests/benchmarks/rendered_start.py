"""A whole detector to start from where no published one can be had: trained on rendered scenes of twenty shapes.

usage: python tests/benchmarks/rendered_start.py --recipe R.toml --out FOLDER [--minutes 40] [--threads 1]
       [--images 3000] [--verify 3000] [--few-large] [--set train.epochs=40]

The set is rendered into FOLDER/scenes, once for all recipes that share FOLDER: 320 px, up to 12 shapes of 0.04 to 0.4
of a side, 200 images in the split "val"; with --few-large it has 192 px, and up to 5 shapes of 6 kinds and 0.15 to 0.5
of a side, for members that learn small objects slowly. The recipe gives the model; the training is from random weights,
with numbers for a set of this size. An interrupted training goes on. The bundle is FOLDER/RECIPE.bundle: the --start of
whole_start.py and fine_tuning_defaults.py, and, with its 3,000 images in "test", the detector of search_table.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import edgedetr
from edgedetr.data import synthetic
from edgedetr.recipe import Recipe

MANY_SMALL: dict[str, Any] = {"classes": synthetic.ALL_SHAPES, "size": 320, "objects": 12, "sides": (0.04, 0.4)}
FEW_LARGE: dict[str, Any] = {}  # the defaults of synthetic.render
TRAINING = (
    "batch=8",
    "lr=5e-4",
    "backbone_lr_factor=1.0",
    "clip=1.0",
    "warmup_steps=200",
    'schedule="cosine"',
    "growth=[0.6, 0.8, 1.0]",
    "ema_decay=0.998",
    "ema_warmup=200",
    "eval_every=2",
    "denoising=50",
    "patience=0",
    "epochs=12",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True, help="gives [model]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=3000, help="of the split train")
    parser.add_argument("--verify", type=int, default=3000, help="of the split test")
    parser.add_argument("--few-large", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="a setting of the training, over those of here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scenes = FEW_LARGE if options.few_large else MANY_SMALL
    data = synthetic.render(options.out / "scenes", train=options.images, val=200, verify=options.verify, **scenes)
    recipe = options.out / f"{options.recipe.stem}-model.toml"
    recipe.write_text(Recipe.load(options.recipe).to_toml(("model", "input")))
    sets = [f"train.{pair}" for pair in (*TRAINING, f"minutes={options.minutes}", f"threads={options.threads}")]
    augment = ["augment.crop=0.0", "augment.zoom_out=0.0"]
    folder = options.out / f"{options.recipe.stem}.bundle"
    bundle = edgedetr.train(data, folder, recipe=recipe, sets=[*sets, *augment, *options.set], resume=True)
    print(edgedetr.export(bundle), file=sys.stderr)


if __name__ == "__main__":
    main()
