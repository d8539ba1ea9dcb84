"""State dicts as the authors' code writes them, made from ours by the names of their modules written out here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, cat

Weights = dict[str, Tensor]


def torchvision_resnet(ours: Weights, prefix: str) -> Weights:
    """`backbone.*` of a plain ResNet under torchvision's names, without BatchNorm's counters."""
    names: Weights = {}
    for name, tensor in ours.items():
        if not name.startswith("backbone.") or name.endswith("num_batches_tracked"):
            continue
        part = name.split(".")
        if part[1] == "stem":
            new = ["conv1" if part[3] == "conv" else "bn1", part[4]]
        elif part[4] == "shortcut":
            new = [f"layer{int(part[2]) + 1}", part[3], "downsample", "0" if part[6] == "conv" else "1", part[7]]
        else:
            kind = "conv" if part[6] == "conv" else "bn"
            new = [f"layer{int(part[2]) + 1}", part[3], f"{kind}{int(part[5]) + 1}", part[7]]
        names[prefix + ".".join(new)] = tensor
    return names


def hgnetv2(ours: Weights, prefix: str) -> Weights:
    """`backbone.*` of an HGNetV2 as RT-DETR, D-FINE, DEIMv2 and timm name it, without BatchNorm's counters."""
    theirs = {"norm": "bn", "activation": "lab", "point": "conv1", "depth": "conv2", "aggregate": "aggregation"}
    return {
        prefix + ".".join(theirs.get(part, part) for part in name.split(".")[1:]): tensor
        for name, tensor in ours.items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }


def both(theirs: str, mine: str, ours: Weights) -> Weights:
    return {f"{theirs}.{kind}": ours[f"{mine}.{kind}"] for kind in ("weight", "bias")}


def packed(theirs: str, mine: str, ours: Weights) -> Weights:
    """torch.nn.MultiheadAttention: q, k and v in one tensor."""
    joined = {
        f"{theirs}.in_proj_{kind}": cat([ours[f"{mine}.{part}.{kind}"] for part in "qkv"])
        for kind in ("weight", "bias")
    }
    return {**joined, **both(f"{theirs}.out_proj", f"{mine}.out", ours)}


def sampled(theirs: str, mine: str, ours: Weights) -> Weights:
    """MSDeformAttn."""
    names = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    return {key: tensor for t, m in names.items() for key, tensor in both(f"{theirs}.{t}", f"{mine}.{m}", ours).items()}


def mlp(theirs: str, mine: str, ours: Weights, layers: int = 3) -> Weights:
    return {
        key: tensor
        for index in range(layers)
        for key, tensor in both(f"{theirs}.layers.{index}", f"{mine}.layers.{index}", ours).items()
    }


Attention = Callable[[str, str, Weights], Weights]


def encoder_layer(theirs: str, mine: str, ours: Weights, attention: Attention) -> Weights:
    return {
        **attention(f"{theirs}.self_attn", f"{mine}.attention", ours),
        **both(f"{theirs}.linear1", f"{mine}.feedforward.up", ours),
        **both(f"{theirs}.linear2", f"{mine}.feedforward.down", ours),
        **both(f"{theirs}.norm1", f"{mine}.attention_norm", ours),
        **both(f"{theirs}.norm2", f"{mine}.feedforward_norm", ours),
    }


def decoder_layer(theirs: str, mine: str, ours: Weights, cross: str, attention: Attention, norms: str) -> Weights:
    """norms  whose norm is the first and whose the second: "self cross", or Deformable DETR's "cross self" """
    first, second = norms.split()
    return {
        **packed(f"{theirs}.self_attn", f"{mine}.self_attention", ours),
        **attention(f"{theirs}.{cross}", f"{mine}.cross_attention", ours),
        **both(f"{theirs}.linear1", f"{mine}.feedforward.up", ours),
        **both(f"{theirs}.linear2", f"{mine}.feedforward.down", ours),
        **both(f"{theirs}.norm1", f"{mine}.{first}_norm", ours),
        **both(f"{theirs}.norm2", f"{mine}.{second}_norm", ours),
        **both(f"{theirs}.norm3", f"{mine}.feedforward_norm", ours),
    }


