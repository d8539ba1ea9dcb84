"""Tensor names of hybrid encoders: RT-DETR's, D-FINE's and DEIMv2's, in the authors' files and in transformers.

All rules expect names that begin with `encoder.`, as the authors' files have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from edgedetr.models.checkpoints.rename_rules import RenameRule, Weights

# The levels of all of them; RT-DETR's own files and transformers agree here.
LEVELS: list[RenameRule] = [
    (r"^encoder\.lateral_convs\.", "encoder.lateral."),
    (r"^encoder\.downsample_convs\.", "encoder.downsample."),
    (r"^encoder\.fpn_blocks?\.", "encoder.top_down."),  # one block in a lite encoder, a list in the others
    (r"^encoder\.pan_blocks?\.", "encoder.bottom_up."),
    (r"\.bottlenecks\.(\d)\.conv1\.", r".blocks.\1.wide."),
    (r"\.bottlenecks\.(\d)\.conv2\.", r".blocks.\1.narrow."),
]
_BLOCK = r"^(encoder\.(?:top_down|bottom_up)(?:\.\d)?)"
# RT-DETR: a fusion block is one CspRep.
HYBRID: list[RenameRule] = [
    *LEVELS,
    (_BLOCK + r"\.conv1\.", r"\1.deep."),
    (_BLOCK + r"\.conv2\.", r"\1.flat."),
    (_BLOCK + r"\.conv3\.", r"\1.merge."),
]
# D-FINE and DEIMv2: a fusion block is a RepElan. `pair` and `packed` mark what `split_pairs` takes apart.
_CSP: list[RenameRule] = [
    (r"\.(first|second)\.0\.conv1\.", r".\1.0.deep."),
    (r"\.(first|second)\.0\.conv2\.", r".\1.0.flat."),
]
_PACKED_CSP: list[RenameRule] = [(r"\.(first|second)\.0\.conv1\.", r".\1.0.packed.")]
_AUTHORS: list[RenameRule] = [
    *LEVELS,
    (r"^(encoder\.downsample\.\d)\.0\.cv1\.", r"\1.point."),
    (r"^(encoder\.downsample\.\d)\.0\.cv2\.", r"\1.depth."),
    (_BLOCK + r"\.cv1\.", r"\1.pair."),
    (_BLOCK + r"\.cv2\.", r"\1.first."),
    (_BLOCK + r"\.cv3\.", r"\1.second."),
    (_BLOCK + r"\.cv4\.", r"\1.merge."),
]
_HUB: list[RenameRule] = [
    *LEVELS,
    (r"^(encoder\..*)\.mlp\.layers\.0\.", r"\1.feedforward.up."),  # in memory; files have fc1 and fc2
    (r"^(encoder\..*)\.mlp\.layers\.1\.", r"\1.feedforward.down."),
    (r"^(encoder\.downsample\.\d)\.conv1\.", r"\1.point."),
    (r"^(encoder\.downsample\.\d)\.conv2\.", r"\1.depth."),
    (_BLOCK + r"\.conv1\.", r"\1.pair."),
]
D_FINE_AUTHORS: list[RenameRule] = [*_AUTHORS, *_CSP]
D_FINE_HUB: list[RenameRule] = [
    *_HUB,
    (_BLOCK + r"\.csp_rep1\.", r"\1.first.0."),
    (_BLOCK + r"\.conv2\.", r"\1.first.1."),
    (_BLOCK + r"\.csp_rep2\.", r"\1.second.0."),
    (_BLOCK + r"\.conv3\.", r"\1.second.1."),
    (_BLOCK + r"\.conv4\.", r"\1.merge."),
    *_CSP,
]
DEIMV2_AUTHORS: list[RenameRule] = [
    (r"^encoder\.down_sample1\.1\.", "encoder.coarser.1.conv."),
    (r"^encoder\.down_sample1\.2\.", "encoder.coarser.1.norm."),
    (r"^encoder\.down_sample2\.1\.", "encoder.downsample.1.conv."),
    (r"^encoder\.down_sample2\.2\.", "encoder.downsample.1.norm."),
    (r"^encoder\.bi_fusion\.cv\.", "encoder.mix."),
    *_AUTHORS,
    *_PACKED_CSP,
]
DEIMV2_HUB: list[RenameRule] = [
    (r"^encoder\.down_conv1\.", "encoder.coarser.1."),
    (r"^encoder\.down_conv2\.", "encoder.downsample.1."),
    (r"^encoder\.bi_fusion_conv\.", "encoder.mix."),
    *_HUB,
    (_BLOCK + r"\.conv2\.", r"\1.merge."),
    (_BLOCK + r"\.csp_rep1\.conv2\.", r"\1.first.1."),
    (_BLOCK + r"\.csp_rep2\.conv2\.", r"\1.second.1."),
    (_BLOCK + r"\.csp_rep1\.", r"\1.first.0."),
    (_BLOCK + r"\.csp_rep2\.", r"\1.second.0."),
    *_PACKED_CSP,
]
PAIRS = {"pair": ("keep", "deep"), "packed": ("flat", "deep"), "gated": ("gate", "up")}


def split_pairs(weights: Mapping[str, Tensor]) -> Weights:
    """Convolutions and Linears whose output the authors split, as the two of ours, which PAIRS names."""
    split: Weights = {}
    for name, tensor in weights.items():
        found = re.match(rf"(.*\.)({'|'.join(PAIRS)})\.(.*)", name)
        if found is None:
            split[name] = tensor
            continue
        for part, half in zip(PAIRS[found[2]], tensor.chunk(2)):
            split[f"{found[1]}{part}.{found[3]}"] = half.clone()
    return split
