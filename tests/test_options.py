"""Every option of every configuration is checked, from Python as from TOML, and no unknown word chooses anything."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest

import edgedetr
from edgedetr.data.detection_set import DataConfig
from edgedetr.errors import EdgedetrError, RecipeError
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.exporting.config import ExportConfig
from edgedetr.models import FAMILY
from edgedetr.models.member_config import RANGES
from edgedetr.options import check
from edgedetr.quantization.config import QuantConfig
from edgedetr.recipe import InputSize, Recipe, _build
from edgedetr.training.config import AUGMENT_RANGES, TRAIN_RANGES, AugmentConfig, TrainConfig

CONFIGS = [
    TrainConfig,
    AugmentConfig,
    QuantConfig,
    ExportConfig,
    VerifyConfig,
    DataConfig,
    InputSize,
    *(member.config for member in FAMILY.values()),
]
FIELDS = [(kind, item.name) for kind in CONFIGS for item in fields(kind)]
WORDS = [(kind, name) for kind, name in FIELDS if get_origin(get_type_hints(kind)[name]) is Literal]


def of(cases):
    return pytest.mark.parametrize("kind, name", cases, ids=[f"{kind.__name__}.{name}" for kind, name in cases])


@pytest.mark.parametrize("section", [f.name for f in fields(Recipe) if f.name != "model"])
def test_every_section_of_a_recipe_is_a_configuration_of_this_test(section):
    assert type(getattr(Recipe.load(), section)) in CONFIGS


@of(WORDS)
def test_every_choice_refuses_an_unknown_word_from_python(kind, name):
    for wrong in ("no-such-word", 977, None, True):
        with pytest.raises(RecipeError, match=rf"{name} is .*; expected one of"):
            kind(**{name: wrong})


@of([(kind, name) for kind, name in WORDS if isinstance(get_args(get_type_hints(kind)[name])[-1], str)])
def test_a_misspelt_word_is_answered_with_the_right_one(kind, name):
    right = max(get_args(get_type_hints(kind)[name]), key=len)
    if len(right) > 3:
        with pytest.raises(RecipeError, match=f"did you mean '{right}'"):
            kind(**{name: right[:-1]})


@of(FIELDS)
def test_every_field_refuses_another_type_and_no_number(kind, name):
    hint, default = get_type_hints(kind)[name], getattr(kind(), name)
    with pytest.raises(RecipeError, match=rf"\.{name} is "):
        kind(**{name: object()})
    if isinstance(default, (int, float)) and get_origin(hint) is not Literal and not isinstance(default, bool):
        for wrong in (math.nan, math.inf, -math.inf, "1e-4", True):
            with pytest.raises(RecipeError, match=rf"\.{name} is "):
                kind(**{name: wrong})
    if isinstance(default, tuple) and default:
        with pytest.raises(RecipeError, match=rf"\.{name} is "):
            kind(**{name: (*default[:-1], math.nan)})


def is_number(kind, name):
    """Whether a field takes a number, or a number or a word."""
    hint = get_type_hints(kind)[name]
    return hint in (int, float) or bool({int, float} & set(get_args(hint)) and type(None) not in get_args(hint))


@of([(kind, name) for kind, name in FIELDS if is_number(kind, name)])
def test_every_number_has_limits(kind, name):
    for wrong in (-5, 10**30):
        if wrong < 0 or name not in ("clip", "cost_l1", "cost_giou", "weight_l1", "weight_giou"):
            with pytest.raises(EdgedetrError, match=rf"\.{name} is .*expected"):
                kind(**{name: wrong})


def test_every_range_belongs_to_a_field():
    members = [member.config for member in FAMILY.values()]
    for kinds, ranges in (
        ([TrainConfig], TRAIN_RANGES),
        ([AugmentConfig], AUGMENT_RANGES),
        (members, RANGES),
        *(([kind], kind.ranges) for kind in members),
    ):
        assert set(ranges) <= {item.name for kind in kinds for item in fields(kind)}


def test_a_misspelt_word_in_a_recipe_is_answered_with_the_right_one():
    with pytest.raises(RecipeError, match="schedule = 'cosinus'.*did you mean 'cosine'"):
        Recipe.load(sets=["train.schedule=cosinus"])
    with pytest.raises(RecipeError, match="quant.observer is 'mean'; expected one of 'minmax'"):
        QuantConfig(observer="mean")


@dataclass(frozen=True)
class NumberOrWord:
    """Keys that take a number, or a word in its place."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid"}

    steps: int | Literal["auto"] = "auto"
    sizes: tuple[float, ...] | Literal["auto"] = ()

    def __post_init__(self) -> None:
        check(self, "train", {"steps": (1, 9), "sizes": (0.1, 4)})


