"""train(): what it writes, what it refuses, and that it stops at NaN without losing anything."""

from __future__ import annotations

import json
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from edgedetr.bundle import Bundle, digest
from edgedetr.errors import DataError, TrainingError
from edgedetr.recipe import Recipe
from edgedetr.train import checkpoint
from edgedetr.train.step import Trainee
from edgedetr.train.train import train


@pytest.fixture(scope="module")
def trained(micro_data, tmp_path_factory) -> Bundle:
    return train(micro.recipe(), micro_data, tmp_path_factory.mktemp("trained") / "micro.bundle")


def lines(bundle: Path) -> list[dict]:
    return [json.loads(line) for line in (bundle / "train" / "metrics.jsonl").read_text().splitlines()]


def test_the_bundle_has_weights_recipe_classes_and_splits(trained, micro_data):
    again = Bundle.open(trained.path)
    assert again.require("weights.safetensors") and again.require("recipe.toml")
    assert Recipe.from_bundle(again) == micro.recipe()
    assert [(c.category_id, c.name) for c in again.manifest.classes] == [(3, "large"), (4, "small")]
    assert again.manifest.data.path == str(micro_data) and again.manifest.data.verify_split == "test"
    assert again.manifest.output.activation == "sigmoid"


def test_the_weights_load_into_the_deployed_graph(trained):
    from edgedetr.models.deploy import load_bundle_model

    detector, graph = load_bundle_model(trained)
    logits, boxes = graph(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 10, 2) and boxes.shape == (1, 10, 4)
    assert detector.state_dict().keys() == load_file(trained.path / "weights.safetensors").keys()


def test_metrics_have_one_evaluation_per_epoch_and_points(trained):
    evaluations = [line for line in lines(trained.path) if line["kind"] == "eval"]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    assert all(line["split"] == "val" and 0 <= line["ap"] <= 100 for line in evaluations)
    assert [line["step"] for line in lines(trained.path) if line["kind"] == "train"] == [3, 6, 9]


def test_a_taken_place_is_refused_and_a_finished_training_is_returned_as_it_is(trained, micro_data):
    before = digest(trained.path / "weights.safetensors")
    with pytest.raises(TrainingError, match="--resume"):
        train(micro.recipe(), micro_data, trained.path)
    train(micro.recipe(), micro_data, trained.path, resume=True)
    assert digest(trained.path / "weights.safetensors") == before


def test_resume_with_another_recipe_or_other_data_is_refused(trained, micro_data, tmp_path):
    with pytest.raises(TrainingError, match="another recipe"):
        train(micro.recipe(lr=2e-3), micro_data, trained.path, resume=True)
    other = micro.write_data(tmp_path / "other", train_images=15)
    with pytest.raises(TrainingError, match="other training data"):
        train(micro.recipe(), other, trained.path, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign"])
def test_a_damaged_checkpoint_is_refused_with_the_way_out(micro_data, tmp_path, damage):
    path = tmp_path / "b" / "train" / "last.safetensors"
    path.parent.mkdir(parents=True)
    if damage == "foreign":
        from safetensors.torch import save_file
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"not a checkpoint" if damage == "text" else (100).to_bytes(8, "little") + b"{")
    before = digest(path)
    with pytest.raises(TrainingError, match="start from the beginning"):
        train(micro.recipe(), micro_data, tmp_path / "b", resume=True)
    assert digest(path) == before


