"""The micro training: its data set, drawn once, and its bundle, trained once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from edgedetr.artifacts import WEIGHTS
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


@pytest.fixture(scope="session")
def teaching(trained: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher that finds something: the micro detector with class logits raised, so that many pass the score."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("teacher") / "t.bundle"
    shutil.copytree(trained.path, path)
    bundle = Bundle.open(path)
    weights = load_file(bundle.require(WEIGHTS.file))
    for name in weights:
        if name.startswith("decoder.boxes.score.") and name.endswith("bias"):
            weights[name] = weights[name] + 4.5
    with bundle.add(WEIGHTS.file, stage=WEIGHTS.step, made_from=WEIGHTS.made_from) as file:
        save_file(weights, file)
    return str(path)
