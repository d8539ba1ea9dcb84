"""The model that is trained: pretrained weights, frozen parameters, adapters, stochastic depth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from safetensors.torch import load_file

from edgedetr.bundle import ClassInfo
from edgedetr.errors import ModelError, TrainingError
from edgedetr.layers.drop_path import DropPath
from edgedetr.layers.lora import LoraLinear
from edgedetr.models.deploy import load_bundle_model
from edgedetr.training import training_module
from edgedetr.training.train import train

CLASSES = (ClassInfo(0, 3, "large"), ClassInfo(1, 4, "small"))


@pytest.fixture(scope="module")
def trained(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(micro.recipe(epochs=1), micro_data, tmp_path_factory.mktemp("start") / "a.bundle").path


def test_a_training_starts_from_the_weights_of_a_bundle(trained: Path) -> None:
    detector = training_module.build_model(micro.recipe(start=str(trained)), CLASSES, load_weights=True)
    weights = load_file(trained / "weights.safetensors")
    other = [name for name, value in detector.state_dict().items() if not torch.equal(value, weights[name])]
    assert all(name.endswith("num_batches_tracked") for name in other), other  # counters, which nothing reads


def test_other_classes_are_reinitialized_and_the_rest_is_kept(trained: Path) -> None:
    three = (ClassInfo(0, 9, "huge"), *(replace(item, index=item.index + 1) for item in CLASSES))
    detector = training_module.build_model(micro.recipe(start=str(trained)), three, load_weights=True)
    weights = load_file(trained / "weights.safetensors")
    assert torch.equal(detector.state_dict()["selector.project.weight"], weights["selector.project.weight"])
    assert torch.equal(detector.selector.score.weight[1:], weights["selector.score.weight"]), "rows go by name"
    assert not torch.equal(detector.selector.score.weight[0], weights["selector.score.weight"][0])


@pytest.mark.parametrize(
    "settings, advice",
    [
        ({"lora_rank": 2, "lora_on": ["*.q"]}, None),
        ({"freeze": ["selector.*"]}, "remove them from train.freeze"),
        ({"lora_rank": 2, "lora_on": ["*.q"], "lora_beside": ["selector.*", "decoder.boxes.*"]}, None),
    ],
)
def test_reinitialized_but_frozen_parameters_are_reported(trained: Path, caplog, settings, advice) -> None:
    three = (ClassInfo(0, 9, "huge"), *(replace(item, index=item.index + 1) for item in CLASSES))
    for classes in (three, CLASSES):  # no warning where the classes are the same
        caplog.clear()
        training_module.build_model(micro.recipe(start=str(trained), **settings), classes, load_weights=True)
        warnings = [
            record.getMessage()
            for record in caplog.records
            if "reinitialized for these classes, but frozen" in record.getMessage()
        ]
        assert bool(warnings) == (classes is three and advice is not None)
        assert all("selector.denoising_class_embed.weight" in line and line.endswith(str(advice)) for line in warnings)


def test_adapters_train_alone_with_heads_and_norms_and_are_merged_into_the_bundle(
    trained: Path, micro_data: Path, tmp_path: Path
) -> None:
    recipe = micro.recipe(epochs=2, lora_rank=2, lora_on=["*.q", "*.v", "*feedforward.up"], start=str(trained))
    detector = training_module.build_model(recipe, CLASSES, load_weights=True)
    learning = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert any(isinstance(module, LoraLinear) for module in detector.modules())
    also_trained = ("decoder.boxes.", "selector.score.", "selector.box.", "selector.denoising_class_embed.")
    assert all("norm" in n or n.endswith((".down", ".up")) or n.startswith(also_trained) for n in learning)
    bundle = train(recipe, micro_data, tmp_path / "lora.bundle")
    before, after = load_file(trained / "weights.safetensors"), load_file(bundle.require("weights.safetensors"))
    assert sorted(after) == sorted(before), "nothing is left of the adapters' own weights"
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "decoder.layers.0.self_attention.q.weight" in changed
    assert "decoder.layers.0.self_attention.k.weight" not in changed
    load_bundle_model(bundle)


def test_untrained_parameters_learn_with_adapters(trained: Path) -> None:
    """Classes of a denoised query have vectors of their own, and without train.start the decoder is random."""
    three = (ClassInfo(0, 9, "huge"), *(replace(item, index=item.index + 1) for item in CLASSES))
    recipe = micro.recipe(lora_rank=2, start=str(trained))
    detector = training_module.build_model(recipe, three, load_weights=True)
    weights = load_file(trained / "weights.safetensors")
    parameters = dict(detector.named_parameters())
    untrained = {
        name for name, value in parameters.items() if name not in weights or value.shape != weights[name].shape
    }
    assert "selector.denoising_class_embed.weight" in untrained
    assert all(parameters[name].requires_grad for name in untrained)
    assert not parameters["selector.project.weight"].requires_grad

    with pytest.raises(ModelError, match="matches no Linear that starts from trained weights; expected train.start"):
        training_module.build_model(micro.recipe(lora_rank=2), CLASSES, load_weights=True)
    vit = replace(
        recipe.model,
        config=replace(
            recipe.model.config,
            backbone="vit_tiny",
            backbone_width=0.125,
            backbone_weights="a file that a checkpoint replaces",
        ),
    )
    recipe = replace(recipe, model=vit, train=replace(recipe.train, start=""))
    detector = training_module.build_model(recipe, CLASSES, load_weights=False)
    learns = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
    assert all(learns[name] for name in learns if not name.startswith("backbone.transformer."))
    blocks = {name for name in learns if "blocks.0.attention." in name and learns[name]}
    assert blocks == {
        f"backbone.transformer.blocks.0.attention.{part}.{side}" for part in "qv" for side in ("down", "up")
    }
    random = replace(vit, config=replace(vit.config, backbone_weights="random"))
    with pytest.raises(ModelError, match="matches no Linear that starts from trained weights"):
        training_module.build_model(replace(recipe, model=random), CLASSES, load_weights=True)


def test_frozen_parameters_stay_and_a_pattern_that_fits_nothing_is_an_error() -> None:
    detector = training_module.build_model(
        micro.recipe(freeze=["backbone.*", "encoder.project.*"]), CLASSES, load_weights=True
    )
    still = {name.split(".")[0] for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert still == {"backbone", "encoder"}
    with pytest.raises(ModelError, match="no parameter name matches 'bckbone"):
        training_module.build_model(micro.recipe(freeze=["bckbone.*"]), CLASSES, load_weights=True)
    with pytest.raises(TrainingError, match="freezes every parameter"):
        training_module.build_model(micro.recipe(freeze=["*"]), CLASSES, load_weights=True)


def test_stochastic_depth_reaches_every_block_and_the_last_gets_the_whole_rate() -> None:
    detector = training_module.build_model(micro.recipe(drop_path=0.3), CLASSES, load_weights=True)
    rates = [module.rate for module in detector.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.3)
    assert len(set(rates)) == 3  # one encoder layer and two decoder layers
