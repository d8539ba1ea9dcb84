"""Quantize a bundle with a peer: the same model.onnx, the same images and the same pixels as our INT8."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import onnx
from onnx import ModelProto

from edgedetr.artifacts import ONNX, QUANTIZERS, RANGES
from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError, MissingDependency
from edgedetr.lint.lint import lint
from edgedetr.onnx_graph.io import read_bundle_graph
from edgedetr.packages import install
from edgedetr.progress import Progress
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.peers.peer import Peer
from edgedetr.quantization.peers.registry import PEERS
from edgedetr.quantization.peers.worker import Request
from edgedetr.quantization.ranges import Ranges
from edgedetr.runtime.backends.base import MADE_BY, PEER_NOTE

log = logging.getLogger(__name__)

WORKER = "edgedetr.quantization.peers.worker"
LONGEST = 300  # characters of a peer's message in ours


def quantize_with(bundle: Bundle, name: str, *, progress: Progress | None = None) -> None:
    """Write the INT8 graph of the peer `name`, unless the bundle has it from the same graph, images and settings.

    The images are those of ranges.json, so our INT8 is written first. The file is only measured: a finding of lint is
    recorded in it and does not keep it out.

    Errors: MissingDependency; ExportError where the images are gone or the peer fails. Nothing is then written.
    """
    peer, artifact = PEERS[name], QUANTIZERS[name]
    require_installed(peer)
    ranges = Ranges.load(bundle.require(RANGES.file))
    about = {
        "quantizer": peer.name,
        "package": peer.package,
        "version": version(peer.package),
        "settings": peer.settings,
        "image_list": ranges.image_list,
        "images": len(ranges.images),
    }
    made_by = json.dumps(about)
    if bundle.has(artifact.file) and _properties(read_bundle_graph(bundle.require(artifact.file))) == made_by:
        return
    paths = _images(bundle, ranges, name)
    if progress:
        progress(name, 0, 1)
    with tempfile.TemporaryDirectory() as folder:  # some peers write beside the file that they read
        model = Path(folder, "float.onnx")
        model.write_bytes(bundle.require(ONNX.file).read_bytes())
        result = run_peer(peer, model, paths, asdict(bundle.manifest.input))
    note = lint_note(result)
    onnx.helper.set_model_props(result, {MADE_BY: made_by, PEER_NOTE: f"{peer.package} {about['version']}; {note}"})
    with bundle.add(artifact.file, stage=artifact.step, made_from=artifact.made_from) as temporary:
        temporary.write_bytes(result.SerializeToString(deterministic=True))
    if progress:
        progress(name, 1, 1)
    log.info("%s: %s", artifact.file, note)


def require_installed(peer: Peer) -> None:
    """Errors: MissingDependency that names every module that is missing."""
    missing = [module for module in peer.needs if find_spec(module) is None]
    if missing:
        raise MissingDependency(
            f'--quantizer {peer.name}: not installed: {", ".join(missing)} (this project\'s extra "peers" lists them); '
            f"run: {install(missing)}"
        )


def run_peer(peer: Peer, model: Path, images: list[Path], contract: dict[str, object]) -> ModelProto:
    """The graph that the peer makes of the file `model`, whose folder it may write to. Errors: ExportError."""
    out = model.with_name("peer.onnx")
    request = Request(peer.name, str(model), str(out), [str(path.resolve()) for path in images], contract)
    done = subprocess.run(
        [sys.executable, "-m", WORKER],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        check=False,
        cwd=model.parent,
    )
    if done.returncode or not out.is_file():
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise ExportError(
            f"the quantizer {peer.name} ({peer.package} {version(peer.package)}) {how}: {said.strip()[:LONGEST]}; "
            "its graph was not written, ours are; leave --quantizer out, or name another one"
        )
    result: ModelProto = read_bundle_graph(out, ExportError)
    inputs, outputs = [item.name for item in result.graph.input], [item.name for item in result.graph.output]
    if inputs != ["images"] or set(outputs) != {"logits", "boxes"}:
        raise ExportError(
            f"the quantizer {peer.name} changed the graph's interface to {inputs} -> {outputs}; expected images -> "
            "logits, boxes; its graph was not written"
        )
    return result


def lint_note(model: ModelProto) -> str:
    """Whether TensorRT would take the graph, in one sentence."""
    errors = [finding for finding in lint(model) if finding.worst == "error"]
    if not errors:
        return "lint finds no error for TensorRT"
    return f"TensorRT refuses it: {len(errors)} lint error{'s' * (len(errors) > 1)}, the first: {errors[0].reason}"


def _properties(model: ModelProto) -> str:
    return next((item.value for item in model.metadata_props if item.key == MADE_BY), "")


def _images(bundle: Bundle, ranges: Ranges, name: str) -> list[Path]:
    """The images of ranges.json. Errors: ExportError where they are not here or have changed."""
    found = choose_images(bundle, Path(ranges.source) if ranges.source else None, ranges.requested)
    if found.images != ranges.images:
        raise ExportError(
            f"{bundle.path}: the calibration images have changed since {RANGES.file} was made, so {name} would see "
            f"others than our INT8; run: edgedetr export {bundle.path} --int8 --calib DIR --quantizer {name}"
        )
    return list(found.paths)
