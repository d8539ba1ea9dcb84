"""A bundle whose model and classes have hostile names writes nothing that somebody else reads as an instruction."""

from __future__ import annotations

import configparser
import json
import logging
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.cli import run
from edgedetr.cli._output import say, table
from edgedetr.printable import json_text, one_line, printable

HOSTILE = [
    "two\nlines",
    "a;b",
    "\x1b[2J\x1b]0;title\x07gone",
    "\u202egnp.exe",
    "../../etc/passwd",
    "q\"u'o\\te",
    "\r\noverwritten",
    "[property]\nonnx-file=/etc/passwd",
    "\x9b31m",
    "\u2028separated",
    "$\\frac{$",
    " ",
    "<script>alert(1)</script>",
    "\U000e0041tag",
    "\ufeff",
    "\u0645\u06cc\u200c\u062e",
    "z" * 900,
]
REFUSED = ["nul\0byte", "\ud800half", "z" * 5000, ""]  # bundle.json does not have them; other files may
FIXTURES = Path(__file__).parent / "fixtures"
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def steers(text: str, also: str = "\n") -> list[str]:
    """Characters in it that steer a terminal or a reader."""
    return [c for c in text if unicodedata.category(c) in STEERING and c not in also + "\u200c"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class for each name; the first image finds all of them. The folder has a name of that kind too."""
    folder = tmp_path_factory.mktemp("hostile") / "b\x1b[31m\nundle"
    count = len(HOSTILE)
    classes = tuple(ClassInfo(i, i, name) for i, name in enumerate(HOSTILE))
    bundle = Bundle.create(
        folder,
        Manifest("m\n[property]\nonnx-file=/etc/passwd\n\x1b[2J", classes, InputContract(32, 32), OutputContract()),
    )
    constants = {
        "one": np.zeros(1, np.float32),
        "l": np.full((1, 1, count), 3, np.float32),
        "b": np.array([[[0.5, 0.5, 0.5, 0.5]]], np.float32),
        "axes": np.array([1, 2, 3]),
    }
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "one"], ["z"]),
        helper.make_node("Add", ["l", "z"], ["logits"]),
        helper.make_node("Add", ["b", "z"], ["boxes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("images", TensorProto.FLOAT, [1, 3, 32, 32])],
        [value("logits", TensorProto.FLOAT, [1, 1, count]), value("boxes", TensorProto.FLOAT, [1, 1, 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    with bundle.add("model.onnx", stage="export\x1b[2J") as path:
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return folder


def test_the_terminal_gets_no_character_that_steers_it(hostile, tmp_path, capsys):
    image = tmp_path / "\x1b[2J\u202e.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    assert run(["inspect", str(hostile)]) == 0
    assert run(["inspect", str(hostile), "--json"]) == 0
    assert run(["predict", str(hostile), str(image), "--backend", "onnxruntime", "--out", str(tmp_path / "out")]) == 0
    assert run(["predict", str(hostile), str(tmp_path / "none\x1b[2J.png"), "--backend", "onnxruntime"]) == 1
    assert run(["verify", str(hostile)]) == 2
    said = capsys.readouterr()
    assert steers(said.err) == [] and steers(said.out) == []
    assert "\\x1b[2J" in said.err


def test_the_json_lines_return_the_names_unchanged(hostile, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(image)
    assert run(["predict", str(hostile), str(image), "--backend", "onnxruntime"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert {found["class_name"] for found in json.loads(line)["detections"]} == set(HOSTILE)


def test_deepstream_reads_its_own_keys_alone_and_a_label_for_each_class(hostile, tmp_path):
    from edgedetr.serving.deepstream import write_deepstream

    files = write_deepstream(Bundle.open(hostile), tmp_path / "ds")
    text = files.config.read_text(encoding="utf-8")
    assert steers(text) == []
    parser = configparser.ConfigParser(strict=True)  # a key or a section that comes twice is an error
    parser.read_string(text)
    assert parser["property"]["onnx-file"] == "model.onnx"
    assert {section: len(parser[section]) for section in parser.sections()} == {"property": 22, "class-attrs-all": 1}
    labels = files.labels.read_bytes().decode("utf-8").split("\n")
    assert labels.pop() == "" and len(labels) == len(HOSTILE)
    assert not any(";" in label or not label.strip() or steers(label, "") for label in labels)


def test_the_page_of_the_report_holds_no_markup_or_mark_of_theirs(tmp_path):
    from edgedetr.reporting.report import write_report

    shutil.copytree(FIXTURES / "bundle-0.1", tmp_path / "b.bundle")
    bundle = Bundle.open(tmp_path / "b.bundle")
    names = ["<script>alert(1)</script>", "$\\frac{$", "\x1b[2J\x07", "\u202e", '"><img src=x>', "two\nlines"]
    bundle.update(classes=tuple(replace(c, name=name) for c, name in zip(bundle.manifest.classes, names)))
    page = write_report(Bundle.open(bundle.path), data=FIXTURES / "scenes-0.1").path.read_text(encoding="utf-8")
    assert steers(page) == [] and "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert" in page


def test_triton_reads_one_configuration(hostile, tmp_path):
    from edgedetr.serving.triton import write_repository

    made = write_repository(Bundle.open(hostile), tmp_path, "model.onnx")
    assert made.folder.parent == tmp_path and made.name.isascii() and "/" not in made.name
    text = (made.folder / "config.pbtxt").read_text(encoding="utf-8")
    assert text.isascii() and steers(text) == []
    # Outside of strings nothing is left but what we write: as many opened as closed, and each key once.
    bare = "".join(part for i, part in enumerate(text.split('"')) if i % 2 == 0)
    assert bare.count("{") == bare.count("}") and (bare.count("platform:"), bare.count("name:")) == (1, 4)
    assert len((made.folder / "labels.txt").read_text(encoding="utf-8").split("\n")) == len(HOSTILE) + 1


@pytest.mark.parametrize("name", HOSTILE + REFUSED)
def test_a_name_is_one_line_that_can_be_encoded(name):
    for text in (printable(name), one_line(name), json_text([name])):
        assert steers(text, "") == [] and text.encode("utf-8") is not None
    assert json.loads(json_text([name])) == [name] and one_line(name).strip()


def test_letters_of_all_scripts_and_joiners_stay():
    for name in ("\u0645\u06cc\u200c\u062e", "\u7ea2\u7ec6", "\u00e4\u00df", "\U0001f469\u200d\U0001f52c", "e\u0301"):
        assert printable(name) == name and json_text(name) == f'"{name}"'


def test_a_table_keeps_its_rows_and_columns(capsys):
    table(["name", "n"], [["a\nforged  99", 1], ["b\rc\td", 2]])
    assert capsys.readouterr().err.splitlines() == ["name           n", "a\\nforged  99  1", "b\\rc\\td        2"]


def test_colors_of_our_own_remain_and_those_of_others_do_not(monkeypatch):
    written = []
    monkeypatch.setattr(click, "echo", lambda text, err: written.append(text))
    say("\x1b[31mred", fg="green")
    assert written == ["\x1b[32m\\x1b[31mred\x1b[0m"]


def test_log_lines_are_safe_too():
    assert run(["inspect", "none.onnx"]) == 1
    handler = next(h for h in logging.getLogger().handlers if type(h.formatter).__name__ == "SafeFormatter")
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "left out: %s", ("a\x1b[2J\u202e",), None)
    assert handler.format(record) == "WARNING x: left out: a\\x1b[2J\\u202e"
