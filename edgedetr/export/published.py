"""Published weights of a detector to a bundle: architecture from the tensors, classes and resize from what lies beside.

Nothing in the file is executed, and nothing in it is skipped without a word: a tensor that has no place is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from edgedetr.bundle import MANIFEST, Bundle, ClassInfo, DataRecord, Manifest, OutputContract
from edgedetr.data import layouts
from edgedetr.data.coco_names import COCO, UNUSED, coco_classes
from edgedetr.errors import DataError, ModelError
from edgedetr.models import build, member, names, pretrained
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.infer import classes as count_classes
from edgedetr.models.infer import infer
from edgedetr.recipe import Recipe

STEP = 32               # input sides are multiples of the coarsest stride
# What the authors resize to, where no preprocessor_config.json says it: RT-DETR stretches to a square, the others make
# the shorter side 800 px and the longer at most 1333.
STRETCHED = ("rt_detr",)
SQUARE, SHORT, LONG = 640, 800, 1333
# Keys of config.json that no tensor tells, and ours for them.
TOLD = {"two_stage_num_proposals": "queries", "num_queries": "queries", "dilation": "dilate_last"}


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    layout      whose names the file uses
    tensors     taken over;  kept, fresh: classes whose rows were found by name, and those that start anew
    notes       what the reader should know: where classes and resize come from, what could not be told
    """

    bundle: Bundle
    layout: str
    tensors: int
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


def import_weights(source: str, model: str, out: str | Path, *, data: Path | None = None, classes: Path | None = None,
                   size: tuple[int, int] | None = None, sets: Sequence[str] = ()) -> Imported:
    """Write a bundle from a .pth or .safetensors file, a folder of transformers, or a name on the hub.

    data      its classes replace the file's: rows of the class heads are kept by name; recorded for export and verify
    classes   a text file with one name per line, in the order of the file's class head; "-" is a row without a class
    size      height, width of the input; default: what the model was trained with
    sets      `section.key=value`, laid over what was inferred
    Errors: ModelError (layout, tensors, classes), DataError, BundleError.
    """
    out = Path(out)
    if (out / MANIFEST).exists():
        raise ModelError(f"{out} is a bundle already; name another --out")
    chosen = member(model)
    notes: list[str] = []
    raw = pretrained.read(source)
    layout, weights = names.layout_of(model, raw, source), names.translate(model, raw, source)
    told, resize = _beside(source, "config.json"), _beside(source, "preprocessor_config.json")
    heads = _heads(told, sets)
    values = {**infer(chosen.config, weights, heads), **_told(told, chosen.config), "heads": heads}
    values = {name: value for name, value in values.items() if name in chosen.config.__dataclass_fields__}
    height, width, how = _size(model, resize, size, notes)
    sections = {"model": {"name": model, **values, **_colours(resize)},
                "input": {"height": height, "width": width, "resize": how}}
    recipe = Recipe.from_dict(sections, where=source, sets=sets)
    config = recipe.model.config
    if hasattr(config, "dilate_last") and "dilation" not in told:
        notes.append(f"no tensor says whether C5 is dilated (DC5): taken as {config.dilate_last}; otherwise --set "
                     f"model.dilate_last={str(not config.dilate_last).lower()}")
    published = _classes(count_classes(weights, config.activation), told, classes, source, notes)
    record, wanted = None, published
    if data is not None:
        place = recipe.data.resolve(layouts.splits(data))
        wanted = layouts.load(data, place.verify_split).classes
        record = DataRecord(str(data.resolve()), place.verify_split, place.train_split)
    detector = build(model, config, len(wanted))
    rows = pretrained.rows_by_name([c.name for c in published], [c.name for c in wanted])
    loaded = pretrained.fit(detector, weights, source, None if wanted == published else rows)
    contract = recipe.input.contract()
    DeployGraph(detector, contract.height, contract.width)      # what cannot be deployed fails before it is written
    bundle = Bundle.create(out, Manifest(model, wanted, contract, OutputContract(config.activation),
                                         config=asdict(config), data=record, budget=recipe.verify.budget))
    with bundle.add("recipe.toml", stage="import") as path:
        path.write_text(recipe.to_toml(), encoding="utf-8")
    with bundle.add("weights.safetensors", stage="import", made_from=["recipe.toml"]) as path:
        save_file({name: value.contiguous() for name, value in detector.state_dict().items()}, path)
    kept = tuple(c.name for c, row in zip(wanted, rows) if row is not None)
    fresh = tuple(c.name for c, row in zip(wanted, rows) if row is None)
    if fresh:
        notes.append(f"rows of the class heads kept by name: {', '.join(kept) or 'none'}; started anew: "
                     f"{', '.join(fresh)}; train before use: edgedetr train --data DIR --recipe {out}/recipe.toml "
                     f"--set train.start={out}")
    return Imported(bundle, layout, loaded.tensors, kept, fresh, tuple(notes))


