"""The micro training: its data set, drawn once, and its bundle, trained once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgedetr.bundle import Bundle

sys.path.insert(0, str(Path(__file__).parent))  # `import micro`, also in child processes


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import micro

    return micro.write_data(tmp_path_factory.mktemp("micro") / "data")


@pytest.fixture(scope="session")
def trained(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The finished micro training."""
    import micro

    return micro.train(micro.recipe(), micro_data, tmp_path_factory.mktemp("trained") / "micro.bundle")
