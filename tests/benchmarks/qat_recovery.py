"""How much of INT8's drop quantization-aware training gets back, on one bundle and one policy, and what it took.

usage: python tests/benchmarks/qat_recovery.py BUNDLE --out DIR [--policy everything] [--artifact int8-cpu]
       [--quant quant.observer=minmax ...] [--set train.lr=1e-5 ...]

The hard case is a policy that makes everything INT8, the heads too. The AP of the verify split is measured against the
float detector of BUNDLE, in ONNX Runtime: of INT8 as export makes it (with the values of --quant), of INT8 after
training, and of the float form of the trained weights. BUNDLE itself is not changed. A run that was interrupted
goes on: what is in DIR is kept. The last two lines are a head and a row of a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from edgedetr import api
from edgedetr.bundle import Bundle
from edgedetr.recipe import Recipe

ONNX, BACKEND = "onnx", "onnxruntime"
COPIED = ("bundle.json", "recipe.toml", "weights.safetensors", "reference.npz", "model.onnx", "ranges.json")


def calibrated(source: Bundle, folder: Path, sets: list[str]) -> Bundle:
    """A copy of a bundle, quantized with settings of [quant]."""
    if not (folder / "bundle.json").exists():
        folder.mkdir(parents=True)
        for name in COPIED[::-1]:  # bundle.json last: with it, the copy is whole
            if (source.path / name).exists():
                shutil.copy2(source.path / name, folder / name)
    copy = Bundle.open(folder)
    api.export(copy, int8=True, sets=sets)
    return copy


def measured(bundle: Bundle, artifacts: list[str]) -> dict[str, dict[str, float]]:
    """{artifact: ap, drop, drop_upper95}, measured once."""
    path = bundle.path / "results" / "qat_recovery.json"
    if not path.exists():
        verdict = api.verify(bundle, artifacts=artifacts, backends=[BACKEND])
        stages = [stage for stage in verdict.to_json()["stages"] if stage["name"] in artifacts]
        kept = ("ap", "drop", "drop_upper95")
        found = {stage["name"]: {key: stage[key] for key in kept} for stage in stages}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy", default="everything")
    parser.add_argument("--artifact", default="int8-cpu", choices=("int8-cpu", "int8"))
    parser.add_argument("--quant", action="append", default=[], metavar="quant.KEY=VALUE")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    given = parser.parse_args()
    source = Bundle.open(given.bundle)
    before = calibrated(source, given.out / "calibrated.bundle", [f"quant.policy={given.policy}", *given.quant])
    first = measured(before, [given.artifact])
    trained, seconds = given.out / "trained.bundle", given.out / "seconds.json"
    if not seconds.exists():
        begun, cpu = time.monotonic(), time.process_time()
        resume = (trained / "train" / "last.safetensors").exists()
        api.train_qat(before, trained, sets=given.sets, resume=resume)
        seconds.write_text(json.dumps({"wall": time.monotonic() - begun, "cpu": time.process_time() - cpu}))
    after = Bundle.open(trained)
    api.export(after, int8=True)
    second = measured(after, [ONNX, given.artifact])
    took = json.loads(seconds.read_text())
    drop, left = first[given.artifact], second[given.artifact]
    share = 1 - left["drop"] / drop["drop"] if drop["drop"] else float("nan")
    epochs = [Recipe.from_bundle(bundle).train.epochs for bundle in (source, after)]
    head = ["bundle", "policy", "INT8 drop", "after training", "recovered", "float of it", "epochs", "CPU s"]
    row = [
        given.bundle.name,
        ", ".join([given.policy, *given.quant]),
        f"{drop['drop']:.2f} (<= {drop['drop_upper95']:.2f})",
        f"{left['drop']:.2f} (<= {left['drop_upper95']:.2f})",
        f"{share:.0%}",
        f"{second[ONNX]['drop']:.2f}",
        f"{epochs[1]} after {epochs[0]}",
        f"{took['cpu']:.0f}",
    ]
    print("| " + " | ".join(head) + " |\n| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
