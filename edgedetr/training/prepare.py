"""What a training starts from: data to learn, and a detector, built, filled with weights and told what of it learns."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from edgedetr.artifacts import WEIGHTS
from edgedetr.bundle import MANIFEST, Bundle, ClassInfo
from edgedetr.data.detection_set import DetectionSet
from edgedetr.errors import DataError, ModelError, TrainingError
from edgedetr.layers import drop_path, lora
from edgedetr.models import build, member
from edgedetr.models.checkpoints import pretrained
from edgedetr.models.detector import DetrModel
from edgedetr.recipe import Recipe
from edgedetr.runtime.cpu import bounded

log = logging.getLogger(__name__)


def use_threads(wanted: int) -> None:
    """Threads of torch on the CPU, no more than this process has cores; 0: torch's own choice."""
    if wanted:
        torch.set_num_threads(bounded(wanted, "train.threads"))


def detector(recipe: Recipe, classes: tuple[ClassInfo, ...], *, fresh: bool) -> DetrModel:
    """The recipe's detector in training mode.

    fresh   fill in published weights; False where a checkpoint will bring all of them
    """
    config = recipe.train
    model = build(recipe.model.name, recipe.model.config, len(classes))
    anew: tuple[str, ...] = ()
    if fresh and config.start:
        anew = _start(model, recipe, config.start, [item.name for item in classes])
    elif fresh:
        pretrained.load_backbone(model, recipe.model.config)
    if config.drop_path:
        rates = drop_path.set_rates(model, config.drop_path, config.drop_path_schedule)
        if not max(rates, default=0.0):
            raise ModelError(
                f"train.drop_path is {config.drop_path}, but {recipe.model.name} has no block to leave out; expected 0"
            )
        log.info("train.drop_path: %d blocks are left out at rates of %.3g to %.3g", len(rates), rates[0], rates[-1])
    if config.lora_rank:
        untrained = started_anew(recipe)
        freeze(model, ("*",), but=(*config.lora_beside, *untrained))
        lora.adapt(model, config.lora_on, config.lora_rank, config.lora_alpha, but=untrained)
    freeze(model, config.freeze)
    still = [name for name, parameter in model.named_parameters() if name in anew and not parameter.requires_grad]
    if still:
        log.warning(
            "started anew for these classes, and frozen: %s; to let them learn, leave them out of train.freeze",
            ", ".join(still),
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"train.freeze {list(config.freeze)} leaves nothing to learn; name fewer patterns")
    return model.train()


def started_anew(recipe: Recipe) -> tuple[str, ...]:
    """Patterns of names of all that no trained weights may have filled, and which therefore learns beside adapters.

    They follow from the recipe alone, so that a training that goes on has the same: with train.start, what depends on
    the classes; without, all but a pretrained backbone.
    """
    if recipe.train.start:
        return member(recipe.model.name).per_class
    if recipe.model.config.backbone_weights == "random":
        return ("*",)
    return ("encoder.*", "selector.*", "decoder.*", "backbone.levels.*")


def freeze(model: nn.Module, patterns: tuple[str, ...], but: tuple[str, ...] = ()) -> None:
    """Parameters whose names fit `patterns` and not `but` do not learn; ModelError for a pattern that fits none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"train.freeze: no parameter is named like {pattern!r}; expected patterns of names like "
                f"{', '.join(names[:3])}"
            )
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in but):
            parameter.requires_grad_(False)


def _start(model: DetrModel, recipe: Recipe, source: str, classes: list[str]) -> tuple[str, ...]:
    """Weights of a whole detector: of a bundle (class rows by name), or of a file or a name on the hub.

    return  the tensors that start anew, at least for some classes
    """
    name = recipe.model.name
    if (Path(source) / MANIFEST).is_file():
        bundle = Bundle.open(source)
        if bundle.manifest.model != name:
            raise ModelError(f"{source} holds a {bundle.manifest.model}; expected a {name}, or another --recipe")
        path = bundle.require(WEIGHTS.file)
        theirs = [item.name for item in bundle.manifest.classes]
        rows = pretrained.rows_by_name(theirs, classes)
        loaded = pretrained.load_weights(
            model, pretrained.read_weights(str(path)), str(path), None if theirs == classes else rows
        )
        if theirs != classes:
            kept = [name for name, row in zip(classes, rows) if row is not None]
            fresh = [name for name, row in zip(classes, rows) if row is None]
            log.warning(
                "%s: rows of the class heads kept by name: %s; started anew: %s",
                source,
                ", ".join(kept) or "none",
                ", ".join(fresh) or "none",
            )
        return loaded.fresh if None in rows and theirs != classes else ()
    return pretrained.load_detector(model, name, source, recipe.model.config).fresh


def require_place(out: Path, saved: Path, resume: bool) -> None:
    """Errors: TrainingError where good weights would be overwritten by a training from the beginning."""
    weights = out / WEIGHTS.file
    if resume and weights.exists() and not saved.exists():
        raise TrainingError(
            f"{out} holds trained weights but no {saved.relative_to(out)}, so there is nothing to go "
            "on from, and a start from the beginning would overwrite them; restore that folder from a "
            f"copy, or train into another --out (from these weights: --set train.start={out})"
        )
    if not resume and (saved.exists() or weights.exists()):
        raise TrainingError(f"{out} holds a training already; go on with it by --resume, or name another --out")


def check(samples: DetectionSet, chosen: DetectionSet) -> None:
    """Errors: DataError where there is nothing to learn, or where the two splits name other classes."""
    if not len(samples) or not any((~sample.crowd).any() for sample in samples.samples):
        raise DataError(
            f"{samples.root}: the split {samples.name!r} has {len(samples)} usable images and no objects "
            f"to learn; run: edgedetr data check {samples.root}"
        )
    if not any((~sample.crowd).any() for sample in chosen.samples):
        raise DataError(
            f"{samples.root}: the split {chosen.name!r} has {len(chosen)} usable images and no objects, so "
            "its AP is undefined and no epoch could be chosen by it; name another split with "
            "--set data.select_split=NAME, or label it"
        )
    if samples.classes != chosen.classes:
        ours, theirs = (", ".join(c.name for c in part.classes) for part in (samples, chosen))
        raise DataError(
            f"{samples.root}: classes differ between {samples.name} ({ours}) and {chosen.name} ({theirs}); "
            "expected the same in every split"
        )


def warn_of_crowds(samples: DetectionSet, recipe: Recipe) -> None:
    """Say which images hold more objects than there are queries: the others are never found, nor learned from."""
    queries = recipe.model.config.queries
    fuller = [(int((~sample.crowd).sum()), sample.path) for sample in samples.samples if len(sample.boxes) > queries]
    fuller = [(count, path) for count, path in fuller if count > queries]
    if fuller:
        most, path = max(fuller)
        log.warning(
            "%d of %d training images hold more objects than the model has queries: up to %d (%s), and "
            "model.queries is %d, so at most %d of them can be found; expected --set model.queries=%d or more",
            len(fuller),
            len(samples),
            most,
            path,
            queries,
            queries,
            most,
        )
