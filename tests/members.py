"""The family at micro size: one configuration per member, for every test that goes over all of them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.models import FAMILY, build
from edgedetr.models.backbones.resnet import Block
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel
from edgedetr.storage.atomic import atomic_write

CLASSES = 3
HEIGHT, WIDTH = 96, 128  # rectangular, so that a swap of x and y shows

# As small as it goes while every part of a member is there, at least two decoder layers where the member has several.
# Weights are random, so norms train. Fields that a member lacks are left out.
MICRO: dict[str, object] = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "backbone_norm": "trainable",
    "frozen_stages": 0,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_ffn": 48,
    "decoder_ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 12,
    "dynamic_hidden": 8,
}
# A windowed transformer of two blocks, the second of which attends to the whole image.
WINDOWED: dict[str, object] = {
    "backbone_windows": 2,
    "backbone_maps": (0, 1),
    "backbone_full_attention": (1,),
    "backbone_grid": 4,
    "cross_heads": 8,
    "groups": 3,
}
# What differs for one member.
OWN: dict[str, dict[str, object]] = {
    "anchor_detr": {"dilate_last": False, "patterns": 3},
    "deformable_detr": {"refine": True, "two_stage": True},
    # Wider than the others: it learns by heart more slowly (a fifth of the loss after 65 steps at 32, before 40 at 64).
    "dn_detr": {"hidden": 64},
    "efficient_detr": {"encoder_layers": 1, "decoder_layers": 1, "first_queries": 20},
    # As wide as dn_detr, for the same reason.
    "lw_detr": {**WINDOWED, "backbone": "lw_vit_tiny", "backbone_width": 0.25, "scales": (2, 0.5), "hidden": 64},
    "rf_detr": {**WINDOWED, "backbone": "dinov2_small", "backbone_width": 0.25, "hidden": 64},
    # Its own backbone has tests of its own; at random weights its many norms in a row make rounding errors large.
    "d_fine": {
        "backbone": "resnet18vd",
        "encoder_layers": 1,
        "encoder_width": 40,
        "fusion_blocks": 1,
        "points": (3, 4, 2),
        "reg_max": 8,
    },
    # Three levels: with two, these images have 60 cells, of which half are off the middle.
    "deimv2": {
        "backbone": "resnet18vd",
        "levels": 3,
        "encoder_layers": 1,
        "expansion": 0.5,
        "fusion_blocks": 1,
        "points": (3, 4, 2),
        "reg_max": 8,
    },
    "rt_detr": {"backbone": "resnet18vd", "encoder_layers": 1, "points": (4, 2, 3)},
}


def micro(name: str) -> object:
    """The configuration of a member at micro size."""
    kind = FAMILY[name].config
    known = {item.name for item in fields(kind)}
    return kind(**{key: value for key, value in {**MICRO, **OWN.get(name, {})}.items() if key in known})


SMALL: dict[str, object] = {name: micro(name) for name in FAMILY}
VARIANTS: dict[str, object] = {}  # of single test files; what goes over all members does not see them


def variant(name: str, **options: object) -> str:
    """A member with other options at micro size, as a name that `small`, `deployed` and `exported` take as well."""
    found = f"{name}+{'+'.join(map(str, options.values()))}"
    VARIANTS[found] = replace(micro(name), **options)  # type: ignore[type-var]
    return found


def config_of(name: str) -> object:
    """The configuration of a variant, or of a member at micro size."""
    return VARIANTS[name] if name in VARIANTS else SMALL[name]


def member_of(name: str) -> str:
    """The member of a variant, or of a member."""
    return name.partition("+")[0]


# Members with groups of queries in training.
GROUPED = ("lw_detr", "rf_detr")

# Members whose boxes may reach beyond the image: deltas relative to a box have no bound, and sides that move by
# distributions reach as far as half a box.
RCNN = ("dynamic_detr", "sparse_rcnn")
BEYOND = (*RCNN, *GROUPED, "d_fine", "deimv2")

NOISE = 1.0  # standard deviation that the added noise alone gives to what a layer makes of inputs of deviation 1

# Members whose queries' positions follow from boxes that depend on the image.
MOVING = ("dn_detr", "dino", "deformable_detr", "efficient_detr", *GROUPED)

RESIDUAL = 0.3  # scale of a ResNet block's branch

# Members whose queries are the best of the image's cells.
SELECTING = ("deformable_detr", "dino", "efficient_detr", "rt_detr", *GROUPED, "d_fine", "deimv2")

SIDES = tuple(f"decoder.boxes.first.layers.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias"))

# Parameters without a gradient from predictions alone, per member, and why.
UNUSED: dict[str, tuple[str, ...]] = {
    # No box of these images is large enough for P5, and P7 is further from P4 than two layers carry.
    "sparse_rcnn": ("encoder.pyramid.smooth.3.weight", "encoder.pyramid.smooth.3.bias"),
    "dynamic_detr": ("encoder.pyramid.coarser.1.weight", "encoder.pyramid.coarser.1.bias"),
    # The class embedding of noised queries is used by training's denoising alone.
    "rt_detr": ("selector.denoising_class_embed.weight",),
    "dino": ("selector.denoising_class_embed.weight",),
    # The losses of the sides alone reach the first layer's plain head.
    "d_fine": (*SIDES, "selector.denoising_class_embed.weight"),
    "deimv2": (*SIDES, "selector.denoising_class_embed.weight"),
}


@torch.no_grad()
def small(name: str) -> DetrModel:
    """A little detector whose detections depend on the image, and whose best tokens have a decided order."""
    torch.manual_seed(0)
    detector = build(member_of(name), config_of(name), CLASSES)
    for parameter in detector.parameters():  # as much as the scale of its inputs allows, so that no map grows
        parameter.add_(torch.randn_like(parameter) * min(0.1, NOISE * max(parameter[0].numel(), 1) ** -0.5))
    for key, parameter in detector.named_parameters():
        if key.startswith("decoder.boxes.score") and key.endswith("bias"):
            parameter.clamp_(min=-2)  # heads start with every class rare; here detections are to be seen
    if member_of(name) in RCNN:  # every other box spans three images, to be read from another level; all move a little
        detector.selector.box.weight[::2, 2:] *= 3
        for head in detector.decoder.boxes.box:
            head.weight.mul_(0.2)
    return _measured(detector.eval())


def _measured(detector: DetrModel) -> DetrModel:
    """BatchNorm's statistics as they are on images, where random ones would let maps grow or vanish."""
    for block in detector.modules():
        if isinstance(block, Block):  # as in trained networks, a block changes its input a little, so that what
            block.body[-1].norm.weight.mul_(RESIDUAL)  # rounding changes does not grow from block to block
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None  # the mean of all batches, of which there is one
    detector(detector.normalize(sample_images(4)))
    for norm in norms:
        norm.eval().momentum = 0.1
    return detector


