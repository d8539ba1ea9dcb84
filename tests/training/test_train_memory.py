"""Freed memory stays with the process, by the page faults that the kernel counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Ten blocks of 40 MB, one after the other, and what they cost in page faults.
FAULTS = """
import resource
from edgedetr.training.train import keep_freed_memory
if {keep}:
    print(keep_freed_memory())
for count in range(11):
    if count == 1:      # the first one is new memory in any case
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 40_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool) -> list[str]:
    script = FAULTS.format(keep=keep)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux has this setting")
def test_freed_blocks_are_not_requested_again():
    without, (could, keep) = int(run(False)[-1]), run(True)
    if could == "False":
        pytest.skip("this C library has no such option")
    assert without > 1000
    assert int(keep) < without / 20
