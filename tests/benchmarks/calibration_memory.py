"""Peak memory of `edgedetr export --int8` at 640 px with random weights, step by step; the limit is 1.5 GB.

usage: PYTHONPATH=. python tests/benchmarks/calibration_memory.py [--member rt_detr detr] [--images 512]

The first export writes model.onnx in a process of its own. The measured process then calibrates on that many images and
writes both INT8 graphs; ru_maxrss is read whenever a step reports progress. Exit code 1 where it exceeds the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

LIMIT_MB = 1500
PIXELS = 640
CONFIGS = {"rt_detr": {}, "detr": {"encoder_layers": 6, "decoder_layers": 6}}


def make(folder: Path, member: str) -> Path:
    """A bundle with random weights and model.onnx."""
    import torch
    from safetensors.torch import save_file

    from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
    from edgedetr.exporting.config import ExportConfig
    from edgedetr.exporting.export import export
    from edgedetr.models import FAMILY, build

    config = FAMILY[member].config(backbone_weights="random", **CONFIGS.get(member, {}))
    torch.manual_seed(0)
    detector = build(member, config, 3)
    classes = tuple(ClassInfo(n, n, f"class {n}") for n in range(3))
    manifest = Manifest(
        member, classes, InputContract(PIXELS, PIXELS), OutputContract(config.activation), config=asdict(config)
    )
    bundle = Bundle.create(folder / f"{member}.bundle", manifest)
    with bundle.add("weights.safetensors", stage="train") as path:
        save_file(detector.state_dict(), path)
    export(bundle, config=ExportConfig())
    return bundle.path


def images(folder: Path, count: int) -> Path:
    """Smooth random images, no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg")
    return folder


def quantize(bundle: Path, calib: Path, count: int) -> None:
    """Calibrate and quantize here, and print {step: peak in MB so far}."""
    from edgedetr.exporting.config import ExportConfig
    from edgedetr.exporting.export import export
    from edgedetr.quantization.config import QuantConfig

    peaks: dict[str, float] = {}

    def note(step: str, done: int = 0, total: int = 0) -> None:
        peaks[step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576

    note("start")
    export(bundle, int8=True, calib=calib, config=ExportConfig(), quant=QuantConfig(images=count), progress=note)
    note("end")
    print(json.dumps(peaks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--member", nargs="+", default=["rt_detr", "detr"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        what, first, second = given.step
        if what == "make":
            make(Path(first), second)
        else:
            quantize(Path(first), Path(second), given.images)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        calib = images(Path(folder, "calib"), given.images)
        for member in given.member:
            run("make", folder, member, given.images)
            peaks = json.loads(run("quantize", str(Path(folder, f"{member}.bundle")), str(calib), given.images))
            worst = max(worst, peaks["end"])
            steps = ", ".join(f"{step} {peak:.0f}" for step, peak in peaks.items())
            print(f"{member}, {given.images} images: peak {peaks['end']:.0f} MB ({steps})", flush=True)
    return int(worst > LIMIT_MB)


def run(step: str, first: str, second: str, count: int) -> str:
    """The last line that one step prints, in a process of its own."""
    command = [sys.executable, __file__, "--images", str(count), "--step", step, first, second]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