def _beside(source: str, name: str) -> dict[str, Any]:
    """A JSON file beside the weights, on disk or on the hub; empty where there is none."""
    path = pretrained.beside(source, name)
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); repair or remove it") from error
    return content if isinstance(content, dict) else {}


def _heads(told: dict[str, Any], sets: Sequence[str]) -> int:
    """Attention heads: as set, as told, or 8 as in every published member."""
    for assignment in sets:
        if assignment.replace(" ", "").startswith("model.heads="):
            return int(assignment.partition("=")[2])
    return int(told.get("decoder_attention_heads") or told.get("encoder_attention_heads") or 8)


def _told(told: dict[str, Any], config: type[Any]) -> dict[str, Any]:
    """Settings that config.json has and no tensor tells."""
    found = {ours: told[theirs] for theirs, ours in TOLD.items() if isinstance(told.get(theirs), (int, bool))}
    if told.get("two_stage") and "two_stage_num_proposals" in told:
        found["queries"] = told["two_stage_num_proposals"]
    if told.get("decoder_method") in ("default", "discrete"):
        found["method"] = told["decoder_method"]
    return {name: value for name, value in found.items() if name in config.__dataclass_fields__}


def _colours(resize: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation of preprocessor_config.json; {} where the member's own hold."""
    if not resize:
        return {}
    if not resize.get("do_normalize", True):
        return {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    if isinstance(resize.get("image_mean"), list) and isinstance(resize.get("image_std"), list):
        return {"mean": [float(x) for x in resize["image_mean"]], "std": [float(x) for x in resize["image_std"]]}
    return {}


def _size(model: str, resize: dict[str, Any], size: tuple[int, int] | None,
          notes: list[str]) -> tuple[int, int, str]:
    """Height, width and way of the resize that the model was trained with, as one fixed size."""
    told = resize.get("size")
    told = told if isinstance(told, dict) else {}
    if told.get("height") and told.get("width"):
        height, width, how = int(told["height"]), int(told["width"]), "stretch"
    elif told.get("shortest_edge") or model not in STRETCHED:
        short, long = int(told.get("shortest_edge") or SHORT), int(told.get("longest_edge") or LONG)
        height, width, how = -(-short // STEP) * STEP, -(-long // STEP) * STEP, "letterbox"
        notes.append(f"trained with the shorter side at {short} px and the longer at most {long}: letterbox to "
                     f"{height} x {width} keeps that for wide pictures; for upright ones use --input {width}x{height}")
    else:
        height, width, how = SQUARE, SQUARE, "stretch"
    if size is not None:
        notes.append(f"input {size[0]} x {size[1]} instead of the {height} x {width} that it was trained with")
        height, width = size
    return height, width, how


def _classes(count: int, told: dict[str, Any], file: Path | None, source: str,
             notes: list[str]) -> tuple[ClassInfo, ...]:
    """The classes of the file's head: named by `file`, by config.json, by COCO where the count fits, or by number."""
    labels = told.get("id2label")
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            listed = [UNUSED if line == "-" else line for line in lines if line]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: not readable ({error}); expected a class name per line") from error
        if len(listed) != count:
            raise DataError(f"{file} names {len(listed)} classes, but the class head of {source} has {count}; "
                            "expected one name per line, in the head's order; for other classes use --data")
    elif isinstance(labels, dict) and len(labels) == count:
        listed = [str(labels.get(str(index), labels.get(index, index))) for index in range(count)]
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
