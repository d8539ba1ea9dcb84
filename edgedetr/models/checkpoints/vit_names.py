"""Names of a vision transformer in timm's and transformers' files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import Rule, Weights, rename

MARK = r"(?:^|\.)(?:patch_embed|patch_embeddings)\."
# Nothing of ours: classifiers, and transformers' layer for the class token alone.
UNUSED = re.compile(r"^head\.|^fc_norm\.|^pooler\.|^classifier\.")

RULES: list[Rule] = [
    # timm
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "position.table"),
    (r"^patch_embed\.proj\.", "patch."),
    (r"^(blocks\.\d+)\.norm1\.", r"\1.attention_norm."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.feedforward_norm."),
    (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"^(blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"^(blocks\.\d+)\.ls1\.", r"\1.attention_scale."),
    (r"^(blocks\.\d+)\.ls2\.", r"\1.feedforward_scale."),
    # transformers, as files and as in memory
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "position.table"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".attention_norm."),
    (r"\.layernorm_after\.", ".feedforward_norm."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}."),
    (r"\.attention\.([qkv])_proj\.", r".attention.\1."),
    (r"\.attention\.o_proj\.", ".attention.out."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.intermediate\.dense\.", ".feedforward.up."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.feedforward.down."),
    # both
    (r"\.mlp\.fc1\.", ".feedforward.up."),
    (r"\.mlp\.fc2\.", ".feedforward.down."),
]


def rename_vit(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of a vision transformer under the names of ours; a classifier's and a pooler's are left out."""
    split: Weights = {}
    for name, tensor in weights.items():
        name = name.removeprefix("vit.")
        if UNUSED.search(name):
            continue
        if ".attn.qkv." in name:
            split |= {name.replace("qkv", part): chunk.clone() for part, chunk in zip("qkv", tensor.chunk(3))}
        else:
            split[name] = tensor
    return rename(split, RULES)