def test_nan_stops_with_step_and_pictures_and_keeps_the_last_good_checkpoint(micro_data, tmp_path, monkeypatch):
    real, calls = Trainee.forward, []

    def poisoned(self, *inputs):
        calls.append(1)
        return real(self, *inputs) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(Trainee, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"loss became NaN or infinite at step 5, on .*\d\.png") as error:
        train(micro.recipe(), micro_data, tmp_path / "b")
    named = str(error.value).split("; ")[0].split(" on ")[1].split(", ")
    assert len(named) == 4 and all(Path(name).is_file() for name in named)
    saved = load_file(tmp_path / "b" / "train" / "last.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    monkeypatch.setattr(Trainee, "forward", real)
    bundle = train(micro.recipe(), micro_data, tmp_path / "b", resume=True)     # it goes on from step 4
    assert bundle.require("weights.safetensors")


def test_an_infinite_gradient_stops_too(micro_data, tmp_path, monkeypatch):
    real = Trainee.forward

    def steep(self, *inputs):
        result = real(self, *inputs)
        result.register_hook(lambda gradient: gradient * float("inf"))
        return result

    monkeypatch.setattr(Trainee, "forward", steep)
    with pytest.raises(TrainingError, match="gradient became NaN or infinite at step 1"):
        train(micro.recipe(), micro_data, tmp_path / "b")
    assert not (tmp_path / "b" / "train" / "last.safetensors").exists()


def test_early_stop_ends_after_patience_and_keeps_the_best(micro_data, tmp_path):
    bundle = train(micro.recipe(epochs=6, lr=1e-9, patience=2), micro_data, tmp_path / "b")
    evaluations = [line for line in lines(bundle.path) if line["kind"] == "eval"]
    best = max(range(len(evaluations)), key=lambda n: evaluations[n]["ap"])
    assert len(evaluations) < 6 and len(evaluations) == best + 1 + 2


def test_accumulated_parts_give_the_step_of_the_whole_batch(micro_data, tmp_path):
    # Frozen statistics and no random parts: BatchNorm, dropout and noise see other batches in parts.
    sections = {name: dict(values) for name, values in micro.TOML.items()}
    sections["model"].update(backbone_norm="frozen", dropout=0.0, expansion=0.5)
    sections["train"].update(epochs=1, denoising=0, batch=4, ema_decay=0.0)
    weights = []
    for parts in (1, 2):
        sections["train"]["accumulate"] = parts
        step = _first_step(Recipe.from_dict(sections, where="micro"), micro_data, tmp_path / str(parts))
        weights.append(step)
    # float32 sums in another order
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def _first_step(recipe: Recipe, data: Path, out: Path) -> torch.Tensor:
    """Losses of the first step with every BatchNorm at its start statistics."""
    from edgedetr.data import layouts
    from edgedetr.train.dataset import batches, order
    from edgedetr.train.devices import launch
    from edgedetr.train.progress import Silent
    from edgedetr.train.train import Run

    samples = layouts.load(data, "train")
    run = Run(recipe, launch(recipe.train), recipe.data.resolve(["train", "val", "test"]), samples,
              layouts.load(data, "val"), data, out, Silent())
    for module in run.detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batch = next(batches(run.pictures, order(len(samples), 4, seed=0, epoch=0), 0, plain=True, workers=0))
    return run.step(batch)


def test_a_set_without_objects_is_refused(tmp_path):
    data = micro.write_data(tmp_path / "data")
    path = data / "annotations" / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(DataError, match="no objects"):
        train(micro.recipe(), data, tmp_path / "b")


def test_where_only_the_verify_split_is_there_nothing_is_chosen_by_it(tmp_path):
    data = micro.write_data(tmp_path / "data")
    (data / "annotations" / "val.json").unlink()
    bundle = train(micro.recipe(epochs=2), data, tmp_path / "b")
    saved = load_file(tmp_path / "b" / "train" / "last.safetensors")
    delivered = load_file(bundle.path / "weights.safetensors")
    # The last weights, not the best ones.
    assert all(torch.equal(value, saved[f"ema.{name}"]) for name, value in delivered.items())


def test_workers_change_nothing(trained, micro_data, tmp_path):
    bundle = train(micro.recipe(workers=1), micro_data, tmp_path / "b")
    assert digest(bundle.path / "weights.safetensors") == digest(trained.path / "weights.safetensors")


def test_bf16_trains_and_delivers_float32(micro_data, tmp_path):
    bundle = train(micro.recipe(epochs=1, precision="bf16"), micro_data, tmp_path / "b")
    weights = load_file(bundle.path / "weights.safetensors")
    counters = {torch.int64}    # of BatchNorm
    assert {value.dtype for value in weights.values()} == {torch.float32} | counters
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_checkpoint_holds_no_pickle(trained):
    path = trained.path / "train" / checkpoint_name()
    assert path.read_bytes()[8:9] == b"{"      # safetensors: a length, then a JSON header
    assert set(path.parent.iterdir()) >= {path} and not list(path.parent.glob("*.pt"))


def checkpoint_name() -> str:
    from edgedetr.train.train import CHECKPOINT

    assert checkpoint.SCHEMA == 1
    return CHECKPOINT
