"""What each candidate for the default costs on a CPU: float32 and INT8 of shipped recipes, at random weights.

usage: python tests/benchmarks/member_latency.py --data DIR [--recipe rtdetr-r18 dfine-s ...] [--threads 2]
       [--rounds 30] [--keep FOLDER] [--json]

Accuracy means nothing here (random weights): AP and its source are the published ones. Ranges come from a few images of
DIR. A model's float32 and INT8 run in turns in one process; wall time counts, and needs an idle machine (of one thread,
--threads 1 --cpu-time gives nearly the same ratios on a busy one). With --keep, the graphs are made once, and the
script can be stopped. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from int8_latency import make, measure

from edgedetr.bundle import Bundle, ClassInfo
from edgedetr.model_list import COCO_CLASSES
from edgedetr.published.published_detectors import published
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.quantize import quantize
from edgedetr.recipe import Recipe
from edgedetr.recipe_list import summaries

RECIPES = ("rtdetr-r18", "dfine-s", "dfine-n", "rfdetr-n", "deimv2-n")
CLASSES = tuple(ClassInfo(number, number + 1, f"class {number}") for number in range(COCO_CLASSES))


def make_recipe(path: Path, name: str, data: Path, images: int) -> Bundle:
    """A bundle with the model of a recipe at random weights, for 80 classes: model.onnx and both INT8 graphs."""
    recipe = Recipe.load(name)
    config = recipe.model.config
    if hasattr(config, "backbone_weights"):
        config = replace(config, backbone_weights="random")
    bundle = make(path, recipe.model.name, config, CLASSES, recipe.input.contract(), data)
    quantize(bundle, config=QuantConfig(images=images))
    return bundle


def row_of(name: str, bundle: Bundle, options: argparse.Namespace) -> dict[str, object]:
    """Facts and milliseconds of one recipe."""
    listed = next(one for one in summaries() if one.name == name)
    known = next((one for one in published().values() if one.recipe == name), None)
    row: dict[str, object] = {
        "recipe": name,
        "input": f"{listed.height}x{listed.width}",
        "M parameters": round(listed.parameters / 1e6, 1),
        "AP as published": known.ap if known else None,
    }
    for found in measure(bundle, options.threads, options.rounds, options.cpu_time):
        row[f"{found['backend']} float32 ms"] = round(float(str(found["float_ms"])), 1)
        row[f"{found['backend']} INT8 ms"] = round(float(str(found["int8_ms"])), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a labeled image set, for ranges")
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    parser.add_argument("--images", type=int, default=8, help="calibration images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process instead of wall time")
    parser.add_argument("--keep", type=Path, help="folder for the bundles; one that is finished is used again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.recipe:
            path = folder / f"{name}.bundle"
            if not path.exists():  # made beside its place: what was stopped halfway is not taken for a finished one
                with tempfile.TemporaryDirectory(dir=folder) as working:
                    make_recipe(Path(working) / "b", name, options.data, options.images).path.rename(path)
            rows.append(row_of(name, Bundle.open(path), options))
            print(rows[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
