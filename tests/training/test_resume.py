"""A training killed by SIGKILL at any moment, also while it saves, ends in the same bytes as one that ran through."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from edgedetr.bundle import Bundle
from edgedetr.data import layouts
from edgedetr.recipe import Recipe
from edgedetr.storage.digests import digest
from edgedetr.training.output import fingerprint
from edgedetr.training.train import train
from edgedetr.training.trainer import Trainer

START = 120  # seconds for a child to import torch on a loaded machine


@pytest.fixture(scope="module")
def processes():
    """Children fork from a server that has imported everything, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["micro"])
    return context


@pytest.fixture(scope="module")
def straight(processes, micro_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "b"
    child = processes.Process(target=micro.child, args=(str(micro_data), str(out), {}))
    child.start()
    child.join()
    assert child.exitcode == 0
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text().splitlines()]


def wait_for(happened, child) -> None:
    limit = time.monotonic() + START
    while not happened() and child.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.0005)


def kill_once(processes, data: Path, out: Path, moment: str, chance: random.Random) -> None:
    """Start or resume the training and kill it; afterwards every file is complete."""
    child = processes.Process(target=micro.child, args=(str(data), str(out), {}))
    child.start()
    folder = out / "train"
    if moment == "saving":
        wait_for(lambda: folder.is_dir() and list(folder.glob(".last.*.tmp")), child)
        time.sleep(chance.uniform(0, 0.01))
    elif moment == "delivering":
        wait_for(lambda: out.is_dir() and list(out.glob(".*.tmp")), child)
    else:
        wait_for(folder.is_dir, child)
        time.sleep(chance.uniform(0, 1.0))
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    if (folder / "last.safetensors").exists():
        load_file(folder / "last.safetensors")
    if (out / "bundle.json").exists():
        bundle = Bundle.open(out)
        for name in bundle.manifest.files:
            bundle.require(name)


def finish(processes, data: Path, out: Path) -> None:
    child = processes.Process(target=micro.child, args=(str(data), str(out), {}))
    child.start()
    child.join()
    assert child.exitcode == 0


