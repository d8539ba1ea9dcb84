"""Our INT8 beside other quantizers': AP drop with its bound, and latency in turns, as one Markdown table.

usage: PYTHONPATH=. python tests/benchmarks/peers_table.py BUNDLE... [--quantizer NAME...] [--rounds 50] [--threads 2]

For each bundle: export with every quantizer that is installed, verify, and time each quantizer's graph in a process of
its own in turns with model.onnx and our INT8 for the same backend (two or three models at a time: OpenVINO's threads
of more disturb each other). Everything is kept in the bundle, so the same command resumes what was interrupted; times
are in BUNDLE/results/peers-times.json. Latency needs an idle machine. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import edgedetr
from edgedetr.artifacts import INT8_CPU, ONNX, OPENVINO, ORT, QUANTIZERS, VERDICT
from edgedetr.bundle import Bundle
from edgedetr.errors import EdgedetrError, MissingDependency
from edgedetr.evaluation.bench import bench
from edgedetr.evaluation.verdict import read_verdict
from edgedetr.quantization.peers.quantize_with import require_installed
from edgedetr.quantization.peers.registry import PEERS
from edgedetr.reporting.markdown import Timings, markdown_table
from edgedetr.storage.atomic import atomic_write

OURS = {ORT: INT8_CPU, OPENVINO: INT8_CPU}  # the faster one on a CPU with an 8-bit dot product


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def exported(path: Path, quantizers: list[str]) -> list[str]:
    """The quantizers whose graph the bundle has afterwards."""
    found = []
    for name in quantizers:
        try:
            require_installed(PEERS[name])
            edgedetr.export(path, int8=True, quantizers=[name])
            found.append(name)
            say(f"{path}: {name} is there")
        except MissingDependency as error:
            say(f"{path}: {error}")
        except EdgedetrError as error:
            say(f"{path}: {name} failed: {error}")
    return found


def verified(path: Path, quantizers: list[str], threads: int | None) -> None:
    """A verdict over our graphs and those of the quantizers; a stored one that is up to date is kept."""
    bundle = Bundle.open(path)
    if bundle.has(VERDICT.file):
        rows = read_verdict(bundle.require(VERDICT.file), path).artifacts
        if set(quantizers) <= {row.quantizer for row in rows}:
            return
    say(f"{path}: verify")
    edgedetr.verify(path, threads=threads)


def times(path: Path, quantizers: list[str], rounds: int, threads: int | None) -> Timings:
    """Milliseconds by (artifact, backend).

    Each process gives ratios to its own float32; they are multiplied by the median float32 of all processes.
    """
    verdict = read_verdict(Bundle.open(path).require(VERDICT.file), path)
    ran = {(row.quantizer, row.backend) for row in verdict.artifacts if row.p50_ms is not None}
    record = path / "results" / "peers-times.json"
    kept = json.loads(record.read_text()) if record.is_file() else {}
    found: dict[tuple[str, str], list[float]] = {}
    whole: dict[str, list[float]] = {}
    for backend, ours in OURS.items():
        for name in [one for one in quantizers if (one, backend) in ran]:
            key = measurement_key(Bundle.open(path), name, backend, rounds, threads)
            if key not in kept:
                say(f"{path}: {name} in {backend}")
                kept[key] = timed_apart(path, name, backend, rounds, threads)
                with atomic_write(record) as temporary:
                    temporary.write_text(json.dumps(kept, indent=1) + "\n")
            float32 = kept[key][ONNX.id]
            whole.setdefault(backend, []).append(float32)
            for artifact in (ours.id, QUANTIZERS[name].id):
                found.setdefault((artifact, backend), []).append(kept[key][artifact] / float32)
    milliseconds = {(ONNX.id, backend): float(np.median(values)) for backend, values in whole.items()}
    ratios = {pair: float(np.median(values)) * milliseconds[ONNX.id, pair[1]] for pair, values in found.items()}
    return {**milliseconds, **ratios}


def measurement_key(bundle: Bundle, name: str, backend: str, rounds: int, threads: int | None) -> str:
    """What a measurement depends on: the three files, and how it is made."""
    files = (ONNX.file, OURS[backend].file, QUANTIZERS[name].file)
    digests = " ".join(bundle.manifest.files[file].sha256[:12] for file in files)
    return f"{name} {backend} {digests} rounds {rounds} threads {threads}"


def timed_apart(path: Path, name: str, backend: str, rounds: int, threads: int | None) -> dict[str, float]:
    """p50 in milliseconds by artifact, measured in another process."""
    command = [sys.executable, __file__, str(path), "--time", name, backend, "--rounds", str(rounds)]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def time_here(path: Path, name: str, backend: str, rounds: int, threads: int | None) -> None:
    artifacts = [ONNX.id, OURS[backend].id, QUANTIZERS[name].id]
    found = bench(path, artifacts=artifacts, backends=[backend], rounds=rounds, threads=threads)
    print(json.dumps({timing.name: timing.p50_ms for timing in found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--quantizer", nargs="+", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--time", nargs=2, metavar=("QUANTIZER", "BACKEND"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.time:
        time_here(given.bundles[0], *given.time, given.rounds, given.threads)
        return
    measured = []
    for path in given.bundles:
        there = exported(path, given.quantizer)
        verified(path, there, given.threads)
        measured.append(times(path, there, given.rounds, given.threads))
    print(markdown_table(given.bundles, measured), end="")


if __name__ == "__main__":
    main()
