"""Commands that measure and report: verify, eval, bench and report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgedetr.bundle import Bundle
from edgedetr.commands.choose import BACKENDS, bundle_argument, data_option, json_option, open_bundle, threads_option
from edgedetr.commands.show import Progress, as_json, progress_bars, say, table
from edgedetr.errors import BundleError, NotWithinTolerance

if TYPE_CHECKING:
    from edgedetr.data.form import DetectionSet
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

    On a device with engines these are verified, without PyTorch: at batch 1, in full batches of equal pictures, INT8
    beside FP16, and the precision that they really run in.

    Exit 3 when a delivered stage is not shown to be within the budget."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.device import DeviceVerdict
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
    if "recipe.toml" not in bundle.manifest.files:
        return None
    from edgedetr.evaluation.config import VerifyConfig
    from edgedetr.reading import read_toml

    path = bundle.require("recipe.toml")
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
    from edgedetr.export.reference import detect, detect_by_graph, imported
    from edgedetr.models.deploy import load_bundle_model

    def make(bundle: Bundle, dataset: DetectionSet) -> Reference:
        if imported(bundle):
            return Reference.of(dataset, detect_by_graph(bundle, dataset, progress))
        _, graph = load_bundle_model(bundle)
        return Reference.of(dataset, detect(bundle.manifest, graph, dataset, progress))

    return make


def show_verdict(result: dict[str, Any]) -> None:
    """The closing table of verify and demo, and one line that says what it means; `result` is a Verdict as JSON."""
    from edgedetr.report.tables import stage_rows, verdict_sentence

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


@click.command("eval")
@bundle_argument
@data_option
@click.option("--split", help="The split to evaluate.  [default: the bundle's verify split]")
@click.option("--stage", default="onnx", show_default=True, help="torch, onnx, fp16, int8 or int8-cpu.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), help="Inference library.  [default: the stage's own]"
)
@threads_option
@json_option
def evaluate(
    bundle: Path | None,
    data: Path | None,
    split: str | None,
    stage: str,
    backend: str | None,
    threads: int | None,
    as_json_: bool,
) -> None:
    """Measure one stage on labelled images; alias: val."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.verify import evaluate_stage

    with progress_bars() as progress:
        metrics = evaluate_stage(
            opened, stage=stage, backend=backend, data=data, split=split, threads=threads, progress=progress
        )
    rows = [
        ["AP", metrics.ap],
        ["AP50", metrics.ap50],
        ["AP75", metrics.ap75],
        ["AP small", metrics.ap_small],
        ["AP medium", metrics.ap_medium],
        ["AP large", metrics.ap_large],
    ]
    rows += [[f"AP {name}", value] for name, value in metrics.per_class.items()]
    rows += [["doubled boxes, per cent", metrics.doubled]]
    table(["metric", "points"], [[name, None if value is None else f"{value:.2f}"] for name, value in rows])
    if as_json_:
        as_json(metrics.to_json())


@click.command()
@bundle_argument
@click.option(
    "--rounds", type=click.IntRange(1), default=50, show_default=True, help="Timed runs of each stage, interleaved."
)
@threads_option
@json_option
def bench(bundle: Path | None, rounds: int, threads: int | None, as_json_: bool) -> None:
    """Time every stage side by side in one process."""
    opened = open_bundle(bundle)
    from edgedetr.evaluation.verify import bench as run

    with progress_bars() as progress:
        timings = run(opened, rounds=rounds, threads=threads, progress=progress)
    table(
        ["stage", "backend", "p50 ms", "p99 ms", "MB"],
        [[t.name, t.backend, f"{t.p50_ms:.2f}", f"{t.p99_ms:.2f}", f"{t.size_mb:.2f}"] for t in timings],
    )
    from edgedetr.runtime import board

    if conditions := board.read().conditions():
        say(conditions)
    if as_json_:
        as_json([t.to_json() for t in timings])


@click.command()
@bundle_argument
@data_option
@click.option("--open", "open_it", is_flag=True, help="Open the page in the browser.")
def report(bundle: Path | None, data: Path | None, open_it: bool) -> None:
    """Write one HTML page about the bundle.

    It measures nothing: run `edgedetr verify` first."""
    opened = open_bundle(bundle)
    from edgedetr.report.report import write_report

    page = write_report(opened, data=data)
    say(f"report: {page}")
    if open_it:
        click.launch(str(page))


COMMANDS = (verify, evaluate, bench, report)
