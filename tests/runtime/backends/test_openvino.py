"""Signals still reach Python after OpenVINO's graphs are built and released."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("openvino")

# Several graphs come and go in the order they came, as in verify and bench; then a signal that Python handles. The
# process has faulthandler's stack for signal handlers, as under pytest or with PYTHONFAULTHANDLER, or none.
COME_AND_GO = """
import signal, sys
from edgedetr.runtime.backends.openvino import OpenVinoRunner
runners = [OpenVinoRunner(sys.argv[1]) for _ in range(3)]
while runners:
    del runners[0]
signal.signal(signal.SIGTERM, lambda number, frame: print("handled", number))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize("words", [["-X", "faulthandler"], []], ids=["faulthandler", "plain"])
def test_a_signal_is_handled_after_graphs_went_in_the_order_they_came(make_bundle, words):
    model = make_bundle("model.onnx").path / "model.onnx"
    done = subprocess.run(
        [sys.executable, *words, "-c", COME_AND_GO, str(model)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "handled 15"), done.stderr
