"""RT-DETR on an HGNetV2 backbone: transformers' class with that backbone, the authors' files, the published sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import author_state_dicts
import pytest
import torch
from members import CLASSES, SMALL
from references import with_spread

from edgedetr.errors import ModelError
from edgedetr.importing.weights import architecture
from edgedetr.models import build
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.checkpoints.transformers_config import read_config
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.recipe import Recipe

# B0 with half of its channels.
HALF_B0 = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 32, 128, 256],
    "stage_mid_channels": [8, 16, 32, 64],
    "stage_out_channels": [32, 128, 256, 512],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
    "hidden_sizes": [32, 128, 256, 512],  # what transformers tells the projections behind it
    "out_features": ["stage2", "stage3", "stage4"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    transformers = pytest.importorskip("transformers")
    config = transformers.RTDetrV2Config(
        backbone_config=transformers.HGNetV2Config(**HALF_B0),
        num_labels=CLASSES,
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32] * 3,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_layers=2,
        num_queries=12,
        hidden_expansion=0.5,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        anchor_image_size=None,
    )
    model = with_spread(transformers.RTDetrV2ForObjectDetection(config), 0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lab.scale"):
                parameter.fill_(0.8)
            elif parameter.ndim == 4:  # so that what passes keeps its size, and the image reaches the queries
                parameter.mul_((2 / parameter[0].numel()) ** 0.5 / 0.2)
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_a_folder_of_transformers_with_this_backbone_is_imported(saved: tuple[torch.nn.Module, Path]) -> None:
    reference, folder = saved
    read = architecture(WeightSource(str(folder)), "rt_detr")
    config = read.recipe.model.config
    assert (config.backbone, config.backbone_width) == ("hgnetv2_b0", 0.5)
    ours = build("rt_detr", config, CLASSES).eval()
    assert load_weights(ours, read.weights, str(folder)).fresh == ()
    images = torch.randn(2, 3, 96, 128)
    theirs, got = reference(pixel_values=images), ours(images)
    assert theirs.logits.std(dim=1).min() > 5e-3 and theirs.pred_boxes.std() > 0.1, "the reference says something"
    torch.testing.assert_close(got.logits[-1], theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], theirs.pred_boxes, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage_num_blocks": [1, 1, 3, 1]}, r"stage_num_blocks is \[1, 1, 3, 1\], but the tensors say \[1, 1, 2, 1\]"),
        ({"use_learnable_affine_block": False}, "use_learnable_affine_block is false, but the tensors say true"),
        ({"model_type": "rt_detr_resnet"}, "model_type is rt_detr_resnet, but the tensors are those of hgnetv2_b0"),
    ],
)
def test_a_configuration_of_another_hgnetv2_is_refused(
    saved: tuple[torch.nn.Module, Path], changes: dict[str, object], message: str
) -> None:
    config = saved[0].config.to_dict()
    nested = {"model_type": "hgnet_v2", **HALF_B0, **changes}
    if nested["model_type"] != "hgnet_v2":
        nested = {"model_type": nested["model_type"], "out_features": HALF_B0["out_features"]}
    read = read_config({**config, "backbone_config": nested}, "rt_detr", "config.json")
    with pytest.raises(ModelError, match=message):
        read._require_agreement_of_stages({"backbone": "hgnetv2_b0", "backbone_width": 0.5})


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_an_authors_file_is_imported(version: int, tmp_path: Path) -> None:
    """As rtdetrv2_hgnetv2_l_6x_coco_from_paddle.pth, at a quarter of the channels."""
    options = {"backbone": "hgnetv2_b4", "frozen_stages": 1, "expansion": 1.0, "points": (4, 4, 4)}
    made = build("rt_detr", replace(SMALL["rt_detr"], heads=8, **options), CLASSES)
    path = tmp_path / "rtdetrv2_hgnetv2_l.pth"
    torch.save({"ema": {"module": author_state_dicts.rt_detr(made.state_dict(), version)}}, path)
    read = architecture(WeightSource(str(path)), "rt_detr")
    config = read.recipe.model.config
    assert (config.backbone, config.backbone_width, config.expansion) == ("hgnetv2_b4", 0.25, 1.0)
    ours = build("rt_detr", config, CLASSES)
    load_weights(ours, read.weights, str(path))
    for name, tensor in made.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("size, count", [("l", 32_970_476), ("x", 67_467_852)])
def test_the_recipes_have_the_published_sizes(size: str, count: int) -> None:
    """Counts of ultralytics' RT-DETR-l and -x; the authors' README rounds down to 32 and 67 M.

    There the embedding of noised classes has no row for filling (256 numbers), and norms learn.
    """
    recipe = Recipe.load(f"rtdetr-hgnetv2-{size}")
    config = replace(recipe.model.config, backbone_norm="trainable")
    with torch.device("meta"):
        model = build("rt_detr", config, 80)
    assert sum(p.numel() for p in model.parameters()) == count + 256
