"""What a member's configuration must have been, read from the sizes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.backbones.resnet import DEPTHS

Weights = Mapping[str, Tensor]


def config_from_state_dict(config: type[Any], weights: Weights, heads: int = 8) -> dict[str, Any]:
    """Values of the fields of `config` that the tensors, under our names, decide; the others keep their defaults.

    heads   of attention; no tensor's size tells them, and samples per head follow from them
    """
    known = {field.name for field in fields(config)}
    found: dict[str, Any] = {name: value(weights) for name, value in READ.items() if name in known}
    if "points" in known:
        found["points"] = _points(weights, heads)
    values = {name: value for name, value in {**found, **_backbone(weights)}.items() if value is not None}
    return {name: value for name, value in values.items() if name in known}


def num_classes(weights: Weights, activation: str) -> int:
    """Number of classes: rows of the class head, without "no object"."""
    for name in ("decoder.boxes.score.weight", "decoder.boxes.score.0.weight"):
        if name in weights:
            return weights[name].shape[0] - (activation == "softmax")
    raise ModelError("no class head (decoder.boxes.score) among the weights; expected those of a whole detector")


def _rows(*names: str) -> Callable[[Weights], int | None]:
    return lambda weights: next((weights[name].shape[0] for name in names if name in weights), None)


def _count(pattern: str) -> Callable[[Weights], int | None]:
    """Different numbers that `pattern` captures."""
    return lambda weights: len({m[1] for name in weights if (m := re.match(pattern, name))}) or None


def _has(name: str) -> Callable[[Weights], bool]:
    return lambda weights: name in weights


def _position(weights: Weights) -> str | None:
    """Learned positions are tensors; sine and none are not, and sine is the default."""
    if "encoder.position.row.weight" in weights:
        return "learned"
    return "sequence" if "encoder.position.table" in weights else None


def _queries(weights: Weights) -> int | None:
    """Learned queries; None where they are selected, which no tensor counts."""
    patterns = _rows("selector.pattern.weight")(weights)
    if patterns is not None and "selector.points.points" in weights:
        return patterns * weights["selector.points.points"].shape[0]
    return _rows("selector.position.weight", "selector.embed.weight", "selector.content.weight", "selector.box.weight")(
        weights
    )


def _share(weights: Weights) -> float | None:
    """Width of RT-DETR's fusion blocks, share of the encoder's."""
    name, inside = "encoder.top_down.0.deep.conv.weight", _rows("encoder.project.0.conv.weight")(weights)
    return weights[name].shape[0] / inside if name in weights and inside else None


def _encoder_width(weights: Weights) -> int | None:
    """Channels of RT-DETR's hybrid encoder where they are not those of the decoder; 0 where they are."""
    inside, outside = _rows("encoder.project.0.conv.weight")(weights), READ["hidden"](weights)
    return None if inside is None else 0 if inside == outside else inside


def _activation(weights: Weights) -> str:
    """A learned slope is a tensor of its own."""
    return "prelu" if "decoder.layers.0.feedforward.activation.weight" in weights else "relu"


def _points(weights: Weights, heads: int) -> int | tuple[int, ...] | str | None:
    """Samples per head and level, equally many in every level; of anchor points, whether they are learned."""
    if "selector.pattern.weight" in weights:
        return "learned" if "selector.points.points" in weights else "grid"
    name = "decoder.layers.0.cross_attention.weights.weight"
    if name not in weights:
        return None
    if "encoder.place.level" in weights:
        return weights[name].shape[0] // (heads * weights["encoder.place.level"].shape[0])
    return (weights[name].shape[0] // (heads * 3),) * 3


READ: dict[str, Callable[[Weights], Any]] = {
    "hidden": _rows("decoder.layers.0.cross_norm.weight"),
    "ffn": _rows("decoder.layers.0.feedforward.up.weight"),
    "encoder_ffn": _rows("encoder.attention.0.feedforward.up.weight"),
    "decoder_ffn": _rows("decoder.layers.0.feedforward.up.weight"),
    "encoder_layers": _count(r"encoder\.(?:layers|attention)\.(\d+)\."),
    "decoder_layers": _count(r"decoder\.layers\.(\d+)\."),
    "queries": _queries,
    "patterns": _rows("selector.pattern.weight"),
    "dynamic_hidden": _rows("decoder.layers.0.cross_attention.interaction.norms.0.weight"),
    "position": _position,
    "pre_norm": _has("encoder.norm.weight"),
    "levels": _rows("encoder.place.level"),
    "refine": _has("decoder.boxes.box.0.layers.0.weight"),
    "two_stage": _has("selector.place.weight"),
    "expansion": _share,
    "encoder_width": _encoder_width,
    "fusion_blocks": _count(r"encoder\.top_down\.0\.blocks\.(\d+)\."),
    "denoising": _has("selector.denoising_class_embed.weight"),
    "layer_scale": lambda weights: 1e-5 if "backbone.transformer.blocks.0.attention_scale.gamma" in weights else None,
    "scale_attention": lambda weights: "channel" if "encoder.layers.0.scale.squeeze.weight" in weights else None,
    "learned_content": _has("selector.content.weight"),
    "ffn_activation": _activation,
}


def _backbone(weights: Weights) -> dict[str, Any]:
    """Name and width of the ResNet."""
    stem = _count(r"backbone\.stem\.(\d)\.conv")(weights)
    if stem is None:
        return {}
    blocks = tuple(_count(rf"backbone\.stages\.{stage}\.(\d+)\.")(weights) or 0 for stage in range(4))
    bottleneck = "backbone.stages.0.0.body.2.conv.weight" in weights
    for name, (depths, wide) in DEPTHS.items():
        if depths == blocks and wide == bottleneck:
            width = weights[f"backbone.stem.{stem - 1}.conv.weight"].shape[0] / 64
            return {"backbone": name + "vd" * (stem == 3), "backbone_width": width}
    raise ModelError(
        f"the backbone has {' + '.join(map(str, blocks))} blocks, which is no ResNet of this package; "
        f"expected one of {', '.join(DEPTHS)}"
    )
