"""Checkpoints: what is refused and how, what the fingerprint covers, and that no flipped bit goes unnoticed."""

from __future__ import annotations

import json
import random

import micro
import pytest
import torch
from safetensors.torch import save_file

from edgedetr.data import layouts
from edgedetr.errors import TrainingError
from edgedetr.storage.digests import digest
from edgedetr.training.output import CHECKPOINT, DECISIVE_SECTIONS, SCHEMA, TrainState, fingerprint, load_checkpoint
from edgedetr.training.train import train


@pytest.mark.parametrize("damage", ["truncated", "text", "other tensors"])
def test_a_damaged_checkpoint_is_refused_with_advice(micro_data, tmp_path, damage):
    path = tmp_path / "b" / "train" / "last.safetensors"
    path.parent.mkdir(parents=True)
    if damage == "other tensors":
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"not a checkpoint" if damage == "text" else (100).to_bytes(8, "little") + b"{")
    before = digest(path)
    with pytest.raises(TrainingError, match="start from the beginning"):
        train(micro.recipe(), micro_data, tmp_path / "b", resume=True)
    assert digest(path) == before


def test_any_flipped_bit_of_a_checkpoint_is_noticed(trained, micro_data, tmp_path):
    path, chance = tmp_path / "last.safetensors", random.Random(0)
    good = (trained.path / "train" / "last.safetensors").read_bytes()
    trainer = micro.new_trainer(micro.recipe(), micro_data, trained.path)
    trainer.checkpoint = path
    header = int.from_bytes(good[:8], "little")
    offsets = [chance.randrange(len(good)) for _ in range(15)] + [chance.randrange(8, header) for _ in range(15)]
    start = good.index(b'"schema":"2"')
    offsets += [start + 2, start + 10, good.index(b'"digest"') + 3]
    for offset in offsets:
        flipped = bytearray(good)
        flipped[offset] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(TrainingError, match="checkpoint|another recipe"):
            trainer.resume()
    path.write_bytes(good)
    trainer.resume()


def test_a_state_of_another_kind_is_a_damaged_checkpoint(tmp_path):
    for number, position in enumerate(("[" * 100_000, "9" * 5000, '{"step": "3"}', '{"stop": 3}', "[]", "null")):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.zeros(1)}, path, {"schema": "1", "fingerprint": "x", "position": position})
        with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
            load_checkpoint(path, "x", None, None, None)


def test_a_state_is_stored_under_the_keys_of_the_first_version():
    keys = ["step", "best", "best_epoch", "stale", "done", "scale", "growth", "epochs", "sums", "summed", "skipped"]
    state = TrainState(step=7, epochs_without_improvement=2, loss_sums=[0.5], summed_steps=3, skipped_in_a_row=1)
    stored = json.loads(state.to_json())
    assert list(stored) == [*keys, "in_row"]
    assert (stored["stale"], stored["sums"], stored["summed"], stored["in_row"]) == (2, [0.5], 3, 1)
    assert TrainState.from_json(state.to_json()) == state


def test_options_of_later_versions_leave_the_fingerprint_of_older_checkpoints(micro_data):
    samples = layouts.load(micro_data, "train")
    names = ("decay", "sizes", "init", "crop_kind")
    assert not any(f"\n{name} = " in micro.recipe().to_toml(DECISIVE_SECTIONS, later=False) for name in names)
    assert all(f"\n{name} = " in micro.recipe().to_toml() for name in names)
    same = fingerprint(micro.recipe(decay="matrices"), samples)
    assert same == fingerprint(micro.recipe(), samples)
    assert same != fingerprint(micro.recipe(decay="all"), samples)


def test_the_checkpoint_holds_no_pickle(trained):
    assert SCHEMA == 2
    path = trained.path / "train" / CHECKPOINT
    assert path.read_bytes()[8:9] == b"{"  # safetensors: a length, then a JSON header
    assert set(path.parent.iterdir()) >= {path} and not list(path.parent.glob("*.pt"))
