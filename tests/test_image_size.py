"""HEIGHTxWIDTH is read in one way, whichever option or argument holds it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgedetr
from edgedetr.cli import run
from edgedetr.errors import UsageError
from edgedetr.image_size import check_size, parse_size

WRONG = [
    "",
    "x",
    "1080",
    "0x5",
    "5x0",
    "0x0",
    "5x-1",
    "1080x1920x3",
    "99999x1",
    "16385x1",
    "axb",
    "1.5x2",
    "²x3",
    "\u0661x\u0662",
    "1_0x2",
    "+1x2",
    "1e3x2",
    "9" * 5000 + "x1",
    "640",
    "640×640",
    "640,640",
    "1x2\n3",
]


@pytest.mark.parametrize("text, size", [("1080x1920", (1080, 1920)), ("1X2", (1, 2)), (" 16384 x 1 ", (16384, 1))])
def test_a_size_is_height_by_width(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_a_usage_error_of_a_line(text):
    with pytest.raises(UsageError, match="expected HEIGHTxWIDTH in pixels, each side 1 to 16384") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "size",
    [
        (0, 5),
        (5, -1),
        (1.5, 2),
        ("1", "2"),
        (True, 5),
        (1, 2, 3),
        640,
        None,
        "640x640",
        (10**400, 1),
        pytest.param((10**5000, 1), id="huge"),
    ],
)
def test_other_values_are_a_usage_error(size):
    with pytest.raises(UsageError, match="expected HEIGHTxWIDTH"):
        check_size(size)


@pytest.mark.parametrize(
    "command",
    [
        ["build", "none.bundle", "--frame"],
        ["export", "none.bundle", "--frame"],
        ["import", "none.onnx", "--out", "out.bundle", "--input"],
    ],
)
@pytest.mark.parametrize("text", ["²x3", "0x0", "640", "99999x1"])
def test_every_command_says_the_same_before_it_looks_at_anything(tmp_path, monkeypatch, capsys, command, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.bundle").mkdir()
    assert run([*command, text]) == 2
    assert f"{command[-1]} is '{text}'; expected HEIGHTxWIDTH" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["none.bundle"]


def test_nothing_else_in_the_package_takes_a_size_apart():
    package, found = Path(edgedetr.__file__).parent, []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                if node.func.attr in ("split", "partition") and first in ("x", "X"):
                    found.append(path.name)
    assert found == []
