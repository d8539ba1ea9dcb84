"""edgedetr verify: what each file of a bundle lost against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedetr.artifacts import BACKENDS, RECIPE
from edgedetr.bundle import Bundle
from edgedetr.cli._options import bundle_argument, data_option, json_option, open_bundle, threads_option
from edgedetr.cli._output import Progress, as_json, progress_bars, say, table
from edgedetr.errors import BundleError, NotWithinTolerance

if TYPE_CHECKING:
    from edgedetr.data.detection_set import DetectionSet
    from edgedetr.evaluation.config import VerifyConfig
    from edgedetr.evaluation.reference import Reference


@click.command()
@bundle_argument
@data_option
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="AP",
    help="Largest accepted AP drop, points.  [default: the bundle's]",
)
@click.option("--live", is_flag=True, help="Run the PyTorch model again instead of reading its recorded detections.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Only these libraries; repeatable.  [default: the engines that fit this device, else those that run here]",
)
@threads_option
@json_option
def verify(
    bundle: Path | None,
    data: Path | None,
    max_drop: float | None,
    live: bool,
    backends: tuple[str, ...],
    threads: int | None,
    as_json_: bool,
) -> int:
    """Bound what each stage loses against PyTorch.

    On a device with engines these are verified, without PyTorch: at batch 1, in full batches of equal images, INT8
    beside FP16, and the precision that they really run in.

    Exit 3 when a delivered stage is not shown to be within the budget."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.engine_verdict import DeviceVerdict
    from edgedetr.evaluation.verify import verify as run

    with progress_bars() as progress:
        verdict = run(
            opened,
            data=data,
            max_drop=max_drop,
            live=_live(progress) if live else None,
            backends=backends or None,
            threads=threads,
            config=_settings(opened),
            progress=progress,
        )
    result = verdict.to_json()
    show_verdict(result)
    if isinstance(verdict, DeviceVerdict):
        show_engines(result)
    if as_json_:
        as_json(result)
    return 0 if result["passed"] else NotWithinTolerance.exit_code


def _settings(bundle: Bundle) -> VerifyConfig | None:
    """The [verify] section of the bundle's recipe with the bundle's budget; None where the bundle has no recipe."""
    if RECIPE.file not in bundle.manifest.files:
        return None
    from edgedetr.evaluation.config import VerifyConfig
    from edgedetr.storage.reading import read_toml

    path = bundle.require(RECIPE.file)
    fix = "expected the keys that edgedetr train writes"
    section = read_toml(path, BundleError, fix=fix).get("verify", {})
    if not isinstance(section, dict):
        raise BundleError(f"{path} [verify]: no table; {fix}")
    try:
        return VerifyConfig(**{**section, "budget": bundle.manifest.budget})
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path} [verify]: {error}; {fix}") from error


def _live(progress: Progress) -> Callable[[Bundle, DetectionSet], Reference]:
    """What makes the reference anew, with PyTorch or an imported graph, for verify, whose floor is without torch."""
    from edgedetr.evaluation.reference import Reference
    from edgedetr.exporting.reference_run import detect_with_onnx, detect_with_pytorch, is_imported
    from edgedetr.models.deploy import load_bundle_model

    def make(bundle: Bundle, dataset: DetectionSet) -> Reference:
        if is_imported(bundle):
            return Reference.of(dataset, detect_with_onnx(bundle, dataset, progress))
        _, graph = load_bundle_model(bundle)
        return Reference.of(dataset, detect_with_pytorch(bundle.manifest, graph, dataset, progress))

    return make


def show_verdict(result: dict[str, Any]) -> None:
    """The closing table of verify and demo, and one line that says what it means; `result` is a Verdict as JSON."""
    from edgedetr.reporting.tables import stage_rows, verdict_sentence

    head, rows = stage_rows(result)
    table(head, rows)
    for stage in result["stages"]:
        if stage.get("note"):
            say(f"{stage['name']} ({stage['backend']}): {stage['note']}", fg="yellow")
    say(verdict_sentence(result), fg="green" if result["passed"] else "red")


def show_engines(result: dict[str, Any]) -> None:
    """What is only known of engines; `result` is a DeviceVerdict as JSON."""
    say(f"{result['device']}, TensorRT {result['tensorrt']}" + (f", {c}" if (c := result["conditions"]) else ""))
    engines = [stage for stage in result["stages"] if "engine" in stage]
    table(
        ["engine", "layers in its precision", "reformats", "equal rows"],
        [[e["engine"], _percent(e["share"]), e["reformats"], _percent(e["rows"])] for e in engines],
    )
    say(f"recommended: {result['recommended'] or 'none of them'}")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"
