"""How much faster INT8 is than float32: every member at 640 px with random weights, timed alternately in one process.

usage: python tests/benchmarks/int8_latency.py --data DIR [--member rt_detr detr] [--threads 2] [--rounds 30] [--json]

Accuracy means nothing here (random weights); ranges come from a few images of DIR. Wall time is what counts and needs
an idle machine; CPU time (of one thread: --threads 1 --cpu-time) gives nearly the same ratio on a busy one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.data.layouts import load
from edgedetr.exporting.config import ExportConfig
from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.models import FAMILY, build
from edgedetr.models.deploy import load_bundle_model
from edgedetr.models.member_config import TransformerConfig
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.quantize import quantize
from edgedetr.runtime.backends.onnxruntime import OrtRunner
from edgedetr.runtime.backends.openvino import OpenVinoRunner

CONFIGS = {"rt_detr": {}, "detr": {"encoder_layers": 3, "decoder_layers": 3}}
# The goal of the project: int8 / float32 on the same backend, on a CPU with an 8-bit dot product.
LIMITS = {
    ("rt_detr", "onnxruntime"): 0.40,
    ("detr", "onnxruntime"): 0.33,
    ("rt_detr", "openvino"): 0.33,
    ("detr", "openvino"): 0.28,
}
WARM = 3  # first runs allocate memory and choose kernels


def make(
    path: Path, member: str, config: TransformerConfig, classes: tuple[ClassInfo, ...], size: InputContract, data: Path
) -> Bundle:
    """A bundle with random weights and model.onnx; `data` is what ranges come from."""
    torch.manual_seed(0)
    model = build(member, config, len(classes))
    bundle = Bundle.create(
        path,
        Manifest(
            model=member,
            classes=classes,
            input=size,
            output=OutputContract(config.activation),
            config=asdict(config),
            data=DataRecord(str(data), "test", "train"),
        ),
    )
    with bundle.add("weights.safetensors", stage="train") as temporary:
        save_file(model.state_dict(), temporary)
    _, graph = load_bundle_model(bundle)
    with bundle.add("model.onnx", stage="export", made_from=["weights.safetensors"]) as temporary:
        write_onnx(graph, temporary, opset=ExportConfig().opset)
    return bundle


def make_member(path: Path, member: str, data: Path, pixels: int, images: int) -> Bundle:
    """A bundle of a member of CONFIGS for the classes of `data`, with both INT8 graphs."""
    config = FAMILY[member].config(backbone_weights="random", **CONFIGS.get(member, {}))
    bundle = make(path, member, config, load(data, "train").classes, InputContract(pixels, pixels), data)
    quantize(bundle, config=QuantConfig(images=images))
    return bundle


def timed(runs: dict[str, Callable[[], object]], rounds: int, cpu_time: bool) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other in changing order."""
    clock = time.process_time if cpu_time else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(WARM + rounds):
        for name in order if turn % 2 else order[::-1]:
            start = clock()
            runs[name]()
            if turn >= WARM:
                found[name].append((clock() - start) * 1e3)
    return found


def measure(bundle: Bundle, threads: int, rounds: int, cpu_time: bool) -> list[dict[str, object]]:
    """One backend after the other; two models alive at a time."""
    size = bundle.manifest.input
    images = np.random.default_rng(0).integers(0, 256, (1, 3, size.height, size.width)).astype(np.float32)
    rows = []
    for backend, kind, quantized in (
        ("onnxruntime", OrtRunner, "model.int8-cpu.onnx"),
        ("openvino", OpenVinoRunner, "model.int8-cpu.onnx"),
    ):
        runners = {name: kind(bundle.require(name), threads=threads) for name in ("model.onnx", quantized)}
        runs = {name: (lambda runner=runner: runner.run(images)) for name, runner in runners.items()}
        found = {name: float(np.median(values)) for name, values in timed(runs, rounds, cpu_time).items()}
        ratio = found[quantized] / found["model.onnx"]
        limit = LIMITS.get((bundle.manifest.model, backend))
        rows.append(
            {
                "model": bundle.manifest.model,
                "backend": backend,
                "file": quantized,
                "float_ms": found["model.onnx"],
                "int8_ms": found[quantized],
                "ratio": ratio,
                "limit": limit,
                "passed": limit is None or ratio <= limit,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a labeled image set, for ranges")
    parser.add_argument("--member", nargs="+", default=list(CONFIGS), choices=sorted(FAMILY))
    parser.add_argument("--pixels", type=int, default=640)
    parser.add_argument("--images", type=int, default=8, help="calibration images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process instead of wall time")
    parser.add_argument("--keep", type=Path, help="folder for the bundles; one that is there is used again")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        for member in options.member:
            path = folder / f"{member}.bundle"
            bundle = (
                Bundle.open(path)
                if (path / "bundle.json").exists()
                else make_member(path, member, options.data, options.pixels, options.images)
            )
            rows += measure(bundle, options.threads, options.rounds, options.cpu_time)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'model':10}{'backend':14}{'file':22}{'float ms':>10}{'int8 ms':>10}{'ratio':>8}{'limit':>8}")
        for row in rows:
            print(
                f"{row['model']:10}{row['backend']:14}{row['file']:22}{row['float_ms']:10.1f}{row['int8_ms']:10.1f}"
                f"{row['ratio']:8.2f}{row['limit'] or float('nan'):8.2f}"
            )
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
