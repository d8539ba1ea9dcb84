"""Freed memory stays with the process, by the page faults that the kernel counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Ten blocks of 40 MB, one after the other, and what they cost in page faults.
FAULTS = """
import resource
from edgedetr.training.train import keep_freed_memory
def faults():
    for count in range(11):
        if count == 1:      # the first one is new memory in any case
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * 40_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux has this setting")
def test_freed_blocks_are_not_requested_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    without, could, kept = done.stdout.split()
    if could == "False":
        pytest.skip("this C library has no such option")
    assert int(without) > 1000
    assert int(kept) < int(without) / 20
