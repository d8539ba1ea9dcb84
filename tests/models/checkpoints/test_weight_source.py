"""Names on the hub: one revision, over https, stored in the bundle; a filled huggingface_hub cache replaces it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import author_state_dicts
import pytest
import torch
from safetensors.torch import save_file

from edgedetr.bundle import Bundle
from edgedetr.errors import ModelError
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.weights import import_weights
from edgedetr.models import build
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.members.detr import DetrConfig

CONFIG = DetrConfig(
    backbone="resnet18", backbone_width=0.25, hidden=32, heads=4, ffn=48, encoder_layers=1, decoder_layers=1, queries=6
)
COMMIT, LATER = "a" * 40, "b" * 40
NAME = "someone/small-detr"
hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


class Cache:
    """Downloaded files of one model, offline; `missing` is what the hub was asked for and has not."""

    def __init__(self, root: Path) -> None:
        self.root = root / f"models--{NAME.replace('/', '--')}"
        (self.root / "refs").mkdir(parents=True)
        self.point(COMMIT)

    def point(self, commit: str) -> None:
        """`main` is this commit."""
        (self.root / "refs" / "main").write_text(commit)

    def add(self, name: str, content: dict[str, Any] | dict[str, torch.Tensor], commit: str = COMMIT) -> Path:
        path = self.root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, path)
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def missing(self, *names: str, commit: str = COMMIT) -> None:
        folder = self.root / ".no_exist" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).touch()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {
        name: value.contiguous()
        for name, value in author_state_dicts.detr(build("detr", CONFIG, 91).state_dict(), 1).items()
    }


def test_a_bundle_records_the_commit_and_the_digest_of_the_file(
    cache: Cache, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = cache.add("model.safetensors", weights)
    cache.add("preprocessor_config.json", {"size": {"height": 64, "width": 96}})
    cache.missing("config.json", "processor_config.json")
    bundle = import_weights(NAME, tmp_path / "b.bundle", ImportOptions(model="detr", sets=("model.heads=4",))).bundle
    assert (bundle.manifest.input.height, bundle.manifest.input.width) == (64, 96)
    about = json.loads(Bundle.open(bundle.path).require("results/import.json").read_text(encoding="utf-8"))
    assert about["source"] == NAME and about["revision"] == COMMIT
    assert about["files"] == {"model.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert any("COCO" in note for note in about["notes"]), "what was said is kept"


def test_a_file_on_disk_is_recorded_without_its_folder(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(weights, path)
    bundle = import_weights(
        str(path), tmp_path / "b", ImportOptions(model="detr", size=(64, 64), sets=("model.heads=4",))
    ).bundle
    text = bundle.require("results/import.json").read_text(encoding="utf-8")
    assert json.loads(text)["source"] == "mine.safetensors" and str(tmp_path) not in text
    assert json.loads(text)["revision"] is None


def test_all_files_are_of_the_commit_of_the_first(cache: Cache, weights: dict[str, torch.Tensor]) -> None:
    """The hub moves on between two downloads."""
    cache.add("model.safetensors", weights)
    cache.add("config.json", {"from": "first"})
    cache.add("config.json", {"from": "later"}, LATER)
    origin = WeightSource(NAME)
    origin.weights()
    cache.point(LATER)
    found = origin.file_next_to("config.json")
    assert found is not None and json.loads(found.read_text()) == {"from": "first"}
    assert origin.revision == COMMIT


def test_shards_come_from_the_hub_as_well(cache: Cache, weights: dict[str, torch.Tensor]) -> None:
    listed = sorted(weights)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(listed)}
    cache.missing("model.safetensors")
    cache.add("model.safetensors.index.json", {"weight_map": weight_map})
    for file in set(weight_map.values()):
        cache.add(file, {name: weights[name] for name in listed if weight_map[name] == file})
    origin = WeightSource(NAME)
    assert origin.weights().keys() == weights.keys()
    assert sorted(origin.record()["files"]) == sorted({*weight_map.values(), "model.safetensors.index.json"})


def test_a_model_without_weights_says_what_was_looked_for(cache: Cache) -> None:
    cache.missing(
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
    )
    cache.add("adapter_config.json", {})
    with pytest.raises(ModelError, match=r"has none of model.safetensors.*it holds an adapter, PEFT"):
        WeightSource(NAME).weights()


def test_a_configuration_that_could_not_be_looked_up_is_not_taken_for_none(
    cache: Cache, weights: dict[str, torch.Tensor]
) -> None:
    """Offline, nobody knows whether there is a config.json: without it, another model might be computed."""
    cache.add("model.safetensors", weights)
    origin = WeightSource(NAME)
    origin.weights()
    with pytest.raises(
        ModelError, match=r"config.json is not on this machine.*edgedetr fetch someone/small-detr --to DIR"
    ):
        origin.file_next_to("config.json")
    cache.missing("config.json")
    assert origin.file_next_to("config.json") is None


def test_an_endpoint_without_encryption_is_refused_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror.example")
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(ModelError, match=r"HF_ENDPOINT is http://mirror.example; expected https://.*token"):
        WeightSource(NAME).weights()
