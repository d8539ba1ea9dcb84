"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import members`: the family at micro size

if find_spec("torch"):
    pytest_plugins = ["bundle_fixtures"]

# Trainings in tests run on the CPU, where the same seed gives the same bytes; lightning-fabric reads this, and so do
# child processes. tests/gpu takes it back.
os.environ["LT_ACCELERATOR"] = "cpu"

# oneDNN's kernels for AMX, which few CPUs have, are free of a fault of OpenVINO that tests hold: openvino-concat in
# calib/patterns/known.toml.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

# Side by side (pytest -n), one thread each: more would only wait for each other on tiny networks.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

with suppress(ModuleNotFoundError):
    from hypothesis import settings

    # The same examples in every run, so that a run says what the change did; HYPOTHESIS_PROFILE=random tries new ones.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.register_profile("random", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder in which members.exported keeps its files, for all processes of this run."""
    if not hasattr(config, "workerinput"):
        os.environ["EDGEDETR_TEST_EXPORTS"] = tempfile.mkdtemp(prefix="members-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["EDGEDETR_TEST_EXPORTS"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def machine_id(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine has an id, whatever container the tests run in: without one, engines count as another machine's."""
    from edgedetr.runtime.tensorrt import engine_validation

    engine_validation.MACHINE_ID = tmp_path_factory.mktemp("machine") / "machine-id"
    engine_validation.MACHINE_ID.write_text("0123456789abcdef" * 2 + "\n")
    return engine_validation.MACHINE_ID


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets next to the checkout; tests that need them say why they skip where they are missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data sets in {SHARED_DATA}, which are not part of the repository")
    return SHARED_DATA


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def bindings() -> ModuleType:
    """tests/tensorrt_spec/bindings.py, with NVIDIA's bindings at hand; where they are not, a skip with the reason."""
    from tensorrt_spec import bindings

    try:
        bindings.described()
    except bindings.Unavailable as reason:
        pytest.skip(f"needs NVIDIA's TensorRT bindings: {reason}")
    return bindings


@pytest.fixture(scope="session", params=["10.3.0", "10.16.1", "11.4.0"])
def trt(request: pytest.FixtureRequest, bindings: ModuleType) -> ModuleType:
    """The names of one version of TensorRT, as a module to specify fakes with (JetPack 6, JetPack 7.2, TensorRT 11)."""
    return bindings.module(request.param)