def detr(ours: Weights, layers: int) -> Weights:
    """facebookresearch/detr."""
    names = {
        **torchvision_resnet(ours, "backbone.0.body."),
        **both("input_proj", "encoder.project", ours),
        **both("class_embed", "decoder.boxes.score", ours),
        **mlp("bbox_embed", "decoder.boxes.box", ours),
        **both("transformer.decoder.norm", "decoder.norm", ours),
        "query_embed.weight": ours["selector.position.weight"],
    }
    if "encoder.norm.weight" in ours:
        names |= both("transformer.encoder.norm", "encoder.norm", ours)
    for index in range(layers):
        names |= encoder_layer(f"transformer.encoder.layers.{index}", f"encoder.layers.{index}", ours, packed)
        names |= decoder_layer(
            f"transformer.decoder.layers.{index}",
            f"decoder.layers.{index}",
            ours,
            "multihead_attn",
            packed,
            "self cross",
        )
    return names


def deformable_detr(ours: Weights, layers: int) -> Weights:
    """fundamentalvision/Deformable-DETR, in the form that the weights have."""
    names = {**torchvision_resnet(ours, "backbone.0.body."), "transformer.level_embed": ours["encoder.place.level"]}
    level = 0
    while f"encoder.project.{level}.0.weight" in ours:
        for part in "01":
            names |= both(f"input_proj.{level}.{part}", f"encoder.project.{level}.{part}", ours)
        level += 1
    for index in range(layers):
        names |= encoder_layer(f"transformer.encoder.layers.{index}", f"encoder.layers.{index}", ours, sampled)
        names |= decoder_layer(
            f"transformer.decoder.layers.{index}", f"decoder.layers.{index}", ours, "cross_attn", sampled, "cross self"
        )
    refined, two_stage = "decoder.boxes.score.0.weight" in ours, "selector.place.weight" in ours
    if two_stage:
        for theirs, mine in {
            "enc_output": "project",
            "enc_output_norm": "norm",
            "pos_trans": "place",
            "pos_trans_norm": "place_norm",
        }.items():
            names |= both(f"transformer.{theirs}", f"selector.{mine}", ours)
    else:
        names["query_embed.weight"] = ours["selector.embed.weight"]
        names |= both("transformer.reference_points", "selector.reference", ours)
    for index in range(layers + two_stage):
        mine = "selector" if index == layers else "decoder.boxes"
        which = f".{index}" if refined and index < layers else ""
        # Modules that are attributes twice are written twice.
        for prefix in ["", *(["transformer.decoder."] if refined else [])]:
            names |= mlp(f"{prefix}bbox_embed.{index}", f"{mine}.box{which}", ours)
            if two_stage or not prefix:
                names |= both(f"{prefix}class_embed.{index}", f"{mine}.score{which}", ours)
    return names


def dino(ours: Weights, layers: int) -> Weights:
    """IDEA-Research/DINO: one pair of heads, an attribute of every layer, of the model and of the decoder alike."""
    names = {
        **torchvision_resnet(ours, "backbone.0.body."),
        "transformer.level_embed": ours["encoder.place.level"],
        "transformer.tgt_embed.weight": ours["selector.content.weight"],
        "label_enc.weight": ours["selector.denoising_class_embed.weight"],
        **both("transformer.enc_output", "selector.project", ours),
        **both("transformer.enc_output_norm", "selector.norm", ours),
        **both("transformer.enc_out_class_embed", "selector.score", ours),
        **mlp("transformer.enc_out_bbox_embed", "selector.box", ours),
        **both("transformer.decoder.norm", "decoder.norm", ours),
        **mlp("transformer.decoder.ref_point_head", "decoder.query_position.head", ours, 2),
    }
    level = 0
    while f"encoder.project.{level}.0.weight" in ours:
        for part in "01":
            names |= both(f"input_proj.{level}.{part}", f"encoder.project.{level}.{part}", ours)
        level += 1
    for index in range(len({name.split(".")[2] for name in ours if name.startswith("encoder.layers.")})):
        names |= encoder_layer(f"transformer.encoder.layers.{index}", f"encoder.layers.{index}", ours, sampled)
    for index in range(layers):
        names |= decoder_layer(
            f"transformer.decoder.layers.{index}", f"decoder.layers.{index}", ours, "cross_attn", sampled, "cross self"
        )
        for prefix in ("", "transformer.decoder."):
            names |= both(f"{prefix}class_embed.{index}", "decoder.boxes.score", ours)
            names |= mlp(f"{prefix}bbox_embed.{index}", "decoder.boxes.box", ours)
    return names


