"""DEIMv2 against transformers' class at random weights, as that class computes and as the authors' code does."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from members import deployed, exported, sample_images, variant
from parameter_counts import deployed_parameters, parameters
from references import with_spread
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.importing.weights import architecture
from edgedetr.lint.lint import lint
from edgedetr.models import build
from edgedetr.models.checkpoints import pretrained
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.detector import DetrModel
from edgedetr.models.members.deimv2 import Deimv2Config
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.policy import load_policy, make_plan
from edgedetr.recipe import Recipe
from edgedetr.runtime.backends.onnxruntime import OrtRunner

transformers = pytest.importorskip("transformers", reason="the reference implementation of these tests")

CLASSES = 5
HGNET: dict[str, Any] = {"stem_channels": [3, 4, 4], "use_learnable_affine_block": True}
# As N: two levels of the hybrid encoder, gated layers. As Pico: the lite encoder, one box head, no gate.
FORMS: dict[str, dict[str, Any]] = {
    "n": {
        "backbone": {
            **HGNET,
            "stage_in_channels": [4, 16, 64, 128],
            "stage_mid_channels": [4, 8, 16, 32],
            "stage_out_channels": [16, 64, 128, 256],
            "stage_num_blocks": [1, 1, 2, 1],
            "stage_numb_of_layers": [3, 3, 3, 3],
            "hidden_sizes": [16, 64, 128, 256],
            "out_features": ["stage3", "stage4"],
        },
        "encoder_in_channels": [128, 256],
        "feat_strides": [16, 32],
        "encode_proj_layers": [1],
        "decoder_n_points": [6, 6],
        "decoder_layers": 2,
    },
    "pico": {
        "backbone": {
            **HGNET,
            "stage_in_channels": [4, 16, 64],
            "stage_mid_channels": [4, 8, 16],
            "stage_out_channels": [16, 64, 128],
            "stage_num_blocks": [1, 1, 2],
            "stage_numb_of_layers": [3, 3, 3],
            "stage_downsample": [False, True, True],
            "stage_downsample_strides": [2, 2, 2],
            "stage_light_block": [False, False, True],
            "stage_kernel_size": [3, 3, 5],
            "hidden_sizes": [16, 64, 128],
            "depths": [3, 3, 3],
            "out_features": ["stage3"],
        },
        "encoder_in_channels": [128],
        "encoder_type": "lite",
        "encoder_layers": 0,
        "feat_strides": [16],
        "decoder_n_points": [4, 2],
        "decoder_layers": 3,
        "use_gateway": False,
        "share_bbox_head": True,
    },
}


class Once(nn.Module):
    """A module that answers with its first answer, as the authors' position of a query does, until it is reset."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.answer = inner, None

    def forward(self, x: Tensor) -> Tensor:
        self.answer = self.inner(x) if self.answer is None else self.answer
        return self.answer


@cache
def reference(form: str) -> Any:
    options = dict(FORMS[form])
    config = transformers.Deimv2Config(
        backbone_config=transformers.HGNetV2Config(**options.pop("backbone")),
        num_labels=CLASSES,
        d_model=32,
        encoder_hidden_dim=32,
        decoder_in_channels=[32] * 2,
        num_feature_levels=2,
        hidden_expansion=0.5,
        depth_mult=0.5,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        num_queries=20,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_activation_function="silu",
        freeze_backbone_batch_norms=False,
        architectures=["Deimv2ForObjectDetection"],
        **options,
    )
    model = with_spread(transformers.Deimv2ForObjectDetection(config))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # `with_spread` draws constants anew as well
            parameter.data.fill_(0.5 if name.endswith("up") else config.reg_scale)
    return model


def as_the_authors_compute(model: Any) -> Any:
    """Their decoder (engine/deim/deim_decoder.py): tokens are scored as they are, heads have SiLU, and a query has one
    position for all layers, that of the box it starts from."""
    model.model.enc_output = nn.Identity()
    decoder = model.model.decoder
    heads = [model.model.enc_bbox_head, decoder.pre_bbox_head, *decoder.bbox_embed, *model.bbox_embed]
    for head in [*heads, *(quality.reg_conf for quality in decoder.lqe_layers)]:
        head.act = nn.SiLU()
    decoder.query_pos_head = Once(decoder.query_pos_head)
    return model


