"""Tensor names of backbones (ResNet, HGNetV2, ViT) in torchvision, timm, transformers, RT-DETR, D-FINE and LW-DETR.

Also of the projector behind LW-DETR's and RF-DETR's, and of the adapter beside DEIMv2's, which their authors call
parts of the backbone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import RenameRule, Weights, rename

RESNET: list[RenameRule] = [
    # torchvision, timm (whose "d" stem is conv1.0 conv1.1 conv1.3 conv1.4 conv1.6 bn1)
    (r"^conv1\.0\.", "stem.0.conv."),
    (r"^conv1\.1\.", "stem.0.norm."),
    (r"^conv1\.3\.", "stem.1.conv."),
    (r"^conv1\.4\.", "stem.1.norm."),
    (r"^conv1\.6\.", "stem.2.conv."),
    # RT-DETR's own files
    (r"^conv1\.conv1_([123])\.", lambda m: f"stem.{int(m[1]) - 1}."),
    (
        r"^res_layers\.(\d)\.blocks\.(\d+)\.branch2([abc])\.",
        lambda m: f"stages.{m[1]}.{m[2]}.body.{'abc'.index(m[3])}.",
    ),
    (r"^res_layers\.(\d)\.blocks\.(\d+)\.short\.(?:conv\.(?=conv\.|norm\.))?", r"stages.\1.\2.shortcut.project."),
    # torchvision, timm
    (r"^conv1\.", "stem.0.conv."),
    (r"^bn1\.", "stem.LAST.norm."),
    (r"^layer([1-4])\.(\d+)\.conv([1-3])\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.body.{int(m[3]) - 1}.conv."),
    (r"^layer([1-4])\.(\d+)\.bn([1-3])\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.body.{int(m[3]) - 1}.norm."),
    (r"^layer([1-4])\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.project."),
    # transformers' ResNet and RT-DETR's ResNet-vd
    (r"^embedder\.embedder\.(\d)\.", r"stem.\1."),
    (r"^embedder\.embedder\.", "stem.0."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.", r"stages.\1.\2.body."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(?:1\.)?", r"stages.\1.\2.shortcut.project."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
]
TUNED_MARK = r"(?:sta|spatial_tuning_adapter)\."
HGNETV2_MARK = r"^(?:stem|embedder)\.stem1\."
HGNETV2: list[RenameRule] = [
    # transformers
    (r"^embedder\.", "stem."),
    (r"^encoder\.stages\.", "stages."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    # timm, D-FINE, RT-DETR
    (r"\.bn\.", ".norm."),
    # all of them
    (r"\.lab\.", ".activation."),
    (r"\.conv1\.", ".point."),
    (r"\.conv2\.", ".depth."),
    (r"\.aggregation\.", ".aggregate."),
]
VIT_MARK = r"(?:^|\.)(?:patch_embed|patch_embeddings)\."
# Nothing of ours: classifiers, transformers' layer for the class token alone, and DINOv2's token for hidden patches.
UNUSED = re.compile(r"^head\.|^fc_norm\.|^pooler\.|^classifier\.|(?:^|\.)mask_token$")

VIT: list[RenameRule] = [
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    # timm, LW-DETR's own files, and transformers' DINOv2
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "position.table"),
    (r"^patch_embed\.proj\.", "patch."),
    (r"^(blocks\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.feedforward_norm."),
    (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"^(blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"\.attention\.([qv])_bias$", r".attention.\1.bias"),
    (r"^(blocks\.\d+)\.(?:ls1\.gamma|gamma_1|layer_scale1\.lambda1)$", r"\1.attention_scale.gamma"),
    (r"^(blocks\.\d+)\.(?:ls2\.gamma|gamma_2|layer_scale2\.lambda1)$", r"\1.feedforward_scale.gamma"),
    # transformers, as files and as in memory
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "position.table"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^storage_tokens$", "register_tokens"),
    (r"^embeddings\.(?:patch_embeddings\.)?projection\.", "patch."),
    (r"^embeddings\.patch_embeddings\.", "patch."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".attention_norm."),
    (r"\.layernorm_after\.", ".feedforward_norm."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}."),
    (r"\.attention\.([qkv])_proj\.", r".attention.\1."),
    (r"\.attention\.o_proj\.", ".attention.out."),
    (r"\.attention\.output\.(?:dense\.)?", ".attention.out."),
    (r"\.intermediate\.(?:dense|fc1)\.", ".feedforward.up."),
    (r"\.intermediate\.fc2\.", ".feedforward.down."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.feedforward.down."),
    # both; w1, w2, w3 and *_proj are DINOv3's
    (r"\.mlp\.(?:w1|gate_proj)\.", ".feedforward.gate."),
    (r"\.mlp\.(?:fc1|w2|up_proj)\.", ".feedforward.up."),
    (r"\.mlp\.(?:fc2|w3|down_proj)\.", ".feedforward.down."),
]
# DEIMv2's adapter: the authors' Sequentials, and transformers' modules
ADAPTER: list[RenameRule] = [
    (r"^sta\.", "prior."),
    (r"^spatial_tuning_adapter\.", "prior."),
    (r"^prior\.stem_conv\.", "prior.stem."),
    (r"^prior\.stem\.0\.", "prior.stem.conv."),
    (r"^prior\.stem\.1\.", "prior.stem.norm."),
    (r"^prior\.conv([234])\.", lambda m: f"prior.down.{int(m[1]) - 2}."),
    (r"^(prior\.down\.0)\.0\.", r"\1.conv."),
    (r"^(prior\.down\.0)\.1\.", r"\1.norm."),
    (r"^(prior\.down\.[12])\.1\.", r"\1.conv."),
    (r"^(prior\.down\.[12])\.2\.", r"\1.norm."),
    (r"^fusion_proj\.", "fuse."),
    (r"^convs\.(\d)\.", r"fuse.\1.conv."),
    (r"^norms\.(\d)\.", r"fuse.\1.norm."),
]
PROJECTOR: list[RenameRule] = [
    # the authors' files, which are RF-DETR's on the hub as well
    (r"^stages_sampling\.", "sampling."),
    (r"^stages\.(\d+)\.1\.", r"norms.\1."),
    (r"^stages\.(\d+)\.0\.", r"fuse.\1."),
    (r"\.cv1\.(?=conv\.|bn\.)", ".0."),
    (r"\.cv2\.(?=conv\.|bn\.)", ".1."),
    (r"\.m\.", ".blocks."),
    (r"\.bn\.", ".norm."),
    # transformers; RF-DETR in memory has one level without a number
    (r"^projector_layer\.", "fuse.0."),
    (r"^layer_norm\.", "norms.0."),
    (r"^scale_layers\.(\d+)\.sampling_layers\.(\d+)\.layers\.", r"sampling.\1.\2."),
    (r"^scale_layers\.(\d+)\.projector_layer\.", r"fuse.\1."),
    (r"^scale_layers\.(\d+)\.layer_norm\.", r"norms.\1."),
    (r"\.bottlenecks\.", ".blocks."),
    (r"\.conv1\.", ".0."),
    (r"\.conv2\.", ".1."),
    # both
    (r"^(fuse\.\d+)\.0\.", r"\1.spread."),
    (r"^(fuse\.\d+)\.1\.", r"\1.merge."),
]


def rename_backbone(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of a ResNet, an HGNetV2 or DEIMv2's transformer under our names; a classifier's are left out."""
    if any(re.match(TUNED_MARK, name) for name in weights):
        return rename_tuned_vit(weights)
    if any(re.search(HGNETV2_MARK, name) for name in weights):
        return rename({name: tensor for name, tensor in weights.items() if not UNUSED.search(name)}, HGNETV2)
    # The last convolution of the stem has no number of its own in timm's deep stem: count it.
    last = "2" if "conv1.6.weight" in weights else "0"
    pooled = any(re.match(r"layer\d\.\d+\.downsample\.2\.", name) for name in weights)
    numbered = {}
    for name, tensor in weights.items():
        # Sequential(conv, norm), or with pooling before it: numbers 0 1, or 1 2.
        first = 1 if pooled and f"{name.partition('downsample.')[0]}downsample.0.weight" not in weights else 0
        shortcut = re.match(r"(layer\d\.\d+\.downsample\.)([012])\.(.*)", name)
        if shortcut:
            name = f"{shortcut[1]}{'conv' if int(shortcut[2]) == first else 'norm'}.{shortcut[3]}"
        numbered[name] = tensor
    return rename(numbered, [*RESNET, (r"\.LAST\.", f".{last}.")])


