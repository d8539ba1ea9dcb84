"""The search within budgets beside NNCF's accuracy control on the same float graph, as one Markdown table.

    python tests/benchmarks/search_table.py B --budgets 0.2 0.5 1.0 --target onnxruntime [--nncf 0.5] [--work DIR]

For every budget: the accepted placement, its drop and bound on the verify images, image-forwards (runs of any session
of ONNX Runtime or model in OpenVINO, also those inside NNCF), and the latency of all graphs in turns, one thread, time
of the CPU; for tensorrt it is what the search predicts. B is copied, and stays as it is. Every finished step is kept in
--work (default: B with .search-table), so the command can be repeated after an interruption. --images N takes only the
first N verify images for NNCF, to try the script.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import edgedetr
from edgedetr.bundle import Bundle
from edgedetr.data.images import decode
from edgedetr.errors import NotWithinTolerance
from edgedetr.evaluation.bootstrap import paired
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.reference import Reference
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.ranges import Ranges
from edgedetr.quantization.search.image_sets import image_sets
from edgedetr.quantization.search.workbench import TARGETS
from edgedetr.runtime.backends import base
from edgedetr.runtime.backends.openvino import OpenVinoRunner
from edgedetr.runtime.postprocess import decode as decode_outputs
from edgedetr.runtime.preprocess import prepare

ROUNDS = 60
HEAD = "| | budget | INT8 groups | AP lost | bound (95 %) | image-forwards | ms | of float32 |"


class Counted:
    """Counts runs of sessions of ONNX Runtime and of models in OpenVINO."""

    def __init__(self) -> None:
        self.runs = 0
        for kind in (onnxruntime.InferenceSession, OpenVinoRunner):
            kind.run = self._counting(kind.run)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(model: Any, *arguments: Any, **named: Any) -> Any:
            self.runs += 1
            return original(model, *arguments, **named)

        return run


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.exists():
        value = make()
        path.write_text(json.dumps(value, indent=1))
    return dict(json.loads(path.read_text()))


def ours(work: Path, budget: float, target: str, counted: Counted, threads: int) -> dict[str, Any]:
    """One budget in the copied bundle; what an earlier budget measured is found there, and not counted again."""
    bundle, before = work / "searched.bundle", counted.runs
    try:
        found = edgedetr.export(bundle, int8=True, max_drop=budget, target=target, threads=threads, progress=say).search
        note, ended = found.sentence(), found.outcome
        report = found.to_json()
    except NotWithinTolerance as error:
        note, ended = str(error), "none"
        report = json.loads((bundle / "results/search.json").read_text())
    row: dict[str, Any] = {"note": note, "outcome": ended, "forwards": counted.runs - before, "groups": None}
    if ended == "accepted":
        shutil.copy(bundle / TARGETS[target].artifact.file, work / f"ours-{budget:g}.onnx")
        accepted = next(one for one in report["candidates"] if one["name"] == report["accepted"])
        position = list(report["order"]).index(report["accepted"])
        look = [one for one in report["looks"] if one["candidate"] == position][-1]
        row |= {"groups": len(accepted["placement"]["int8"]), "drop": look["drop"], "upper": look["upper"]}
        row["predicted"] = f"{1 + accepted['predicted_ms'] / report['costs']['float_ms']:.2f} predicted"
    return row


def theirs(work: Path, budget: float, target: str, counted: Counted, images: int | None) -> dict[str, Any]:
    """nncf.quantize_with_accuracy_control: calibrates on our calibration images, validates on the verify images."""
    import nncf

    bundle = Bundle.open(work / "searched.bundle")
    samples = image_sets(bundle, edgedetr_config(bundle), None, 64).verify[:images]
    truth = Reference.load(bundle.require("reference.npz")).truth.subset([sample.image_id for sample in samples])
    manifest = bundle.manifest
    ranges = Ranges.load(bundle.require("ranges.json"))
    paths = choose_images(bundle, Path(ranges.source) if ranges.source else None, ranges.requested).paths

    def feed(path: Path) -> dict[str, np.ndarray]:
        return {"images": prepare([decode(path)], manifest.input)[0]}

    by_path = {sample.path: sample for sample in samples}

    def detect(model: onnx.ModelProto, chosen: Sequence[Any] = samples) -> dict[int, Any]:
        path = work / "nncf-now.onnx"
        onnx.save(model, path)
        runner, found = base.get(TARGETS[target].backend).open(path, threads=1), {}
        for sample in chosen:
            batch, geometry = prepare([decode(sample.path)], manifest.input)
            found[sample.image_id] = decode_outputs(runner.run(batch), geometry, manifest.classes, manifest.output)[0]
        return found

    def validate(model: onnx.ModelProto, data: Iterable[Path]) -> tuple[float, None]:
        chosen = [by_path[path] for path in data]  # NNCF ranks on subsets, down to single images
        part = truth.subset([sample.image_id for sample in chosen])
        ap = (evaluate(part, detect(model, chosen), by_size=False).ap or 0.0) / 100
        say(f"NNCF validates: AP {100 * ap:.2f} on {len(chosen)} images", 1, 1)
        return ap, None

    before, float_model = counted.runs, onnx.load(bundle.require("model.onnx"))
    result = nncf.quantize_with_accuracy_control(
        float_model,
        calibration_dataset=nncf.Dataset(paths, feed),
        validation_dataset=nncf.Dataset([sample.path for sample in samples], feed),
        validation_fn=validate,
        max_drop=budget / 100,
        drop_type=nncf.DropType.ABSOLUTE,
        model_type=nncf.ModelType.TRANSFORMER,
    )
    forwards = counted.runs - before
    onnx.save(result, work / f"nncf-{budget:g}.onnx")
    pair = [evaluate(truth, detect(model), by_size=False).matches for model in (float_model, result)]
    drop = paired(*pair, resamples=VerifyConfig().bootstrap)
    weighted = sum(node.op_type in ("Conv", "MatMul", "Gemm") for node in result.graph.node)
    return {
        "forwards": forwards,
        "drop": drop.drop,
        "upper": drop.upper,
        "note": f"{weighted} layers in all",
        "groups": None,
    }


def edgedetr_config(bundle: Bundle) -> Any:
    from edgedetr.exporting.export import recipe_settings

    return recipe_settings(bundle)[1]


def latencies(work: Path, target: str) -> dict[str, float]:
    """{graph: ms}, all in turns, one thread, time of the CPU: other processes disturb it less. {} where not here."""
    if not TARGETS[target].here:
        return {}
    bundle = Bundle.open(work / "searched.bundle")
    files = {"float32": bundle.require("model.onnx")}
    files |= {path.stem: path for path in sorted(work.glob("*.onnx")) if path.stem != "nncf-now"}
    runners = {name: base.get(TARGETS[target].backend).open(path, threads=1) for name, path in files.items()}
    contract = bundle.manifest.input
    batch = np.random.default_rng(0).uniform(0, 255, (1, 3, contract.height, contract.width)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(ROUNDS):
        for name, runner in runners.items():
            began = time.process_time()
            runner.run(batch)
            if number >= 3:
                times[name].append(time.process_time() - began)
    return {name: float(np.median(values)) * 1e3 for name, values in times.items()}


def say(what: str, done: int, total: int) -> None:
    if done == total:
        print(f"  {what}: {done}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.5, 1.0])
    arguments.add_argument("--nncf", type=float, nargs="*", default=[])
    arguments.add_argument("--target", choices=list(TARGETS), default="onnxruntime")
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--images", type=int)
    given = arguments.parse_args()
    work = given.work or given.bundle.with_suffix(".search-table")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "searched.bundle").exists():
        shutil.copytree(given.bundle, work / "copying")
        (work / "copying").rename(work / "searched.bundle")
    counted = Counted()
    rows = []
    for budget in sorted(given.budgets):
        row = kept(work / f"ours-{budget:g}.json", lambda b=budget: ours(work, b, given.target, counted, 1))
        rows.append((f"ours-{budget:g}", budget, row))
    for budget in given.nncf:
        row = kept(
            work / f"nncf-{budget:g}.json", lambda b=budget: theirs(work, b, given.target, counted, given.images)
        )
        rows.append((f"nncf-{budget:g}", budget, row))
    times = latencies(work, given.target)
    about = f", float32 {times['float32']:.2f} ms" if times else ""
    print(f"\n{given.bundle.name}, {given.target}{about}\n\n{HEAD}\n{'|---' * 8}|")
    for name, budget, row in rows:
        ms = times.get(name)
        drop, upper = (f"{row[key]:.2f}" if key in row else "-" for key in ("drop", "upper"))
        speed = f"- | {row.get('predicted', '-')}" if ms is None else f"{ms:.2f} | {ms / times['float32']:.2f}"
        print(f"| {name} | {budget:g} | {row['groups'] or '-'} | {drop} | {upper} | {row['forwards']} | {speed} |")
    print("\n" + "\n".join(f"- {name}: {row['note']}" for name, _, row in rows))


if __name__ == "__main__":
    main()
