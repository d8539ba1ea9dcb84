"""Infers a member's configuration from the sizes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from edgedetr.errors import ModelError
from edgedetr.models.backbones import hgnetv2
from edgedetr.models.backbones.resnet import DEPTHS
from edgedetr.models.backbones.vit_designs import DESIGNS, ROTARY_DESIGNS


@dataclass(frozen=True)
class StateDict:
    """Tensors under our names, and what a configuration is read from.

    heads   of attention; no tensor's size shows them, and the samples per head follow from them
    known   fields of the configuration that another file tells
    """

    weights: Mapping[str, Tensor]
    heads: int = 8
    known: Mapping[str, Any] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.weights

    def rows(self, *names: str) -> int | None:
        """First dimension of the first of these tensors that exists; None where there is none of them."""
        return next((self.weights[name].shape[0] for name in names if name in self.weights), None)

    def rows_of_table(self, name: str) -> int | None:
        """Second dimension of a tensor [1, rows, C], or None."""
        return self.weights[name].shape[1] if name in self.weights else None

    def count(self, pattern: str) -> int | None:
        """How many different values the group of `pattern` has among the names; None where no name fits."""
        return len({found[1] for name in self.weights if (found := re.match(pattern, name))}) or None


Reader = Callable[[StateDict], Any]  # the value of one field, or None to keep its default


def rows_of(*names: str) -> Reader:
    return lambda state: state.rows(*names)


def count_of(pattern: str) -> Reader:
    return lambda state: state.count(pattern)


def has(name: str) -> Reader:
    return lambda state: state.has(name)


# Fields that several members share; those of one member alone are read by its own record.
SHARED: dict[str, Reader] = {
    "hidden": rows_of("decoder.layers.0.cross_norm.weight"),
    "ffn": rows_of("decoder.layers.0.feedforward.up.weight"),
    # A learned slope (PReLU) is a tensor; the other activations have none.
    "ffn_activation": lambda state: "prelu" if state.has("decoder.layers.0.feedforward.activation.weight") else "relu",
    "encoder_layers": count_of(r"encoder\.layers\.(\d+)\."),
    "decoder_layers": count_of(r"decoder\.layers\.(\d+)\."),
    "queries": rows_of("selector.position.weight", "selector.content.weight", "selector.box.weight"),
    "dynamic_hidden": rows_of("decoder.layers.0.cross_attention.interaction.norms.0.weight"),
    "denoising": has("selector.denoising_class_embed.weight"),
    "layer_scale": lambda state: 1e-5 if state.has("backbone.transformer.blocks.0.attention_scale.gamma") else None,
}


class ReadableMember(Protocol):
    """What is needed of a `models.member.Member`."""

    @property
    def config(self) -> type[Any]:
        """Its configuration, a dataclass."""
        ...

    @property
    def readers(self) -> Mapping[str, Reader]:
        """Field -> its value from the tensors, beside those of all members."""
        ...


def config_from_state_dict(
    member: ReadableMember, weights: Mapping[str, Tensor], heads: int = 8, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Values of the fields of a member's configuration that its tensors decide; the others keep their defaults.

    weights   under our names
    known     fields that another file tells, for those that no tensor shows alone
    """
    state, names = StateDict(weights, heads, known or {}), {item.name for item in fields(member.config)}
    found = {name: reader(state) for name, reader in {**SHARED, **member.readers}.items() if name in names}
    return {name: value for name, value in {**found, **_backbone(state)}.items() if value is not None and name in names}


def num_classes(weights: Mapping[str, Tensor], activation: str) -> int:
    """Number of classes: rows of the class head, without "no object"."""
    found = StateDict(weights).rows("decoder.boxes.score.weight", "decoder.boxes.score.0.weight")
    if found is None:
        raise ModelError("no class head (decoder.boxes.score) among the weights; expected those of a whole detector")
    return found - (activation == "softmax")


