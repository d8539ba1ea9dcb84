"""HGNetV2 against transformers' HGNetV2Backbone, its files, its sizes, and what a deployed graph makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from members import CLASSES, SMALL

from edgedetr.errors import ModelError
from edgedetr.layers.convolution import AffineRelu, ConvNorm, ReluPlus
from edgedetr.layers.norm import FrozenBatchNorm2d
from edgedetr.models import build, member
from edgedetr.models.backbones.backbone import BackboneConfig, make_backbone
from edgedetr.models.checkpoints.backbone_names import rename_backbone
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.pretrained import load_backbone, load_weights

# The sizes as configurations of transformers: the numbers of D-FINE's and DEIMv2's own files, stage by stage
# (src/nn/backbone/hgnetv2.py and engine/backbone/hgnetv2.py).
THEIRS: dict[str, dict[str, Any]] = {
    "hgnetv2_atto": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 256],
        "stage_mid_channels": [16, 32, 64],
        "stage_out_channels": [64, 256, 256],
        "stage_num_blocks": [1, 1, 1],
        "stage_downsample": [False, True, True],
        "stage_downsample_strides": [2, 2, 2],
        "stage_light_block": [False, False, True],
        "stage_kernel_size": [3, 3, 3],
        "stage_numb_of_layers": [3, 3, 3],
        "use_learnable_affine_block": True,
        "depths": [1, 1, 1],
    },
    "hgnetv2_b0": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "use_learnable_affine_block": True,
    },
    "hgnetv2_b4": {},  # transformers' default
}


def backbone(name: str, levels: tuple[int, ...] = (3, 4), **options: Any) -> Any:
    options = {"backbone_norm": "trainable", "frozen_stages": 0, **options}
    return make_backbone(BackboneConfig(backbone=name, **options), levels)


@torch.no_grad()
def varied(model: torch.nn.Module) -> torch.nn.Module:
    """Every norm and every learned scale and bias differs from its first value; maps neither grow nor vanish."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            noise = torch.rand(tensor.shape, generator=generator) - 0.5
            tensor.add_(noise * (0.4 if name.endswith(("bias", "_mean")) else 1))
        elif tensor.ndim == 4:  # deviation 1 of what a convolution makes of a map of deviation 1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
    return model.eval()


