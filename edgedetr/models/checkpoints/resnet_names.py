"""Names of a ResNet in torchvision's, timm's, transformers' and RT-DETR's files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import Rule, Weights, rename

RULES: list[Rule] = [
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


def rename_backbone(weights: Mapping[str, Tensor]) -> Weights:
    """Tensors of a ResNet under our backbone's names."""
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
    return rename(numbered, [*RULES, (r"\.LAST\.", f".{last}.")])