def _backbone(state: StateDict) -> dict[str, Any]:
    """Name and width of the ResNet or HGNetV2, or of the windowed transformer with what its tensors show."""
    if state.has("backbone.stem.stem1.conv.weight"):
        return _hgnetv2(state)
    if state.has("backbone.prior.stem.conv.weight"):
        return _dinov3(state)
    if state.has("backbone.patch.weight"):
        return _windowed_vit(state)
    stem = state.count(r"backbone\.stem\.(\d)\.conv")
    if stem is None:
        return {}
    blocks = tuple(state.count(rf"backbone\.stages\.{stage}\.(\d+)\.") or 0 for stage in range(4))
    bottleneck = state.has("backbone.stages.0.0.body.2.conv.weight")
    for name, (depths, wide) in DEPTHS.items():
        if depths == blocks and wide == bottleneck:
            width = state.weights[f"backbone.stem.{stem - 1}.conv.weight"].shape[0] / 64
            return {"backbone": name + "vd" * (stem == 3), "backbone_width": width}
    raise ModelError(
        f"the backbone has {' + '.join(map(str, blocks))} blocks, which is no ResNet of this package; "
        f"expected one of {', '.join(DEPTHS)}"
    )


def _hgnetv2(state: StateDict) -> dict[str, Any]:
    """Name and width of the HGNetV2."""

    def rows(stage: int, part: str) -> int:
        return state.rows(f"backbone.stages.{stage}.blocks.0.{part}.conv.weight") or 0

    stages = range(state.count(r"backbone\.stages\.(\d+)\.") or 0)
    blocks = tuple(state.count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") or 0 for stage in stages)
    layers = state.count(r"backbone\.stages\.0\.blocks\.0\.layers\.(\d+)\.")
    affine = state.has("backbone.stem.stem1.activation.scale")
    stem = [state.rows(f"backbone.stem.{part}.conv.weight") or 0 for part in ("stem1", "stem4")]
    middle = [rows(stage, "layers.0.depth") or rows(stage, "layers.0") for stage in stages]
    outputs = [rows(stage, "aggregate.1") for stage in stages]
    for name, size in hgnetv2.SIZES.items():
        width = outputs[-1] / size.outputs[-1] if outputs else 0.0
        expected = [
            [hgnetv2.scaled(channels, width) for channels in counts]
            for counts in (size.stem, size.middle, size.outputs)
        ]
        same = (size.blocks, size.layers, size.affine) == (blocks, layers, affine)
        kernel = state.weights.get("backbone.stages.2.blocks.0.layers.0.depth.conv.weight")
        if (
            same
            and expected == [stem, middle, outputs]
            and kernel is not None
            and kernel.shape[-1] == size.light_kernel
        ):
            return {"backbone": name, "backbone_width": width}
    raise ModelError(
        f"the backbone is an HGNetV2 of {' + '.join(map(str, blocks))} blocks with {layers} layers each and outputs of "
        f"{', '.join(map(str, outputs))} channels, which is none of this package; expected one of "
        f"{', '.join(hgnetv2.NAMES)}"
    )


def _windowed_vit(state: StateDict) -> dict[str, Any]:
    """Name, width, patch and grid of positions; no tensor shows windows, nor which maps are read."""
    patch = state.weights["backbone.patch.weight"]  # [C, 3, P, P]
    classes, registers = state.has("backbone.class_token"), state.has("backbone.register_tokens")
    cells = (state.rows_of_table("backbone.position.table") or 0) - classes
    fitting = {
        name: design.dim
        for name, design in DESIGNS.items()
        if design.class_token == classes and bool(design.registers) == registers
    }
    # An exact width if there is one; else the smallest design, whose heads another width keeps.
    name = next((name for name, dim in fitting.items() if dim == patch.shape[0]), min(fitting, key=fitting.__getitem__))
    width = patch.shape[0] / fitting[name]
    return {
        "backbone": name,
        "backbone_width": width,
        "backbone_patch": patch.shape[2],
        "backbone_grid": math.isqrt(cells) or None,
    }


def _dinov3(state: StateDict) -> dict[str, Any]:
    """Name and width of a backbone of DEIMv2: the first whose channels all fit, at the width of its patches."""
    dim, prior, outputs = (
        state.rows(f"backbone.{part}.weight") or 0 for part in ("transformer.patch", "prior.stem.conv", "fuse.0.conv")
    )
    registers = state.has("backbone.transformer.register_tokens")
    gated = state.has("backbone.transformer.blocks.0.feedforward.gate.weight")
    for name, design in ROTARY_DESIGNS.items():
        width = dim / design.dim
        scaled = [round(channels * width) for channels in (design.prior, design.outputs)]
        if (design.pretrained, design.gated) == (registers, gated) and scaled == [prior, outputs]:
            return {"backbone": name, "backbone_width": width}
    raise ModelError(
        f"the backbone is a vision transformer of {dim} channels with an adapter of {prior} and levels of {outputs}, "
        f"which is none of this package; expected one of {', '.join(ROTARY_DESIGNS)}"
    )
