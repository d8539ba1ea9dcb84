"""Damaged and hostile files end in one error, within seconds, whichever reader meets them.

A few inputs for each reader in every run; `pytest -m slow tests/fuzz` tries 100,000 in all, and prints what it saw.
"""

from __future__ import annotations

import os
import random
import resource
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fuzz.mutate import mutate
from fuzz.readers import READERS, Reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedetr.errors import EdgedetrError

SECONDS, GIGABYTES = 5, 2  # an input may take at most, and a process may hold at most
LONG = int(os.environ.get("EDGEDETR_FUZZ", "100000"))


def attempt(reader: Reader, content: bytes, folder: Path) -> str:
    """Give the reader these bytes; an empty string, or what went wrong."""
    path = folder / reader.file
    path.write_bytes(content)
    start = time.monotonic()
    try:
        reader.read(folder)
    except EdgedetrError as error:
        if not str(error).strip() or len(str(error)) > 20_000:
            return f"a message of {len(str(error))} characters"
    except Exception:  # noqa: BLE001  # any other kind is what this looks for
        return traceback.format_exc(limit=-4)
    if (seconds := time.monotonic() - start) > SECONDS:
        return f"took {seconds:.1f} s"
    return ""


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """A folder for each reader with the files next to its file."""
    made: dict[str, Path] = {}

    def folder(reader: Reader) -> Path:
        if reader.name not in made:
            made[reader.name] = tmp_path_factory.mktemp("fuzz")
            reader.prepare(made[reader.name])
        return made[reader.name]

    return folder


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_an_undamaged_file_is_read(reader, around):
    pytest.importorskip("torch")
    for seed in reader.seeds():
        (around(reader) / reader.file).write_bytes(seed)
        reader.read(around(reader))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_read_or_refused_in_one_message(reader, around):
    pytest.importorskip("torch")
    seeds, folder = reader.seeds(), around(reader)

    @settings(
        max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(st.integers(0, len(seeds) - 1), st.randoms(use_true_random=True))
    def holds(number: int, rng: random.Random) -> None:
        assert attempt(reader, mutate(seeds[number], seeds, rng), folder) == ""

    holds()


def _worker(name: str, first: int, count: int, found) -> None:
    """Try inputs first, first + 1, ...; `found` hears of each fault, and every 200 inputs how far this came."""
    reader = next(reader for reader in READERS if reader.name == name)
    seeds = reader.seeds()
    with TemporaryDirectory() as folder:
        reader.prepare(Path(folder))
        for seed in seeds:  # imports are no part of an input's time
            attempt(reader, seed, Path(folder))
        for number in range(first, first + count):
            rng = random.Random(f"{name} {number}")
            found.put(("at", number))
            if fault := attempt(reader, mutate(rng.choice(seeds), seeds, rng), Path(folder)):
                found.put(("fault", f"{name} {number}: {fault}"))
    found.put(("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_many_damaged_files_are_read_or_refused(reader, capsys):
    """LONG inputs over all readers, in a process whose end, silence and memory are watched."""
    count = -(-LONG * reader.weight // sum(one.weight for one in READERS))
    context = get_context("spawn")
    found, faults, at, largest = context.Queue(), [], 0, 0.0
    process = context.Process(target=_worker, args=(reader.name, 0, count, found))
    process.start()
    try:
        while True:
            try:
                kind, value = found.get(timeout=4 * SECONDS + 60 * (at == 0))  # the first one waits for imports
            except Exception:  # noqa: BLE001  # queue.Empty: hung, or the process died
                faults.append(f"input {at}: no answer (exit code {process.exitcode})")
                break
            if kind == "done":
                largest = value
                break
            if kind == "fault":
                faults.append(value)
            else:
                at = value
    finally:
        process.kill()
        process.join()
    with capsys.disabled():
        print(f"\n{reader.name}: {at + 1} inputs, {len(faults)} faults, {largest:.2f} GiB")
    assert not faults, "\n".join(faults[:20])
    assert at + 1 == count and largest < GIGABYTES