def reference(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    stages = len(THEIRS[name].get("stage_out_channels", [0] * 4))
    config = transformers.HGNetV2Config(**THEIRS[name], out_indices=list(range(1, stages + 1)))
    return varied(transformers.HGNetV2Backbone(config))


def as_authors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of transformers as those of the files of D-FINE, RT-DETR and timm, whose modules are called conv and bn."""
    rules = [
        (r"^embedder\.", "stem."),
        (r"^encoder\.stages", "stages"),
        (r"\.convolution\.", ".conv."),
        (r"\.normalization\.", ".bn."),
    ]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_it_computes_what_transformers_does_from_files_of_both_layouts(name: str) -> None:
    theirs = reference(name)
    levels = tuple(range(2, len(theirs.encoder.stages) + 2))
    images = torch.randn(2, 3, 64, 96)
    expected = theirs(images).feature_maps
    for weights in (theirs.state_dict(), as_authors(theirs.state_dict())):
        ours = backbone(name, levels).eval()
        load_weights(ours, rename_backbone(weights), "test")
        actual = ours(images)
        assert len(actual) == len(expected) == len(levels)
        for level, mine, other, channels, stride in zip(levels, actual, expected, ours.channels, ours.strides):
            assert mine.shape == (2, channels, 64 // stride, 96 // stride) and stride == 2**level
            # float32, sums over up to 2,176 channels; measured 0 to 2e-6 of the largest value
            torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    # timm's model cards and keras-hub's presets count the classifier too: a 1x1 convolution to 2,048 channels, and
    # 1,000 classes.
    "name, million",
    [("b0", 5.997), ("b1", 6.343), ("b2", 11.221), ("b3", 16.3), ("b4", 19.8), ("b5", 39.6), ("b6", 75.3)],
)
def test_sizes_are_those_of_paddles_classifiers(name: str, million: float) -> None:
    with torch.device("meta"):
        net = backbone(f"hgnetv2_{name}", (5,))
    head = 2048 * net.channels[-1] + 1000 * 2048 + 1000
    assert (sum(p.numel() for p in net.parameters()) + head) / 1e6 == pytest.approx(million, rel=2e-3)


@pytest.mark.parametrize("name, width", [("hgnetv2_b0", 0.5), ("hgnetv2_pico", 1.0), ("hgnetv2_b4", 0.25)])
def test_name_and_width_follow_from_the_tensors(name: str, width: float) -> None:
    with torch.device("meta"):
        net = backbone(name, backbone_width=width)
    state = {f"backbone.{key}": tensor for key, tensor in net.state_dict().items()}
    found = config_from_state_dict(member("rt_detr"), state)
    assert (found["backbone"], found["backbone_width"]) == (name, width)


def test_an_hgnetv2_that_is_none_of_ours_is_refused() -> None:
    with torch.device("meta"):
        net = backbone("hgnetv2_b0")
    state = {f"backbone.{key}": tensor for key, tensor in net.state_dict().items() if ".layers.2." not in key}
    with pytest.raises(ModelError, match=r"1 \+ 1 \+ 2 \+ 1 blocks with 2 layers each"):
        config_from_state_dict(member("rt_detr"), state)


def test_the_small_sizes_have_no_map_of_stride_32() -> None:
    assert backbone("hgnetv2_pico", (4,)).strides == [16]
    with pytest.raises(ModelError, match=r"hgnetv2_pico, whose last map is C4 \(stride 16\), and this model reads C5"):
        backbone("hgnetv2_pico", (4, 5))


def test_options_of_other_backbones_are_refused() -> None:
    with pytest.raises(ModelError, match="layer_scale belongs to vision transformers"):
        backbone("hgnetv2_b0", layer_scale=1e-5)
    with pytest.raises(ModelError, match="dilate_last needs a bottleneck ResNet, not hgnetv2_b0"):
        make_backbone(BackboneConfig(backbone="hgnetv2_b0"), (5,), dilate_last=True)


@pytest.mark.parametrize("stages", [0, 1, 3])
def test_freezing_goes_from_the_stem_up(stages: int) -> None:
    net = backbone("hgnetv2_b0", (5,), frozen_stages=stages, backbone_width=0.25)
    frozen = [not any(p.requires_grad for p in part.parameters()) for part in (net.stem, *net.stages)]
    assert frozen == [True] * stages + [False] * (5 - stages)


@torch.no_grad()
def test_frozen_norms_compute_what_evaluation_does() -> None:
    trainable = varied(backbone("hgnetv2_b0", (3, 5), backbone_width=0.25))
    frozen = backbone("hgnetv2_b0", (3, 5), backbone_width=0.25, backbone_norm="frozen", frozen_stages=5)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in frozen.modules())
    trainable.stages[1].blocks[0].layers[1].activation.scale.fill_(-0.5)  # no part of a kernel behind a ReLU
    images = torch.randn(1, 3, 64, 96)
    for _ in range(2):  # kernels that a layer keeps follow its tensors
        load_weights(frozen, trainable.state_dict(), "test")
        for mine, other in zip(frozen(images), trainable(images)):
            torch.testing.assert_close(mine, other, atol=1e-4 * float(other.abs().max()), rtol=0)
        trainable.stem.stem1.activation.scale.fill_(1.7)


@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0])
@torch.no_grad()
def test_a_folded_affine_relu_computes_the_same(scale: float) -> None:
    """A positive scale passes ReLU and goes into the convolution; another one stays behind it."""
    torch.manual_seed(0)
    layer = varied(ConvNorm(5, 6, 3, activation="affine_relu"))
    layer.activation.scale.fill_(scale)
    x = torch.randn(2, 5, 8, 9)
    by_hand = scale * torch.relu(layer.norm(layer.conv(x))) + layer.activation.bias
    torch.testing.assert_close(layer(x), by_hand)
    fused = layer.fused()
    torch.testing.assert_close(fused(x), by_hand, atol=1e-5, rtol=0)
    assert isinstance(fused[1], ReluPlus if scale > 0 else AffineRelu)


@torch.no_grad()
def test_a_file_of_a_whole_classifier_starts_a_member(tmp_path: Path) -> None:
    """As timm's files: the names of the authors, and a classifier that no detector has."""
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in as_authors(reference("hgnetv2_b0").state_dict()).items()}
    weights |= {"head.last_conv.0.weight": torch.zeros(8, 4, 1, 1), "head.fc.bias": torch.zeros(10)}
    save_file(weights, tmp_path / "model.safetensors")
    options = {"backbone": "hgnetv2_b0", "backbone_width": 1.0, "backbone_weights": str(tmp_path / "model.safetensors")}
    config = replace(SMALL["detr"], **options)
    detector = build("detr", config, CLASSES)
    loaded = load_backbone(detector, config)
    assert loaded is not None and loaded.tensors == len(
        [name for name in detector.backbone.state_dict() if "num_batches" not in name]
    )
    assert torch.equal(
        detector.backbone.stages[2].blocks[1].layers[2].depth.activation.bias,
        weights["stages.2.blocks.1.layers.2.conv2.lab.bias"],
    )
