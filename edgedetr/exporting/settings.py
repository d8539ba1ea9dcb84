"""Settings given to an export: checked before it, and written into the bundle's recipe after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from edgedetr.artifacts import RECIPE
from edgedetr.bundle import Bundle
from edgedetr.errors import UsageError
from edgedetr.exporting.reference_run import is_imported
from edgedetr.quantization.policy import CURE, without_cures
from edgedetr.recipe import Recipe

SECTIONS = ("quant", "export")  # what an export can change; the rest is in the weights, or verify's


def settings(bundle: Bundle, sets: Sequence[str]) -> Recipe:
    """The bundle's recipe, changed by `section.key=value` strings; the defaults where the bundle has none.

    Errors: UsageError for a section that no export changes, RecipeError for unknown sections, keys and values.
    """
    for assignment in sets:
        section = assignment.partition("=")[0].partition(".")[0].strip()
        if section == "export" and is_imported(bundle):
            raise UsageError(
                f"--set {assignment!r}: {bundle.path} holds an imported graph, whose form is fixed; "
                "expected keys of quant; or import it again: edgedetr import"
            )
        if section not in SECTIONS and section in [part.name for part in fields(Recipe)]:
            way = (
                f"give verify its own: edgedetr verify {bundle.path} --max-drop AP"
                if section == "verify"
                else f"train again: edgedetr train --data DIR --recipe {bundle.path / RECIPE.file} "
                f"--set {assignment} --out B"
            )
            raise UsageError(
                f"--set {assignment!r}: an export cannot change [{section}]; expected keys of "
                f"{' and '.join(SECTIONS)}; {way}"
            )
    if RECIPE.file in bundle.manifest.files:
        return Recipe.from_bundle(bundle, sets)
    return Recipe.from_dict({}, where=str(bundle.path), sets=sets)


def record(bundle: Bundle, recipe: Recipe) -> None:
    """Write these settings into the bundle's recipe, so that later commands use them; an equal recipe is not rewritten.

    The weights do not depend on them and stay fresh. A bundle without a recipe, which is an imported graph, gets one
    of these sections alone.
    """
    entry = bundle.manifest.files.get(RECIPE.file)
    whole = entry is not None and entry.stage != "export"
    recipe.to_bundle(bundle, stage=entry.stage if entry else "export", sections=None if whole else SECTIONS)


def with_cures(bundle: Bundle, sets: Sequence[str], cures: Sequence[str]) -> str:
    """The setting that adds the cures of known patterns to the policy that the bundle's recipe and `sets` name."""
    policy = settings(bundle, sets).quant.policy
    base = without_cures(policy)
    names = dict.fromkeys([*policy[len(base) :].split(CURE), *cures])
    return f"quant.policy={CURE.join([base, *filter(None, names)])}"
