"""What a layer is for: the words by which a member declares it, and a quantization policy keeps it float."""

from __future__ import annotations

from typing import Literal, get_args

# What a layer is for. A quantization policy (calib/policy/*.toml) decides by it which layers stay float.
Role = Literal[
    "decoder",  # refines queries and boxes
    "query_selection",  # scores and selects the queries
    "memory_projection",  # the part of the decoder or of the selection that is computed once per memory token
    "sampling_offsets",  # where deformable attention or a deformable convolution samples
    "attention_weights",  # how strongly deformable attention weighs each sample
    "dynamic_relu",  # predicts the slopes of a dynamic ReLU
    "box_distribution",  # predicts and integrates the distributions of a box's sides
    "dynamic_head",  # predicts and applies the weights with which a query reads its box
    "patch_embedding",  # makes a token of each patch of pixels
    "projector",  # fuses the maps of a vision transformer's blocks
]
ROLES: tuple[Role, ...] = get_args(Role)