AUTHORS: list[tuple[str, str]] = [
    (r"^model\.conv_encoder\.encoder_input_proj\.(\d)\.", r"encoder.input_proj.\1."),
    (r"^model\.conv_encoder\.model\.embedder\.", "backbone.stem."),
    (r"^model\.conv_encoder\.model\.encoder\.", "backbone."),
    (r"^(backbone\..*)\.convolution\.", r"\1.conv."),
    (r"^(backbone\..*)\.normalization\.", r"\1.bn."),
    (r"^model\.encoder\.(?:encoder|aifi)\.", "encoder.encoder."),
    (r"^model\.encoder\.", "encoder."),
    (r"^encoder\.down_conv([12])\.conv\.", r"encoder.down_sample\1.1."),
    (r"^encoder\.down_conv([12])\.norm\.", r"encoder.down_sample\1.2."),
    (r"^encoder\.bi_fusion_conv\.", "encoder.bi_fusion.cv."),
    (r"^(encoder\.downsample_convs\.\d)\.conv([12])\.", r"\1.0.cv\2."),
    (r"^(encoder\.\w+_blocks?(?:\.\d)?)\.conv1\.", r"\1.cv1."),
    (r"^(encoder\.\w+_blocks?(?:\.\d)?)\.conv2\.", r"\1.cv4."),
    (r"\.csp_rep1\.conv2\.", ".cv2.1."),
    (r"\.csp_rep2\.conv2\.", ".cv3.1."),
    (r"\.csp_rep1\.", ".cv2.0."),
    (r"\.csp_rep2\.", ".cv3.0."),
    (r"^model\.(enc_score_head|enc_bbox_head|denoising_class_embed)\.", r"decoder.\1."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.decoder\.lqe_layers\.", "decoder.decoder.lqe_layers."),
    (r"^model\.decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^model\.decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"\.query_pos_head\.inner\.", ".query_pos_head."),
    (r"^model\.decoder\.", "decoder."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"^(encoder\..*)\.mlp\.(?:layers\.0|fc1)\.", r"\1.linear1."),
    (r"^(encoder\..*)\.mlp\.(?:layers\.1|fc2)\.", r"\1.linear2."),
    (r"\.o_proj\.", ".out_proj."),
    (r"^(encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\..*)\.self_attn_layer_norm\.weight", r"\1.norm1.scale"),
    (r"^(decoder\..*)\.encoder_attn_layer_norm\.weight", r"\1.norm2.scale"),
    (r"^(decoder\..*)\.final_layer_norm\.weight", r"\1.norm3.scale"),
    (r"\.gateway\.norm\.weight", ".gateway.norm.scale"),
    (r"\.mlp\.down_proj\.", ".swish_ffn.w3."),
]


def as_authors(model: Any) -> dict[str, Tensor]:
    """A model in memory under the names of Intellindust-AI-Lab/DEIMv2, packed parts and constants included."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("class_embed.", "bbox_embed.")):
            continue  # copies of the decoder's
        for pattern, new in AUTHORS:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor.clone()
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        owner, kind = name.split(".q_proj.")
        renamed[f"{owner}.in_proj_{kind}"] = torch.cat([renamed.pop(f"{owner}.{part}_proj.{kind}") for part in "qkv"])
    for name in [name for name in renamed if ".mlp.gate_proj." in name]:
        owner, kind = name.split(".mlp.gate_proj.")
        halves = [renamed.pop(f"{owner}.mlp.{part}_proj.{kind}") for part in ("gate", "up")]
        renamed[f"{owner}.swish_ffn.w12.{kind}"] = torch.cat(halves)
    scale = renamed["decoder.reg_scale"].long()  # the authors' configuration says 4, and so does the file
    copies = {"decoder.decoder.up": renamed["decoder.up"].clone(), "decoder.decoder.reg_scale": scale.clone()}
    constants = {"decoder.anchors": torch.zeros(1, 5, 4), "decoder.valid_mask": torch.ones(1, 5, 1)}
    return {**renamed, "decoder.reg_scale": scale, **copies, **constants}


def imported(source: Path, sets: tuple[str, ...] = ()) -> DetrModel:
    read = architecture(WeightSource(str(source)), "deimv2", sets=sets)
    detector = build("deimv2", read.recipe.model.config, CLASSES).eval()
    pretrained.load_weights(detector, read.weights, str(source))
    return detector


@torch.no_grad()
def assert_equal(ours: DetrModel, theirs: Any, height: int = 96, width: int = 128) -> None:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))
    expected, got = theirs(pixel_values=images), ours(images)
    assert min(expected.logits.std(), expected.pred_boxes.std()) > 1e-2, "the reference says something"
    # float32; measured 2e-6 and 1e-6
    torch.testing.assert_close(got.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.encoder[0], expected.enc_topk_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.encoder[1], expected.enc_topk_bboxes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_transformers_computes_what_transformers_does(form: str, tmp_path: Path) -> None:
    theirs = reference(form)
    theirs.save_pretrained(tmp_path)
    ours = imported(tmp_path)
    assert_equal(ours, theirs)
    assert len(ours.decoder.boxes.box) == (1 if form == "pico" else 2)


@pytest.mark.parametrize("form", FORMS)
def test_the_authors_file_computes_what_the_authors_code_does(form: str, tmp_path: Path) -> None:
    theirs = as_the_authors_compute(reference.__wrapped__(form))
    torch.save({"model": as_authors(theirs)}, tmp_path / "deimv2.pth")
    points = FORMS[form]["decoder_n_points"]
    ours = imported(tmp_path / "deimv2.pth", ("model.heads=4", "model.queries=20", f"model.points={points}"))
    assert not ours.selector.project.state_dict(), "tokens are scored as they are"
    assert_equal(ours, theirs)


# As L, X and S, a quarter as wide, on Meta's transformers and the authors' own; L's keys as the converter writes them.
META: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "intermediate_size": 384,
    "out_indices": [6, 9, 12],
}
META |= {"num_register_tokens": 4, "layerscale_value": 1e-5}
TRUNKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "dinov3_small": ({**META, "key_bias": True}, 56, 8),
    "dinov3_small_plus": ({**META, "use_gated_mlp": True, "hidden_act": "silu"}, 64, 16),
    "dinov3_tiny": (
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "intermediate_size": 192,
            "out_indices": [4, 8, 12],
            "num_register_tokens": 0,
            "layerscale_value": 1.0,
            "apply_layernorm": False,
        },
        48,
        4,
    ),
}


@cache
@torch.no_grad()
def on_dinov3(name: str) -> Any:
    """Three levels, no projection before the encoder, blocks without a 3x3 convolution."""
    options, width, prior = TRUNKS[name]
    trunk = transformers.DINOv3ViTConfig(num_hidden_layers=12, rope_theta=100.0, **options)
    config = transformers.Deimv2Config(
        backbone_config=trunk,
        num_labels=CLASSES,
        d_model=width,
        encoder_hidden_dim=width,
        encoder_in_channels=[width] * 3,
        decoder_in_channels=[width] * 3,
        spatial_tuning_adapter_inplanes=prior,
        encoder_has_trailing_conv=False,
        hidden_expansion=1.0,
        depth_mult=0.34,
        decoder_n_points=[3, 6, 3],
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_layers=2,
        num_queries=20,
        encoder_attention_heads=width // 8,
        decoder_attention_heads=width // 8,
        decoder_activation_function="silu",
        architectures=["Deimv2ForObjectDetection"],
    )
    theirs = with_spread(transformers.Deimv2ForObjectDetection(config))
    theirs.model.decoder.up.fill_(0.5), theirs.model.decoder.reg_scale.fill_(4.0)
    for key, parameter in theirs.named_parameters():
        if key.endswith("attention.k_proj.bias"):
            parameter.fill_(0)  # as the converter leaves what Meta's code multiplies by 0
    return theirs


@pytest.mark.parametrize("name", ["dinov3_small", "dinov3_small_plus"])
def test_a_file_on_dinov3s_transformer_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    theirs = on_dinov3(name)
    theirs.save_pretrained(tmp_path)
    config = architecture(WeightSource(str(tmp_path)), "deimv2").recipe.model.config
    assert (config.backbone, config.backbone_width, config.smooth) == (name, 0.25, False)
    ours = imported(tmp_path)
    assert_equal(ours, theirs)


def test_transformers_small_ones_on_dinov3_are_refused_with_what_to_use(tmp_path: Path) -> None:
    """Its class normalizes their last map, and the authors' code does not."""
    on_dinov3("dinov3_tiny").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"for dinov3_tiny \(DEIMv2-S and M\).* import the authors' file"):
        imported(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out_indices": [4, 8, 12], "out_features": None}, r"out_indices is \[4, 8, 12\], .*dinov3_small"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3, .*has 6"),
        ({"apply_layernorm": False}, "apply_layernorm is false"),
        ({"rope_theta": 10.0}, "rope_theta is 10.0"),
        ({"use_gated_mlp": True}, "use_gated_mlp is true"),
        ({"patch_size": 14}, "patch_size is 14"),
    ],
)
def test_a_dinov3_that_the_tensors_deny_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    on_dinov3("dinov3_small").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["backbone_config"] = {**raw["backbone_config"], **change}
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        imported(tmp_path)


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("pico", {"use_gateway": True}, "use_gateway is true, but the tensors say false"),
        ("pico", {"share_bbox_head": False}, "share_bbox_head is false, but the tensors say true"),
        ("n", {"encoder_type": "lite"}, r"out_indices is \[3, 4\]; expected the stages \[3\]"),
        ("n", {"encoder_fuse_op": "cat"}, 'encoder_fuse_op is "cat", .*levels are added'),
        ("n", {"encoder_has_trailing_conv": False}, "encoder_has_trailing_conv is false, but the tensors say true"),
        ("n", {"encode_proj_layers": [0]}, r"encode_proj_layers is \[0\]"),
        ("n", {"decoder_activation_function": "gelu"}, 'decoder_activation_function is "gelu"'),
    ],
)
def test_a_configuration_that_the_tensors_deny_is_refused(
    form: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference(form).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        imported(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    reference("pico").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.decoder.strange.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="strange"):
        imported(tmp_path)


def test_a_position_is_computed_once_or_in_every_layer() -> None:
    """By counting: the authors' decoder asks for it before its loop, transformers' in it."""
    for as_transformers, calls in ((False, 1), (True, 3)):
        config = Deimv2Config(backbone="hgnetv2_b0", backbone_width=0.25, hidden=32, heads=4, queries=5)
        config = Deimv2Config(**{**vars(config), "as_transformers": as_transformers})
        model, asked = build("deimv2", config, CLASSES).eval(), []
        model.decoder.query_position.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        model(torch.randn(1, 3, 64, 64))
        assert len(asked) == calls


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lite": True, "levels": 3, "points": (4, 2, 1)}, "model.levels is 3; the lite encoder"),
        ({"points": (4, 4, 4)}, "model.points has 3 numbers; expected one for each of the 2 levels"),
        ({"reg_max": 31}, "model.reg_max is 31; expected an even number"),
    ],
)
def test_what_cannot_be_built_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Deimv2Config(**change)