def rename_vit(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of a vision transformer under the names of ours; a classifier's and a pooler's are left out."""
    split: Weights = {}
    for name, tensor in weights.items():
        name = name.removeprefix("vit.")
        if UNUSED.search(name):
            continue
        if name.endswith((".attn.qkv.bias_mask", "rope_embed.periods")):
            continue  # the mask is read with its bias; the periods follow from the width of a head
        if name.endswith(".attn.qkv.bias") and f"{name}_mask" in weights:
            # DINOv3's keys have no bias: their part of it is multiplied by 0.
            tensor, mask = tensor * weights[f"{name}_mask"], weights[f"{name}_mask"].chunk(3)
            parts = dict(zip("qkv", tensor.chunk(3)))
            kept = [part for part, factor in zip("qkv", mask) if factor.any()]
            split |= {name.replace("qkv", part): parts[part].clone() for part in kept}
        elif ".attn.qkv." in name:
            split |= {name.replace("qkv", part): chunk.clone() for part, chunk in zip("qkv", tensor.chunk(3))}
        else:
            split[name] = tensor
    return _completed(rename(split, VIT))


def _completed(weights: Weights) -> Weights:
    """A transformer without a class token (LW-DETR) has a position for one all the same, and its keys have no bias.

    A bias of all keys adds one number to all scores of a query, which softmax takes out again.
    """
    table = weights.get("position.table")
    if "class_token" not in weights and table is not None and math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        weights["position.table"] = table[:, 1:].clone()
    # With positions that turn the keys (no table), a bias would count.
    unread = [name for name in weights if table is not None and name.endswith(".attention.q.bias")]
    for name in unread:
        weights.setdefault(name.replace(".q.", ".k."), torch.zeros_like(weights[name]))
    return weights


def rename_tuned_vit(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of DEIMv2's transformer and adapter under the names of ours (models/backbones/dinov3.py)."""
    trunk = re.compile(r"^(?:dinov3\.(?:_model\.)?|backbone\.)")
    inside = {trunk.sub("", name): tensor for name, tensor in weights.items() if trunk.match(name)}
    beside = {name: tensor for name, tensor in weights.items() if not trunk.match(name)}
    renamed = rename_vit(inside)
    registers = renamed.get("register_tokens")
    if registers is not None and not registers.numel():  # transformers', of a transformer without any
        del renamed["register_tokens"]
    elif registers is not None:  # Meta's keys have no bias, which transformers' converter writes as zeros
        renamed = {name: item for name, item in renamed.items() if not name.endswith(".k.bias") or item.any()}
    return {**{f"transformer.{name}": tensor for name, tensor in renamed.items()}, **rename(beside, ADAPTER)}


def rename_projector(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of LW-DETR's or RF-DETR's projector under the names of ours (models/encoders/projector.py)."""
    return rename(weights, PROJECTOR)
