"""A folder in the layout of the hub's cache, with a model of transformers that has random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

COMMIT = "c" * 40
# The recipe keys that make rt_detr as small as `small_rt_detr_v2`; 64 x 64 pixels.
SETS = (
    "model.backbone_width=0.25",
    "model.hidden=32",
    "model.heads=4",
    "model.encoder_ffn=48",
    "model.decoder_ffn=48",
    "model.decoder_layers=2",
    "model.points=[2, 2, 2]",
    "model.queries=20",
    "input.height=64",
    "input.width=64",
)


def small_rt_detr_v2(labels: int = 80):
    """RT-DETRv2 of transformers with an R18 backbone of quarter width, random weights and `labels` classes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[32, 64, 128],
        d_model=32,
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        hidden_expansion=0.5,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        num_queries=20,
        decoder_layers=2,
        decoder_n_points=2,
        num_labels=labels,
        use_pretrained_backbone=False,
        anchor_image_size=None,
    )
    return transformers.RTDetrV2ForObjectDetection(config).eval()


def write_hub_folder(cache: Path, repo: str, model: torch.nn.Module, commit: str = COMMIT) -> Path:
    """Save the model as `repo` into a cache folder, as its newest commit; returns the folder of the files."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    model.save_pretrained(folder / "snapshots" / commit)
    return folder / "snapshots" / commit
