"""Detectors of transformers as PyTorch's own exporters write them: imported, they find what the files find."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from external_models import (
    CLASSES,
    HEIGHT,
    QUERIES,
    WIDTH,
    Raw,
    hugging_face_d_fine,
    hugging_face_detr,
    hugging_face_rt_detr,
    open_session,
    sample_images,
    spread,
)

from edgedetr.boxes import cxcywh_to_xyxy
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.onnx_model import import_onnx_model
from edgedetr.runtime.bundle_detector import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # an export by torch.export takes 5 to 30 s


def resnet(**changes):
    return transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 48], depths=[1, 1, 1, 1], layer_type="basic", **changes
    )


def rt_detr_v2():
    return hugging_face_rt_detr("V2")


def conditional():
    torch.manual_seed(0)
    return spread(
        transformers.ConditionalDetrForObjectDetection(
            transformers.ConditionalDetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=resnet(out_features=["stage4"]),
                d_model=32,
                num_queries=QUERIES,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_labels=CLASSES,
            )
        )
    )


def deformable():
    torch.manual_seed(0)
    return spread(
        transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=resnet(out_features=["stage2", "stage3", "stage4"]),
                d_model=32,
                num_queries=QUERIES,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_feature_levels=3,
                encoder_n_points=2,
                decoder_n_points=2,
                num_labels=CLASSES,
            )
        )
    )


CASES = {
    "rt_detr opset 20": (hugging_face_rt_detr, 20, {}),
    "rt_detr opset 23": (hugging_face_rt_detr, 23, {}),
    "rt_detr_v2 opset 17 by TorchScript": (rt_detr_v2, -17, {}),
    "detr opset 21": (hugging_face_detr, 21, {"activation": "softmax"}),
    "detr opset 23": (hugging_face_detr, 23, {"activation": "softmax"}),
    "conditional opset 22": (conditional, 22, {"activation": "sigmoid"}),
    "deformable opset 20": (deformable, 20, {"activation": "sigmoid"}),
    "d_fine opset 19 by TorchScript": (hugging_face_d_fine, -19, {}),
}


def exported(make, opset: int, path: Path) -> Path:
    """By torch.export; by TorchScript where the opset is negative."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Raw(make()),
            (torch.rand(1, 3, HEIGHT, WIDTH),),
            str(path),
            input_names=["pixel_values"],
            output_names=["logits", "pred_boxes"],
            opset_version=abs(opset),
            dynamo=opset > 0,
        )
    return path


@pytest.mark.parametrize("case", list(CASES))
def test_the_bundle_finds_what_the_export_finds(case, tmp_path):
    make, opset, asked = CASES[case]
    path = exported(make, opset, tmp_path / "model.onnx")
    result = import_onnx_model(path, tmp_path / "b", ImportOptions(**asked))
    assert result.opset >= abs(opset)
    assert "GridSample" not in {node.op_type for node in onnx.load(result.bundle.require("model.onnx")).graph.node}
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    session = open_session(str(path))
    for image in sample_images(2):
        logits, boxes = (
            value[0].astype(np.float64)
            for value in session.run(["logits", "pred_boxes"], {"pixel_values": (image / 255)[None].astype(np.float32)})
        )
        if asked.get("activation") == "softmax":
            power = np.exp(logits)
            scores = (power / power.sum(-1, keepdims=True))[:, :-1]
            scores = np.where(scores == scores.max(-1, keepdims=True), scores, -1)
        else:
            scores = 1 / (1 + np.exp(-logits))
        query, label = np.unravel_index(np.argsort(-scores, axis=None)[:15], scores.shape)
        size = [WIDTH, HEIGHT, WIDTH, HEIGHT]
        corners = np.clip(cxcywh_to_xyxy(boxes[query]) * size, 0, size)
        found = detector([image.transpose(1, 2, 0).astype(np.uint8)])[0]
        np.testing.assert_allclose(found.confidence[:10], scores[query, label][:10], atol=1e-3)
        there = (
            (found.class_id[:, None] == label)
            & (np.abs(found.xyxy[:, None] - corners).max(-1) <= 0.1)
            & (np.abs(found.confidence[:, None] - scores[query, label]) <= 1e-3)
        )
        assert (there[:10].any(axis=1) & there[:, :10].any(axis=0)).all()
