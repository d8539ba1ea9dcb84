"""D-FINE against transformers' class at random weights, through the importer; sizes of the published models."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from members import SMALL
from parameter_counts import deployed_parameters, parameters
from references import with_spread
from safetensors.torch import load_file, save_file

from edgedetr.errors import ModelError
from edgedetr.importing.weights import architecture
from edgedetr.models import build
from edgedetr.models.backbones import hgnetv2
from edgedetr.models.checkpoints import pretrained
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.d_fine import DFineConfig
from edgedetr.recipe import Recipe

transformers = pytest.importorskip("transformers", reason="the reference implementation of these tests")

CLASSES = 5
# As N: two levels, equally many points, narrow blocks. As X: three levels, points by level, a wider encoder whose
# levels are projected, steeper bins.
FORMS: dict[str, dict[str, Any]] = {
    "n": {
        "encoder_in_channels": [128, 256],
        "decoder_in_channels": [32] * 2,
        "encoder_hidden_dim": 32,
        "feat_strides": [16, 32],
        "encode_proj_layers": [1],
        "num_feature_levels": 2,
        "decoder_n_points": [6, 6],
        "hidden_expansion": 0.34,
        "depth_mult": 0.5,
        "decoder_layers": 2,
    },
    "x": {
        "encoder_in_channels": [64, 128, 256],
        "decoder_in_channels": [48] * 3,
        "encoder_hidden_dim": 48,
        "decoder_n_points": [4, 4, 4],
        "hidden_expansion": 1.0,
        "depth_mult": 0.67,
        "decoder_layers": 3,
        "reg_scale": 8.0,
        "max_num_bins": 16,
        "decoder_activation_function": "silu",
    },
}


@cache
def reference(form: str) -> Any:
    levels = len(FORMS[form]["encoder_in_channels"])
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 4, 4],
        stage_in_channels=[4, 16, 64, 128],
        stage_mid_channels=[4, 8, 16, 32],
        stage_out_channels=[16, 64, 128, 256],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=[16, 64, 128, 256],
        use_learnable_affine_block=True,
        out_features=["stage2", "stage3", "stage4"][-levels:],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        num_labels=CLASSES,
        d_model=32,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=20,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        freeze_backbone_batch_norms=False,
        architectures=["DFineForObjectDetection"],
        **FORMS[form],
    )
    model = with_spread(transformers.DFineForObjectDetection(config))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # `with_spread` draws constants anew as well
            parameter.data.fill_(0.5 if name.endswith("up") else config.reg_scale)
    return model


def as_authors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of files on the hub as those of Peterande/D-FINE, packed projections and constants included."""
    rules = [
        (r"^model\.backbone\.model\.embedder\.", "backbone.stem."),
        (r"^model\.backbone\.model\.encoder\.", "backbone."),
        (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
        (r"^(backbone\..*)\.normalization\.", r"\1.bn."),
        (r"^model\.(en|de)coder_input_proj\.(\d)\.0\.", r"\1coder.input_proj.\2.conv."),
        (r"^model\.(en|de)coder_input_proj\.(\d)\.1\.", r"\1coder.input_proj.\2.norm."),
        (r"^model\.encoder\.(?:encoder|aifi)\.", "encoder.encoder."),
        (r"^model\.encoder\.", "encoder."),
        (r"^(encoder\.downsample_convs\.\d)\.conv([12])\.", r"\1.0.cv\2."),
        (r"^(encoder\.\w+_blocks\.\d)\.conv1\.", r"\1.cv1."),
        (r"^(encoder\.\w+_blocks\.\d)\.csp_rep1\.", r"\1.cv2.0."),
        (r"^(encoder\.\w+_blocks\.\d)\.conv2\.", r"\1.cv2.1."),
        (r"^(encoder\.\w+_blocks\.\d)\.csp_rep2\.", r"\1.cv3.0."),
        (r"^(encoder\.\w+_blocks\.\d)\.conv3\.", r"\1.cv3.1."),
        (r"^(encoder\.\w+_blocks\.\d)\.conv4\.", r"\1.cv4."),
        (r"^model\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"decoder.\1."),
        (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
        (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
        (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
        (r"^model\.decoder\.lqe_layers\.", "decoder.decoder.lqe_layers."),
        (r"^model\.decoder\.class_embed\.", "decoder.dec_score_head."),
        (r"^model\.decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
        (r"^model\.decoder\.", "decoder."),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
        (r"\.o_proj\.", ".out_proj."),
        (r"^(encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
        (r"^(decoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    ]
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        owner, kind = name.split(".q_proj.")
        parts = [renamed.pop(f"{owner}.{part}_proj.{kind}") for part in "qkv"]
        renamed[f"{owner}.in_proj_{kind}"] = torch.cat(parts)
    renamed["decoder.reg_scale"] = renamed["decoder.reg_scale"].long()  # `reg_scale: 4` in their configurations
    renamed["decoder.decoder.up"] = renamed["decoder.up"].clone()
    renamed["decoder.decoder.reg_scale"] = renamed["decoder.reg_scale"].clone()
    renamed["decoder.anchors"], renamed["decoder.valid_mask"] = torch.zeros(1, 5, 4), torch.ones(1, 5, 1)
    return renamed


def imported(source: Path, sets: tuple[str, ...] = ()) -> DetrModel:
    read = architecture(WeightSource(str(source)), "d_fine", sets=sets)
    detector = build("d_fine", read.recipe.model.config, CLASSES).eval()
    pretrained.load_weights(detector, read.weights, str(source))
    return detector


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["hub", "authors"])
@torch.no_grad()
def test_detections_are_those_of_transformers(form: str, layout: str, tmp_path: Path) -> None:
    theirs, sets = reference(form), ()
    theirs.save_pretrained(tmp_path)
    if layout == "authors":
        weights = as_authors(load_file(tmp_path / "model.safetensors"))
        torch.save({"ema": {"module": weights}}, tmp_path / "dfine.pth")
        points, activation = FORMS[form]["decoder_n_points"], FORMS[form].get("decoder_activation_function", "relu")
        sets = ("model.heads=4", "model.queries=20", f"model.points={points}", f"model.decoder_activation={activation}")
        ours = imported(tmp_path / "dfine.pth", sets)
    else:
        ours = imported(tmp_path)
    images = torch.randn(2, 3, 96, 128)  # rectangular
    expected, got = theirs(pixel_values=images), ours(images)
    assert min(expected.logits.std(), expected.pred_boxes.std()) > 1e-2, "the reference says something"
    torch.testing.assert_close(got.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.encoder[0], expected.enc_topk_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.encoder[1], expected.enc_topk_bboxes, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_layer_in_training_is_that_of_transformers(tmp_path: Path) -> None:
    """Boxes, distributions and the plain head of the first layer, which the losses see."""
    theirs = reference("x")
    theirs.save_pretrained(tmp_path)
    ours, images = imported(tmp_path), torch.randn(2, 3, 96, 128)
    got = ours(images)
    theirs.model.decoder.train()  # it predicts in every layer only then; nothing is dropped
    expected = theirs.model(pixel_values=images)
    theirs.eval()
    wanted = expected.intermediate_logits.transpose(0, 1)  # the plain head comes first
    torch.testing.assert_close(torch.cat([got.sides.first[0][None], got.logits]), wanted, atol=1e-4, rtol=0)
    boxes = expected.intermediate_reference_points.transpose(0, 1)
    torch.testing.assert_close(torch.cat([got.sides.first[1][None], got.boxes]), boxes, atol=1e-5, rtol=0)
    corners = expected.intermediate_predicted_corners.transpose(0, 1)
    torch.testing.assert_close(got.sides.logits.flatten(-2), corners, atol=1e-4, rtol=0)
    starts = expected.initial_reference_points.transpose(0, 1)
    torch.testing.assert_close(got.sides.start.expand_as(starts), starts, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_idx": 0}, "eval_idx is 0, .*the last layer is the answer"),
        ({"layer_scale": 2}, "layer_scale is 2, .*equally wide"),
        ({"reg_scale": 4.0}, "reg_scale is 4.0, but the tensors say 8.0"),
        ({"decoder_n_points": [4, 4, 5]}, "decoder_n_points is .*, but the tensors say"),
        ({"decoder_n_points": [4, 4, 0]}, "expected a whole number from 1, or one for each level"),
        ({"encode_proj_layers": [1]}, r"encode_proj_layers is \[1\], but the tensors say 3"),
        ({"max_num_bins": 32}, "max_num_bins is 32, but the tensors say 16"),
    ],
)
def test_a_configuration_that_the_tensors_deny_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference("x").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        imported(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    reference("n").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.decoder.strange.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="strange"):
        imported(tmp_path)


# The sizes in configs/dfine/dfine_hgnetv2_*_coco.yml of Peterande/D-FINE under transformers' keys, and millions of
# parameters in its README.
PUBLISHED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "n": (
        4,
        "hgnetv2_b0",
        {
            **FORMS["n"],
            "encoder_in_channels": [512, 1024],
            "decoder_in_channels": [128] * 2,
            "encoder_hidden_dim": 128,
            "d_model": 128,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
            "decoder_layers": 3,
        },
    ),
    "s": (10, "hgnetv2_b0", {"decoder_layers": 3, "depth_mult": 0.34, "hidden_expansion": 0.5}),
    "m": (19, "hgnetv2_b2", {"decoder_layers": 4, "depth_mult": 0.67}),
    "l": (31, "hgnetv2_b4", {}),
    "x": (
        62,
        "hgnetv2_b5",
        {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384] * 3, "reg_scale": 8.0},
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size: str) -> None:
    """As many as transformers' class has; and in the README, which counts the deployed model, in whole millions."""
    million, name, sizes = PUBLISHED[size]
    sizes = {"decoder_n_points": [3, 6, 3], **sizes}
    backbone = hgnetv2.SIZES[name]
    theirs_backbone = transformers.HGNetV2Config(
        stem_channels=[3, *backbone.stem],
        stage_in_channels=[backbone.stem[1], *backbone.outputs[:3]],
        stage_mid_channels=list(backbone.middle),
        stage_out_channels=list(backbone.outputs),
        stage_num_blocks=list(backbone.blocks),
        stage_numb_of_layers=[backbone.layers] * 4,
        hidden_sizes=list(backbone.outputs),
        use_learnable_affine_block=backbone.affine,
        out_features=["stage2", "stage3", "stage4"][-len(sizes.get("encoder_in_channels", "123")) :],
    )
    config = transformers.DFineConfig(
        backbone_config=theirs_backbone, num_labels=80, freeze_backbone_batch_norms=False, **sizes
    )
    recipe = Recipe.load(f"dfine-{size}", ["model.backbone_norm=trainable"])
    with torch.device("meta"):
        theirs = transformers.DFineForObjectDetection(config)
        ours = build("d_fine", recipe.model.config, 80)
    constants = 2  # up and reg_scale, which are parameters there
    assert parameters(ours) == parameters(theirs) - constants
    assert round(deployed_parameters(ours) / 1e6) == million


def test_a_number_of_bins_without_a_middle_is_refused() -> None:
    with pytest.raises(ModelError, match="model.reg_max is 31; expected an even number"):
        DFineConfig(reg_max=31)
    with pytest.raises(ModelError, match="expected one for each of the 2 levels"):
        DFineConfig(levels=2)


def test_deims_heads_and_query_position_are_silu_networks() -> None:
    torch.manual_seed(0)
    model = build("d_fine", replace(SMALL["d_fine"], head_activation="silu"), CLASSES).eval()
    boxes = model.decoder.boxes
    for mlp in (boxes.first, *boxes.box, model.selector.box, model.decoder.query_position):
        x = torch.randn(7, mlp.layers[0].weight.shape[1])
        wanted = x
        for layer in mlp.layers[:-1]:
            wanted = wanted @ layer.weight.T + layer.bias
            wanted = wanted * wanted.sigmoid()
        wanted = wanted @ mlp.layers[-1].weight.T + mlp.layers[-1].bias
        torch.testing.assert_close(mlp(x), wanted.clamp(-10, 10) if mlp.limit else wanted, atol=1e-6, rtol=1e-5)
