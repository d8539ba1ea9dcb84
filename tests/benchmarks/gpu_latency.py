"""What one image takes on an NVIDIA GPU: PyTorch, ONNX Runtime's CUDA provider and engines, timed alternately.

usage: python tests/benchmarks/gpu_latency.py BUNDLE [BUNDLE ...] [--rounds 200] [--json]

The image lies in the CPU's memory and the detections end there, for all sides. PyTorch runs the deployed graph, plain
and compiled with CUDA graphs. Engines are built strongly typed from the bundle's graphs by TensorRT, or by TensorRT-RTX
where that alone is installed. "off" is the largest difference of a score from float32 (no TF32) in PyTorch, 0..1, over
queries in the order they come.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import numpy as np
import torch

from edgedetr.artifacts import ENGINE_GRAPHS
from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError
from edgedetr.models.deploy import load_bundle_model
from edgedetr.runtime.backends.onnxruntime_cuda import OrtCudaRunner
from edgedetr.runtime.latency import rotated, timed
from edgedetr.runtime.tensorrt import build, gpu
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.trt_runner import Session

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
WARM = 20


def pytorch(bundle: Bundle, kind: torch.dtype, *, compiled: bool) -> Run:
    graph = load_bundle_model(bundle)[1].cuda()
    model = torch.compile(graph, mode="reduce-overhead") if compiled else graph

    @torch.inference_mode()
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.autocast("cuda", kind, enabled=kind != torch.float32):
            logits, boxes = model(torch.from_numpy(images).cuda())
        return logits.float().cpu().numpy(), boxes.float().cpu().numpy()

    return run


def onnx_runtime(bundle: Bundle, name: str) -> Run:
    runner = OrtCudaRunner(bundle.require(name))

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = runner.run(images)
        return found.logits, found.boxes

    return run


def engine(bundle: Bundle, precision: str) -> Run:
    device = gpu.probe()
    plan = build.build_serialized(
        bundle.require(ENGINE_GRAPHS[precision].file).read_bytes(),
        BuildArguments(precision, (1, 1, 1), 4096, 3, "strong"),
        device,
        what=precision,
    )
    session = Session(plan.data, what=precision)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = session.run({"images": images})
        return found["logits"], found["boxes"]

    return run


def sides(bundle: Bundle) -> dict[str, Callable[[], Run]]:
    return {
        "pytorch fp32": lambda: pytorch(bundle, torch.float32, compiled=False),
        "pytorch fp16": lambda: pytorch(bundle, torch.float16, compiled=False),
        "pytorch fp16 compiled": lambda: pytorch(bundle, torch.float16, compiled=True),
        "onnxruntime fp32": lambda: onnx_runtime(bundle, "model.onnx"),
        "onnxruntime fp16": lambda: onnx_runtime(bundle, "model.fp16.onnx"),
        "onnxruntime int8": lambda: onnx_runtime(bundle, "model.int8.onnx"),
        **{
            f"engine {precision}": (lambda precision=precision: engine(bundle, precision))
            for precision in ENGINE_GRAPHS
        },
    }


def measure(bundle: Bundle, rounds: int) -> list[dict[str, object]]:
    size = bundle.manifest.input
    torch.backends.cudnn.allow_tf32 = False
    images = np.random.default_rng(0).integers(0, 256, (1, 3, size.height, size.width)).astype(np.float32)
    runs, rows = {}, []
    for name, make in sides(bundle).items():
        try:
            run = make()
            found = run(images)
            for _ in range(WARM):
                run(images)
            runs[name] = run, found
        except (EdgedetrError, RuntimeError) as error:  # one that is not there or fails must not hide the others
            print(f"{name}: {type(error).__name__}: {str(error)[:600]}", file=sys.stderr, flush=True)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in rotated(list(runs), turn):
            took[name].append(1e3 * timed(lambda run=runs[name][0]: run(images)))
    reference = 1 / (1 + np.exp(-runs["pytorch fp32"][1][0])) if "pytorch fp32" in runs else None
    for name, (_run, found) in runs.items():
        off = None if reference is None else float(np.abs(1 / (1 + np.exp(-found[0])) - reference).max())
        p50, p95 = np.percentile(took[name], [50, 95])
        rows.append(
            {
                "bundle": str(bundle.path),
                "model": bundle.manifest.model,
                "side": name,
                "p50_ms": p50,
                "p95_ms": p95,
                "off": off,
            }
        )
        print(f"{bundle.path.name:24}{name:24}{p50:9.3f} ms{p95:9.3f} ms  off {off}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="+", type=Bundle.open)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for bundle in options.bundle for row in measure(bundle, options.rounds)]
    if options.json:
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
