"""Import pretrained weights: the architecture from the tensors, classes and preprocessing from the files next to them.

Nothing in the files is executed, and nothing is ignored silently: a tensor that the model does not have is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgedetr.artifacts import IMPORT_RECORD, RECIPE, WEIGHTS
from edgedetr.bundle import MANIFEST, Bundle, ClassInfo, DataRecord, Manifest, OutputContract
from edgedetr.data import layouts
from edgedetr.data.coco_classes import COCO, UNUSED, coco_classes
from edgedetr.data.detection_set import without_empty_classes
from edgedetr.errors import DataError, ModelError
from edgedetr.importing.class_names import read_names
from edgedetr.importing.image_processor import find_processor, preprocessing_of, preprocessing_of_published
from edgedetr.importing.import_options import ImportOptions
from edgedetr.models import build, member
from edgedetr.models.checkpoints import conversion, pretrained
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict, num_classes
from edgedetr.models.checkpoints.transformers_config import TransformersConfig, config_labels
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.member import Member
from edgedetr.recipe import Recipe
from edgedetr.runtime.arguments import as_path

DECODER_LAYER = re.compile(r"decoder\.(?:layers|boxes\.(?:score|box|quality|class_tower|box_tower))\.(\d+)\.")


@dataclass(frozen=True)
class ImportedWeights:
    """What an import of weights found.

    layout      whose tensor names the file uses
    tensors     number of tensors that were copied
    kept, fresh  classes whose rows of the class heads were found by name, and those whose rows are newly initialized
    notes       for the user: where classes and resize come from, what the files do not contain
    revision    commit on the hub; "" for other files
    """

    source: str
    bundle: Bundle
    layout: str
    tensors: int
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]
    revision: str = ""

    def describe(self) -> str:
        """What was found, in some sentences."""
        return "\n".join([f"{self.source}: {self.layout} layout, {self.tensors} tensors", *self.notes])

    def to_json(self) -> dict[str, object]:
        """The keys of `edgedetr import --json`."""
        return {
            "bundle": str(self.bundle.path),
            "layout": self.layout,
            "tensors": self.tensors,
            "kept": self.kept,
            "fresh": self.fresh,
            "notes": self.notes,
        }


def import_weights(source: str | Path, out: str | Path, options: ImportOptions) -> ImportedWeights:
    """Write a bundle from a .pth or .safetensors file, a folder of transformers, or the id of a model on the hub.

    `options.model` is required. Classes of `options.data` replace the file's: rows of the class heads are kept by name.

    Errors: ModelError (layout, tensors, configuration, classes), DataError, BundleError.
    """
    as_path(source, "source", "a path, or a name on the Hugging Face hub")
    source, out = os.fspath(source), as_path(out, "out")
    model, size, sets = "" if options.model is None else options.model, options.size, options.sets
    member(model)
    data, classes = (None if value is None else Path(value) for value in (options.data, options.classes))
    if (out / MANIFEST).exists():
        raise ModelError(f"{out} is a bundle already; name another --out")
    origin = WeightSource(source)
    if origin.published is not None:
        origin.published.require_accepted(options.accept_license)
    read = architecture(origin, model, size, sets)
    recipe, weights, notes = read.recipe, read.weights, list(read.notes)
    config = recipe.model.config
    in_file = _classes(num_classes(weights, config.activation), read.config, classes, origin, notes)
    record, wanted = (None, in_file) if data is None else _data_classes(recipe, data)
    with torch.device("meta"):
        pretrained.check_weights(build(model, config, len(in_file)), weights, source)  # before any memory is allocated
    detector = build(model, config, len(wanted))
    rows = pretrained.rows_by_name([c.name for c in in_file], [c.name for c in wanted])
    loaded = pretrained.load_weights(detector, weights, source, None if wanted == in_file else rows)
    contract = recipe.input.contract()
    DeployGraph(detector, contract.height, contract.width)  # fails before anything is written
    kept = tuple(c.name for c, row in zip(wanted, rows) if row is not None)
    fresh = tuple(c.name for c, row in zip(wanted, rows) if row is None)
    if fresh:
        notes.append(
            f"rows of the class heads kept by name: {', '.join(kept) or 'none'}; started anew: "
            f"{', '.join(fresh)}; train before use: edgedetr train --data DIR --recipe {out}/recipe.toml "
            f"--set train.start={out}"
        )
    bundle = Bundle.create(
        out,
        Manifest(
            model,
            wanted,
            contract,
            OutputContract(config.activation),
            config=asdict(config),
            data=record,
            budget=recipe.verify.budget,
        ),
    )
    with bundle.add(RECIPE.file, stage="import") as path:
        path.write_text(recipe.to_toml(), encoding="utf-8")
    with bundle.add(WEIGHTS.file, stage="import", made_from=WEIGHTS.made_from) as path:
        save_file({name: value.contiguous() for name, value in detector.state_dict().items()}, path)
    with bundle.add(IMPORT_RECORD.file, stage=IMPORT_RECORD.step) as path:
        about: dict[str, Any] = {**origin.record(), "layout": read.layout, "notes": notes}
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return ImportedWeights(source, bundle, read.layout, loaded.tensors, kept, fresh, tuple(notes), origin.revision)


def _data_classes(recipe: Recipe, data: Path) -> tuple[DataRecord, tuple[ClassInfo, ...]]:
    """The splits and the classes of a data set, as a training of the recipe would take them."""
    splits = recipe.data.resolve(layouts.splits(data))
    classes = layouts.load(data, splits.verify_split).classes
    if splits.drop_empty_classes:
        classes = without_empty_classes(layouts.load(data, splits.train_split)).classes
    return DataRecord(str(data.resolve()), splits.verify_split, splits.train_split), classes


@dataclass(frozen=True)
class Architecture:
    """A model as its files describe it.

    layout    whose tensor names the file uses
    recipe    with the configuration of the model and its input
    weights   under our names
    config    config.json of transformers; None without
    notes     for the user
    """

    layout: str
    recipe: Recipe
    weights: conversion.Weights
    config: TransformersConfig | None
    notes: tuple[str, ...]


def architecture(
    origin: WeightSource, model: str, size: tuple[int, int] | None = None, sets: Sequence[str] = ()
) -> Architecture:
    """The model that a source's tensors, config.json and preprocessor_config.json describe together.

    Errors: ModelError, which names the key, if they disagree, or for a model that this package would not compute.
    """
    source, family_member = origin.source, member(model)
    raw = origin.weights()
    layout, notes = conversion.layout_of(model, raw, source), list(origin.notes)
    config = _config_next_to(origin, model, layout, notes)
    weights = conversion.translate(model, raw, source)
    values = dict(config.values) if config else {}
    for assignment in sets:  # needed now, because the number of samples per head follows from it
        for name in ("heads", "cross_heads"):
            if assignment.replace(" ", "").startswith(f"model.{name}="):
                values[name] = _heads_of(assignment)
    found = config_from_state_dict(family_member, weights, values.get("heads", 8), values)
    if (
        family_member.refuse_import is not None
        and layout != "edgedetr"
        and (refused := family_member.refuse_import(found))
    ):
        raise ModelError(f"{source}: {refused}")
    if config:
        config.require_agreement(found)
    raw_processor, where = find_processor(origin.file_next_to, ModelError) or (None, source)
    if raw_processor is None and origin.published is not None:
        image = preprocessing_of_published(origin.published, size)
    else:
        image = preprocessing_of(raw_processor, family_member.resize_of(found), where, size)
    notes += image.notes
    colors = {"mean": image.mean, "std": image.std} if image.mean and image.std else {}
    known = family_member.config.__dataclass_fields__
    inside = {name: value for name, value in {**found, **values}.items() if name in known}
    sections = {
        "model": {"name": model, **inside, **colors},
        "input": {"height": image.height, "width": image.width, "resize": image.resize},
    }
    recipe = Recipe.from_dict(sections, where=source, sets=sets)
    if not config:
        notes.append(_unreadable(family_member, recipe.model.config, found))
    weights = _first_layers(weights, getattr(recipe.model.config, "decoder_layers", len(weights)), notes)
    weights, unread = pretrained.without_unread_blocks(weights, recipe.model.config)
    if unread:
        notes.append(f"{unread} tensors of the blocks after the last map that is read are left out")
    return Architecture(layout, recipe, weights, config, tuple(notes))


def _first_layers(weights: conversion.Weights, count: int, notes: list[str]) -> conversion.Weights:
    """The weights without decoder layers from `count` on, which a file may hold and its model not use (eval_idx)."""
    later = {name for name in weights if (found := DECODER_LAYER.match(name)) and int(found[1]) >= count}
    if later:
        notes.append(f"decoder layers from {count} on are left out, as model.decoder_layers says: {len(later)} tensors")
    return {name: tensor for name, tensor in weights.items() if name not in later}


def _heads_of(assignment: str) -> int:
    """The number in `model.heads=N`."""
    value = assignment.partition("=")[2].strip()
    if not value.isdecimal() or not 0 < int(value[:9]) < 1 << 16:
        raise ModelError(f"--set {assignment}: expected a whole number from 1")
    return int(value)


def _config_next_to(origin: WeightSource, model: str, layout: str, notes: list[str]) -> TransformersConfig | None:
    """config.json next to weights of transformers; that of other files is not read, and `notes` says so."""
    if layout.startswith("transformers"):
        config = pretrained.transformers_config_of(origin, model)
        if config is None:
            notes.append("no config.json next to the weights")
        return config
    path = origin.file_next_to("config.json")
    if path is not None:
        notes.append(f"{path} was not read: the weights are not transformers', but those of {layout}")
    return None


def _unreadable(model: Member, config: Any, found: dict[str, Any]) -> str:
    """The note about fields that no tensor shows, and the values assumed for them."""
    assumed = {
        name: getattr(config, name)
        for name in model.unreadable
        if name not in found or (name == "ffn_activation" and found[name] != "prelu")
    }
    listed = ", ".join(f"{name}={value}".lower() for name, value in assumed.items())
    unknown = "whether C5 is dilated (DC5), " if "dilate_last" in assumed else ""
    unknown += (
        "whether sampling is discrete, which decoder layer is the last one used (eval_idx), "
        if "method" in assumed
        else ""
    )
    return (
        f"no tensor shows {unknown}and no file next to it does; taken as usual: {listed}; change by --set "
        f"model.{next(iter(assumed), 'heads')}=VALUE, and so on"
    )


def _classes(
    count: int, config: TransformersConfig | None, file: Path | None, origin: WeightSource, notes: list[str]
) -> tuple[ClassInfo, ...]:
    """Classes of the class head: named by `file`, by the table of published detectors, by config.json, by COCO if the
    count fits, or numbered."""
    source, row = origin.source, origin.published
    labels = _labels(config, count) if config and file is None and row is None else None
    if file is None and row is not None and count != row.class_rows:
        raise ModelError(
            f"{source}: its class head has {count} rows, and that of {row.name} {row.class_rows}; expected "
            "the published weights; name a file of other weights by its path"
        )
    if file is not None:
        listed = [UNUSED if name == "-" else name for name in read_names(file)]
        if len(listed) != count:
            raise DataError(
                f"{file} names {len(listed)} classes, but the class head of {source} has {count}; "
                "expected one name per line, in the head's order; for other classes use --data"
            )
    elif labels is not None:
        listed = labels
        notes.append("classes from config.json")
    else:
        coco = coco_classes(count)
        if coco is not None:
            notes.append(f"the head has {count} classes: taken for COCO's; name others by --classes FILE")
            return tuple(ClassInfo(index, number, name) for index, (number, name) in enumerate(coco))
        notes.append(f"nothing names the {count} classes; they are numbered; name them by --classes FILE")
        listed = [f"class {index}" for index in range(count)]
    by_name = {name: number for number, name in COCO.items()}
    numbers = [by_name.get(name, -1) for name in listed]
    if len(set(numbers)) < count or -1 in numbers:
        numbers = list(range(count))
    return tuple(ClassInfo(index, numbers[index], name) for index, name in enumerate(listed))


def _labels(config: TransformersConfig, count: int) -> list[str] | None:
    """Names in config.json, as many as the class head has rows; None if it has none."""
    number = config.raw.get("num_labels")
    if number is not None and (isinstance(number, bool) or number != count):
        raise ModelError(f"{config.where}: num_labels is {number!r:.60}, but the class head has {count} rows")
    listed = config_labels(config.raw, config.where, ModelError)
    if listed is not None and len(listed) != count:
        raise ModelError(
            f"{config.where}: id2label has {len(listed)} entries; expected one for each of the class head's {count} "
            "rows; or name the classes by --classes FILE"
        )
    return listed
