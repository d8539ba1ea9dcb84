"""The wheel works from an empty folder: no checkout on the path, only what it contains and what it declares."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel, as `pip install --no-deps --target` leaves it."""
    pytest.importorskip("hatchling", reason="building the wheel offline needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    wheel = next((folder / "dist").glob("edgedetr-*.whl"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(folder / "site"),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    return folder


def run(installed: Path, *words: str, code: str = "") -> str:
    """Run the installed command, or some code, away from the checkout; standard output and error together."""
    # -S and -P would hide the test environment's own packages (numpy, click, torch), which replace the declared ones.
    environment = {"PATH": os.environ["PATH"], "HOME": str(installed), "PYTHONPATH": str(installed / "site")}
    command = (
        [sys.executable, "-c", code] if code else [sys.executable, str(installed / "site" / "bin" / "edgedetr"), *words]
    )
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_carries_recipes_policies_template_and_types(installed):
    names = set(zipfile.ZipFile(next((installed / "dist").glob("*.whl"))).namelist())
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert f"edgedetr/_recipes/{recipe.name}" in names
    assert {
        "edgedetr/_policy/default.toml",
        "edgedetr/_patterns/known.toml",
        "edgedetr/reporting/page.html",
        "edgedetr/py.typed",
        "edgedetr/lint/operators.json",
        "edgedetr/recipe_list.json",
        "edgedetr/model_list.json",
    } <= names
    assert not [name for name in names if name.startswith(("tests", "runs")) or name.endswith(".pyc")]


def test_the_installed_package_is_the_one_that_runs(installed):
    where = run(installed, code="import edgedetr; print(edgedetr.__file__)")
    assert Path(where.strip()).is_relative_to(installed)


def test_the_installed_command_answers(installed):
    assert "Start:" in run(installed, "--help")
    assert "edgedetr 0.2.0" in run(installed, "--version")
    assert "rt_detr" in run(installed, "recipes")


def test_the_installed_package_finds_its_recipes_and_policies(installed):
    code = (
        "from edgedetr.recipe import Recipe; from edgedetr.package_data import policies_directory, recipes_directory; "
        "print(Recipe.load('demo').model.name, recipes_directory(), (policies_directory() / 'default.toml').is_file())"
    )
    assert run(installed, code=code).split() == ["rt_detr", str(installed / "site" / "edgedetr" / "_recipes"), "True"]


def test_the_installed_runtime_imports_alone(installed):
    code = "import sys, edgedetr.runtime; print('torch' in sys.modules, 'click' in sys.modules)"
    assert run(installed, code=code).split() == ["False", "False"]
