"""Published weights into our models: which file, which of its names is which of ours, and what did not fit.

Reads safetensors, or a torch file with `weights_only`: nothing in a weight file is executed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedetr.errors import ModelError
from edgedetr.models.detector import Detector

log = logging.getLogger(__name__)

# Where "auto" takes a backbone from: ImageNet weights in torchvision's layout; for vd, the backbone of the published
# RT-DETR (trained further on COCO), because its ImageNet weights alone are not on the hub.
SOURCES = {
    **{f"resnet{depth}": f"timm/resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}vd": f"PekingU/rtdetr_r{depth}vd" for depth in (18, 34, 50, 101)},
}
RANDOM = "--set model.backbone_weights=random --set model.backbone_norm=trainable --set model.frozen_stages=0"

# Names of other libraries -> ours, in order; each is applied wherever it matches. First the parts of a backbone, ...
BACKBONE = [
    # torchvision, timm (whose "d" stem is conv1.0 conv1.1 conv1.3 conv1.4 conv1.6 bn1)
    (r"^conv1\.0\.", "stem.0.conv."), (r"^conv1\.1\.", "stem.0.norm."), (r"^conv1\.3\.", "stem.1.conv."),
    (r"^conv1\.4\.", "stem.1.norm."), (r"^conv1\.6\.", "stem.2.conv."),
    (r"^conv1\.", "stem.0.conv."), (r"^bn1\.", "stem.LAST.norm."),
    (r"^layer([1-4])\.(\d+)\.conv([1-3])\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.body.{int(m[3]) - 1}.conv."),
    (r"^layer([1-4])\.(\d+)\.bn([1-3])\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.body.{int(m[3]) - 1}.norm."),
    (r"^layer([1-4])\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) - 1}.{m[2]}.shortcut.project."),
    # transformers' ResNet and RT-DETR's ResNet-vd
    (r"^embedder\.embedder\.(\d)\.", r"stem.\1."), (r"^embedder\.embedder\.", "stem.0."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.", r"stages.\1.\2.body."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(?:1\.)?", r"stages.\1.\2.shortcut.project."),
    (r"\.convolution\.", ".conv."), (r"\.normalization\.", ".norm."),
]
# ... then of a detector in transformers' layouts, as files and as in memory.
DETECTOR = [
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone."),
    (r"^model\.(?:encoder_input_proj)\.(\d)\.0\.", r"encoder.project.\1.conv."),
    (r"^model\.(?:encoder_input_proj)\.(\d)\.1\.", r"encoder.project.\1.norm."),
    (r"^model\.decoder_input_proj\.(\d)\.0\.", r"encoder.memory_project.\1.conv."),
    (r"^model\.decoder_input_proj\.(\d)\.1\.", r"encoder.memory_project.\1.norm."),
    (r"^model\.encoder\.(?:aifi|encoder)\.0\.layers\.(\d)\.", r"encoder.attention.\1."),
    (r"^model\.encoder\.lateral_convs\.", "encoder.lateral."),
    (r"^model\.encoder\.downsample_convs\.", "encoder.downsample."),
    (r"^model\.encoder\.fpn_blocks\.", "encoder.top_down."), (r"^model\.encoder\.pan_blocks\.", "encoder.bottom_up."),
    (r"\.bottlenecks\.(\d)\.conv1\.", r".blocks.\1.wide."), (r"\.bottlenecks\.(\d)\.conv2\.", r".blocks.\1.narrow."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv1\.", r"\1.deep."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv2\.", r"\1.flat."),
    (r"^(encoder\.(?:top_down|bottom_up)\.\d)\.conv3\.", r"\1.merge."),
    (r"^model\.enc_output\.0\.", "selector.project."), (r"^model\.enc_output\.1\.", "selector.norm."),
    (r"^model\.enc_score_head\.", "selector.score."), (r"^model\.enc_bbox_head\.", "selector.box."),
    (r"^model\.denoising_class_embed\.", "selector.denoising_class_embed."),
    (r"^(?:model\.decoder\.)?class_embed\.", "decoder.boxes.score."),
    (r"^(?:model\.decoder\.)?bbox_embed\.", "decoder.boxes.box."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_position."),
    (r"^class_labels_classifier\.", "decoder.boxes.score."), (r"^bbox_predictor\.", "decoder.boxes.box."),
    (r"^model\.query_position_embeddings\.", "selector.position."),
    (r"^model\.input_projection\.", "encoder.project."),
    (r"^model\.encoder\.layernorm\.", "encoder.norm."), (r"^model\.decoder\.layernorm\.", "decoder.norm."),
    (r"^model\.encoder\.layers\.", "encoder.layers."), (r"^model\.decoder\.layers\.", "decoder.layers."),
    (r"\.(?:mlp\.)?fc1\.", ".feedforward.up."), (r"\.(?:mlp\.)?fc2\.", ".feedforward.down."),
    (r"\.final_layer_norm\.", ".feedforward_norm."),
    (r"\.sampling_offsets\.", ".offsets."), (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."), (r"\.output_proj\.", ".out."),
    (r"\.([qkv])_proj\.", r".\1."), (r"\.(?:out_proj|o_proj)\.", ".out."),
    (r"^(decoder\..*)\.self_attn_layer_norm\.", r"\1.self_norm."), (r"\.self_attn_layer_norm\.", ".attention_norm."),
    (r"^(decoder\..*)\.self_attn\.", r"\1.self_attention."), (r"\.self_attn\.", ".attention."),
    (r"\.encoder_attn_layer_norm\.", ".cross_norm."), (r"\.encoder_attn\.", ".cross_attention."),
]
# Nothing of ours: ImageNet's classifier, counters of BatchNorm, and constants that follow from the configuration.
IGNORED = re.compile(r"^fc\.|^classifier\.|num_batches_tracked$|n_points_scale$|num_points_scale$|anchors$|valid_mask$")
# The only weights whose size depends on the number of classes.
PER_CLASS = re.compile(r"^selector\.(score|denoising_class_embed)\.|^decoder\.boxes\.score\.")


@dataclass(frozen=True)
class Loaded:
    """What came from the file, and the names that kept their fresh values because the classes differ."""

    source: str
    tensors: int
    fresh: tuple[str, ...] = ()


def rename_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a torchvision, timm or transformers ResNet under our backbone's names."""
    # The last convolution of the stem has no number of its own in timm's deep stem: count it.
    last = "2" if "conv1.6.weight" in weights else "0"
    deep = any(re.match(r"layer\d\.\d+\.downsample\.2\.", name) for name in weights)
    renamed = {}
    for name, tensor in weights.items():
        if IGNORED.search(name):
            continue
        new = _rename(name, BACKBONE).replace("LAST", last)
        # Sequential(conv, norm), or with pooling before it: numbers 0 1, or 1 2.
        conv = 1 if deep and f"{name.rsplit('downsample.', 1)[0]}downsample.0.weight" not in weights else 0
        new = new.replace(f"shortcut.project.{conv}.", "shortcut.project.conv.")
        renamed[new.replace(f"shortcut.project.{conv + 1}.", "shortcut.project.norm.")] = tensor
    return renamed


