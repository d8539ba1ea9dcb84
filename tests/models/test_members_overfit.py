"""Every member learns eight real images by heart, from random weights: nothing between pixels and AP is cut.

Slow: some minutes of one core per member. The figures of a recorded run stand in recipes/README.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from edgedetr.models import FAMILY
from edgedetr.recipe import Recipe
from edgedetr.training.train import train

IMAGE_COUNT = 8
SIDE = 256  # pixels: platelets are 15 to 20 of them wide
MINUTES = 15  # of CPU time

# Half-width ResNet-18 and 96 channels, where a member has no other settings.
COMMON = {
    "backbone": "resnet18",
    "backbone_width": 0.5,
    "backbone_weights": "random",
    "backbone_norm": "trainable",
    "frozen_stages": 0,
    "hidden": 96,
    "heads": 4,
    "queries": 60,
}
# Anchor DETR gets a quarter-width ResNet-50 whose last map has stride 16: at 32 there are but 8 columns and 8 rows.
FINE = {
    "backbone": "resnet50",
    "backbone_width": 0.25,
    "dilate_last": True,
    "ffn": 256,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "dropout": 0.0,
}
# Dense attention finds its objects in any map, after many steps: a small map, and steps that take a fifth of a second.
DENSE = {"backbone_width": 0.25, "ffn": 256, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0}
# Four blocks of 96 channels, the second and the fourth over the whole image; stride 8, for platelets.
WINDOWED = {
    "backbone_width": 0.25,
    "backbone_windows": 2,
    "backbone_maps": (1, 3),
    "backbone_full_attention": (1, 3),
    "backbone_grid": 16,
    "hidden": 96,
    "cross_heads": 8,
    "ffn": 256,
    "decoder_layers": 2,
    "groups": 3,
}
OWN: dict[str, dict[str, object]] = {
    "detr": DENSE,
    "conditional_detr": DENSE,
    "dn_detr": DENSE,
    "anchor_detr": {**FINE, "patterns": 1},
    "deformable_detr": {
        "ffn": 256,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "dropout": 0.0,
        "refine": True,
        "two_stage": True,
    },
    "efficient_detr": {"ffn": 256, "encoder_layers": 2, "decoder_layers": 1, "dropout": 0.0, "first_queries": 60},
    "dynamic_detr": {
        "backbone_width": 0.25,
        "hidden": 64,
        "ffn": 256,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "dynamic_hidden": 24,
        "roi_samples": 1,
    },
    "sparse_rcnn": {"ffn": 256, "decoder_layers": 3, "dynamic_hidden": 24},
    "deimv2": {
        "backbone": "resnet18vd",
        "levels": 3,
        "points": (4, 4, 4),
        "encoder_ffn": 256,
        "decoder_ffn": 256,
        "fusion_blocks": 1,
    },
    "dino": {"ffn": 256, "levels": 3, "encoder_layers": 2, "decoder_layers": 3},
    "lw_detr": {**WINDOWED, "backbone": "lw_vit_tiny", "backbone_width": 0.5, "scales": (2.0, 0.5)},
    "rf_detr": {**WINDOWED, "backbone": "dinov2_small", "scales": (2.0,)},
    "rt_detr": {"backbone": "resnet18vd", "encoder_ffn": 256, "decoder_ffn": 256, "fusion_blocks": 1},
    "d_fine": {
        "backbone": "hgnetv2_b0",
        "encoder_ffn": 256,
        "decoder_ffn": 256,
        "expansion": 0.5,
        "fusion_blocks": 1,
        "decoder_layers": 3,
    },
}
SIDES = {"detr": 192, "conditional_detr": 192, "dn_detr": 192}  # pixels, where not SIDE
STEPS = {
    "detr": 1200,
    "conditional_detr": 1000,
    "dn_detr": 1000,
    "anchor_detr": 900,
    "deformable_detr": 250,
    "efficient_detr": 250,
    "dynamic_detr": 300,
    "sparse_rcnn": 300,
    "rt_detr": 220,
    "d_fine": 220,
    "deimv2": 300,
    "dino": 250,
    "lw_detr": 400,
    "rf_detr": 900,
}


def eight(source: Path, root: Path) -> Path:
    """The first images of BCCD's training split that hold all three classes, as every split of a COCO set."""
    whole = json.loads((source / "annotations" / "train.json").read_text())
    classes = {category["id"] for category in whole["categories"]}
    of = {image["id"]: [a for a in whole["annotations"] if a["image_id"] == image["id"]] for image in whole["images"]}
    chosen = [image for image in whole["images"] if {a["category_id"] for a in of[image["id"]]} == classes][
        :IMAGE_COUNT
    ]
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val", "test"):
        (root / "images" / split).mkdir(parents=True)
        for image in chosen:
            name = Path(image["file_name"]).name
            os.symlink((source / "images" / "train" / name).resolve(), root / "images" / split / name)
        (root / "annotations" / f"{split}.json").write_text(
            json.dumps(
                {
                    "images": [{**image, "file_name": Path(image["file_name"]).name} for image in chosen],
                    "annotations": [a for image in chosen for a in of[image["id"]]],
                    "categories": whole["categories"],
                }
            )
        )
    return root


def recipe(name: str) -> Recipe:
    fields = FAMILY[name].config.__dataclass_fields__
    model = {key: value for key, value in {**COMMON, **OWN[name]}.items() if key in fields}
    side = SIDES.get(name, SIDE)
    return Recipe.from_dict(
        {
            "model": {"name": name, **model},
            "input": {"height": side, "width": side},
            "train": {
                "epochs": STEPS[name],
                "batch": IMAGE_COUNT,
                "lr": 1e-3,
                "backbone_lr_factor": 1.0,
                "weight_decay": 0.0,
                "clip": 1.0,
                "warmup_steps": 50,
                "schedule": "cosine",
                "ema_decay": 0.98,
                "ema_warmup": 50,
                "eval_every": STEPS[name],
                "denoising": 60,
                "checkpoint_every": 10**6,
            },
            "augment": {"flip_horizontal": 0.0, "crop": 0.0, "zoom_out": 0.0, "scale_jitter": 0.0, "color": 0.0},
        },
        where=name,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_eight_images_are_learned_by_heart(name: str, shared_data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a second one that waits in a loop would count as CPU time
    begun = time.process_time()
    bundle = train(recipe(name), eight(shared_data / "bccd", tmp_path / "data"), tmp_path / "heart.bundle")
    minutes = (time.process_time() - begun) / 60
    record = [json.loads(line) for line in (bundle.path / "train" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in record if line["kind"] == "eval")
    print(
        f"\n{name}: AP {found['ap']:.1f}, AP50 {found['ap50']:.1f} after {STEPS[name]} steps, "
        f"{minutes:.1f} minutes of CPU time"
    )
    assert found["ap50"] >= 90
    assert found["ap"] >= 60
    assert minutes <= MINUTES
