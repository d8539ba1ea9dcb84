"""The projector against transformers' of LW-DETR and RF-DETR, and its deployed graph behind a windowed transformer."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from members import SMALL, small
from torch import nn

from edgedetr.errors import ModelError
from edgedetr.exporting.to_onnx import write_onnx
from edgedetr.models.checkpoints.backbone_names import rename_projector
from edgedetr.models.checkpoints.pretrained import load_weights
from edgedetr.models.deploy import ConstantFolded, DeployGraph
from edgedetr.models.encoders.projector import MultiScaleProjector, ProjectorEncoder
from edgedetr.models.windowed_backbone import WindowedVitConfig, make_windowed_backbone


@torch.no_grad()
def varied(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * (0.5 if "running_var" in name else 0.1))
    return model.eval()


def lw_detr(channels: int, scales: list[float]) -> tuple[nn.Module, nn.Module]:
    """transformers' projector and ours, both of two maps."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.lw_detr.modeling_lw_detr import LwDetrMultiScaleProjector

    backbone = transformers.LwDetrViTConfig(
        hidden_size=channels, num_hidden_layers=2, num_attention_heads=2, image_size=1024, out_indices=[1, 2]
    )
    config = transformers.LwDetrConfig(backbone_config=backbone, d_model=32, projector_scale_factors=scales)
    # nn.BatchNorm2d's second argument is its eps there as here.
    ours = ProjectorEncoder([channels] * 2, [16, 16], scales, 32, "batch")
    return varied(LwDetrMultiScaleProjector(config)), ours.eval()


@pytest.mark.parametrize("channels, scales", [(24, [1.0]), (24, [2.0, 0.5]), (516, [2.0, 1.0])])
@torch.no_grad()
def test_it_computes_what_transformers_lw_detr_does(channels: int, scales: list[float]) -> None:
    """One level, two, and maps so wide that they are narrowed before they grow."""
    reference, ours = lw_detr(channels, scales)
    load_weights(ours.project, rename_projector(reference.state_dict()), "test")
    maps = [torch.randn(2, channels, 6, 10) for _ in range(2)]
    expected = reference(maps)
    for level, other in zip(ours.project(maps), expected, strict=True):
        torch.testing.assert_close(level, other, atol=1e-4, rtol=0)  # float32, normalized; measured 4e-6
    memory = ours(maps)
    assert memory.strides == [round(16 / scale) for scale in scales]
    assert memory.shapes == [tuple(level.shape[2:]) for level in expected]
    torch.testing.assert_close(memory.maps()[-1], expected[-1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_it_computes_what_transformers_rf_detr_does() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrScaleProjector

    backbone = RfDetrDinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, out_indices=[1, 2])
    config = transformers.RfDetrConfig(backbone_config=backbone, d_model=32, layer_norm_eps=1e-6)
    reference = varied(RfDetrScaleProjector(config))
    ours = ProjectorEncoder([24, 24], [16, 16], [1], 32, "layer").eval()
    load_weights(ours.project, rename_projector(reference.state_dict()), "test")
    maps = [torch.randn(2, 24, 6, 10) for _ in range(2)]
    torch.testing.assert_close(ours.project(maps)[0], reference(maps), atol=1e-4, rtol=0)  # measured 4e-6


@torch.no_grad()
def test_the_authors_names_are_read() -> None:
    """Written out from the modules of roboflow/rf-detr (models/backbone/projector.py): Sequential and ConvX."""
    ours = varied(MultiScaleProjector([8, 8], [2, 0.5], 16, nn.BatchNorm2d))
    theirs = {}
    for name, tensor in ours.state_dict().items():
        for part, other in (
            ("sampling.", "stages_sampling."),
            ("norms.0.", "stages.0.1."),
            ("norms.1.", "stages.1.1."),
            ("fuse.0.", "stages.0.0."),
            ("fuse.1.", "stages.1.0."),
            ("spread.", "cv1."),
            ("merge.", "cv2."),
            (".norm.", ".bn."),
        ):
            name = name.replace(part, other, 1)
        for block in range(3):
            for conv in range(2):
                name = name.replace(f".blocks.{block}.{conv}.", f".m.{block}.cv{conv + 1}.")
        theirs[name] = tensor
    assert {"stages.1.0.m.2.cv2.bn.running_var", "stages_sampling.1.0.0.conv.weight"} <= set(theirs)
    assert {"stages_sampling.0.1.0.weight", "stages.0.0.cv1.conv.weight", "stages.1.1.bias"} <= set(theirs)
    target = MultiScaleProjector([8, 8], [2, 0.5], 16, nn.BatchNorm2d)
    load_weights(target, rename_projector(theirs), "test")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("backbone, norm", [("dinov2_small_registers", "layer"), ("lw_vit_tiny", "batch")])
@torch.no_grad()
def test_behind_windows_it_deploys_to_onnx(backbone: str, norm: str, tmp_path: Path) -> None:
    """In place of rt_detr's encoder: BatchNorm is folded, LayerNorm stays, positions are constants, any batch runs."""
    config = WindowedVitConfig(
        backbone=backbone,
        backbone_width=0.125 if backbone == "lw_vit_tiny" else 0.0625,
        backbone_maps=(0, 1),
        backbone_full_attention=(1,),
        backbone_grid=3,
    )
    detector = copy.deepcopy(small("rt_detr"))
    detector.backbone = net = varied(make_windowed_backbone(config))
    hidden = SMALL["rt_detr"].hidden
    detector.encoder = varied(ProjectorEncoder(net.channels, net.strides, [2, 1, 0.5], hidden, norm))
    graph = DeployGraph(detector, 64, 96)
    assert isinstance(graph.detector.backbone.position, ConstantFolded)
    path = tmp_path / "x.onnx"
    write_onnx(graph, path, batch=None)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 4):
        images = torch.rand(batch, 3, 64, 96) * 255
        expected = detector(detector.normalize(images), last_only=True)
        logits, boxes = session.run(["logits", "boxes"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected.logits[0], atol=1e-4)
        np.testing.assert_allclose(boxes, expected.boxes[0], atol=1e-4)  # 1e-5: random weights amplify


@pytest.mark.parametrize(
    "scales, norm, message",
    [([4], "layer", "a level at 4 times the size of the maps; expected 2, 1 or 0.5"), ([1], "group", "'group'")],
)
def test_what_cannot_be_built_says_why(scales: list[float], norm: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ProjectorEncoder([8], [16], scales, 16, norm)


def test_padding_is_refused() -> None:
    encoder = ProjectorEncoder([8], [16], [1], 16, "layer")
    with pytest.raises(ModelError, match="without padding"):
        encoder([torch.zeros(1, 8, 2, 2)], torch.zeros(1, 32, 32, dtype=torch.bool))