def rename_detector(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' Detr, TableTransformer, RTDetr or RTDetrV2 under our names."""
    renamed = {_rename(name, DETECTOR): tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    inner = {name.removeprefix("backbone."): tensor for name, tensor in renamed.items() if name.startswith("backbone.")}
    rest = {name: tensor for name, tensor in renamed.items() if not name.startswith("backbone.")}
    return {**rest, **{f"backbone.{name}": tensor for name, tensor in rename_backbone(inner).items()}}


def load_detector(detector: Detector, source: str) -> Loaded:
    """Published weights of a whole detector; class heads start anew where the number of classes differs."""
    return fit(detector, rename_detector(read(source)), source)


def load_backbone(detector: Detector, config: Any) -> Loaded | None:
    """What `config.backbone_weights` asks for: None for "random"; else the backbone's tensors are replaced."""
    source = config.backbone_weights
    if source == "random":
        return None
    if source == "auto":
        if config.backbone_width != 1 or config.backbone not in SOURCES:
            raise ModelError(f"no published weights for {config.backbone} at width {config.backbone_width}; "
                             f"use model.backbone_width=1, or train from scratch: {RANDOM}")
        source = SOURCES[config.backbone]
    weights = read(source)
    whole = rename_detector(weights)
    inner = {name.removeprefix("backbone."): tensor for name, tensor in whole.items() if name.startswith("backbone.")}
    return fit(detector.backbone, inner or rename_backbone(weights), source)


@torch.no_grad()
def fit(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy tensors of the same names; ModelError that lists every one that is missing, left over or of another size."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not IGNORED.search(name)}
    weights = {name: tensor for name, tensor in weights.items() if not IGNORED.search(name)}
    fresh = [name for name in own if PER_CLASS.match(name) and name in weights
             and own[name].shape[0] != weights[name].shape[0] and own[name].shape[1:] == weights[name].shape[1:]]
    shapes = [f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}" for name in own
              if name in weights and name not in fresh and weights[name].shape != own[name].shape]
    missing, extra = set(own) - set(weights), set(weights) - set(own)
    if missing or extra or shapes:
        raise ModelError(f"{source} does not fit this model: {_list('missing', missing)}{_list('left over', extra)}"
                         f"{_list('of another size', shapes)}expected the same architecture; check the [model] section")
    for name, tensor in own.items():
        if name not in fresh:
            tensor.copy_(weights[name])
    if fresh:
        log.warning("%s: %d tensors kept; started anew, because the number of classes differs: %s",
                    source, len(own) - len(fresh), ", ".join(fresh))
    return Loaded(source, len(own) - len(fresh), tuple(fresh))


def read(source: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, or of a model on the Hugging Face hub ("owner/name")."""
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise ModelError(f"{path}: no such file; expected weights there, or train from scratch: {RANDOM}")
        path = _download(source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch each raise their own kinds, without a common base
        raise ModelError(f"{path}: not readable as weights ({error}); expected safetensors, or a torch file that holds "
                         "nothing but tensors") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in ("ema", "module", "model", "state_dict") if key in content), None)
        if inner is None:
            raise ModelError(f"{path}: no tensors inside; expected a state dict")
        content = inner
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _download(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelError(f"{name} is on the Hugging Face hub, which needs: pip install 'edgedetr[train]'; "
                         f"or train from scratch: {RANDOM}") from error
    try:
        return Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # offline, no such name, no access: the hub client's and its transport's own kinds
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(f"weights {name!r} could not be downloaded ({type(error).__name__}: {reason}); go online "
                         f"once, name a .safetensors file, or train from scratch: {RANDOM}") from error


def _rename(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _list(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{what} ({len(names)}): {', '.join(names)}; " if names else ""
