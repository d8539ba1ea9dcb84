"""Finds the data files of the package: recipes, quantization policies and known patterns of faults.

In a checkout they are in `recipes/` and `calib/` at the top; in the wheel they are inside the package.
"""

from __future__ import annotations

from pathlib import Path

from edgedetr.errors import EdgedetrError

_PACKAGE = Path(__file__).resolve().parent


def recipes_directory() -> Path:
    """The folder of shipped recipes, *.toml."""
    return _find("_recipes", "recipes")


def policies_directory() -> Path:
    """The folder of shipped quantization policies, *.toml."""
    return _find("_policy", "calib/policy")


def patterns_file() -> Path:
    """The known patterns at which INT8 goes wrong."""
    return _find("_patterns", "calib/patterns") / "known.toml"


def _find(installed: str, checkout: str) -> Path:
    for folder in (_PACKAGE / installed, _PACKAGE.parent / checkout):
        if folder.is_dir():
            return folder
    raise EdgedetrError(
        f"neither {_PACKAGE / installed} nor {_PACKAGE.parent / checkout} is here: this installation is incomplete; "
        "install it again, from the checkout (make install) or from its wheel (make wheel)"
    )
