"""The data set of the micro training, drawn once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import micro`, also in child processes


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import micro

    return micro.write_data(tmp_path_factory.mktemp("micro") / "data")
