"""Presets keep their promise: `strong` reaches every recipe, `parity` is the authors' configuration value by value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgedetr.errors import RecipeError
from edgedetr.models import FAMILY
from edgedetr.package_data import recipes_directory
from edgedetr.recipe import Recipe, read_preset

RECIPES = sorted(path.stem for path in recipes_directory().glob("*.toml"))
PRESETS = sorted(path.stem for path in (recipes_directory() / "presets").glob("*.toml"))


def is_for(preset, member):
    """Whether a preset has a section for a member, or for all."""
    text = (recipes_directory() / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    return any(f"\n[{whose}." in text for whose in ("all", member))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_recipe_empties_a_preset(name, preset):
    member = Recipe.load(name).model.name
    if not is_for(preset, member):
        with pytest.raises(RecipeError, match=f"preset '{preset}' has no values for {member}; it is for "):
            Recipe.load(name, preset=preset)
        return
    recipe = Recipe.load(name, preset=preset)
    for section, values in read_preset(preset, recipe.model.name).items():
        config = recipe.model.config if section == "model" else getattr(recipe, section)
        for key, value in values.items():
            found = getattr(config, key)
            assert (list(found) if isinstance(found, tuple) else found) == value, f"{section}.{key}"


def test_a_set_overrides_a_preset_and_a_preset_a_recipe():
    recipe = Recipe.load("dn-detr-r50", sets=["train.warmup_steps=7", "augment.mosaic=0"], preset="strong")
    assert (recipe.train.schedule, recipe.train.ema_decay) == ("cosine", "auto")  # the preset's, not the recipe's
    assert (recipe.train.warmup_steps, recipe.augment.mosaic) == (7, 0)  # as set
    assert (recipe.train.epochs, recipe.train.denoising_mode) == (50, "dn")  # the recipe's
    other = Recipe.load("rtdetr-r18", sets=["model.name=detr"], preset="parity")  # the member that is trained
    assert other.model.name == "detr" and other.train.epochs == 300


def test_every_preset_fits_every_member():
    for preset in PRESETS:
        for member in FAMILY:
            if is_for(preset, member):
                Recipe.from_dict({"model": {"name": member}}, where=f"{preset} {member}", preset=preset)
    assert all(is_for(preset, "rt_detr") for preset in PRESETS)
    with pytest.raises(RecipeError, match="no preset 'strang'; did you mean 'strong'"):
        Recipe.from_dict({"model": {"name": "rt_detr"}}, where="x", preset="strang")


@pytest.mark.parametrize(
    "path",
    [*recipes_directory().glob("*.toml"), *recipes_directory().glob("presets/*.toml")],
    ids=lambda path: path.stem,
)
def test_the_command_in_a_head_names_a_recipe_and_a_preset_that_are_there(path):
    for command in re.findall(r"edgedetr train (.*)", path.read_text(encoding="utf-8")):
        for option, known in (("--recipe", {*RECIPES, "NAME"}), ("--preset", PRESETS)):
            named = re.findall(rf"{option} (\S+)", command)
            assert set(named) <= set(known), command


# ------------------------------------------------------------------- the authors' values, each with its source

SIZES = (0.6, 0.64, 0.68, 0.72, 0.76, 0.8, 0.84, 0.88, 0.92, 0.96, 1.0)  # [480, 512 .. 800] / 800
HEIR = {  # of main.py and datasets/coco.py, which DETR's heirs have in common, except for the values below
    "train.weight_decay": (1e-4, "main.py --weight_decay"),
    "train.decay": ("all", "main.py param_dicts: every parameter by name, one weight_decay"),
    "train.clip": (0.1, "main.py --clip_max_norm"),
    "train.warmup_steps": (0, "main.py: StepLR alone"),
    "train.schedule": ("step", "main.py: StepLR(optimizer, args.lr_drop)"),
    "train.ema_decay": (0.0, "engine.py: none"),
    "train.backbone_lr_factor": (0.1, "main.py --lr_backbone / --lr"),
    "train.sizes": (SIZES, "datasets/coco.py scales"),
    "train.label_smoothing": (0.0, "models: none"),
    "train.drop_path": (0.0, "models: none"),
    "train.cost_l1": (5.0, "main.py --set_cost_bbox"),
    "train.cost_giou": (2.0, "main.py --set_cost_giou"),
    "train.weight_l1": (5.0, "main.py --bbox_loss_coef"),
    "train.weight_giou": (2.0, "main.py --giou_loss_coef"),
    "augment.flip_horizontal": (0.5, "datasets/transforms.py RandomHorizontalFlip"),
    "augment.crop": (0.5, "datasets/transforms.py RandomSelect"),
    "augment.crop_kind": ("size", "datasets/coco.py RandomSizeCrop(384, 600)"),
    "augment.min_visible": (0.0, "datasets/transforms.py crop: boxes with any area stay"),
    "augment.scale_jitter": (0.0, "datasets/coco.py: none"),
    "augment.color": (0.0, "datasets/coco.py: none"),
    "augment.zoom_out": (0.0, "datasets/coco.py: none"),
    "augment.off_for_last": (0.0, "datasets/coco.py: none"),
    "model.init": ("original", "models: see tests/models/test_initial.py"),
    "model.backbone_norm": ("frozen", "models/backbones/resnet.py FrozenBatchNorm2d"),
}
FIFTY = {"train.epochs": (50, "main.py --epochs"), "train.step_epochs": ((40,), "main.py --lr_drop")}
PARITY = {
    "detr": HEIR
    | {
        "train.epochs": (300, "main.py --epochs"),
        "train.step_epochs": ((200,), "main.py --lr_drop"),
        "train.lr": (1e-4, "main.py --lr"),
        "train.batch": (16, "README: 8 GPUs, main.py --batch_size 2"),
        "train.no_object": (0.1, "main.py --eos_coef"),
        "train.denoising": (0, "none"),
    },
    "conditional_detr": HEIR
    | FIFTY
    | {
        "train.lr": (1e-4, "main.py --lr"),
        "train.batch": (16, "README: 8 GPUs, main.py --batch_size 2"),
        "train.focal_alpha": (0.25, "main.py --focal_alpha"),
        "train.denoising": (0, "none"),
    },
    "deformable_detr": HEIR
    | FIFTY
    | {
        "train.lr": (2e-4, "main.py --lr"),
        "train.batch": (32, "README: total batch size of 32"),
        "train.slow_lr_factor": (0.1, "main.py --lr_linear_proj_mult"),
        "train.denoising": (0, "none"),
    },
    "anchor_detr": HEIR
    | FIFTY
    | {
        "train.lr": (1e-4, "main.py --lr"),
        "train.batch": (8, "README: 8 GPUs, main.py --batch_size 1"),
        "train.denoising": (0, "none"),
    },
    "dn_detr": HEIR
    | FIFTY
    | {
        "train.lr": (1e-4, "main.py --lr"),
        "train.batch": (16, "README: --ngpus 8 --batch_size 2"),
        "train.weight_class": (1.0, "main.py --cls_loss_coef"),
        "train.denoising_mode": ("dn", "no --contrastive"),
        "train.denoising_groups": (5, "main.py --scalar"),
        "train.label_noise": (0.2, "main.py --label_noise_scale"),
        "train.box_noise": (0.4, "main.py --box_noise_scale"),
    },
    "sparse_rcnn": {  # projects/SparseRCNN
        "train.epochs": (round(270_000 * 16 / 117_266), "Base-SparseRCNN.yaml MAX_ITER, of COCO's images with objects"),
        "train.step_epochs": (tuple(round(step * 16 / 117_266) for step in (210_000, 250_000)), "the same, STEPS"),
        "train.batch": (16, "the same, IMS_PER_BATCH"),
        "train.lr": (2.5e-5, "the same, BASE_LR"),
        "train.backbone_lr_factor": (1.0, "the same, BACKBONE_MULTIPLIER"),
        "train.weight_decay": (1e-4, "the same, WEIGHT_DECAY"),
        "train.decay": ("all", "train_net.py: one for all"),
        "train.clip": (1.0, "the same, CLIP_VALUE, full_model"),
        "train.warmup_steps": (1000, "the same, WARMUP_ITERS"),
        "train.schedule": ("step", "the same"),
        "train.ema_decay": (0.0, "train_net.py: none"),
        "train.l1": ("xyxy", "sparsercnn/loss.py loss_boxes"),
        "train.sizes": (SIZES, "the same, MIN_SIZE_TRAIN"),
        "augment.crop": (0.0, "sparsercnn.res50.100pro.3x.yaml CROP.ENABLED"),
        "augment.color": (0.0, "dataset_mapper.py: none"),
        "augment.zoom_out": (0.0, "dataset_mapper.py: none"),
        "model.init": ("original", "sparsercnn/head.py"),
        "model.queries": (100, "NUM_PROPOSALS"),
    },
    "rt_detr": {  # rtdetrv2_pytorch/configs/rtdetrv2
        "train.epochs": (120, "rtdetrv2_r18vd_120e_coco.yml epoches"),
        "train.batch": (16, "include/dataloader.yml total_batch_size"),
        "train.lr": (1e-4, "include/optimizer.yml lr"),
        "train.backbone_lr_factor": (1.0, "r18vd_120e: its parameter groups replace those with lr: 0.00001"),
        "train.weight_decay": (1e-4, "include/optimizer.yml"),
        "train.decay": ("not_norms", "r18vd_120e: norm|bn"),
        "train.clip": (0.1, "include/optimizer.yml clip_max_norm"),
        "train.betas": ((0.9, 0.999), "the same"),
        "train.warmup": ("linear", "the same, LinearWarmup"),
        "train.warmup_steps": (2000, "the same"),
        "train.schedule": ("constant", "the same, milestones: [1000] of 120 epochs"),
        "train.ema_decay": (0.9999, "the same, ema"),
        "train.ema_warmup": (2000, "the same, ema"),
        "train.eval_every": (1, "src/solver/det_solver.py"),
        "train.patience": (0, "the same: none"),
        "train.sizes": ((), "r18vd_120e: scales: ~"),
        "train.denoising": (100, "include/rtdetrv2_r50vd.yml"),
        "train.label_noise": (0.5, "the same, label_noise_ratio"),
        "train.box_noise": (1.0, "the same"),
        "train.vfl_alpha": (0.75, "the same, alpha"),
        "train.gamma": (2.0, "the same, gamma"),
        "train.cost_l1": (5.0, "the same, cost_bbox"),
        "train.cost_giou": (2.0, "the same, cost_giou"),
        "augment.crop": (0.8, "include/dataloader.yml RandomIoUCrop p"),
        "augment.zoom_out": (0.5, "torchvision RandomZoomOut p"),
        "augment.zoom_out_scale": (4.0, "the same"),
        "augment.color": (0.5, "include/dataloader.yml RandomPhotometricDistort p"),
        "augment.brightness": (0.125, "torchvision"),
        "augment.contrast": (0.5, "torchvision"),
        "augment.saturation": (0.5, "torchvision"),
        "augment.hue": (0.05, "torchvision"),
        "augment.off_for_last": ((120 - 117) / 120, "r18vd_120e policy epoch: 117"),
        "model.backbone_norm": ("trainable", "r18vd_120e freeze_norm: False"),
        "model.frozen_stages": (0, "r18vd_120e freeze_at: -1"),
        "model.expansion": (0.5, "r18vd_120e"),
        "model.decoder_layers": (3, "r18vd_120e num_layers"),
        "model.init": ("original", "rtdetrv2_decoder.py"),
    },
}


@pytest.mark.parametrize("name", PARITY)
def test_parity_is_the_authors_configuration_with_and_without_the_members_recipe(name):
    bare = Recipe.from_dict({"model": {"name": name}}, where=name, preset="parity")
    shipped = [
        Recipe.load(recipe, preset="parity")
        for recipe in RECIPES
        if recipe.endswith(("r50", "r18")) and not recipe.startswith("deim-") and Recipe.load(recipe).model.name == name
    ]
    assert shipped
    for recipe in [bare, *shipped]:
        for key_path, (value, source) in PARITY[name].items():
            section, key = key_path.split(".")
            config = recipe.model.config if section == "model" else getattr(recipe, section)
            assert getattr(config, key) == value, f"{key_path}: {source}"


def test_parity_says_what_it_cannot_hold_and_claims_nothing_for_members_without_code():
    head = Path(recipes_directory() / "presets" / "parity.toml").read_text(encoding="utf-8").split("\n[")[0]
    for word in ("keep the aspect ratio", "zoom-out and crop exclude", "dynamic_detr and efficient_detr"):
        assert word in re.sub(r"\n# ?", " ", head)
    with_code = {name for name, found in FAMILY.items() if found.original_init is not None}
    assert set(PARITY) <= with_code  # a member that came later may have no section yet
    assert not {"dynamic_detr", "efficient_detr"} & with_code


# DEIM's repository: configs/base/rt_deim.yml and base/deim.yml, which its configurations have in common.
DEIM = {
    "train.class_loss": ("mal", "DEIMCriterion losses: ['mal', ...]"),
    "train.gamma": (1.5, "DEIMCriterion gamma"),
    "train.warmup": ("quadratic", "engine/optim/lr_scheduler.py: (current_iter / warmup_iter) ** 2"),
    "train.schedule": ("flat_cosine", "lrsheduler: flatcosine"),
    "train.final_lr_factor": (0.5, "lr_gamma"),
    "augment.mosaic": (0.5, "mosaic_prob"),
    "augment.mosaic_kind": ("affine", "Mosaic: RandomAffine of four whole images"),
    "augment.mosaic_degrees": (10.0, "rotation_range"),
    "augment.mosaic_shift": (0.1, "translation_range"),
    "augment.mosaic_scale": ((0.5, 1.5), "scaling_range"),
    "augment.mixup": (0.5, "mixup_prob"),
    "augment.crop": (0.8, "RandomIoUCrop p"),
    "augment.zoom_out": (0.5, "torchvision RandomZoomOut p"),
    "augment.zoom_out_scale": (4.0, "the same"),
    "augment.color": (0.5, "RandomPhotometricDistort p"),
}
DEIM_TRAINED = {  # of the recipes, which are whole configurations
    "train.warmup_steps": (2000, "warmup_iter"),
    "train.ema_decay": (0.9999, "base/rt_optimizer.yml, base/optimizer.yml: ema decay"),
    "train.clip": (0.1, "the same, clip_max_norm"),
    "train.patience": (0, "engine/solver/det_solver.py: none"),
    "model.backbone_norm": ("trainable", "freeze_norm: False"),
    "model.frozen_stages": (0, "freeze_at: -1"),
    "model.decoder_activation": ("silu", "activation"),
    "model.head_activation": ("silu", "mlp_act"),
}


def deim(epochs, policy, flat, batch, lr, backbone_lr, weight_decay, **others):
    return {"epochs": (epochs, policy, flat), "train": (batch, lr, backbone_lr / lr, weight_decay), **others}


# Epochs, the policy's three (mixup's are the first two), flat_epoch, batch, lr, that of the backbone, weight decay.
DEIM_RECIPES = {
    "deim-rtdetr-r18": deim(120, [4, 64, 117], 64, 16, 2e-4, 2e-4, 1e-4, ema_warmup=2000, model={"position_layers": 3}),
    "deim-rtdetr-r50": deim(60, [4, 34, 58], 34, 16, 2e-4, 2e-5, 1e-4, ema_warmup=2000, model={"position_layers": 3}),
    "deim-dfine-n": deim(160, [4, 78, 148], None, 128, 8e-4, 4e-4, 1e-4),  # lr_gamma 1: no fall
    "deim-dfine-s": deim(132, [4, 64, 120], 64, 32, 4e-4, 2e-4, 1e-4),
    "deim-dfine-m": deim(102, [4, 49, 90], 49, 32, 4e-4, 4e-5, 1e-4),
    "deim-dfine-l": deim(58, [4, 29, 50], 29, 32, 5e-4, 2.5e-5, 1.25e-4),
    "deim-dfine-x": deim(58, [4, 29, 50], 29, 32, 5e-4, 5e-6, 1.25e-4),
}


def differing(recipe, expected):
    """The keys of a recipe that are not as in a table of values and sources."""
    found = {}
    for path, (value, source) in expected.items():
        section, key = path.split(".")
        config = recipe.model.config if section == "model" else getattr(recipe, section)
        if getattr(config, key) != value:
            found[path] = (getattr(config, key), value, source)
    return found


@pytest.mark.parametrize("name", [name for name in DEIM_RECIPES if name in RECIPES])
def test_a_recipe_of_deim_is_the_authors_configuration(name):
    recipe, expected = Recipe.load(name), DEIM_RECIPES[name]
    epochs, policy, flat = expected["epochs"]
    constant = {"train.schedule": ("constant", "lr_gamma: 1.0")} if flat is None else {}
    values = {**DEIM, **DEIM_TRAINED, **constant}
    if flat is None:
        del values["train.final_lr_factor"]
    assert differing(recipe, values) == {}
    train, augment = recipe.train, recipe.augment
    assert (train.batch, train.lr, train.weight_decay) == (
        expected["train"][0],
        expected["train"][1],
        expected["train"][3],
    )
    assert train.backbone_lr_factor == pytest.approx(expected["train"][2])
    assert train.ema_warmup == expected.get("ema_warmup", 1000) and train.epochs == epochs
    strong = [epoch for epoch in range(epochs) if augment.is_strong(epoch, epochs)]
    assert strong == list(range(policy[0], policy[2]))
    assert [epoch for epoch in range(epochs) if augment.mixes(epoch, epochs)] == list(range(policy[1]))
    assert flat is None or round(train.flat * epochs) == flat
    assert {key: getattr(recipe.model.config, key) for key in expected.get("model", {})} == expected.get("model", {})


@pytest.mark.parametrize(("member", "policy", "epochs"), [("rt_detr", [4, 64, 117], 120), ("d_fine", [4, 29, 50], 58)])
def test_the_preset_is_deims_training_and_leaves_epochs_rates_and_the_model(member, policy, epochs):
    bare = Recipe.from_dict({"model": {"name": member}}, where=member)
    recipe = Recipe.from_dict({"model": {"name": member}}, where=member, preset="deim")
    assert differing(recipe, DEIM) == {}
    augment = recipe.augment
    assert [epoch for epoch in range(epochs) if augment.is_strong(epoch, epochs)] == list(range(policy[0], policy[2]))
    assert [epoch for epoch in range(epochs) if augment.mixes(epoch, epochs)] == list(range(policy[1]))
    assert round(recipe.train.flat * epochs) == policy[1]
    for key in ("epochs", "batch", "lr", "warmup_steps", "ema_decay"):
        assert getattr(recipe.train, key) == getattr(bare.train, key)
    assert recipe.model == bare.model


def test_mixup_of_deim_weighs_both_images_as_its_uniform_weights_do():
    """Beta(150, 150) beside the uniform 0.45 to 0.55 of its collate function: the same mean and spread."""
    b = Recipe.load("rtdetr-r18", preset="deim").augment.mixup_beta
    assert 1 / (4 * (2 * b + 1)) == pytest.approx(0.1**2 / 12, rel=0.01)  # the variances
