"""What each setting of quantization costs: observers with and without bias correction, on one split of a bundle's data.

usage: python tests/benchmarks/int8_settings.py BUNDLE [--split val] [--observer mse minmax percentile=99.99 ...]
       [--images 200] [--threads 2] [--json]

Nothing in the bundle changes. Settings are chosen on a split that neither trains nor verifies: "val", not the one that
the verdict is measured on. Every row is one graph on one backend; the drop of AP and the distance of the detections are
against model.onnx in ONNX Runtime, on the same images. The distance needs no labels: detections above 0.3 matched one
to one. "exact" is ONNX Runtime without optimizations, which computes as the graph is written. OpenVINO is left out on a
CPU that saturates its INT8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import ModelProto

from edgedetr.bundle import Bundle
from edgedetr.data import images as image_files
from edgedetr.data.detection_set import DetectionSet
from edgedetr.data.layouts import load as load_split
from edgedetr.evaluation.agreement import compare_detections
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.exporting.settings import settings
from edgedetr.onnx_graph.fp16 import activation_absmax, convert_to_fp16
from edgedetr.onnx_graph.fp16_simulation import simulate_fp16
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.bias_correction import IMAGES, BiasCorrection
from edgedetr.quantization.calibration import observe
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.quantization.qdq import insert_qdq
from edgedetr.quantization.quantize import ABSMAX_IMAGES, read_onnx
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import share_pool_ranges
from edgedetr.quantization.target import CPU, TENSORRT, Target, weight_bits
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.backends.openvino import OpenVinoRunner
from edgedetr.runtime.cpu import int8_saturates
from edgedetr.runtime.postprocess import Detections, decode
from edgedetr.runtime.preprocess import prepare

OBSERVERS = ("mse", "percentile=99.99", "percentile=99.999", "minmax")


class GraphWriter:
    """The quantized graphs of a bundle; activations are observed once, for all observers."""

    def __init__(self, bundle: Bundle) -> None:
        self.config = settings(bundle, ()).quant
        self.policy = load_policy(self.config.policy)
        self.contract = bundle.manifest.input
        self.model: ModelProto = split_concats(read_onnx(bundle.require("model.onnx")))
        self.graph = GraphIndex(self.model)
        self.plan = make_plan(self.graph, self.policy)
        self.paths = choose_images(bundle, None, self.config.images).paths
        self.histograms = observe(self.model, tensors_to_observe(self.graph, self.plan), self.paths, self.contract)
        self.correction = BiasCorrection(self.graph, self.plan.layers, lambda: self.batches(IMAGES))
        self.absmax = activation_absmax(self.graph, self.batches(ABSMAX_IMAGES))

    def batches(self, count: int) -> Iterator[np.ndarray]:
        for i in np.unique(np.linspace(0, len(self.paths) - 1, count).round().astype(int)):
            yield prepare([image_files.decode(self.paths[i])], self.contract)[0]

    def make(self, observer: str, corrected: bool, target: Target) -> bytes:
        kind, _, percentile = observer.partition("=")
        amax = {name: found.amax(kind, float(percentile or 100)) for name, found in self.histograms.items()}
        amax = share_pool_ranges(self.model, amax)
        result = insert_qdq(self.graph, self.plan, amax, target)
        if corrected:
            result = insert_qdq(self.graph, self.plan, amax, target, self.correction.shifts(result, self.plan))
        return (
            convert_to_fp16(result, self.absmax, self.policy.float32_nodes(result)).model if target.fp16 else result
        ).SerializeToString()


def rows(writer: GraphWriter, observer: str, corrected: bool, folder: Path, threads: int) -> dict[str, OrtRunner]:
    """{name of a graph on a backend: what runs it}."""
    found = {}
    path = folder / "int8.onnx"
    path.write_bytes(writer.make(observer, corrected, TENSORRT))
    found["int8, exact"] = OrtRunner(simulate_fp16(path), threads=threads, optimize=False)
    if not int8_saturates():
        found["int8, openvino"] = OpenVinoRunner(path, threads=threads)
    bits = weight_bits("auto")
    cpu = writer.make(observer, corrected, replace(CPU, weight_bits=bits))
    found[f"int8-cpu {bits} bit, onnxruntime"] = OrtRunner(cpu, threads=threads)
    return found


def detect(bundle: Bundle, runners: dict[str, OrtRunner], samples: DetectionSet) -> dict[str, dict[int, Detections]]:
    """{runner: {image id: detections}}; every image is read once."""
    manifest = bundle.manifest
    found: dict[str, dict[int, Detections]] = {name: {} for name in runners}
    for sample in samples.samples:
        batch, geometry = prepare([image_files.decode(sample.path)], manifest.input)
        for name, runner in runners.items():
            found[name][sample.image_id] = decode(runner.run(batch), geometry, manifest.classes, manifest.output)[0]
    return found


def head(*names: str) -> str:
    """The first two lines of a Markdown table."""
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--observer", nargs="+", default=OBSERVERS)
    parser.add_argument("--images", type=int, default=0, help="only so many of the split; 0 = all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    dataset = load_split(bundle.manifest.data.path, options.split)
    if options.images:
        dataset = replace(dataset, samples=dataset.samples[: options.images])
    writer = GraphWriter(bundle)
    exact = detect(bundle, {"onnx": OrtRunner(bundle.require("model.onnx"), threads=options.threads)}, dataset)["onnx"]
    before = evaluate(dataset, exact, by_size=False).ap
    print(f"model.onnx: AP {before:.2f} on {len(dataset)} images of {options.split}", file=sys.stderr)
    names = ("observer", "bias correction", "graph", "drop", "matched", "spurious", "score", "box px")
    print(head(*names), file=sys.stderr)
    table = []
    for observer in options.observer:
        for corrected in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                runners = rows(writer, observer, corrected, Path(folder), options.threads)
                for name, found in detect(bundle, runners, dataset).items():
                    drop = before - evaluate(dataset, found, by_size=False).ap
                    agreement = compare_detections(exact, found)
                    table.append(
                        {
                            "observer": observer,
                            "corrected": corrected,
                            "graph": name,
                            "drop": drop,
                            **agreement.to_json(),
                        }
                    )
                    fractions = (agreement.matched, agreement.spurious, agreement.score_mean, agreement.box_mean)
                    cells = (
                        observer,
                        "on" if corrected else "off",
                        name,
                        f"{drop:.2f}",
                        *("-" if fraction is None else f"{fraction:.4f}" for fraction in fractions),
                    )
                    print("| " + " | ".join(cells) + " |", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"ap": before, "images": len(dataset), "split": options.split, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
