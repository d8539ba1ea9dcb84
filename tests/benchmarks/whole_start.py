"""What a start from a whole detector gains: trainings of equal epochs on few images, from three kinds of weights.

usage: python tests/benchmarks/whole_start.py --recipe R.toml --start BUNDLE --data BCCD --out FOLDER
       [--images 25 50 100 205] [--minutes 5 | --epochs N] [--threads 1] [--set key=value ...]

Each training takes the first images of one random order of the train split and one start: "whole" (every weight of the
bundle but the class rows), "backbone" (its backbone alone) or "random". For every number of images, the first start
measures how many epochs the minutes have time for, and the others are given that number: same network and images, so
equal epochs are equal minutes. Early stop is off. The best epoch is chosen on the split "val"; AP is of the split
"test". Finished trainings are kept, so that the script can be stopped; two of them with other --images or recipes may
share FOLDER. The last lines are a Markdown table; FOLDER/RECIPE-whole-start.svg is its chart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from recorded_training import Length, Row, add_options, train_row

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


def rows_of(options: argparse.Namespace, count: int) -> dict[str, Row]:
    """The trainings on so many images, by start."""
    data = few_images(options.data, count, options.out / f"{options.recipe.stem}-{count}-images")
    length, rows = Length(options.minutes, options.epochs), {}
    for start in STARTS:
        rows[start] = train_row(
            f"{options.recipe.stem}-{start}-{count}",
            data,
            options.recipe,
            ["train.patience=0", *settings_of(start, options.start), *options.sets],
            length=length,
            out=options.out,
            threads=options.threads,
        )
        length = Length(options.minutes, rows[start].epochs)
    return rows


def draw(table: dict[int, dict[str, Row]], path: Path) -> None:
    """A line for each start: AP over the number of training images."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for start in STARTS:
        axes.plot(list(table), [rows[start].ap for rows in table.values()], marker="o", label=start)
    axes.set(xlabel="training images", ylabel="AP on test", title="Equal epochs from three starts", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(title="start")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[25, 50, 100, 205])
    parser.add_argument("--set", dest="sets", action="append", default=[])
    add_options(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = {count: rows_of(options, count) for count in options.images}
    draw(table, options.out / f"{options.recipe.stem}-whole-start.svg")
    print(f"AP / AP50 on test\n\n| images | epochs | {' | '.join(STARTS)} |\n|---|---|---|---|---|")
    for count, rows in table.items():
        cells = [f"{rows[start].ap:.1f} / {rows[start].ap50:.1f}" for start in STARTS]
        print(f"| {count} | {rows[STARTS[0]].epochs} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
