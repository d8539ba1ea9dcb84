"""Which form of INT8 does a backend compute wrongly? One small graph per form, compared with the reference run.

    python tests/benchmarks/backend_kernels.py --backend onnxruntime-cuda [BUNDLE]

Prints decibels against ONNX Runtime on the CPU without optimizations, as a Markdown table. For ONNX Runtime also
without optimizations, which tells a wrong kernel from a wrong fusion. With a bundle, also the first node of its INT8
graphs at which the backend departs. Seconds on a CPU, about a minute on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantized_kernels import FLOOR_DB, GRAPHS, build, images_for

from edgedetr.artifacts import GRAPHS as ARTIFACTS
from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError
from edgedetr.quantization.localize import departure_of
from edgedetr.runtime.backends import base, onnxruntime, onnxruntime_cuda
from edgedetr.runtime.sqnr import sqnr_db


def measured(data: bytes, images: np.ndarray, backend: str, *, optimize: bool) -> float | str:
    """dB of `y` against the reference run, or why there is none."""
    expected = onnxruntime.tensors(data, images, ["y"], optimize=False)["y"]
    try:
        if optimize:
            read = base.get(backend).tensors
            if read is None:
                raise SystemExit(f"{backend} cannot read tensors")
            found = read(data, images, ["y"])["y"]
        else:
            opened = onnxruntime_cuda._session if "cuda" in backend else onnxruntime.open_session
            found = opened(data, None, False).run(["y"], {"images": images})[0]
    except EdgedetrError as error:
        return str(error)[:60]
    return sqnr_db(expected, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    options = parser.parse_args()
    if reason := base.get(options.backend).unavailable():
        raise SystemExit(reason)
    print(f"| form | {options.backend}, dB | without optimizations, dB | |\n|---|---|---|---|")
    for name, lines in GRAPHS.items():
        model = build(lines)
        data, images = model.SerializeToString(), images_for(model)
        whole = measured(data, images, options.backend, optimize=True)
        plain = measured(data, images, options.backend, optimize=False) if "onnx" in options.backend else ""
        wrong = not isinstance(whole, float) or whole < FLOOR_DB
        shown = [f"{value:.0f}" if isinstance(value, float) else value for value in (whole, plain)]
        print(f"| {name} | {shown[0]} | {shown[1]} | {'WRONG' if wrong else ''} |", flush=True)
    if options.bundle is not None:
        bundle = Bundle.open(options.bundle)
        contract = bundle.manifest.input
        images = np.random.default_rng(0).uniform(0, 255, (1, 3, contract.height, contract.width)).astype(np.float32)
        for graph in ARTIFACTS.values():
            if graph.precision == "int8" and graph.file in bundle.manifest.files:
                found = departure_of(bundle.require(graph.file), options.backend, images)
                print(f"\n{graph.file}: {found or 'as the reference run'}", flush=True)


if __name__ == "__main__":
    main()