# Parameters of the authors' model, built by their code from configs/deimv2, less what computes nothing: two constants,
# in L and X the token for hidden patches and the biases of keys, which they multiply by 0. And millions in their
# README, which counts the deployed model.
PUBLISHED = {
    "atto": (508_983, 0.5),
    "femto": (983_943, 1.0),
    "pico": (1_539_537, 1.5),
    "n": (3_600_419, 3.6),
    "s": (9_779_836, 9.7),
    "m": (18_357_748, 18.1),
    "l": (32_546_220, 32.2),
    "x": (51_206_742, 50.3),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size: str) -> None:
    exact, million = PUBLISHED[size]
    recipe = Recipe.load(f"deimv2-{size}", ["model.backbone_norm=trainable"])
    with torch.device("meta"):
        ours = build("deimv2", recipe.model.config, 80)
    assert parameters(ours) == exact
    assert deployed_parameters(ours) / 1e6 == pytest.approx(million, rel=0.01, abs=0.05)  # it has one digit


@torch.no_grad()
def test_the_lite_encoder_and_the_shared_head_are_deployed_as_they_are() -> None:
    """In ONNX Runtime, batch 1 and 4; nothing in the graph is known to trouble TensorRT, and the encoder is INT8."""
    name = variant("deimv2", lite=True, levels=2, points=(4, 2), gate=False, shared_boxes=True)
    images = sample_images(4)
    logits, boxes = deployed(name)(images)
    for batch in (1, 4):
        raw = OrtRunner(exported(name, None if batch == 4 else 1)).run(images[:batch].numpy())
        torch.testing.assert_close(torch.from_numpy(raw.logits), logits[:batch], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.from_numpy(raw.boxes), boxes[:batch], atol=1e-5, rtol=0)
    model = split_concats(onnx.load(exported(name, 1)))
    assert [str(finding) for finding in lint(model)] == []
    plan = make_plan(GraphIndex(model), load_policy("default"))
    integer = {layer.node for layer in plan.layers}
    assert any("/encoder/coarser/" in node for node in integer), "the encoder is INT8"
    assert not any("/decoder/" in node for node in integer), "the decoder is float: its values have no projection"