def check_same(out: Path, straight: Path) -> None:
    assert digest(out / "weights.safetensors") == digest(straight / "weights.safetensors")
    # Tensor by tensor: the order of the file's header is not defined.
    ours, theirs = (load_file(path / "train" / "last.safetensors") for path in (out, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert lines(out) == lines(straight)
    assert not list(out.rglob(".*.tmp"))


def test_killed_and_resumed_ends_in_the_same_bytes(processes, micro_data, straight, tmp_path):
    chance = random.Random(0)
    for moment in ("saving", "delivering", "any"):
        kill_once(processes, micro_data, tmp_path / "b", moment, chance)
    finish(processes, micro_data, tmp_path / "b")
    check_same(tmp_path / "b", straight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_twenty_kills_lose_nothing(processes, micro_data, straight, tmp_path, seed):
    chance = random.Random(seed)
    for _ in range(5):
        kill_once(processes, micro_data, tmp_path / "b", chance.choice(["saving", "delivering", "any"]), chance)
    finish(processes, micro_data, tmp_path / "b")
    check_same(tmp_path / "b", straight)


def other_settings(recipe: Recipe) -> Recipe:
    """Another quantization, export and verdict of the same training."""
    return replace(
        recipe,
        quant=replace(recipe.quant, images=3, observer="minmax"),
        export=replace(recipe.export, dynamic_batch=True),
        verify=replace(recipe.verify, budget=2.5),
    )


@pytest.mark.parametrize(
    "section, changes",
    [
        ("input", {"width": 96}),
        ("data", {"verify_split": "val"}),
        ("train", {"lr": 2e-3}),
        ("augment", {"crop": 0.1}),
        ("model", {"queries": 11}),
        ("quant", {"images": 3}),
        ("export", {"dynamic_batch": True}),
        ("verify", {"budget": 2.0}),
    ],
)
def test_only_settings_that_determine_the_weights_are_in_the_fingerprint(micro_data, section, changes):
    recipe, samples = micro.recipe(), layouts.load(micro_data, "train")
    part = getattr(recipe, section)
    part = replace(part, config=replace(part.config, **changes)) if section == "model" else replace(part, **changes)
    same = fingerprint(replace(recipe, **{section: part}), samples) == fingerprint(recipe, samples)
    assert same == (section in ("quant", "export", "verify"))


def test_a_finished_training_keeps_its_weights_and_takes_the_new_recipe(straight, micro_data, tmp_path):
    out = shutil.copytree(straight, tmp_path / "b")
    weights = digest(out / "weights.safetensors")
    changed = other_settings(micro.recipe())
    assert Recipe.from_bundle(Bundle.open(out)) != changed
    bundle = train(changed, micro_data, out, resume=True)
    assert digest(bundle.require("weights.safetensors")) == weights
    assert Recipe.from_bundle(bundle) == changed and bundle.manifest.budget == 2.5
    before = (out / "bundle.json").read_bytes(), (out / "recipe.toml").stat().st_mtime_ns
    train(changed, micro_data, out, resume=True)
    assert ((out / "bundle.json").read_bytes(), (out / "recipe.toml").stat().st_mtime_ns) == before


def test_a_training_resumed_with_another_quantization_ends_in_the_same_weights(
    straight, micro_data, tmp_path, monkeypatch
):
    class Stop(Exception):
        pass

    def stop(trainer: Trainer, epoch: int) -> None:
        if epoch == 2:
            raise Stop
        epochs(trainer, epoch)

    epochs = Trainer._train_epoch
    monkeypatch.setattr(Trainer, "_train_epoch", stop)
    with pytest.raises(Stop):
        train(micro.recipe(), micro_data, tmp_path / "b")
    monkeypatch.setattr(Trainer, "_train_epoch", epochs)
    changed = other_settings(micro.recipe())
    bundle = train(changed, micro_data, tmp_path / "b", resume=True)
    ours, theirs = (load_file(path / "train" / "last.safetensors") for path in (bundle.path, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert digest(bundle.require("weights.safetensors")) == digest(straight / "weights.safetensors")
    assert Recipe.from_bundle(bundle) == changed


def two(data: str, out: str, rank: int, port: int, settings: dict) -> None:
    """One of two processes, with the variables that torchrun sets."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    alone(data, out, {**settings, "devices": 2})


def alone(data: str, out: str, settings: dict) -> None:
    from edgedetr.training import trainer

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    trainer.LOG_EVERY = 1
    # Both halves of a batch must give the result of the whole: no BatchNorm, no random parts, no weighted mean.
    model = {
        "name": "conditional_detr",
        "backbone": "resnet18",
        "backbone_width": 0.125,
        "backbone_weights": "random",
        "frozen_stages": 0,
        "hidden": 16,
        "heads": 2,
        "ffn": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "queries": 10,
        "dropout": 0.0,
    }
    sections = {**micro.TOML, "model": model, "train": {**micro.TOML["train"], **settings}}
    train(Recipe.from_dict(sections, where="two"), data, out)


def test_two_processes_have_the_losses_of_one_with_the_same_batches(processes, micro_data, tmp_path):
    settings = {"epochs": 1, "lr": 1e-5, "denoising": 0}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [processes.Process(target=alone, args=(str(micro_data), str(tmp_path / "one"), settings))]
    children += [
        processes.Process(
            target=two, args=(str(micro_data), str(tmp_path / "two"), rank, port, {**settings, "minutes": 60})
        )
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    ones, (plan, *twos) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert plan["epochs"] == 1  # both processes have chosen the same number
    assert len(ones) == len(twos) == 4  # three steps, one evaluation
    for one, both in zip(ones, twos):
        for name in ("loss", "class", "l1", "giou", "auxiliary") if one["kind"] == "train" else ("ap", "ap50"):
            assert both[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6)  # float32 sums in two halves
