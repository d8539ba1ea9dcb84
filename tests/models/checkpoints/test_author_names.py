"""Sparse R-CNN's own .pth layout, written out here by the names of its code, read back into the same detector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from members import CLASSES, sample_images

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_detector
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.sparse_rcnn import SparseRcnnConfig

# A bottleneck ResNet, as the original has; as narrow as it goes.
CONFIG = SparseRcnnConfig(
    backbone="resnet50", backbone_width=0.125, hidden=16, heads=2, ffn=24, decoder_layers=2, queries=5, dynamic_hidden=4
)
DEPTHS = (3, 4, 6, 3)


def varied(seed: int, classes: int = CLASSES) -> DetrModel:
    torch.manual_seed(seed)
    detector = build("sparse_rcnn", CONFIG, classes)
    with torch.no_grad():
        for tensor in detector.state_dict().values():  # a statistic like all others, so that a mix-up shows
            tensor.add_(torch.rand_like(tensor) * 0.02 - 0.01)
    return detector.eval()


def original(detector: DetrModel) -> dict[str, torch.Tensor]:
    """The same weights under the names of projects/SparseRCNN, whose backbone and pyramid are detectron2's."""
    ours, out = detector.state_dict(), {}

    def norm(theirs: str, name: str, kinds: tuple[str, ...]) -> None:
        out.update({f"{theirs}.{kind}": ours[f"{name}.{kind}"] for kind in kinds})

    def conv(theirs: str, name: str) -> None:
        out[f"{theirs}.weight"] = ours[f"{name}.conv.weight"]
        norm(f"{theirs}.norm", f"{name}.norm", ("weight", "bias", "running_mean", "running_var"))

    both = ("weight", "bias")
    conv("backbone.bottom_up.stem.conv1", "backbone.stem.0")
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            theirs, name = f"backbone.bottom_up.res{stage + 2}.{block}", f"backbone.stages.{stage}.{block}"
            for number in range(3):
                conv(f"{theirs}.conv{number + 1}", f"{name}.body.{number}")
            if block == 0:
                conv(f"{theirs}.shortcut", f"{name}.shortcut.project")
    for level in range(4):
        norm(f"backbone.fpn_lateral{level + 2}", f"encoder.pyramid.lateral.{level}", both)
        norm(f"backbone.fpn_output{level + 2}", f"encoder.pyramid.smooth.{level}", both)
    out["init_proposal_features.weight"] = ours["selector.content.weight"]
    out["init_proposal_boxes.weight"] = ours["selector.box.weight"]
    for index in range(CONFIG.decoder_layers):
        theirs, name = f"head.head_series.{index}", f"decoder.layers.{index}"
        for kind in both:
            packed = [ours[f"{name}.self_attention.{part}.{kind}"] for part in "qkv"]
            out[f"{theirs}.self_attn.in_proj_{kind}"] = torch.cat(packed)
        read = f"{name}.cross_attention.interaction"
        for their, part in (
            ("self_attn.out_proj", f"{name}.self_attention.out"),
            ("linear1", f"{name}.feedforward.up"),
            ("linear2", f"{name}.feedforward.down"),
            ("norm1", f"{name}.self_norm"),
            ("norm2", f"{name}.cross_norm"),
            ("norm3", f"{name}.feedforward_norm"),
            ("inst_interact.dynamic_layer", f"{read}.weights"),
            ("inst_interact.norm1", f"{read}.norms.0"),
            ("inst_interact.norm2", f"{read}.norms.1"),
            ("inst_interact.out_layer", f"{read}.out"),
            ("inst_interact.norm3", f"{read}.out_norm"),
            ("class_logits", f"decoder.boxes.score.{index}"),
            ("bboxes_delta", f"decoder.boxes.box.{index}"),
        ):
            norm(f"{theirs}.{their}", part, both)
        for tower, mine, blocks in (("cls_module", "class_tower", 1), ("reg_module", "box_tower", 3)):
            for block in range(blocks):
                norm(f"{theirs}.{tower}.{3 * block}", f"decoder.boxes.{mine}.{index}.{3 * block}", ("weight",))
                norm(f"{theirs}.{tower}.{3 * block + 1}", f"decoder.boxes.{mine}.{index}.{3 * block + 1}", both)
    return out


@torch.no_grad()
def test_every_tensor_is_converted(tmp_path: Path) -> None:
    path, source, target = tmp_path / "model_final.pth", varied(0), varied(1)
    torch.save({"model": original(source), "iteration": 270000}, path)
    loaded = load_detector(target, "sparse_rcnn", str(path))
    assert loaded.tensors == len([name for name in source.state_dict() if "num_batches" not in name])
    one, other = (made(made.normalize(sample_images())) for made in (source, target))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.boxes, other.boxes)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    path, weights = tmp_path / "model_final.pth", original(varied(0))
    del weights["head.head_series.1.inst_interact.norm2.bias"]
    weights["head.head_series.2.linear1.weight"] = torch.zeros(1)
    torch.save({"model": weights}, path)
    with pytest.raises(
        ModelError,
        match=r"missing \(1\): decoder.layers.1.cross_attention.interaction.norms.1.bias; "
        r"left over \(1\): decoder.layers.2.feedforward.up.weight",
    ):
        load_detector(varied(1), "sparse_rcnn", str(path))


def test_other_classes_keep_all_but_the_class_heads(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pth"
    torch.save({"model": original(varied(0))}, path)
    loaded = load_detector(varied(1, CLASSES + 4), "sparse_rcnn", str(path))
    assert loaded.fresh == tuple(
        f"decoder.boxes.score.{index}.{kind}" for index in range(CONFIG.decoder_layers) for kind in ("weight", "bias")
    )


def test_the_configuration_is_read_from_the_tensors() -> None:
    found = config_from_state_dict(FAMILY["sparse_rcnn"], translate("sparse_rcnn", original(varied(0))), CONFIG.heads)
    assert replace(SparseRcnnConfig(heads=CONFIG.heads), **found) == CONFIG