def test_a_key_takes_a_number_or_the_word_and_says_so_of_anything_else():
    for good in ({"steps": 3}, {"steps": "auto"}, {"sizes": "auto"}, {"sizes": (0.5, 1.0)}, {"sizes": ()}):
        assert NumberOrWord(**good) == _build(NumberOrWord, json.loads(json.dumps(good)), "x [train]")
    for key, wrong, expected in (
        ("steps", "aut", r"'aut'; expected a whole number or 'auto'; did you mean 'auto'"),
        ("steps", 0, "0; expected 1 to 9"),
        ("steps", 1.5, "1.5; expected a whole number"),
        ("steps", True, "True; expected a whole number"),
        ("steps", None, "None; expected a whole number"),
        ("sizes", "atuo", "'atuo'; expected a list of numbers or 'auto'; did you mean 'auto'"),
        ("sizes", (7.0,), "7.0; expected 0.1 to 4"),
    ):
        with pytest.raises(RecipeError, match=rf"train\.{key} is {expected}"):
            NumberOrWord(**{key: wrong})
    for values, message in (
        ({"steps": "aut"}, r"x \[train\]: steps = 'aut': Input should be 'auto'; did you mean 'auto'"),
        ({"steps": 1.5}, r"x \[train\]: steps = 1\.5: Input should be a valid integer"),
        ({"sizes": [0.5, "half"]}, r"x \[train\]: sizes\.1 = 'half': Input should be a valid number"),
    ):
        with pytest.raises(RecipeError, match=message):
            _build(NumberOrWord, values, "x [train]")


# Options of version 0.1 of what decides weights, by name (models: of any member).
FIRST = set(
    """
accumulate backbone backbone_lr_factor backbone_norm backbone_weights backbone_width batch betas box_layers box_noise
box_tower brightness cache_mb checkpoint_every class_loss class_tower clip colour compile contrast conv_activation
coordinates cost_class cost_giou cost_l1 crop crop_aspect crop_scale cutmix decoder_activation decoder_ffn
decoder_layers denoising denoising_groups denoising_mode devices dilate_last drop_path drop_path_schedule dropout
dynamic_hidden dynamic_layers dynamic_relu ema_decay ema_warmup encoder_activation encoder_ffn encoder_layers epochs
erase eval_every expansion ffn ffn_activation final_lr_factor first_queries flip_horizontal flip_vertical focal_alpha
freeze frozen_stages fusion_blocks gamma growth heads height hidden hue l1 label_noise label_smoothing layer_decay
learned_content levels lora_alpha lora_beside lora_on lora_rank lr magnitude mean method min_visible minutes mixup
mixup_beta mosaic no_object nodes off_for_last patience patterns points position position_at position_on_value
pre_norm precision queries rand_augment refine resize roi_px roi_samples sampling saturation scale_jitter schedule
seed select_split skip_first_self_attention slow_lr_factor start std step_epochs strict threads train_split two_stage
verify_split version vfl_alpha warmup warmup_steps weight_class weight_decay weight_giou weight_l1 width workers
zoom_out zoom_out_scale
""".split()
)


