"""The bar of a training: its lines, and what replaces it where rich is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgedetr.cli import _training_bar

WITHOUT_RICH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rich":
            raise ImportError("rich is not installed")

sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_RICH + code], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_training_from_python_needs_no_rich() -> None:
    done = run("import edgedetr.training.train, sys; assert 'rich' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_without_rich_every_evaluation_is_one_plain_line() -> None:
    done = run(
        "from edgedetr.cli._training_bar import training_bar\n"
        "bar = training_bar()\n"
        "bar.note('warm-up 1 steps [5 % of 20]')\n"
        "bar.start(10, 0, 5)\n"
        "bar.step(1, {'loss': 1.0}, 3.0)\n"
        "bar.evaluated(1, 12.34, None, True)\n"
        "bar.evaluated(2, None, 5.0, False)\n"
        "bar.finish()\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "warm-up 1 steps [5 % of 20]",
        "epoch 1/5: AP 12.3  AP50 -  best so far",
        "epoch 2/5: AP -  AP50 5.0",
    ]


def test_the_bar_shows_steps_and_losses_and_prints_evaluations() -> None:
    console = pytest.importorskip("rich.console")
    import io

    stream = io.StringIO()
    bar = _training_bar.RichTrainingBar(console.Console(file=stream, width=110, force_terminal=True, no_color=True))
    bar.start(30, 3, 2)
    bar.step(4, {"loss": 7.125, "class": 1.5, "l1": 2.0, "giou": 3.0}, 12.4)
    bar.evaluated(1, 31.04, 52.36, True)
    bar.finish()
    shown = stream.getvalue()
    assert "epoch 1/2: AP 31.0  AP50 52.4  best so far" in shown
    assert "4/30" in shown and "loss 7.12  class 1.50  l1 2.00  giou 3.00  12 img/s" in shown
