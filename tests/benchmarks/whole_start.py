"""What a start from a whole detector gains: trainings of equal minutes on few images, from three kinds of weights.

usage: python tests/benchmarks/whole_start.py --recipe R.toml --start BUNDLE --data BCCD --out FOLDER
       [--images 25 50 100 205] [--minutes 5] [--set key=value ...]

Each training takes the first images of one random order of the train split, the minutes, and one start: "whole" (every
weight of the bundle but the class rows), "backbone" (its backbone alone) or "random". The best epoch is chosen on the
split "val"; AP is of the split "test". Finished trainings are kept, so that the script can be stopped. The last
lines are a Markdown table; FOLDER/whole-start.svg is its picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import edgedetr
from edgedetr.data import images as image_files
from edgedetr.data.layouts import load as load_split
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.postprocess import decode
from edgedetr.runtime.preprocess import prepare

STARTS = ("whole", "backbone", "random")


def few_images(data: Path, count: int, out: Path) -> Path:
    """A COCO set with `count` images of the train split, and the other splits as they are; images are links."""
    table = json.loads((data / "annotations" / "train.json").read_text())
    order = np.random.default_rng(0).permutation(len(table["images"]))[:count]
    table["images"] = [table["images"][index] for index in sorted(order.tolist())]
    kept = {image["id"] for image in table["images"]}
    table["annotations"] = [one for one in table["annotations"] if one["image_id"] in kept]
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / "annotations" / "train.json").write_text(json.dumps(table))
    for split in ("val", "test"):
        (out / "annotations" / f"{split}.json").write_bytes((data / "annotations" / f"{split}.json").read_bytes())
    if not (out / "images").exists():
        (out / "images").symlink_to((data / "images").resolve())
    return out


def settings_of(start: str, bundle: Path) -> list[str]:
    """The recipe's keys that choose the start."""
    if start == "whole":
        return [f"train.start={json.dumps(str(bundle))}"]
    source = str(bundle / "weights.safetensors") if start == "backbone" else "random"
    return ['train.start="none"', f"model.backbone_weights={json.dumps(source)}"]


def test_ap(bundle: edgedetr.Bundle, data: Path) -> tuple[float, float]:
    """AP and AP50 of model.onnx on the split "test", points."""
    runner, manifest, found = OrtRunner(bundle.require("model.onnx"), threads=2), bundle.manifest, {}
    samples = load_split(data, "test")
    for sample in samples.samples:
        batch, geometry = prepare([image_files.decode(sample.path)], manifest.input)
        found[sample.image_id] = decode(runner.run(batch), geometry, manifest.classes, manifest.output)[0]
    result = evaluate(samples, found, by_size=False)
    return result.ap, result.ap50


def train_one(options: argparse.Namespace, start: str, count: int) -> dict[str, object]:
    """Train, export and measure one row; a finished one is read from its file."""
    name = f"{options.recipe.stem}-{start}-{count}"
    row = options.out / f"{name}.json"
    if row.exists():
        return dict(json.loads(row.read_text()))
    data = few_images(options.data, count, options.out / f"data-{count}")
    sets = [f"train.minutes={options.minutes}", *settings_of(start, options.start), *options.sets]
    bundle = edgedetr.train(data, options.out / f"{name}.bundle", recipe=options.recipe, sets=sets, resume=True)
    edgedetr.export(bundle)
    ap, ap50 = test_ap(bundle, data)
    found = {"recipe": options.recipe.stem, "start": start, "images": count, "ap": ap, "ap50": ap50}
    row.write_text(json.dumps(found))
    return found


def draw(rows: list[dict[str, object]], minutes: float, path: Path) -> None:
    """A line for each start: AP over the number of training images."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for start in STARTS:
        points = [(row["images"], row["ap"]) for row in rows if row["start"] == start]
        axes.plot(*zip(*points), marker="o", label=start)
    axes.set(xlabel="training images", ylabel="AP on test", title=f"{minutes:g} minutes of training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(title="start")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[25, 50, 100, 205])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in options.images:
        for start in STARTS:
            rows.append(train_one(options, start, count))
            print(rows[-1], file=sys.stderr, flush=True)
    draw(rows, options.minutes, options.out / "whole-start.svg")
    print(f"| images | {' | '.join(STARTS)} |\n|---|---|---|---|")
    for count in options.images:
        cells = [f"{row['ap']:.1f} / {row['ap50']:.1f}" for row in rows if row["images"] == count]
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
