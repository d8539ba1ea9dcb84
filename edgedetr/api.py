"""The steps that need several parts of the package: `edgedetr.train`, `edgedetr.export` and `edgedetr.verify`.

The commands with these names call exactly these functions. Heavy libraries are imported when a function runs, so a
device without PyTorch can verify, and `import edgedetr` is quick. Arguments that name a bundle take its path or an open
`Bundle`. Errors are subclasses of `edgedetr.errors.EdgedetrError`; their messages name the next command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError, UsageError

if TYPE_CHECKING:
    from edgedetr.data.detection_set import DetectionSet
    from edgedetr.evaluation.config import VerifyConfig
    from edgedetr.evaluation.reference import Reference
    from edgedetr.evaluation.verdict import Verdict
    from edgedetr.exporting.serving_files import ServingFiles
    from edgedetr.progress import Progress, TrainingProgress
    from edgedetr.quantization.localize import Localization
    from edgedetr.quantization.search.search_report import SearchReport
    from edgedetr.quantization.sensitivity import SensitivityResult
    from edgedetr.recipe import Recipe
    from edgedetr.runtime.tensorrt.build import BuiltEngine

RUNS = Path("runs")  # where bundles go that are given no path


def default_bundle(data: str | Path) -> Path:
    """Where the bundle of a data set is written when no path is given: runs/DATA.bundle in the working directory."""
    folder = Path(data).resolve()
    folder = folder.parent if folder.is_file() else folder  # a data.yaml stands for its folder
    return RUNS / f"{folder.name}.bundle"


@dataclass(frozen=True)
class TrainingChoice:
    """What a training is by the words of whoever starts it: recipe, preset over it, and start.

    start    None = the recipe's own
    implied  whether start and preset follow from the model's name alone
    """

    recipe: str | Path
    preset: str
    start: str | Path | None
    implied: bool = False


def choose_training(
    *,
    model: str | Path | None = None,
    recipe: str | Path | None = None,
    start: str | Path | None = None,
    preset: str = "",
) -> TrainingChoice:
    """The recipe, preset and start that a model, a recipe or a published detector to start from stands for.

    model    "train this model on my set": the recipe of that name; where its size was published and the recipe is a
             published training from a backbone, the published detector is the start and preset "finetune" the numbers
    recipe   the recipe as it is written. A published detector that is no recipe is treated as a model
    start    without a model or recipe, a published detector is the model

    Errors: UsageError for both a model and a recipe, and for a published detector whose size no shipped recipe has.
    """
    from edgedetr.published.published_detectors import known
    from edgedetr.recipe import DEFAULT, lookup

    if model is not None and recipe is not None:
        raise UsageError(f"a model ({model}) and a recipe ({recipe}); name one: the model is trained by its own recipe")
    if recipe is not None and (lookup(recipe) is not None or known(str(recipe)) is None):
        return TrainingChoice(recipe, preset, start)
    model = recipe if model is None else model
    if model is None and start is not None and not Path(start).exists():
        row = known(str(start))
        model = None if row is None or not row.recipe else row.name
    if model is None:
        return TrainingChoice(DEFAULT, preset, start)
    return _choose_for_model(model, start, preset)


def _choose_for_model(model: str | Path, start: str | Path | None, preset: str) -> TrainingChoice:
    from edgedetr.published.published_detectors import known, published
    from edgedetr.recipe import BACKBONE_ALONE, NOTHING, Recipe, lookup, shipped_recipes

    found = lookup(model)
    if found is None and (row := known(str(model))) is not None:
        if not row.recipe:
            raise UsageError(
                f"{row.name} is a published {row.member} of a size that no shipped recipe has; import it, and start "
                f"from the bundle: edgedetr import {row.name} --out B, then edgedetr train --recipe B/recipe.toml "
                "--start B"
            )
        recipe: str | Path = row.recipe
    elif found is None or found != shipped_recipes().get(found.stem):
        return TrainingChoice(model, preset, start)  # a file of the user's own, or a name to report as unknown
    else:
        recipe = model
        row = next((one for one in published().values() if one.recipe == found.stem), None)
    if row is None or start in (BACKBONE_ALONE, NOTHING):
        return TrainingChoice(recipe, preset, start)
    starts_whole = bool(Recipe.load(row.recipe).train.start)  # then its numbers are those of fine-tuning
    if found is not None and starts_whole:
        return TrainingChoice(recipe, preset, start)
    chosen = preset or ("" if starts_whole else "finetune")
    return TrainingChoice(recipe, chosen, row.name if start is None else start, implied=True)


def train(
    data: str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    preset: str = "",
    start: str | Path | None = None,
    accept_license: Iterable[str] = (),
    device: str | None = None,
    sets: Iterable[str] = (),
    resume: bool = False,
    strict: bool = False,
    progress: TrainingProgress | None = None,
) -> Bundle:
    """Train a detector on a data set and return its bundle, which has recipe.toml and weights.safetensors.

    data       folder in COCO, YOLO or VOC layout, or its data.yaml
    out        folder of the bundle; None = runs/DATA.bundle
    model      what to train on this set: name of a shipped recipe, of a member or of a published detector. Where its
               size is published, training starts from those weights, with the numbers of preset "finetune"
    recipe     the same names, or the path of a TOML file, or a `Recipe`: trains as the recipe is written. None for
               both = the published detector in `start`, else the edge default
    preset     values over the recipe: "parity" (the published training), "strong" (much regularization), "deim" or
               "finetune" (numbers that follow from the set); "" = none
    start      start from a whole detector's weights: a bundle, a file, a published detector (`edgedetr models
               --published`) or a Hugging Face id; "none" = from the backbone's alone, "random" = from nothing;
               None = the recipe's choice
    accept_license  names of licenses whose terms the user has read and accepts: ["DINOv3"]
    device     where to train: "cpu", "cuda", "mps", or numbers of GPUs as "0,1"; None = the GPUs where there are any,
               else the CPU. Several GPUs also set train.devices
    sets       single values over recipe and preset, as `section.key=value`: ["train.epochs=30", "train.lr=2e-4"]
    resume     go on from the last checkpoint in `out`; without one, start
    strict     fail on an unreadable image or annotation instead of leaving it out
    progress   called while the training runs; None = silent
    Errors: RecipeError, DataError, ModelError, TrainingError (NaN, a checkpoint of another training, `out` in use).
    """
    from edgedetr.recipe import Recipe
    from edgedetr.training.device_choice import choose_device, with_devices
    from edgedetr.training.train import train as run

    chosen = choose_device(device)
    if isinstance(recipe, Recipe):
        if model is not None or preset or start is not None or tuple(sets) or tuple(accept_license):
            raise UsageError(
                "model, preset, start and sets change a recipe given by name or path; put them into the Recipe"
            )
    else:
        choice = choose_training(model=model, recipe=recipe, start=start, preset=preset)
        begins = [] if choice.start is None else [f"train.start={json.dumps(str(choice.start))}"]
        if start is None:  # a start that only follows from the model's name: `sets` may say otherwise
            sets = (*begins, *sets)
        else:
            sets = (*sets, *begins)
        if accepted := list(accept_license):
            sets = (*sets, f"train.accept_license={json.dumps(accepted)}")
        recipe = Recipe.load(choice.recipe, sets=sets, preset=choice.preset)
    recipe = with_devices(recipe, chosen)
    out = default_bundle(data) if out is None else out
    return run(recipe, data, out, device=chosen, resume=resume, strict=strict, progress=progress)


def train_qat(
    bundle: Bundle | str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    device: str | None = None,
    sets: Iterable[str] = (),
    resume: bool = False,
    strict: bool = False,
    progress: TrainingProgress | None = None,
    steps: Progress | None = None,
) -> Bundle:
    """Train a bundle's detector for INT8 (quantization-aware training), and return the new bundle.

    It has new weights, their model.onnx, and the learned ranges, from which `export` with int8 writes the INT8 graphs.
    Its reference.npz is that of the float detector, so that `verify` measures the drop from there.

    bundle     a trained bundle; where it has no model.onnx, it is added. Its ranges are where the training starts
    out        folder of the new bundle; None = NAME-qat.bundle beside it
    data       to train on; None = the set that the bundle records
    sets       single values over the recipe, which is that of the bundle with a tenth of the epochs, a twentieth of the
               learning rate and weak augmentation: ["train.epochs=5", "train.lr=1e-5"]
    device, resume, strict, progress   as in `train`
    steps      called while files are exported and ranges observed
    Errors: TrainingError also where nvidia-modelopt is missing, or the graph has a quantized node without a layer.
    """
    from dataclasses import replace

    from edgedetr.artifacts import REFERENCE, WEIGHTS
    from edgedetr.data.layouts import load
    from edgedetr.exporting.export import export_onnx
    from edgedetr.exporting.reference_run import write_reference
    from edgedetr.models.deploy import load_bundle_model
    from edgedetr.quantization.observers import LEARNED
    from edgedetr.quantization.placement import placement_of
    from edgedetr.recipe import Recipe
    from edgedetr.training.data.dataset import open_splits
    from edgedetr.training.device_choice import choose_device, with_devices
    from edgedetr.training.qat import quantized_training as qat
    from edgedetr.training.train import train as run

    start, sets = Bundle.open(bundle), tuple(sets)
    qat.require_trainable(start, data)
    recipe, chosen = Recipe.from_bundle(start), choose_device(device)
    out = start.path.with_name(f"{start.path.stem}-qat.bundle") if out is None else Path(out)
    if out.resolve() == start.path.resolve():
        raise UsageError(f"--out {out} is the bundle that is trained; name another")
    record = start.manifest.data
    folder = Path(record.path if data is None and record is not None else data or "")
    images = len(open_splits(folder, recipe.data).train)
    trained = with_devices(qat.quantized_recipe(recipe, images, sets), chosen)
    observer = "mse" if recipe.quant.observer == LEARNED else recipe.quant.observer
    quant = replace(trained.quant, observer=observer)
    export_onnx(start, recipe.export, steps)
    by_policy = any(text.startswith("quant.policy=") for text in sets)
    placement, note = placement_of(start, "quant.policy was given" if by_policy else "")
    if note and progress is not None:
        progress.note(note)
    kind = qat.quantized_detector(start, quant, placement, steps)
    result = run(trained, folder, out, device=chosen, resume=resume, strict=strict, progress=progress, kind=kind)
    if not result.has(REFERENCE.file):
        if data is None and start.has(REFERENCE.file):
            with result.add(REFERENCE.file, stage=REFERENCE.step, made_from=[WEIGHTS.file]) as path:
                path.write_bytes(start.require(REFERENCE.file).read_bytes())
        else:
            now = result.manifest.data
            if now is None:
                raise BundleError(f"{result.path} does not record the data that it was trained on")
            split = load(now.path, now.verify_split, classes=result.manifest.classes)
            write_reference(result, load_bundle_model(start)[1], split, steps)
    export_onnx(result, trained.export, steps)
    qat.write_ranges(result, quant, placement, steps)
    return result


@dataclass(frozen=True)
class ExportResult:
    """What an export left.

    bundle            the bundle with its new files
    engines           the TensorRT engines that were built or kept
    engines_missing   why engines were asked for and cannot be built here; "" where nothing is missing
    serving           frame graphs, and files for Triton and DeepStream
    notes             what else the export decided, a sentence each
    search            the search within a budget of AP; None where there was none
    """

    bundle: Bundle
    engines: tuple[BuiltEngine, ...]
    engines_missing: str
    serving: ServingFiles
    notes: tuple[str, ...] = ()
    search: SearchReport | None = None


def export(
    bundle: Bundle | str | Path,
    *,
    fp16: bool = False,
    int8: bool = False,
    engines: bool = False,
    calib: str | Path | None = None,
    sampling: Literal["gather", "grid_sample"] | None = None,
    dynamic_batch: bool = False,
    quantizers: Iterable[str] = (),
    max_drop: float | None = None,
    target: str | None = None,
    search_images: int | None = None,
    threads: int | None = None,
    cures: Iterable[str] = (),
    known_cures: bool = True,
    sets: Iterable[str] = (),
    frame: tuple[int, int] | None = None,
    triton: str | Path | None = None,
    deepstream: str | Path | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the ONNX graphs of a bundle, and what servers and engines need. Files that are up to date are kept.

    fp16            model.fp16.onnx too, for TensorRT
    int8            calibrate, and write model.int8.onnx (TensorRT, OpenVINO) and model.int8-cpu.onnx (ONNX Runtime); a
                    placement.json in the bundle decides which layers are INT8, unless `sets` names a quant.policy
    engines         FP16 too, and TensorRT engines of it (and of INT8), where TensorRT and a GPU are here
    calib           folder of calibration images; None = the train split of the bundle's data
    sampling        how deformable attention samples; None = "gather" for FP16 (some versions of TensorRT compute
                    GridSample wrongly), else the recipe's choice
    dynamic_batch   leave the batch size open, for engines of several images
    quantizers      other quantizers whose INT8 of the same float graph and images is written beside ours, to be
                    measured: "modelopt", "onnxruntime", "nncf" (artifacts.QUANTIZERS has all); needs int8
    max_drop        search for the fastest INT8 that is proved to lose at most so many points of AP, and write it as
                    placement.json and the INT8 files; needs int8
    target          what the search makes fast: "onnxruntime" (None), "openvino" or "tensorrt"; and whose known faults
                    the INT8 graphs are cured of (None: of all libraries that verify judges them on); needs int8
    search_images   images that placements are compared on, beside those for calibration and verification; None = 64
    threads         of one inference in the search; None = all cores
    cures           known patterns whose layers stay float (calib/patterns/known.toml), added to the policy: as
                    quant.policy="default+NAME" in `sets`; needs int8
    known_cures     cure the INT8 graphs where they have a pattern that is known for the target, by another order of
                    Q/DQ, a shared scale, or a layer in float; False = leave them as they are
    sets            values of [quant] and [export], as `section.key=value`; they are written into the bundle's recipe
    frame           (height, width) in pixels: graphs for whole camera frames of this size too
    triton          folder of a Triton model repository to add the model to
    deepstream      folder to write a graph, labels and a configuration of nvinfer to
    progress        called with (step, done, total); None = silent
    Errors: BundleError, ExportError, UsageError, RecipeError, DataError; NotWithinTolerance where no placement is
    proved to be within max_drop: then no INT8 file is written.
    """
    from edgedetr.exporting.export import export as run
    from edgedetr.exporting.serving_files import write_serving_files
    from edgedetr.exporting.settings import record, settings, with_cures
    from edgedetr.quantization.placement import placement_of

    # A search for TensorRT compares with FP16, and a profile of the device times it.
    opened, sets, fp16 = Bundle.open(bundle), tuple(sets), fp16 or engines or target == "tensorrt"
    if calib is not None and not (int8 or fp16):
        raise UsageError("--calib names images for FP16 and INT8; add --int8, --fp16 or --trt")
    if cures := tuple(cures):
        if not int8:
            raise UsageError("--cure changes which layers are INT8; add --int8")
        if max_drop is not None:
            raise UsageError("--cure and --max-drop both choose which layers are INT8; give one of them")
        sets = (*sets, with_cures(opened, sets, cures))
    if not (known_cures or int8):
        raise UsageError("--no-cure leaves the INT8 files as they are quantized; add --int8")
    _check_conflicts(sets, {"export.sampling": sampling, "export.dynamic_batch": dynamic_batch or None})
    if fp16 and sampling is None and not any(text.startswith("export.sampling=") for text in sets):
        sampling = "gather"
    chosen = settings(opened, sets) if sets else None  # a mistyped value is an error before anything is made
    _check_search(int8, max_drop, target, search_images, threads)
    by_policy = any(text.startswith("quant.policy=") for text in sets)
    placement, note = placement_of(opened, "quant.policy was given" if by_policy else "") if int8 else (None, "")
    cure_for = () if not known_cures else None if target is None else (target,)
    found = None
    if max_drop is not None:
        from edgedetr.exporting.budget import search_within

        run(
            opened,
            fp16=fp16,
            calib=None if calib is None else Path(calib),
            sampling=sampling,
            dynamic_batch=dynamic_batch,
            config=chosen.export if chosen else None,
            quant=chosen.quant if chosen else None,
            progress=progress,
        )
        found = search_within(
            opened,
            max_drop,
            target=target,
            images=search_images,
            calib=None if calib is None else Path(calib),
            quant=chosen.quant if chosen else None,
            cure_for=cure_for,
            threads=threads,
            progress=progress,
        )
        placement, note = found.placement, found.sentence()
    run(
        opened,
        int8=int8,
        fp16=fp16,
        calib=None if calib is None else Path(calib),
        sampling=sampling,
        dynamic_batch=dynamic_batch,
        quantizers=tuple(quantizers),
        config=chosen.export if chosen else None,
        quant=chosen.quant if chosen else None,
        placement=placement,
        cure_for=cure_for,
        progress=progress,
    )
    if chosen:
        record(opened, chosen)
    built, missing = _build_engines(opened, ("fp16", "int8") if int8 else ("fp16",), progress) if engines else ((), "")
    serving = write_serving_files(opened, fp16=fp16, int8=int8, frame=frame, triton=triton, deepstream=deepstream)
    opened.refresh()
    notes = (*([note] if note else []), *(_about_cures(opened) if int8 else []))
    return ExportResult(opened, built, missing, serving, notes, found)


def _about_cures(bundle: Bundle) -> list[str]:
    from edgedetr.artifacts import INT8, INT8_CPU
    from edgedetr.runtime.cure_record import about_cures

    return [f"{graph.file}: {line}" for graph in (INT8, INT8_CPU) for line in about_cures(bundle, graph.file)]


def _check_conflicts(sets: Iterable[str], options: Mapping[str, object]) -> None:
    """Errors: UsageError where an option that is given (not None) and `sets` set one key."""
    for key in (text.partition("=")[0].strip() for text in sets):
        if options.get(key) is not None:
            option = f"--{key.partition('.')[2].replace('_', '-')}"
            raise UsageError(f"{option} and --set {key} both set {key}; keep one of them")


def _check_search(
    int8: bool, max_drop: float | None, target: str | None, search_images: int | None, threads: int | None
) -> None:
    """Errors: UsageError for an unknown target, and for options that have no effect."""
    from edgedetr.artifacts import OPENVINO, ORT, TENSORRT
    from edgedetr.runtime.arguments import check_word

    if target is not None:
        check_word(target, (ORT, OPENVINO, TENSORRT), "target")
    if max_drop is not None and not int8:
        raise UsageError("--max-drop is a budget for INT8; add --int8")
    if target is not None and not int8:
        raise UsageError("--target names what the INT8 files are for; add --int8")
    for name, value in (("--search-images", search_images), ("--threads", threads)):
        if value is not None and max_drop is None:
            raise UsageError(
                f"{name} is for a search within a budget; add --max-drop POINTS, for example --max-drop 0.5"
            )


def _build_engines(
    bundle: Bundle, precisions: Iterable[str], progress: Progress | None
) -> tuple[tuple[BuiltEngine, ...], str]:
    """The engines of a bundle, or why none can be built on this machine."""
    from edgedetr.runtime.tensorrt import build, gpu

    if missing := gpu.why_unavailable():
        return (), missing
    return tuple(build.build(bundle, precision, progress=progress) for precision in precisions), ""


def verify(
    bundle: Bundle | str | Path,
    *,
    data: str | Path | None = None,
    max_drop: float | None = None,
    live: bool = False,
    artifacts: Collection[str] | None = None,
    backends: Collection[str] | None = None,
    threads: int | None = None,
    config: VerifyConfig | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Measure the AP that each file of a bundle loses against PyTorch, with a bound; record the verdict in the bundle.

    data       folder of the data set; None = the one that the bundle records. Its images must be byte for byte those of
               the export
    max_drop   largest accepted AP drop, points of 0..100; None = the bundle's
    live       run the PyTorch model again instead of reading its recorded detections
    artifacts  only these graphs: "onnx", "fp16", "int8", "int8-cpu"; None = all that the bundle has
    backends   only these libraries; None = the engines that fit this device, and without any the libraries of the CPU
    threads    CPU threads of one inference; None = all cores
    config     all settings at once; None = section [verify] of the bundle's recipe
    progress   called with (step, done, total); None = silent
    return     `passed` is whether every file was shown to lose at most `max_drop`; on engines a `DeviceVerdict`
    Errors: BundleError, DataError, UsageError, MissingDependency, EngineError.
    """
    from edgedetr.evaluation.config import VerifyConfig
    from edgedetr.evaluation.verify import verify as run

    opened = Bundle.open(bundle)
    return run(
        opened,
        data=data,
        max_drop=max_drop,
        live=_live_reference(progress) if live else None,
        artifacts=artifacts,
        backends=backends,
        threads=threads,
        config=config or VerifyConfig.from_bundle(opened),
        progress=progress,
    )


def localize(
    bundle: Bundle | str | Path,
    *,
    data: str | Path | None = None,
    backends: Collection[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Localization:
    """Find where INT8 goes wrong: tensors that their own Q/DQ pairs damage, and nodes that a library computes wrongly.

    data       folder of the data set; None = the one that the bundle records. Its first verify images are used
    backends   only these libraries; None = those that run here
    threads    CPU threads of one inference; None = all cores
    progress   called with (step, done, total); None = silent
    Errors: BundleError, DataError, UsageError, MissingDependency.
    """
    from edgedetr.quantization.localize import localize as run

    return run(Bundle.open(bundle), data=data, backends=backends, threads=threads, progress=progress)


def _live_reference(progress: Progress | None) -> Callable[[Bundle, DetectionSet], Reference]:
    """Makes the reference with PyTorch, or with the graph of an imported model: evaluation itself needs no torch."""
    from edgedetr.evaluation.reference import Reference
    from edgedetr.exporting.reference_run import detect_with_onnx, detect_with_pytorch, is_imported
    from edgedetr.models.deploy import load_bundle_model

    def make(bundle: Bundle, dataset: DetectionSet) -> Reference:
        if is_imported(bundle):
            return Reference.of(dataset, detect_with_onnx(bundle, dataset, progress))
        _, graph = load_bundle_model(bundle)
        return Reference.of(dataset, detect_with_pytorch(bundle.manifest, graph, dataset, progress))

    return make


def sensitivity(
    bundle: Bundle | str | Path,
    *,
    images: int | None = None,
    level: Literal["layer", "part"] = "layer",
    data: str | Path | None = None,
    sets: Iterable[str] = (),
    progress: Progress | None = None,
) -> SensitivityResult:
    """Measure how far each group of layers, alone in INT8, moves the detections of the float graph.

    images     at most so many to compare on; None = 64
    level      "layer": the smallest sets of nodes that a backend switches together; "part": stages and blocks
    data       folder of images to compare on; None = those of the bundle's data that are neither for calibration nor
               for verification
    sets       values of [quant], as `quant.key=value`, for this measurement alone
    progress   called with (step, done, total); None = silent
    Errors: BundleError, ExportError, DataError, UsageError, RecipeError.
    """
    from edgedetr.exporting.settings import settings
    from edgedetr.quantization.sensitivity import IMAGES
    from edgedetr.quantization.sensitivity import sensitivity as run

    opened, sets = Bundle.open(bundle), tuple(sets)
    if others := [text for text in sets if text.strip().startswith("export.")]:
        raise UsageError(f"--set {others[0]}: sensitivity measures model.onnx as it is; expected keys of quant")
    return run(
        opened,
        images=IMAGES if images is None else images,
        level=level,
        data=data,
        config=settings(opened, sets).quant,
        progress=progress,
    )
