"""Reads and writes recipes: strict TOML over the defaults, and `--set section.key=value` over that.

Defaults are in the configuration dataclass next to the code that they configure; a recipe has only what differs. A
preset (recipes/presets) is a set of values with a name. Later ones win: defaults < recipe < preset < `--set`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from edgedetr.artifacts import RECIPE, WEIGHTS
from edgedetr.bundle import Bundle, InputContract
from edgedetr.data.detection_set import DataConfig
from edgedetr.errors import RecipeError, did_you_mean
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.exporting.config import ExportConfig
from edgedetr.idle_settings import idle
from edgedetr.models import FAMILY
from edgedetr.options import check
from edgedetr.package_data import recipes_directory
from edgedetr.printable import shown
from edgedetr.quantization.config import QuantConfig
from edgedetr.storage.manifest import LARGEST_AREA, LARGEST_SIDE
from edgedetr.storage.reading import read_toml
from edgedetr.training.config import AugmentConfig, TrainConfig, require_loss_of, require_sides_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = "rtdetr-r18"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSize:
    """Input of the graph, pixels."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    height: int = 640  # RT-DETR, section 4.1
    width: int = 640
    resize: Literal["stretch", "letterbox"] = "stretch"  # what RT-DETR trains with; "letterbox" keeps the aspect

    def __post_init__(self) -> None:
        check(self, "input", {"height": (1, LARGEST_SIDE), "width": (1, LARGEST_SIDE)})
        if self.height * self.width > LARGEST_AREA:
            raise RecipeError(f"input is {self.height} x {self.width}; expected at most {LARGEST_AREA:,} pixels")

    def contract(self) -> InputContract:
        return InputContract(self.height, self.width, self.resize)


