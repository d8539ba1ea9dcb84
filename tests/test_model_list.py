"""The list that `edgedetr models` prints is that of the models as they are built."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from edgedetr import model_list
from edgedetr.cli import app
from edgedetr.models import FAMILY, build
from edgedetr.models.member_config import TransformerConfig

RECORDED = {one.name: one for one in model_list.summaries()}


def config_of(name: str) -> TransformerConfig:
    return FAMILY[name].config(backbone_weights="random")


def test_the_list_has_every_member_in_the_order_of_the_family(capsys):
    assert app.run(["models", "--json"]) == 0
    captured = capsys.readouterr()
    found = {member["name"]: member for member in json.loads(captured.out)}
    assert list(found) == list(FAMILY)
    assert found["rt_detr"]["dialects"] == ["onnx", "fp16", "int8", "int8-cpu"]
    assert all(f"\n{name} " in f"\n{captured.err}" for name in FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_recorded_parameters_and_settings_are_those_of_the_built_model(name):
    recorded, config = RECORDED[name], config_of(name)
    with torch.device("meta"):
        built = build(name, config, 80)
    assert recorded.parameters == sum(value.numel() for value in built.parameters()), "run: make docs"
    facts = (FAMILY[name].paper, config.queries, config.activation)
    assert (recorded.paper, recorded.queries, recorded.activation) == facts, "run: make docs"


# Counting operations takes a second each; what changes them changes the parameters in almost every case.
@pytest.mark.parametrize(
    "name", [name if name == "rt_detr" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY]
)
def test_recorded_operations_and_levels_are_those_of_the_built_model(name):
    assert RECORDED[name] == model_list.summarize(name), "run: make docs"


def test_recorded_operations_are_as_published():
    """60 GFLOPs at 640 px for R18 (the authors' repository); a multiply-accumulate is two operations."""
    assert 2 * RECORDED["rt_detr"].gmacs == pytest.approx(60, abs=1)  # published in whole GFLOPs; counted: 59.4


def test_another_size_is_counted_with_the_models(monkeypatch):
    monkeypatch.setattr("edgedetr.models.FAMILY", {"rt_detr": FAMILY["rt_detr"]})
    [found] = model_list.summaries(320)
    assert found.levels == ((40, 40, 8), (20, 20, 16), (10, 10, 32))
    assert found.gmacs < RECORDED["rt_detr"].gmacs / 2


def test_the_list_is_printed_without_building_a_model():
    """Within a second: torch alone takes longer to import."""
    code = "import sys; from edgedetr.cli import app; app.run(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
