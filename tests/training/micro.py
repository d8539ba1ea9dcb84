"""A training small enough for tests: drawn squares on noise, a network of a few thousand weights."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edgedetr.progress import SilentTraining
from edgedetr.recipe import Recipe
from edgedetr.training.config import ResolvedTrainConfig, TrainConfig, resolved
from edgedetr.training.data.dataset import open_splits
from edgedetr.training.device_choice import ANY_DEVICE
from edgedetr.training.planning import for_machine, plan_training
from edgedetr.training.train import start_devices, train
from edgedetr.training.trainer import Trainer, training_set

TOML = {
    "model": {
        "name": "rt_detr",
        "backbone": "resnet18vd",
        "backbone_width": 0.125,
        "backbone_weights": "random",
        "backbone_norm": "trainable",
        "hidden": 16,
        "heads": 2,
        "encoder_ffn": 16,
        "decoder_ffn": 16,
        "decoder_layers": 2,
        "queries": 10,
        "fusion_blocks": 1,
        "points": [2, 2, 2],
        "dropout": 0.1,
    },
    "input": {"height": 64, "width": 64},
    "train": {
        "epochs": 3,
        "batch": 4,
        "lr": 1e-3,
        "backbone_lr_factor": 1.0,
        "warmup_steps": 4,
        "schedule": "cosine",
        "ema_decay": 0.9,
        "ema_warmup": 5,
        "denoising": 8,
        "checkpoint_every": 1,
        "threads": 1,
        "seed": 7,
        # What would be "auto": the same on every machine.
        "eval_every": 1,
        "patience": 0,
        "sizes": [],
        "precision": "32",
        "workers": 0,
    },
}


# [train] without "auto", for tests of one part; RT-DETR's numbers.
PUBLISHED = {
    "epochs": 72,
    "lr": 1e-4,
    "backbone_lr_factor": 0.1,
    "warmup_steps": 2000,
    "schedule": "constant",
    "sizes": (),
    "ema_decay": 0.9999,
    "ema_warmup": 2000,
    "eval_every": 1,
    "patience": 0,
    "precision": "32",
    "workers": 0,
}


def numbers(**train_settings: object) -> ResolvedTrainConfig:
    return resolved(TrainConfig(**{**PUBLISHED, **train_settings}))


def recipe(**train_settings: object) -> Recipe:
    sections = {name: dict(values) for name, values in TOML.items()}
    sections["train"].update(train_settings)
    return Recipe.from_dict(sections, where="micro")


def write_data(root: Path, train_images: int = 14, others: int = 4) -> Path:
    """COCO layout: bright squares of two sizes on noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", others), ("test", others)):
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(1, count + 1):
            pixels = rng.integers(0, 90, (70, 80, 3), dtype=np.uint8)
            for label in range(int(rng.integers(1, 4))):
                side = 14 if label % 2 else 24
                x, y = int(rng.integers(0, 80 - side)), int(rng.integers(0, 70 - side))
                pixels[y : y + side, x : x + side, label % 3] = 250
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 3 + label % 2,
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 70, "width": 80})
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": 3, "name": "large"}, {"id": 4, "name": "small"}],
                }
            )
        )
    return root


def child(data: str, out: str, settings: dict[str, object]) -> None:
    """One training in its own process, to be killed or not; always with --resume."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    train(recipe(**settings), data, out, resume=True)


def new_trainer(recipe: Recipe, data: Path, out: Path) -> Trainer:
    """A training that has not begun."""
    splits = open_splits(data, recipe.data)
    images, machine = training_set(recipe, splits), for_machine(recipe.train, ANY_DEVICE, len(splits.train))
    fabric = start_devices(machine.config)
    planned = plan_training(recipe, machine, splits, images, fabric, None, time.monotonic())
    return Trainer(planned.recipe, splits, out, fabric, SilentTraining(), images)