@dataclass(frozen=True)
class ModelChoice:
    """A member of the family and its own configuration."""

    name: str
    config: Any  # the member's Config dataclass; each member has its own


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result: model, input, data splits, training, export, quantization, verification."""

    model: ModelChoice
    input: InputSize = field(default_factory=InputSize)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def __post_init__(self) -> None:
        require_loss_of(self.train.class_loss, self.model.config.activation)
        require_sides_for(self.train, self.model.name, self.model.config.has_sides)
        self._require_size_multiple()

    def _require_size_multiple(self) -> None:
        """Errors: RecipeError with the nearest sizes, where the model cannot read an input of this size."""
        multiple, sides = self.model.config.size_multiple, (self.input.height, self.input.width)
        if any(side % multiple for side in sides):
            above, below = ([max(side // multiple + up, 1) * multiple for side in sides] for up in (1, 0))
            near = [a if 2 * (a - side) <= multiple else b for side, a, b in zip(sides, above, below)]
            raise RecipeError(
                f"input is {sides[0]} x {sides[1]} pixels (height x width); {self.model.name} reads multiples of "
                f"{multiple}; the nearest: --set input.height={near[0]} --set input.width={near[1]}"
            )

    @classmethod
    def load(cls, source: str | Path = DEFAULT, sets: Iterable[str] = (), *, preset: str = "") -> Recipe:
        """Read a recipe, found as by `find`, then apply `section.key=value` strings.

        preset   "parity" or "strong": values over the recipe and under `sets`; "" = none

        Errors: RecipeError that names file, section, key and the nearest known key.
        """
        path = find(source)
        raw = read_toml(path, RecipeError)
        return cls.from_dict(raw, where=str(path), sets=sets, preset=preset)

    @classmethod
    def from_bundle(cls, bundle: Bundle, sets: Iterable[str] = ()) -> Recipe:
        """The resolved recipe that a bundle carries."""
        return cls.load(bundle.require(RECIPE.file), sets)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str, sets: Iterable[str] = (), preset: str = "") -> Recipe:
        """Build from parsed TOML; `where` is the start of every error message."""
        sections = {str(name): values for name, values in raw.items()}
        known = [f.name for f in fields(cls)]
        for name, values in sections.items():
            if name not in known:
                raise RecipeError(
                    f"{where}: unknown section [{name}]{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
            if not isinstance(values, Mapping):
                raise RecipeError(
                    f"{where}: {name!r} is outside any section; expected [section] headers: {', '.join(known)}"
                )
        sections = {name: dict(values) for name, values in sections.items()}
        assigned = [_with_start_of_training(*_parse_set(assignment, known)) for assignment in sets]
        if "start" in sections.get("model", {}):
            sections.setdefault("train", {}).setdefault("start", sections["model"].pop("start"))
        name = next(
            (value for section, key, value in assigned[::-1] if (section, key) == ("model", "name")),
            sections.get("model", {}).get("name", "rt_detr"),
        )
        if name not in FAMILY:
            raise RecipeError(
                f"{where} [model]: unknown model {name!r}{did_you_mean(str(name), FAMILY)}; known: {', '.join(FAMILY)}"
            )
        for section, values in (read_preset(preset, name) if preset else {}).items():
            sections.setdefault(section, {}).update(values)  # a preset changes the recipe
        given = dict.fromkeys((section, key) for section, key, _ in assigned)
        if ("model", "backbone_weights") in given and ("train", "start") not in given:
            assigned.append(("train", "start", BACKBONE_ALONE))  # who chooses them starts from them
        for section, key, value in assigned:
            sections.setdefault(section, {})[key] = value
        _resolve_start(sections, name, where)
        model = {key: value for key, value in sections.pop("model", {}).items() if key != "name"}
        parts: dict[str, Any] = {"model": ModelChoice(name, _build(FAMILY[name].config, model, f"{where} [model]"))}
        for part in fields(cls):
            if part.name != "model":
                kind = part.default_factory
                parts[part.name] = _build(kind, sections.get(part.name, {}), f"{where} [{part.name}]")
        recipe = cls(**parts)
        recipe.input.contract()
        for sentence in idle(recipe, (f"{section}.{key}" for section, key in given)):
            log.warning("%s", sentence)
        return recipe

    def to_bundle(self, bundle: Bundle, *, stage: str, sections: Iterable[str] | None = None) -> bool:
        """Write recipe.toml, whole or these sections, unless the bundle has just this; whether it was written.

        Weights that were made from the old one stay fresh: only a recipe that gives the same weights may be written.
        """
        text = self.to_toml(sections)
        if bundle.has(RECIPE.file) and bundle.require(RECIPE.file).read_text(encoding="utf-8") == text:
            return False
        with bundle.add(RECIPE.file, stage=stage, still_good=[WEIGHTS.file]) as path:
            path.write_text(text, encoding="utf-8")
        return True

    def to_toml(self, sections: Iterable[str] | None = None, *, later: bool = True) -> str:
        """The fully resolved recipe; `load` reads it back to an equal Recipe.

        sections   only these; None = all
        later      False: without options that came after 0.1 and do what 0.1 did, and with the key names of 0.1
        """
        lines = []
        for part in fields(self):
            if sections is not None and part.name not in sections:
                continue
            value = getattr(self, part.name)
            config = value.config if part.name == "model" else value
            hidden = (
                ()
                if later
                else [
                    item.name
                    for item in fields(config)
                    if item.metadata.get("later")
                    and getattr(config, item.name) == item.metadata.get("as_before", item.default)
                ]
            )
            values = {"name": value.name} if part.name == "model" else {}
            names = {} if later else {f.name: f.metadata["was"] for f in fields(config) if "was" in f.metadata}
            values |= {names.get(key, key): item for key, item in asdict(config).items() if key not in hidden}
            lines.append(f"[{part.name}]")
            lines += [f"{key} = {_toml(item)}" for key, item in values.items() if item is not None]
            lines.append("")
        return "\n".join(lines)


# Words for train.start that name no weights.
BACKBONE_ALONE, NOTHING = "none", "random"


def _with_start_of_training(section: str, key: str, value: Any) -> tuple[str, str, Any]:
    """`model.start` is another name of `train.start`."""
    return ("train", key, value) if (section, key) == ("model", "start") else (section, key, value)


def _resolve_start(sections: dict[str, dict[str, Any]], member: str, where: str) -> None:
    """Write what train.start = "none" (the backbone's weights alone) and "random" (no weights) mean into other keys.

    A network of random weights needs norms that learn, no frozen stage, and one learning rate.
    """
    model, train = sections.get("model", {}), sections.get("train", {})
    start = train.get("start")
    if start not in (BACKBONE_ALONE, NOTHING):
        return
    train["start"] = ""
    if start == NOTHING:
        if model.get("backbone_weights", "random") != "random":
            raise RecipeError(
                f"{where}: train.start is 'random', and model.backbone_weights {shown(model['backbone_weights'])}; "
                f"expected 'random' for both, or train.start = {BACKBONE_ALONE!r} for the backbone's weights alone"
            )
        known = {item.name for item in fields(FAMILY[member].config)}
        model = sections.setdefault("model", {})
        model["backbone_weights"] = "random"
        for key, value in (("backbone_norm", "trainable"), ("frozen_stages", 0)):
            if key in known:
                model.setdefault(key, value)
        train.setdefault("backbone_lr_factor", 1.0)


def read_preset(preset: str, member: str) -> dict[str, dict[str, Any]]:
    """Values of a shipped preset for a member: {section: {key: value}}; those for all members, then its own."""
    files = {p.stem: p for p in sorted((recipes_directory() / "presets").glob("*.toml"))}
    if preset not in files:
        raise RecipeError(f"no preset {preset!r}{did_you_mean(preset, files)}; known: {', '.join(files)}")
    raw = read_toml(files[preset], RecipeError)
    found: dict[str, dict[str, Any]] = {}
    for whose in ("all", member):
        for section, values in raw.get(whose, {}).items():
            found.setdefault(section, {}).update(values)
    if not found:
        raise RecipeError(f"preset {preset!r} has no values for {member}; it is for {', '.join(raw)}")
    return found


def shipped_recipes() -> dict[str, Path]:
    """The files of the shipped recipes by name, in the order of the alphabet."""
    return {path.stem: path for path in sorted(recipes_directory().glob("*.toml"))}


def find(source: str | Path) -> Path:
    """The file of a recipe given by its path, by the name of a shipped one, or by the name of a member.

    Capitals and the signs - _ . are ignored in names where nothing has exactly that name: "RTDETR-R18" is rtdetr-r18,
    "rtdetr" is the member rt_detr, and a member is its recipe, see `recipe_of`.
    """
    found = lookup(source)
    if found is not None:
        return found
    shipped, name = shipped_recipes(), str(source)
    raise RecipeError(
        f"no recipe {name!r}: neither a file nor a shipped recipe nor a model"
        f"{did_you_mean(name, [*shipped, *FAMILY])}; shipped: {', '.join(shipped)} (edgedetr recipes); "
        f"models: {', '.join(FAMILY)}"
    )


def lookup(source: str | Path) -> Path | None:
    """As `find`; None where nothing has this name."""
    path = Path(source)
    if path.is_file():
        return path
    shipped, name = shipped_recipes(), str(source)
    near = {_plain(stem): stem for stem in shipped}
    members = {_plain(member): member for member in FAMILY}
    stem = name if name in shipped else near.get(_plain(name))
    if stem is None and _plain(name) in members:
        stem = recipe_of(members[_plain(name)])
    return None if stem is None else shipped[stem]


def recipe_of(member: str) -> str:
    """The name of the shipped recipe that a member's name stands for.

    It is the one that changes the fewest settings of the model, so the member as it was published; of several such
    the one with the shortest name. Errors: RecipeError where no recipe is shipped.
    """
    models = {name: read_toml(path, RecipeError).get("model", {}) for name, path in shipped_recipes().items()}
    own = [name for name, model in models.items() if model.get("name") == member]
    if not own:
        raise RecipeError(f"no recipe is shipped for the model {member!r}; expected a recipe, see: edgedetr recipes")
    return min(own, key=lambda name: (len(models[name]), len(name), name))


def _plain(name: str) -> str:
    return re.sub("[-_. ]", "", name.lower())


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """One section as its dataclass, strictly typed."""
    known = [f.name for f in fields(kind) if f.init]
    values = _with_new_names(kind, values, where)
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise RecipeError(f"{where}: {key} is {number}; expected a finite number")
    try:
        # Through JSON, whose arrays may become tuples, while a string stays no number ("1e-4" is an error here).
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = _clearest(error.errors(), values)
        key = ".".join(str(part) for number, part in enumerate(first["loc"]) if number == 0 or isinstance(part, int))
        if first["type"] == "literal_error" and type(first["input"]) is int and key in values:
            return _build(kind, {**values, key: str(first["input"])}, where)  # --set train.precision=16
        words = re.findall("'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
        near = did_you_mean(str(first.get("input")), words)
        raise RecipeError(f"{where}: {key} = {shown(first.get('input'))}: {first['msg']}{near}") from error
    except (TypeError, RecursionError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _clearest(errors: list[ErrorDetails], values: Mapping[str, Any]) -> ErrorDetails:
    """The error to show where a key takes a number or a word: a text was meant as the word, all else as a number."""
    same = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    words = [error for error in same if error["type"] == "literal_error"]
    others = [error for error in same if error["type"] != "literal_error"]
    is_text = same[0]["loc"] and isinstance(values.get(str(same[0]["loc"][0])), str)
    return ((words if is_text else others) or same)[0]


def _with_new_names(kind: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The section with today's key names; a warning names each older one."""
    now = {f.metadata["was"]: f.name for f in fields(kind) if "was" in f.metadata}
    found = {}
    for key, value in values.items():
        name = now.get(key, key)
        if name != key and name in values:
            raise RecipeError(f"{where}: {key!r} is the older name of {name!r}, and both are given; keep {name!r}")
        if name != key:
            log.warning("%s: %r is now named %r; the older name is still read", where, key, name)
        found[name] = value
    return found


def _parse_set(assignment: str, sections: list[str]) -> tuple[str, str, Any]:
    """`train.lr=2e-4` -> ("train", "lr", 0.0002); a value that is no TOML value is a string."""
    target, equals, text = assignment.partition("=")
    section, dot, key = target.strip().partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"--set {shown(assignment)}: expected section.key=value, for example train.lr=2e-4")
    if section not in sections:
        raise RecipeError(
            f"--set {shown(assignment)}: unknown section {section!r}{did_you_mean(section, sections)}; "
            f"known: {', '.join(sections)}"
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": text.strip()}
    except (ValueError, RecursionError) as error:  # whole numbers of more than 4300 digits, endless brackets
        raise RecipeError(f"--set {shown(assignment)}: not readable as a value ({error})") from error
    if len(parsed) > 1:
        raise RecipeError(
            f"--set {shown(assignment)}: more than one value; expected section.key=value, one --set for each"
        )
    return section, key.strip(), parsed["value"]


def _toml(value: Any) -> str:
    """One value as TOML; the recipe is flat, so tables do not occur."""
    if is_dataclass(value) or isinstance(value, Mapping):
        raise TypeError(f"a recipe section must be flat, found {type(value).__name__}")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value) if any(mark in repr(value) for mark in ".en") else f"{value!r}.0"
    # Strings, booleans and whole numbers are spelled alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)
