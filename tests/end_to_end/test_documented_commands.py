"""README and docs/jetson.md work as pasted: every command of their deployment is run, up to the hardware.

The board is a folder that the documented copy goes to, and a TensorRT whose engines compute what their graphs say.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import fake_cuda
import fake_tensorrt
import pytest
from tensorrt_spec.fake import LAYERS_10, FakeTensorRT

from edgedetr import cli
from edgedetr.bundle import Bundle
from edgedetr.data.synthetic import render

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("micro.toml")
BLOCK = re.compile(r"```\n(.*?)```", re.DOTALL)


def lines(page: str, start: str, end: str) -> list[str]:
    """The commands of all code blocks of a page between two headings, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    part = text[text.index(f"## {start}\n") : text.index(f"## {end}\n")]
    written = [line.split("  #")[0].strip() for block in BLOCK.findall(part) for line in block.splitlines()]
    return [line for line in written if line]


@pytest.fixture(scope="module")
def laptop(tmp_path_factory) -> Path:
    """A folder in which the README's commands were pasted, next to a data set called cells."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("laptop")
    render(folder / "cells", train=16, val=4, verify=10, size=64, seed=3)
    here = Path.cwd()
    os.chdir(folder)
    try:
        for line in lines("README.md", "Your images", "On a Jetson"):
            if not line.startswith("edgedetr ") or line.startswith("edgedetr predict"):
                continue
            words = shlex.split(line)[1:]
            if words[0] == "train":  # a recipe that is trained in a second instead of hours
                words += ["--recipe", str(RECIPE)]
            # 3: what this little model loses is not the question here.
            assert cli.run(words) in {"train": (0,), "export": (0,), "verify": (0, 3), "report": (0,)}[words[0]]
    finally:
        os.chdir(here)
    return folder


class Inspected(FakeTensorRT):
    """A builder whose n-th engine is the n-th graph, and whose layers run in that graph's precision."""

    def _runtime(self, logger):
        form = {
            "fp16": "Row major linear FP16 format",
            "int8": "Thirty-two wide channel vectorized row major Int8 format",
        }[self.order.pop(0)]
        layer = {**LAYERS_10["Layers"][0], "Inputs": [{"Name": "x", "Format/Datatype": form}]}
        self.inspector = json.dumps({**LAYERS_10, "Layers": [layer]})
        return super()._runtime(logger)


def on_board(words: list[str], board: Path, names, monkeypatch) -> int:
    """Run one command of edgedetr as the board would, with TensorRT and without PyTorch."""
    with monkeypatch.context() as patch:
        patch.chdir(board)
        patch.setenv("XDG_CACHE_HOME", str(board / ".cache"))
        cuda = fake_cuda.install(patch)
        if words[0] == "build":
            bundle = Bundle.open(words[1])
            made = Inspected(names)
            made.order = ["fp16", "int8"]
            made.plans = [bundle.require(f"model.{precision}.onnx").read_bytes() for precision in made.order]
            made.inputs = {"images": (1, 3, bundle.manifest.input.height, bundle.manifest.input.width)}
            patch.setitem(sys.modules, "tensorrt", made.module)
        else:
            fake_tensorrt.install(patch, names, cuda)
        return cli.run(words)


@pytest.mark.parametrize(
    "page, start, end", [("README.md", "On a Jetson", "Which model"), ("docs/jetson.md", "Install", "As a service")]
)
def test_the_documented_deployment_works_as_pasted(page, start, end, laptop, tmp_path, bindings, monkeypatch, capsys):
    written = lines(page, start, end)
    board = tmp_path / "board"
    board.mkdir()
    seen = []
    # The board's part begins where its packages are installed; docs/jetson.md says that before it says what to copy.
    first = ("make", "rsync", "edgedetr export", "edgedetr lint")
    for line in sorted(written, key=lambda line: not line.startswith(first)):
        words = shlex.split(line)
        seen.append(" ".join(words[:2]) if words[0] == "edgedetr" else Path(words[0]).name)
        if words[0] == "rsync":
            assert words[1] == "-a" and words[-1] == "board:"
            for source in words[2:-1]:
                if source.startswith("dist/"):  # made by `make wheel`; its name is held by the next test
                    (board / Path(source).name).touch()
                else:
                    shutil.copytree(laptop / source, board / Path(source).name)
        elif words[:2] in (["edgedetr", "export"], ["edgedetr", "lint"]):
            monkeypatch.chdir(laptop)
            assert cli.run(words[1:]) == 0
        elif words[:2] in (["edgedetr", "doctor"], ["edgedetr", "selftest"]):
            continue  # they ask the hardware itself
        elif words[0] == "edgedetr":
            words = [
                str(next((board / "cells" / "images" / "test").iterdir())) if w == "/dev/video0" else w
                for w in words
                if w != "--drop-late"
            ]
            capsys.readouterr()
            assert on_board(words[1:], board, bindings.module("10.3.0"), monkeypatch) in (
                (0, 3) if words[1] == "verify" else (0,)
            ), capsys.readouterr().err
            if words[1] == "verify":
                rows = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
                assert ["fp16", "tensorrt"] in rows and ["int8", "tensorrt"] in rows
        elif words[0].endswith("pip"):
            wheel = next(word for word in words if ".whl" in word).partition("[")[0]
            assert (board / wheel).is_file(), f"{page} installs {wheel}, which was not copied"
    assert {"rsync", "edgedetr build", "edgedetr verify", "edgedetr predict", "make"} <= set(seen)
    assert list((board / "cells.bundle" / "engines").glob("int8-*.plan"))


def test_the_wheel_that_the_docs_name_is_the_one_that_is_built(tmp_path):
    hatchling = pytest.importorskip("hatchling.build", reason="building the wheel offline needs hatchling")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        made = hatchling.build_wheel(str(tmp_path))
    assert zipfile.is_zipfile(tmp_path / made)
    for page in ("README.md", "docs/jetson.md"):
        named = set(re.findall(r"edgedetr-[\w.]+-py3-none-any\.whl", (ROOT / page).read_text(encoding="utf-8")))
        assert named == {made}, page
