"""Detections equal those of transformers' models of the same weights."""

from __future__ import annotations

import pytest
import torch
from references import reference_resnet, with_spread

from edgedetr.models import build
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig

transformers = pytest.importorskip("transformers", reason="the reference implementation of these tests")

CLASSES = 5
PIXELS = (96, 128)  # rectangular, so that a swap of x and y shows


def reference_vd(depth: int) -> object:
    kind, depths = ("basic", [2, 2, 2, 2]) if depth == 18 else ("bottleneck", [3, 4, 6, 3])
    sizes = [32, 64, 128, 256] if depth == 18 else [128, 256, 512, 1024]
    return transformers.RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=sizes,
        depths=depths,
        layer_type=kind,
        out_features=["stage2", "stage3", "stage4"],
    )


def reference_detr(cls: str, depth: int) -> torch.nn.Module:
    config = getattr(transformers, cls.replace("ForObjectDetection", "Config"))(
        backbone_config=reference_resnet(depth),
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        num_labels=CLASSES,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=20,
    )
    return getattr(transformers, cls)(config)


def reference_rt_detr(cls: str, depth: int, **more: object) -> torch.nn.Module:
    backbone = reference_vd(depth)
    config = getattr(transformers, cls.replace("ForObjectDetection", "Config"))(
        backbone_config=backbone,
        num_labels=CLASSES,
        encoder_in_channels=backbone.hidden_sizes[1:],
        d_model=64,
        encoder_hidden_dim=64,
        decoder_in_channels=[64] * 3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        decoder_layers=2,
        num_queries=30,
        hidden_expansion=0.5,
        decoder_attention_heads=4,
        num_attention_heads=4,
        encoder_attention_heads=4,
        anchor_image_size=None,
        **more,
    )
    return getattr(transformers, cls)(config)


RT_DETR = {
    "backbone_width": 0.5,
    "hidden": 64,
    "heads": 4,
    "encoder_ffn": 96,
    "decoder_ffn": 96,
    "decoder_layers": 2,
    "queries": 30,
}
DETR = {"hidden": 64, "heads": 4, "ffn": 96, "encoder_layers": 2, "decoder_layers": 2, "queries": 20}

CASES = {
    "detr r18": ("detr", DetrConfig(backbone="resnet18", **DETR), reference_detr, ("DetrForObjectDetection", 18)),
    "detr r50": ("detr", DetrConfig(backbone="resnet50", **DETR), reference_detr, ("DetrForObjectDetection", 50)),
    "pre-norm": (
        "detr",
        DetrConfig(backbone="resnet18", pre_norm=True, **DETR),
        reference_detr,
        ("TableTransformerForObjectDetection", 18),
    ),
    "rt_detr v1": ("rt_detr", RtDetrConfig(version=1, **RT_DETR), reference_rt_detr, ("RTDetrForObjectDetection", 18)),
    "rt_detr v1 r50": (
        "rt_detr",
        RtDetrConfig(version=1, backbone="resnet50vd", **RT_DETR),
        reference_rt_detr,
        ("RTDetrForObjectDetection", 50),
    ),
    "rt_detr v2": ("rt_detr", RtDetrConfig(**RT_DETR), reference_rt_detr, ("RTDetrV2ForObjectDetection", 18)),
    "rt_detr v2 discrete": (
        "rt_detr",
        RtDetrConfig(method="discrete", **RT_DETR),
        reference_rt_detr,
        ("RTDetrV2ForObjectDetection", 18),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_detections_equal_those_of_transformers(case: str) -> None:
    name, config, make, arguments = CASES[case]
    more = {"decoder_method": "discrete"} if "discrete" in case else {}
    reference = with_spread(make(*arguments, **more))
    ours = build(name, config, CLASSES).eval()
    load_weights(ours, translate(name, reference.state_dict()), case)
    images = torch.randn(2, 3, *PIXELS)
    with torch.no_grad():
        theirs, got = reference(pixel_values=images), ours(images)
    assert min(theirs.logits.std(), theirs.pred_boxes.std()) > 1e-2, "the reference says something"
    # float32 through about 60 layers; measured below 5e-6
    torch.testing.assert_close(got.logits[-1], theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], theirs.pred_boxes, atol=1e-5, rtol=0)
    if got.encoder is not None:
        torch.testing.assert_close(got.encoder[0], theirs.enc_topk_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(got.encoder[1], theirs.enc_topk_bboxes, atol=1e-5, rtol=0)
