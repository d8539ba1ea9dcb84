"""What a training starts from: the weights of a whole detector, which of them stay, and on which terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgedetr.artifacts import IMPORT_RECORD, START, WEIGHTS
from edgedetr.bundle import MANIFEST, Bundle
from edgedetr.errors import ModelError
from edgedetr.models.checkpoints import pretrained
from edgedetr.models.checkpoints.pretrained import LoadedWeights, WeightsDoNotFit
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.detector import DetrModel
from edgedetr.published.published_detectors import PublishedDetector
from edgedetr.recipe import Recipe
from edgedetr.storage.digests import digest
from edgedetr.storage.reading import read_json

SHOWN = 12  # names of classes in a message


@dataclass(frozen=True)
class Start:
    """Weights that were loaded into a model before its training.

    loaded   what was kept
    record   for the bundle: where the weights come from, their revision, digests and license
    notes    for the user
    """

    loaded: LoadedWeights
    record: dict[str, Any]
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """What stays, what starts anew and the license, in some lines for people."""
        loaded, record = self.loaded, self.record
        lines = [f"start: {record['source']}{_about(record)}"]
        kept, fresh = loaded.kept_classes, loaded.fresh_classes
        if kept or fresh:
            lines.append(f"  kept: {loaded.tensors} tensors; of the class heads, rows by name: {_some(kept)}")
        else:
            lines.append(f"  kept: {loaded.tensors} tensors")
        if fresh:
            lines.append(f"  started anew, as classes that are rare at first: {_some(fresh)}")
        elif loaded.fresh:
            lines.append(f"  started anew, because the number of classes differs: {_some(loaded.fresh)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """The content of results/start.json."""
        loaded = asdict(self.loaded)
        counts = {name: loaded[name] for name in ("tensors", "fresh", "kept_classes", "fresh_classes")}
        return {**self.record, **counts, "notes": list(self.notes)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def load_start(model: DetrModel, recipe: Recipe, classes: Sequence[str]) -> Start:
    """Load train.start into the model: from a bundle, a file, a published detector or an id on the hub.

    classes   names of the model's classes; rows of the class heads are kept by name

    Errors: ModelError for weights that are not here or do not fit; LicenseError for a license that was not accepted.
    """
    source = recipe.train.start
    if (Path(source) / MANIFEST).is_file():
        return _from_bundle(model, recipe, source, list(classes))
    origin = WeightSource(source)
    notes: list[str] = []
    if (row := origin.published) is not None:
        row.require_accepted(recipe.train.accept_license)
        _require_fit(row, recipe)
        shown = f"{row.input[0]} x {row.input[1]}"
        if row.resize == "stretch" and row.input != (recipe.input.height, recipe.input.width):
            notes.append(
                f"it was trained at {shown} px, and this training has {recipe.input.height} x {recipe.input.width}"
            )
    try:
        loaded = pretrained.load_detector(model, recipe.model.name, origin, recipe.model.config, classes)
    except WeightsDoNotFit as error:
        if row is None:
            raise
        use = (
            f"--model {row.recipe}"
            if row.recipe
            else f"the recipe that is written by: edgedetr import {row.name} --out B"
        )
        raise WeightsDoNotFit(f"{error}; or train a model of its size: {use}") from error
    record = origin.record()
    if row is not None:
        record["published_ap"] = row.ap
        if not row.license.permissive:
            record["accepted"] = row.license.name
    return Start(loaded, record, (*origin.notes, *notes))


def _require_fit(row: PublishedDetector, recipe: Recipe) -> None:
    """Errors: ModelError where the recipe's model or its pixels are not those of a published detector."""
    model = recipe.model
    if row.member != model.name:
        other = f"--model {row.recipe}" if row.recipe else f"a recipe of {row.member}"
        raise ModelError(f"{row.name} is a {row.member}, and the recipe's model a {model.name}; use {other}")
    for name, theirs in zip(("mean", "std"), row.mean_and_std):
        ours = getattr(model.config, name)
        if any(abs(one - other) > 1e-3 for one, other in zip(ours, theirs)):
            raise ModelError(
                f"{row.name} was trained on pixels with {name} {list(theirs)}, and model.{name} is {list(ours)}; use "
                f"--set model.{name}={json.dumps(theirs)}"
            )


def _from_bundle(model: DetrModel, recipe: Recipe, source: str, classes: list[str]) -> Start:
    """The weights of another training or of an import."""
    bundle, name = Bundle.open(source), recipe.model.name
    if bundle.manifest.model != name:
        raise ModelError(f"{source} holds a {bundle.manifest.model}; expected a {name}, or another --recipe")
    path = bundle.require(WEIGHTS.file)
    weights, theirs = pretrained.read_weights(str(path)), [item.name for item in bundle.manifest.classes]
    loaded = pretrained.load_by_name(model, weights, str(path), theirs, classes)
    record = {"source": Path(source).name, "revision": None, "files": {WEIGHTS.file: digest(path)}}
    return Start(loaded, {**record, **_terms_of(bundle)})


def _terms_of(bundle: Bundle) -> dict[str, str]:
    """The license of the weights that a bundle began with, which binds those made from it; nothing if it has none."""
    for artifact in (START, IMPORT_RECORD):
        if bundle.has(artifact.file):
            found = read_json(bundle.require(artifact.file), ModelError)
            if isinstance(found, dict):
                return {key: found[key] for key in ("license", "terms", "accepted") if isinstance(found.get(key), str)}
    return {}


def _about(record: dict[str, Any]) -> str:
    """` (PekingU/rtdetr_v2_r18vd at 56509617, license Apache-2.0, AP 48.1 on COCO as published)`."""
    where = record.get("where", "")
    revision = f"at {record['revision']:.8}" if record.get("revision") else ""
    parts = [" ".join(filter(None, (where if where != record["source"] else "", revision)))]
    parts.append(f"license {record['license']}" if "license" in record else "license not known here")
    if "published_ap" in record:
        parts.append(f"AP {record['published_ap']:.1f} on COCO as published")
    return f" ({', '.join(filter(None, parts))})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