def rt_detr(ours: Weights, version: int) -> Weights:
    """lyuwenyu/RT-DETR; version 1 numbers the parts of its projections, version 2 names them."""
    conv, norm = ("0", "1") if version == 1 else ("conv", "norm")
    renamed: Weights = {
        "decoder.anchors": ours["selector.norm.weight"][None],
        "decoder.valid_mask": ours["selector.norm.weight"][None],
    }  # constants of a fixed size, which are of no use
    fusion = {"deep": "conv1", "flat": "conv2", "merge": "conv3", "wide": "conv1", "narrow": "conv2"}
    plain = {
        "decoder.query_position.": "decoder.query_pos_head.",
        "decoder.boxes.score.": "decoder.dec_score_head.",
        "decoder.boxes.box.": "decoder.dec_bbox_head.",
        "selector.score.": "decoder.enc_score_head.",
        "selector.box.": "decoder.enc_bbox_head.",
        "encoder.lateral.": "encoder.lateral_convs.",
        "encoder.downsample.": "encoder.downsample_convs.",
        "selector.denoising_class_embed.": "decoder.denoising_class_embed.",
        "selector.content.": "decoder.tgt_embed.",
        "selector.project.": f"decoder.enc_output.{'0' if version == 1 else 'proj'}.",
        "selector.norm.": f"decoder.enc_output.{'1' if version == 1 else 'norm'}.",
    }
    hgnet = "backbone.stem.stem1.conv.weight" in ours
    renamed |= hgnetv2(ours, "backbone.") if hgnet else {}
    for name, tensor in ours.items():
        part = name.split(".")
        prefix = next((old for old in plain if name.startswith(old)), "")
        if hgnet and part[0] == "backbone":
            continue
        if prefix:
            renamed[plain[prefix] + name.removeprefix(prefix)] = tensor
        elif name.startswith("backbone.stem."):
            renamed[".".join(["backbone.conv1", f"conv1_{int(part[2]) + 1}", *part[3:]])] = tensor
        elif part[0] == "backbone" and part[4] == "shortcut":
            # Where the shortcut pools first, its convolution has its own name.
            pooled = "short.conv" if part[2] != "0" else "short"
            renamed[".".join(["backbone.res_layers", part[2], "blocks", part[3], pooled, *part[6:]])] = tensor
        elif part[0] == "backbone":
            branch = "branch2" + "abc"[int(part[5])]
            renamed[".".join(["backbone.res_layers", part[2], "blocks", part[3], branch, *part[6:]])] = tensor
        elif part[1] in ("project", "memory_project"):
            owner = "encoder" if part[1] == "project" else "decoder"
            renamed[".".join([owner, "input_proj", part[2], conv if part[3] == "conv" else norm, *part[4:]])] = tensor
        elif part[1] in ("top_down", "bottom_up"):
            new = {"top_down": "fpn_blocks", "bottom_up": "pan_blocks"}[part[1]]
            if part[3] == "blocks":
                rest = ["bottlenecks", part[4], fusion[part[5]], *part[6:]]
            else:
                rest = [fusion[part[3]], *part[4:]]
            renamed[".".join(["encoder", new, part[2], *rest])] = tensor
    renamed |= encoder_layer("encoder.encoder.0.layers.0", "encoder.attention.0", ours, packed)
    for index in {name.split(".")[2] for name in ours if name.startswith("decoder.layers.")}:
        renamed |= decoder_layer(
            f"decoder.decoder.layers.{index}", f"decoder.layers.{index}", ours, "cross_attn", sampled, "self cross"
        )
        if version == 2:
            renamed[f"decoder.decoder.layers.{index}.cross_attn.num_points_scale"] = ours["selector.norm.weight"]
    return renamed
