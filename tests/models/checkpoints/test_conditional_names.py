"""Files of Conditional, DAB-, DN- and Anchor DETR: the authors' and transformers' names are converted to ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from author_state_dicts import Weights, both, encoder_layer, mlp, packed, torchvision_resnet
from references import reference_resnet, transformers

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build
from edgedetr.models.checkpoints.config_from_state_dict import config_from_state_dict
from edgedetr.models.checkpoints.conversion import translate
from edgedetr.models.checkpoints.pretrained import load_detector, load_weights, read_weights
from edgedetr.models.members.anchor_detr import AnchorDetrConfig
from edgedetr.models.members.conditional_detr import ConditionalDetrConfig
from edgedetr.models.members.dn_detr import DnDetrConfig

CLASSES, LAYERS = 4, 2
PLAIN = {
    "backbone": "resnet18",
    "backbone_width": 0.25,
    "hidden": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "queries": 6,
}


def conditional_layer(theirs: str, mine: str, ours: Weights, first: bool) -> Weights:
    """A decoder layer of Conditional DETR; projections are in the layer, what remains of attention is out_proj."""
    names = {
        "sa_qcontent_proj": "self_attention.q",
        "sa_qpos_proj": "self_attention.q_position",
        "sa_kcontent_proj": "self_attention.k",
        "sa_kpos_proj": "self_attention.k_position",
        "sa_v_proj": "self_attention.v",
        "self_attn.out_proj": "self_attention.out",
        "ca_qcontent_proj": "cross_attention.q",
        "ca_kcontent_proj": "cross_attention.k",
        "ca_kpos_proj": "cross_attention.k_position",
        "ca_v_proj": "cross_attention.v",
        "ca_qpos_sine_proj": "cross_attention.q_spatial",
        "cross_attn.out_proj": "cross_attention.out",
        "linear1": "feedforward.up",
        "linear2": "feedforward.down",
        "norm1": "self_norm",
        "norm2": "cross_norm",
        "norm3": "feedforward_norm",
        **({"ca_qpos_proj": "cross_attention.q_position"} if first else {}),
    }
    return {key: tensor for t, m in names.items() for key, tensor in both(f"{theirs}.{t}", f"{mine}.{m}", ours).items()}


def conditional(ours: Weights) -> Weights:
    """Atten4Vis/ConditionalDETR."""
    names = {
        **torchvision_resnet(ours, "backbone.0.body."),
        **both("input_proj", "encoder.project", ours),
        **both("class_embed", "decoder.boxes.score", ours),
        **mlp("bbox_embed", "decoder.boxes.box", ours),
        **both("transformer.decoder.norm", "decoder.norm", ours),
        **mlp("transformer.decoder.query_scale", "decoder.spatial.scale", ours, 2),
        **mlp("transformer.decoder.ref_point_head", "selector.point.head", ours, 2),
        "query_embed.weight": ours["selector.position.weight"],
    }
    for n in range(LAYERS):
        names |= encoder_layer(f"transformer.encoder.layers.{n}", f"encoder.layers.{n}", ours, packed)
        names |= conditional_layer(f"transformer.decoder.layers.{n}", f"decoder.layers.{n}", ours, n == 0)
    return names


def dab(ours: Weights) -> Weights:
    """IDEA-Research/DAB-DETR, and with `label_enc` DN-DETR; it holds the box head twice."""
    names = {
        **torchvision_resnet(ours, "backbone.0.body."),
        **both("input_proj", "encoder.project", ours),
        **both("class_embed", "decoder.boxes.score", ours),
        **mlp("bbox_embed", "decoder.boxes.box", ours),
        **mlp("transformer.decoder.bbox_embed", "decoder.boxes.box", ours),
        **both("transformer.decoder.norm", "decoder.norm", ours),
        **mlp("transformer.encoder.query_scale", "encoder.position_scale", ours, 2),
        **mlp("transformer.decoder.query_scale", "decoder.spatial.scale", ours, 2),
        **mlp("transformer.decoder.ref_anchor_head", "decoder.spatial.size", ours, 2),
        **mlp("transformer.decoder.ref_point_head", "decoder.query_position.head", ours, 2),
        "refpoint_embed.weight": ours["selector.box.weight"],
    }
    if "selector.denoising_class_embed.weight" in ours:
        names["label_enc.weight"] = ours["selector.denoising_class_embed.weight"]
    for n in range(LAYERS):
        names |= encoder_layer(f"transformer.encoder.layers.{n}", f"encoder.layers.{n}", ours, packed)
        names |= conditional_layer(f"transformer.decoder.layers.{n}", f"decoder.layers.{n}", ours, n == 0)
        for part in ("encoder", "decoder"):
            slope = ours[f"{part}.layers.{n}.feedforward.activation.weight"]
            names[f"transformer.{part}.layers.{n}.activation.weight"] = slope
    return names


def five(theirs: str, mine: str, ours: Weights) -> Weights:
    """MultiheadRCDA: the queries along x ("row") and y, the keys of both, the values, in one tensor."""
    parts = ("q_x", "q_y", "k_x", "k_y", "v")
    joined = {
        f"{theirs}.in_proj_{kind}": torch.cat([ours[f"{mine}.{part}.{kind}"] for part in parts])
        for kind in ("weight", "bias")
    }
    return {**joined, **both(f"{theirs}.out_proj", f"{mine}.out", ours)}


def anchor(ours: Weights) -> Weights:
    """megvii-research/AnchorDETR with one feature level; six layers repeat one pair of heads."""
    names = {
        **torchvision_resnet(ours, "backbone.body."),
        "transformer.pattern.weight": ours["selector.pattern.weight"],
        **both("input_proj.0.0", "encoder.project.0", ours),
        **both("input_proj.0.1", "encoder.project.1", ours),
    }
    if "selector.points.points" in ours:
        names["transformer.position.weight"] = ours["selector.points.points"]
    for theirs, mine in (("adapt_pos1d", "encoder.position.adapt"), ("adapt_pos2d", "selector.points.adapt")):
        for index in (0, 1):
            names |= both(f"transformer.{theirs}.{2 * index}", f"{mine}.layers.{index}", ours)
    for n in range(LAYERS):
        names |= both(f"transformer.class_embed.{n}", "decoder.boxes.score", ours)
        names |= mlp(f"transformer.bbox_embed.{n}", "decoder.boxes.box", ours)
        for theirs, mine in (
            (f"transformer.encoder_layers.{n}", f"encoder.layers.{n}"),
            (f"transformer.decoder_layers.{n}", f"decoder.layers.{n}"),
        ):
            encoder = mine.startswith("encoder")
            if encoder:
                names |= {
                    **five(f"{theirs}.self_attn", f"{mine}.attention", ours),
                    **both(f"{theirs}.norm1", f"{mine}.attention_norm", ours),
                }
            else:
                names |= {
                    **packed(f"{theirs}.self_attn", f"{mine}.self_attention", ours),
                    **five(f"{theirs}.cross_attn", f"{mine}.cross_attention", ours),
                    **both(f"{theirs}.norm1", f"{mine}.cross_norm", ours),
                    **both(f"{theirs}.norm2", f"{mine}.self_norm", ours),
                }
            names |= {
                **both(f"{theirs}.ffn.linear1", f"{mine}.feedforward.up", ours),
                **both(f"{theirs}.ffn.linear2", f"{mine}.feedforward.down", ours),
                **both(f"{theirs}.ffn.norm2", f"{mine}.feedforward_norm", ours),
            }
    return names


GRID = {**PLAIN, "queries": 12}  # 2 x 2 points and 3 patterns
ORIGINALS = {
    "conditional": ("conditional_detr", ConditionalDetrConfig(**PLAIN), conditional),
    "conditional r50": ("conditional_detr", ConditionalDetrConfig(**{**PLAIN, "backbone": "resnet50"}), conditional),
    "dab": ("dn_detr", DnDetrConfig(**PLAIN, denoising=False), dab),
    "dn": ("dn_detr", DnDetrConfig(**PLAIN), dab),
    "anchor": ("anchor_detr", AnchorDetrConfig(**PLAIN, dilate_last=False), anchor),
    "anchor grid": ("anchor_detr", AnchorDetrConfig(**GRID, dilate_last=False, points="grid"), anchor),
}
original = pytest.mark.parametrize("case", ORIGINALS)


def random_state(member: str, config: object) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in build(member, config, CLASSES).state_dict().items()
    }


@original
def test_the_authors_files_come_back_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    member, config, written = ORIGINALS[case]
    ours, path = random_state(member, config), tmp_path / "model.pth"
    torch.save({"model": written(ours), "optimizer": {"state": {}}, "epoch": 49}, path)
    found = translate(member, read_weights(str(path)), case)
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)
    assert load_detector(build(member, config, CLASSES), member, str(path)).fresh == ()


@original
def test_the_architecture_follows_from_the_tensors(case: str) -> None:
    member, config, written = ORIGINALS[case]
    found = config_from_state_dict(FAMILY[member], translate(member, written(random_state(member, config))), heads=4)
    # What no tensor shows: heads, dilation, and how many points a grid has.
    not_stored = {name: getattr(config, name) for name in ("heads", "dilate_last", "queries") if hasattr(config, name)}
    assert found.get("queries", config.queries) == config.queries
    rebuilt = type(config)(**{**found, **not_stored})
    assert build(member, rebuilt, CLASSES).state_dict().keys() == build(member, config, CLASSES).state_dict().keys()
    for name in ("backbone", "backbone_width", "hidden", "ffn", "encoder_layers", "decoder_layers"):
        assert found[name] == getattr(config, name), name


def of_transformers(member: str) -> torch.nn.Module:
    shared = {
        "backbone_config": reference_resnet(18, width=0.25),
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "num_labels": CLASSES,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 6,
    }
    if member == "conditional_detr":
        return transformers.ConditionalDetrForObjectDetection(transformers.ConditionalDetrConfig(**shared, d_model=32))
    return transformers.DabDetrForObjectDetection(transformers.DabDetrConfig(**shared, hidden_size=32))


@pytest.mark.parametrize(
    "member, config",
    [("conditional_detr", ConditionalDetrConfig(**PLAIN)), ("dn_detr", DnDetrConfig(**PLAIN, denoising=False))],
)
def test_files_and_modules_of_transformers_load(member: str, config: object, tmp_path: Path) -> None:
    """As `save_pretrained` writes them, which is how they are stored on the hub, and as they are named in memory."""
    theirs = of_transformers(member)
    theirs.save_pretrained(tmp_path)
    states = []
    for weights in (read_weights(str(tmp_path / "model.safetensors")), theirs.state_dict()):
        ours = build(member, config, CLASSES)
        for tensor in ours.state_dict().values():
            tensor.fill_(-7)  # so that a tensor that was not loaded would show
        assert load_weights(ours, translate(member, weights), member).fresh == ()
        assert [name for name, tensor in ours.state_dict().items() if (tensor == -7).all()] == []
        states.append(ours.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_dn_detr_of_other_classes_keeps_all_but_what_belongs_to_classes() -> None:
    source, target = build("dn_detr", DnDetrConfig(**PLAIN), 9), build("dn_detr", DnDetrConfig(**PLAIN), CLASSES)
    loaded = load_weights(target, translate("dn_detr", dab(source.state_dict())), "nine classes")
    assert set(loaded.fresh) == {
        "decoder.boxes.score.weight",
        "decoder.boxes.score.bias",
        "selector.denoising_class_embed.weight",
    }


def test_dab_detr_weights_loaded_as_dn_detr_name_what_is_missing() -> None:
    weights = translate("dn_detr", dab(random_state("dn_detr", DnDetrConfig(**PLAIN, denoising=False))))
    with pytest.raises(ModelError, match=r"missing \(1\): selector.denoising_class_embed.weight"):
        load_weights(build("dn_detr", DnDetrConfig(**PLAIN), CLASSES), weights, "DAB-DETR")


def test_heads_of_layers_that_differ_are_refused() -> None:
    weights = anchor(random_state("anchor_detr", AnchorDetrConfig(**PLAIN, dilate_last=False)))
    weights["transformer.class_embed.1.bias"] = weights["transformer.class_embed.1.bias"] + 1
    with pytest.raises(ModelError, match=r"transformer.class_embed.0.bias and transformer.class_embed.1.bias differ"):
        translate("anchor_detr", weights)
