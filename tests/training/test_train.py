"""train(): what it writes, what it refuses, and that it stops at NaN without losing anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from edgedetr.bundle import Bundle
from edgedetr.data import layouts
from edgedetr.errors import DataError, TrainingError
from edgedetr.recipe import Recipe
from edgedetr.storage.digests import digest
from edgedetr.training import trainer as trainer_module
from edgedetr.training.data.dataset import TrainingSet, batches, epoch_order
from edgedetr.training.train import train
from edgedetr.training.trainer import MAX_SKIPS
from edgedetr.training.training_module import TrainingModule


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


def test_an_existing_training_is_not_overwritten_and_a_finished_one_is_returned_unchanged(trained, micro_data):
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


def poison(monkeypatch, steps, how=lambda result: result * float("nan")):
    """Make the forward of these steps (counted from 1) bad, and the statistics of BatchNorm with it."""
    real, calls = TrainingModule.forward, []

    def poisoned(self, *inputs):
        calls.append(1)
        if len(calls) not in steps:
            return real(self, *inputs)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.fill_(float("nan"))
        return how(real(self, *inputs))

    monkeypatch.setattr(TrainingModule, "forward", poisoned)
    return calls


def steep(result):
    result.register_hook(lambda gradient: gradient * float("inf"))
    return result


@pytest.mark.parametrize("clip", [0.1, 0.0])
@pytest.mark.parametrize("how", [lambda result: result * float("nan"), steep], ids=["loss", "gradient"])
def test_one_bad_batch_is_skipped_counted_and_named(micro_data, tmp_path, monkeypatch, caplog, how, clip):
    poison(monkeypatch, {2, 4}, how)
    bundle = train(micro.recipe(epochs=2, clip=clip), micro_data, tmp_path / "b")
    skips = [line for line in lines(bundle.path) if line["kind"] == "skip"]
    assert [(line["step"], line["skipped"]) for line in skips] == [(2, 1), (4, 2)]
    named = skips[0]["images"].split(", ")
    assert len(named) == 4 and all(Path(name).is_file() for name in named)
    assert f"step 2 is skipped: {skips[0]['what']} became NaN" in caplog.text and named[0] in caplog.text
    for name in ("weights.safetensors", "train/last.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(bundle.path / name).values() if value.numel())
    assert all(line["loss"] == line["loss"] for line in lines(bundle.path) if line["kind"] == "train")  # no NaN


def test_a_skipped_step_leaves_every_weight_as_it_was(micro_data, tmp_path, monkeypatch):
    seen = []
    real = trainer_module.save_checkpoint

    def save(path, position, fingerprint, model, *rest):
        seen.append((position.step, {name: value.clone() for name, value in model.state_dict().items()}))
        real(path, position, fingerprint, model, *rest)

    monkeypatch.setattr(trainer_module, "save_checkpoint", save)
    poison(monkeypatch, {3})
    train(micro.recipe(epochs=1), micro_data, tmp_path / "b")
    states = dict(seen)
    same = [name for name, value in states[3].items() if torch.equal(value, states[2][name])]
    counters = [name for name in states[3] if name.endswith("num_batches_tracked")]
    assert set(same) | set(counters) == set(states[3])
    assert not all(torch.equal(value, states[1][name]) for name, value in states[2].items())


@pytest.mark.parametrize("how, what", [(lambda result: result * float("nan"), "loss"), (steep, "gradient")])
def test_bad_batches_in_a_row_end_it_with_the_images_and_keep_the_last_good_checkpoint(
    micro_data, tmp_path, monkeypatch, how, what
):
    poison(monkeypatch, set(range(3, 100)), how)
    expected = (
        rf"{what} became NaN or infinite at step {MAX_SKIPS + 2}, on .*\d\.png, as in the {MAX_SKIPS - 1} steps before"
    )
    with pytest.raises(TrainingError, match=expected) as error:
        train(micro.recipe(), micro_data, tmp_path / "b")
    named = str(error.value).split(", as in")[0].split(" on ")[1].split(", ")
    assert len(named) == 4 and all(Path(name).is_file() for name in named)
    saved = load_file(tmp_path / "b" / "train" / "last.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    monkeypatch.undo()
    train(micro.recipe(), micro_data, tmp_path / "b", resume=True)  # good batches now: it goes on


def test_resume_never_starts_over_on_top_of_good_weights(trained, micro_data, tmp_path):
    import shutil

    copy = Path(shutil.copytree(trained.path, tmp_path / "copy.bundle"))
    shutil.rmtree(copy / "train")
    before = digest(copy / "weights.safetensors")
    with pytest.raises(TrainingError, match=r"holds trained weights but no train/last.safetensors.*another --out"):
        train(micro.recipe(), micro_data, copy, resume=True)
    assert digest(copy / "weights.safetensors") == before


def test_a_finished_training_whose_weights_are_gone_writes_its_last_ones_with_a_warning(
    trained, micro_data, tmp_path, caplog
):
    import shutil

    copy = Path(shutil.copytree(trained.path, tmp_path / "copy.bundle"))
    (copy / "weights.safetensors").unlink()
    bundle = train(micro.recipe(), micro_data, copy, resume=True)
    assert load_file(bundle.require("weights.safetensors")) and "the last ones are written" in caplog.text


def test_a_training_has_a_checkpoint_before_its_first_weights(micro_data, tmp_path, monkeypatch):
    """Killed between the first weights and the next checkpoint, it can still be resumed."""
    from edgedetr.training.output import BundleWriter

    real = BundleWriter.write

    def killed(self):
        real(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(BundleWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train(micro.recipe(checkpoint_every=500), micro_data, tmp_path / "b")
    assert (tmp_path / "b" / "weights.safetensors").exists()
    monkeypatch.undo()
    resumed = train(micro.recipe(checkpoint_every=500), micro_data, tmp_path / "b", resume=True)
    straight = train(micro.recipe(checkpoint_every=500), micro_data, tmp_path / "c")
    assert digest(resumed.path / "weights.safetensors") == digest(straight.path / "weights.safetensors")


def test_two_trainings_into_one_bundle_the_second_is_refused_at_once(micro_data, tmp_path):
    with Bundle.training(tmp_path / "b"), pytest.raises(TrainingError, match=r"another training writes here"):
        train(micro.recipe(), micro_data, tmp_path / "b")
    assert not (tmp_path / "b" / "weights.safetensors").exists()


def test_validation_without_objects_is_refused_before_the_first_epoch(micro_data, tmp_path):
    import shutil

    data = Path(shutil.copytree(micro_data, tmp_path / "data"))
    for split in ("val", "train"):
        path = data / "annotations" / f"{split}.json"
        kept, raw = path.read_text(), json.loads(path.read_text())
        path.write_text(json.dumps({**raw, "annotations": []}))
        with pytest.raises(DataError, match=f"the split '{split}' has .* no objects"):
            train(micro.recipe(), data, tmp_path / "b")
        path.write_text(kept)
    crowd = json.loads((data / "annotations" / "val.json").read_text())
    for item in crowd["annotations"]:
        item["iscrowd"] = 1
    (data / "annotations" / "val.json").write_text(json.dumps(crowd))
    with pytest.raises(DataError, match="no objects"):
        train(micro.recipe(), data, tmp_path / "b")
    assert not (tmp_path / "b").exists()


CASES = Path(__file__).parents[3] / "shared" / "data" / "cases"


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_the_case_of_background_alone_in_val_is_refused(tmp_path):
    with pytest.raises(DataError, match="no objects"):
        train(micro.recipe(), CASES / "23b-val-all-background", tmp_path / "b")


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_more_objects_than_queries_is_reported_with_both_numbers_before_training(tmp_path, caplog):
    from edgedetr.training.data.dataset import warn_of_crowded_images

    samples = layouts.load(CASES / "17-400-objects", "train")
    warn_of_crowded_images(samples, micro.recipe().model.config.queries)
    assert "up to 400" in caplog.text and "model.queries is 10" in caplog.text


def test_an_undefined_ap_is_never_the_best(micro_data, tmp_path, monkeypatch):
    from dataclasses import replace as changed

    from edgedetr.training.output import BundleWriter
    from edgedetr.training.validator import Validator

    measured, delivered, real = [], [], Validator.measure

    def measure(self, found):
        measured.append(1)
        metrics = real(self, found)
        return changed(metrics, ap=None) if len(measured) != 2 else changed(metrics, ap=0.0)

    monkeypatch.setattr(Validator, "measure", measure)
    monkeypatch.setattr(
        BundleWriter, "write", lambda self, real=BundleWriter.write: (delivered.append(len(measured)), real(self))
    )
    train(micro.recipe(), micro_data, tmp_path / "b")
    assert delivered == [2]


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
    """Losses of the first step with every BatchNorm at its initial statistics."""
    trainer = micro.new_trainer(recipe, data, out)
    for module in trainer.learner.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    rows = epoch_order(len(trainer.images), 4, seed=0, epoch=0)
    batch = next(batches(trainer.images, rows, 0, strong=False))
    return trainer.learner.step(batch, 0, trainer.schedule).losses


def test_a_set_without_objects_is_refused(tmp_path):
    data = micro.write_data(tmp_path / "data")
    path = data / "annotations" / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(DataError, match="no objects"):
        train(micro.recipe(), data, tmp_path / "b")


def test_a_size_is_drawn_for_every_batch_and_a_resume_draws_the_same(micro_data, tmp_path, monkeypatch):
    seen, real = [], TrainingModule.forward

    def watched(self, images, *rest):
        seen.append(tuple(images.shape[2:]))
        if len(seen) == stop:
            raise KeyboardInterrupt
        return real(self, images, *rest)

    monkeypatch.setattr(TrainingModule, "forward", watched)
    recipe, stop = micro.recipe(sizes=[0.5, 1.0, 1.5], epochs=4), 0
    recipe = replace(recipe, augment=replace(recipe.augment, off_for_last=0.25))
    train(recipe, micro_data, tmp_path / "a")
    straight, stop = list(seen), 6
    assert set(straight[:9]) == {(32, 32), (64, 64), (96, 96)} and set(straight[9:]) == {(64, 64)}
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, micro_data, tmp_path / "b")
    stop = 0
    train(recipe, micro_data, tmp_path / "b", resume=True)
    assert seen[:5] + seen[6:] == straight
    assert digest(tmp_path / "a" / "weights.safetensors") == digest(tmp_path / "b" / "weights.safetensors")


def test_strong_augmentation_has_its_epochs_and_mixing_ends_earlier(micro_data, tmp_path, monkeypatch):
    seen, real = set(), TrainingSet.__getitem__

    def watched(self, key):
        seen.add((key.epoch, key.strong, key.mixes))
        return real(self, key)

    monkeypatch.setattr(TrainingSet, "__getitem__", watched)
    recipe = micro.recipe(epochs=4, schedule="flat_cosine", flat=0.25)
    windows = {"off_for_first": 0.25, "mix_until": 0.5, "off_for_last": 0.25}
    mosaic = {"mosaic": 1.0, "mosaic_kind": "affine", "mixup": 1.0}
    train(replace(recipe, augment=replace(recipe.augment, **windows, **mosaic)), micro_data, tmp_path / "a")
    assert seen == {(0, False, True), (1, True, True), (2, True, False), (3, False, False)}


def test_no_epoch_is_selected_by_the_verify_split(tmp_path):
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


def test_bf16_trains_and_writes_float32_weights(micro_data, tmp_path):
    bundle = train(micro.recipe(epochs=1, precision="bf16"), micro_data, tmp_path / "b")
    weights = load_file(bundle.path / "weights.safetensors")
    counters = {torch.int64}  # of BatchNorm
    assert {value.dtype for value in weights.values()} == {torch.float32} | counters
    assert all(torch.isfinite(value).all() for value in weights.values())
