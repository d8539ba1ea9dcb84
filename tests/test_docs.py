"""What is written is what there is: every written command exists, and no page names the place it was written in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from edgedetr.cli import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").glob("*.md"),
        *(ROOT / "calib").glob("*.md"),
    ]
)
LINE = re.compile(r"^\s*(edgedetr [a-z].*)$|`(edgedetr [a-z][^`]*)`", re.MULTILINE)


def written_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for match in LINE.finditer(page.read_text(encoding="utf-8")):
            found.append((page.name, (match[1] or match[2]).replace("\\|", "|")))
    return found


def find(words: list[str]) -> tuple[click.Command | None, list[str]]:
    """The command that the words name, and the words after it."""
    command: click.Command | None = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command, words = command.get_command(click.Context(command), words[0]), words[1:]
    return command, words


@pytest.mark.parametrize("page, text", written_commands())
def test_every_written_command_and_option_exists(page, text):
    command, rest = find(shlex.split(text.split("#")[0])[1:])
    assert command is not None, f"{page}: {text}"
    known = {name for option in command.params for name in option.opts}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{page}: {text} has no {word}"


def test_every_command_is_written_down():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name, command in cli.commands.items():
        names = [f"{name} {sub}" for sub in command.commands] if isinstance(command, click.Group) else [name]
        for full in names:
            assert f"`edgedetr {full}" in text


def test_every_exit_code_is_written_down():
    from edgedetr import errors

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.EdgedetrError)
    }
    for code in codes | {0, 129, 130, 143}:
        assert f"\n| {code} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_the_commands_of_the_readme_are_those_of_the_help():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```\n(.*?)```", readme, re.DOTALL) if b.startswith("edgedetr train"))
    assert [line.strip() for line in block.splitlines()] == [
        line.strip() for line in cli.help.splitlines() if line.strip().startswith("edgedetr ")
    ]


SOURCES = [
    p
    for folder in ("edgedetr", "recipes", "calib", "docs")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".md", ".toml", ".html")
]


# `pip install edgedetr`, `pip install "edgedetr[runtime]"`, `pip wheel edgedetr==0.1`: ask an index for our name.
FROM_INDEX = re.compile(
    r"(?:pip|pipx|uv)3?\s+(?:install|download|wheel|add|tool install)\b[^\n`]*?[\s'\"]edgedetr\b(?![-/.\w])"
)
TEXTS = [
    p
    for folder in ("edgedetr", "recipes", "calib", "docs", "tests", ".ci", ".github")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".md", ".toml", ".html", ".yml", ".yaml", ".json", ".cfg", "") and p.is_file()
]


@pytest.mark.parametrize(
    "line, wrong",
    [
        ('pip install "edgedetr[all]"', True),
        ("run: pip install 'edgedetr[x]'", True),
        ("pip install -U edgedetr", True),
        ("pip install edgedetr==0.1", True),
        ('pip install "./edgedetr-0.1.0-py3-none-any.whl[runtime]"', False),
        ('pip install -e ".[all]"', False),
        ("pip install ./edgedetr-*.whl", False),
        ("~/edgedetr/bin/pip install numpy", False),
    ],
)
def test_an_installation_by_our_name_is_recognized(line, wrong):
    assert bool(FROM_INDEX.search(line)) == wrong


def test_no_text_installs_our_name_from_an_index_that_does_not_have_it():
    texts = [*TEXTS, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found = [
        f"{p.relative_to(ROOT)}: {match[0]}"
        for p in texts
        if p != Path(__file__)
        for match in FROM_INDEX.finditer(p.read_text(encoding="utf-8"))
    ]
    assert not found


def test_every_extra_that_a_text_names_exists():
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = set(project["optional-dependencies"])
    for p in [*TEXTS, *ROOT.glob("*.md")]:
        for match in re.finditer(r"(?:\.whl|\"\.|'\.)\[([a-z][a-z, -]*)\]", p.read_text(encoding="utf-8")):
            assert {name.strip() for name in match[1].split(",")} <= declared, f"{p.relative_to(ROOT)}: {match[0]}"