def sample_images(batch: int = 2) -> torch.Tensor:
    """[batch, 3, HEIGHT, WIDTH], 0..255: spots of color as large as objects, and noise."""
    generator = torch.Generator().manual_seed(3)
    spots = torch.rand(batch, 3, HEIGHT // 16, WIDTH // 16, generator=generator)
    noise = torch.rand(batch, 3, HEIGHT, WIDTH, generator=generator)
    return (0.8 * interpolate(spots, size=(HEIGHT, WIDTH), mode="bilinear") + 0.2 * noise) * 255


@cache
def deployed(name: str, sampling: str = "gather") -> DeployGraph:
    """The deployed graph of `small(name)` at HEIGHT x WIDTH."""
    return DeployGraph(small(name), HEIGHT, WIDTH, sampling)


def exported(name: str, batch: int | None = 1, sampling: str = "gather") -> Path:
    """`deployed` as an ONNX file that nobody may change, made once for all tests; batch None leaves it open."""
    return _exported(name, batch, sampling)


@cache  # which distinguishes f(x) from f(x, 1): hence behind a function that always gives all three
def _exported(name: str, batch: int | None, sampling: str) -> Path:
    path = _folder() / f"{name}-{batch}-{sampling}.onnx"
    if not path.exists():  # another process of this run may have written it
        with atomic_write(path) as temporary:
            write_onnx(deployed(name, sampling), temporary, batch=batch)
    return path


@cache
def _folder() -> Path:
    """The folder that all processes of a test run share (tests/conftest.py makes it), or a new one."""
    if "EDGEDETR_TEST_EXPORTS" in os.environ:
        return Path(os.environ["EDGEDETR_TEST_EXPORTS"])
    folder = tempfile.mkdtemp(prefix="members-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