@of([(kind, name) for kind, name in FIELDS if kind not in (QuantConfig, ExportConfig, VerifyConfig)])
def test_an_option_that_came_after_0_1_is_marked_so_that_older_trainings_resume(kind, name):
    metadata = next(item for item in fields(kind) if item.name == name).metadata
    marked = metadata.get("later", False)
    assert marked == (metadata.get("was", name) not in FIRST), (
        "declare it as field(default=what 0.1 did, metadata=options.LATER)"
    )


# ------------------------------------------------------------------------- functions that take one of a few words

PACKAGE = Path(edgedetr.__file__).parent
DOORS = {"one_of", "check"}
CLICK_CHECKS = "cli"  # click.Choice refuses other words before a command's function is called


def choices(tree: ast.Module) -> set[str]:
    """Names of this module that are a Literal: Observer = Literal[...]."""
    return {
        node.targets[0].id
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("Literal[")
        and isinstance(node.targets[0], ast.Name)
    }


def takes_words(annotation: ast.expr | None, named: set[str]) -> bool:
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id in {"Literal", *named} for node in ast.walk(annotation)
    )


def calls(body: ast.AST) -> set[str]:
    return {node.func.id for node in ast.walk(body) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def undoored() -> list[str]:
    """Functions and dataclasses that take a word and neither check it nor hand it on to who does."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = choices(tree)
        if inside.parts[0] == CLICK_CHECKS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                words = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if takes_words(a.annotation, named)]
                if words and not DOORS & calls(node):
                    found.append(f"{inside}:{node.name}({', '.join(words)})")
            if isinstance(node, ast.ClassDef):
                words = [
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and takes_words(item.annotation, named)
                ]
                posts = [
                    item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__post_init__"
                ]
                inherits = any(
                    ast.unparse(base) in ("TransformerConfig", "WindowedVitConfig", "BackboneConfig", "_Part")
                    for base in node.bases
                )
                if words and not inherits and not (posts and DOORS & calls(posts[0])):
                    found.append(f"{inside}:{node.name} {', '.join(words)}")
    return found


# Who hands the word on unchanged to a function that checks it, or is made by this package alone.
HANDED_ON = {
    "runtime/preprocess.py:prepare(backend)": "resize",
    "api.py:export(sampling)": "exporting/export.py hands it on",
    "exporting/export.py:export(sampling)": "ExportConfig",
    "api.py:sensitivity(level)": "quantization/sensitivity.py hands it to one_of",
    "layers/drop_path.py:set_rates(schedule)": "rate_at",
    "data/layouts.py:splits(layout)": "_layout refuses it",
    "data/layouts.py:load(layout)": "_layout refuses it",
    **dict.fromkeys(
        (
            "lint/lint_issue.py:node_issue(severity)",
            "lint/lint_issue.py:LintIssue severity",
            "lint/lint_issue.py:LintFinding severity",
        ),
        "made by the rules alone",
    ),
    **dict.fromkeys(
        (
            "importing/class_names.py:class_columns(activation)",
            "importing/image_processor.py:TargetSize kind",
            "importing/onnx_model.py:columns_for(activation)",
            "importing/output_formats.py:BoxFormat layout",
            "importing/output_formats.py:Evidence activation",
            "importing/output_formats.py:LayoutFit layouts",
            "importing/output_formats.py:ambiguous_layouts(found)",
        ),
        "made by the import's own reading, which one_of guards",
    ),
    "training/config.py:ResolvedTrainConfig schedule, precision": "TrainConfig checks all fields",
    "training/fine_tuning.py:FineTuningDefaults schedule": "made by the package alone; TrainConfig checks what follows",
    "quantization/groups.py:Group kind": "made by groups_of alone",
    "quantization/search/sequential.py:LookResult outcome": "made by judge_look alone",
    "quantization/search/search_report.py:SearchReport outcome": "made by the search alone",
    "models/member.py:Block ROLES": "Member checks the roles that its blocks declare",
    "models/backbones/backbone.py:BackboneConfig backbone_norm": "its members' configurations check all fields",
}


def test_a_word_is_checked_where_it_is_taken():
    assert sorted(set(undoored()) - set(HANDED_ON)) == []
