"""Tables of every key in transformers' config.json for the models that can be imported, and how each is handled.

A key is read into a field of the member's configuration, must agree with the tensors, must have a value that our
networks compute, or has no effect on a trained model (with the reason). The import refuses a key that is in no table.
tests/models/checkpoints/test_transformers_config.py compares the tables with the configuration classes, and every entry
numerically.
Sources: the configuration and modeling files of transformers 4.57 and 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _itself(value: Any) -> Any:
    return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else -1


@dataclass(frozen=True)
class Key:
    """How a key is handled, and why: for messages and for readers of the table."""

    why: str = ""


@dataclass(frozen=True)
class Read(Key):
    """Its value is read into a field of the member's configuration.

    field    of the member's configuration
    default  of transformers, if config.json does not have the key
    words    their words and ours; None: a whole number from 1, or true and false, as the default
    of       (value or default, all keys) -> ours, or None for a value that is refused; None: itself
    """

    field: str = ""
    default: Any = None
    words: dict[str, Any] | None = None
    of: Callable[[Any, Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True)
class Same(Key):
    """The tensors decide this field; the key must agree, after `of` if it counts differently.

    default  of transformers, if config.json does not have the key; None if a wrong one fails there too
    """

    field: str = ""
    of: Callable[[Any], Any] = _itself
    default: Any = None


@dataclass(frozen=True)
class Only(Key):
    """The only values that our networks compute, after `of`."""

    values: tuple[Any, ...] = ()
    of: Callable[[Any], Any] = _itself


@dataclass(frozen=True)
class NoEffect(Key):
    """A trained model computes the same whatever its value is, for the reason in `why`."""


@dataclass(frozen=True)
class Special(Key):
    """Read by special code, in transformers_config.py or importing/, because several keys decide together."""


def _all(entry: Key, *names: str) -> dict[str, Key]:
    return dict.fromkeys(names, entry)


GENERIC: dict[str, Key] = {
    **_all(Special("which classes can be read"), "model_type", "architectures"),
    **_all(Special("names of the classes; as many as the class head has rows"), "id2label", "num_labels"),
    **_all(NoEffect("the names again, the other way round"), "label2id"),
    **_all(
        NoEffect("where the file comes from"), "_name_or_path", "name_or_path", "_commit_hash", "transformers_version"
    ),
    **_all(
        NoEffect("weights are computed with in float32, however they are stored"),
        "dtype",
        "torch_dtype",
        "use_bfloat16",
    ),
    **_all(
        NoEffect("what else is returned next to logits and boxes"),
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "tie_last_hidden_states",
    ),
    **_all(
        NoEffect("how it is computed, and not what"),
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "torchscript",
        "chunk_size_feed_forward",
        "use_cache",
        "gradient_checkpointing",
        "disable_custom_kernels",
    ),
    **_all(
        NoEffect("of classifiers and language models; no detector reads it"),
        "is_encoder_decoder",
        "is_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "finetuning_task",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "tf_legacy_loss",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "classifier_dropout",
        "max_position_embeddings",
        "scale_embedding",
    ),
    **_all(
        NoEffect("the file holds each tensor, or one for all copies; copies that differ are refused"),
        "tie_word_embeddings",
    ),
    "pruned_heads": Only("pruned heads are not supported", ({}, None)),
    "per_layer_config": Only("all layers are built alike", ({}, None)),
    "quantization_config": Only("weights that are stored quantized are not read", (None,)),
    "auto_map": Only("code that comes with a model is not executed", (None,)),
}

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
_HEADS: dict[str, Key] = {
    "encoder_attention_heads": Read("as many in the encoder as in the decoder", "heads", 8),
    "decoder_attention_heads": Read("as many in the encoder as in the decoder", "heads", 8),
    "num_attention_heads": Read("another name of encoder_attention_heads", "heads", None),
}
_TRAINING: dict[str, Key] = {
    **_all(
        NoEffect("of the loss and its matching, which training has and inference has not"),
        "class_cost",
        "bbox_cost",
        "giou_cost",
        "mask_loss_coefficient",
        "dice_loss_coefficient",
        "cls_loss_coefficient",
        "bbox_loss_coefficient",
        "giou_loss_coefficient",
        "eos_coefficient",
        "focal_alpha",
    ),
    **_all(
        NoEffect("nothing is dropped at inference"),
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
        "decoder_layerdrop",
    ),
    **_all(
        NoEffect("the first weights, which training replaced"),
        "init_std",
        "init_xavier_std",
        "initializer_range",
        "initializer_bias_prior_prob",
    ),
    "use_pretrained_backbone": NoEffect("the first weights of the backbone, which training replaced"),
}
_BACKBONE = _all(
    Special("together they determine the backbone, its levels and its dilation"),
    "backbone_config",
    "backbone",
    "use_timm_backbone",
    "backbone_kwargs",
    "dilation",
)
_LAYERS: dict[str, Key] = {
    "encoder_layers": Same("", "encoder_layers", default=6),
    "num_hidden_layers": Same("another name of encoder_layers", "encoder_layers"),
    "decoder_layers": Same("", "decoder_layers", default=6),
    "hidden_size": Same("channels of every token", "hidden"),
    "d_model": Same("channels of every token", "hidden"),
}
_NORM = Read("with it, transformers normalizes between decoder layers at inference too", "norm_between", False)

_DENSE: dict[str, Key] = {
    **GENERIC,
    **_TRAINING,
    **_BACKBONE,
    **_HEADS,
    **_LAYERS,
    "num_channels": Only("images have three channels", (3,)),
    "encoder_ffn_dim": Same("one width in encoder and decoder", "ffn"),
    "decoder_ffn_dim": Same("one width in encoder and decoder", "ffn"),
    "num_queries": Read("", "queries", None),  # the tensors count them, and `load_weights` compares
    "activation_function": Read("of all feed-forward parts", "ffn_activation", "relu", _ACTIVATIONS),
    "position_embedding_type": Only("learned positions are built for DETR alone", ("sine",)),
}
DETR: dict[str, Key] = {
    **_DENSE,
    "auxiliary_loss": _NORM,
    "position_embedding_type": Read("", "position", "sine", {"sine": "sine", "learned": "learned"}),
}
CONDITIONAL: dict[str, Key] = {**_DENSE, "auxiliary_loss": _NORM}
DAB: dict[str, Key] = {
    **_DENSE,
    "auxiliary_loss": NoEffect("every layer is normalized for its own prediction, with it and without"),
    "activation_function": Read(
        "of all feed-forward parts", "ffn_activation", "prelu", {**_ACTIVATIONS, "prelu": "prelu"}
    ),
    **_all(
        Only("temperatures of the position encoding, as published", (20,)), "temperature_height", "temperature_width"
    ),
    "query_dim": Only("a query is a box", (4,)),
    "random_refpoints_xy": NoEffect("the first weights, which training replaced"),
    "keep_query_pos": Only("positions of the queries join the content in the first layer alone", (False,)),
    "num_patterns": Only("one query per box", (0,)),
    "normalize_before": Only("layers normalize after each part", (False,)),
    "sine_position_embedding_scale": Only("a full turn", (None,)),
}
DEFORMABLE: dict[str, Key] = {
    **_DENSE,
    "num_queries": Special("or two_stage_num_proposals, by two_stage"),
    "two_stage_num_proposals": Special("or num_queries, by two_stage"),
    "two_stage": Same("", "two_stage", default=False),
    "with_box_refine": Same("", "refine", default=False),
    "num_feature_levels": Same("", "levels", default=4),
    "encoder_n_points": Same("as many in the encoder as in the decoder", "points"),
    "decoder_n_points": Same("as many in the encoder as in the decoder", "points"),
    "return_intermediate": NoEffect("what else is returned next to logits and boxes"),
    "auxiliary_loss": NoEffect("layers are not normalized for their predictions, with it and without"),
}
RT_DETR: dict[str, Key] = {
    **GENERIC,
    **_TRAINING,
    **_BACKBONE,
    **_HEADS,
    **_LAYERS,
    **_all(
        NoEffect("of the loss and its matching, which training has and inference has not"),
        "matcher_alpha",
        "matcher_gamma",
        "matcher_class_cost",
        "matcher_bbox_cost",
        "matcher_giou_cost",
        "auxiliary_loss",
        "focal_loss_alpha",
        "focal_loss_gamma",
        "weight_loss_vfl",
        "weight_loss_bbox",
        "weight_loss_giou",
    ),
    "use_focal_loss": Only("without it scores are softmax's", (True,)),
    **_all(NoEffect("noised queries exist in training alone"), "num_denoising", "label_noise_ratio", "box_noise_scale"),
    **_all(Only("as published", (1e-5,)), "layer_norm_eps", "batch_norm_eps"),
    "freeze_backbone_batch_norms": NoEffect("at inference BatchNorm is frozen in any case"),
    "encoder_layers": Same("", "encoder_layers", default=1),
    "encoder_hidden_dim": Same("channels of the hybrid encoder", "encoder_width"),
    "encoder_in_channels": Only("one for each of C3, C4, C5; the widths are the backbone's own", (3,), _length),
    "decoder_in_channels": Only("one for each of C3, C4, C5; the tensors tell the widths", (3,), _length),
    "feat_strides": Only("C3, C4, C5", ([8, 16, 32],)),
    "encoder_ffn_dim": Same("", "encoder_ffn"),
    "decoder_ffn_dim": Same("", "decoder_ffn"),
    "encode_proj_layers": Only("attention within C5 alone", ([2],)),
    "positional_encoding_temperature": Only("as published", (10000,)),
    "encoder_activation_function": Read("", "encoder_activation", "gelu", _ACTIVATIONS),
    "activation_function": Read("of convolutions", "conv_activation", "silu", _ACTIVATIONS),
    "decoder_activation_function": Read("", "decoder_activation", "relu", _ACTIVATIONS),
    "eval_size": Only("with it, transformers leaves positions out at inference", (None,)),
    "normalize_before": Only("layers normalize after each part", (False,)),
    "hidden_expansion": Same("", "expansion"),
    "num_queries": Read("", "queries", 300),
    "num_feature_levels": Only("C3, C4, C5", (3,)),
    "decoder_n_points": Same("", "points", lambda value: (value,) * 3),
    "learn_initial_query": Same("", "learned_content", default=False),
    "anchor_image_size": NoEffect("anchors are those of the input's size; transformers runs no other than this one"),
    "with_box_refine": Only("every layer moves the box of the layer before", (True,)),
}
RT_DETR_V2: dict[str, Key] = {
    **RT_DETR,
    "decoder_n_levels": Only("C3, C4, C5", (3,)),
    "decoder_offset_scale": Only("as published", (0.5,)),
    "decoder_method": Read("", "method", "default", {"default": "default", "discrete": "discrete"}),
}

# LW-DETR and RF-DETR, whose configurations differ in the projector and in their nested backbone.
_GROUP_DETR: dict[str, Key] = {
    **GENERIC,
    **_TRAINING,
    **_all(
        NoEffect("of the loss and its matching, which training has and inference has not"),
        "class_loss_coefficient",
        "auxiliary_loss",
    ),
    "backbone_config": Special("the windowed transformer, by its own table"),
    "d_model": Same("channels of every token", "hidden"),
    "decoder_layers": Same("", "decoder_layers", default=3),
    "decoder_ffn_dim": Same("", "ffn"),
    "decoder_n_points": Same("", "points"),
    "decoder_self_attention_heads": Read("", "heads", 8),
    "decoder_cross_attention_heads": Read("", "cross_heads", 16),
    "decoder_activation_function": Only("as published", ("relu",)),
    "num_queries": Same("in each group", "queries"),
    "group_detr": Same("groups of queries", "groups"),
    "attention_bias": Only("as published", (True,)),
    "activation_function": Only("of the projector, as published", ("silu",)),
    "hidden_expansion": Only("of the projector, as published", (0.5,)),
    "c2f_num_blocks": Only("of the projector, as published", (3,)),
}
LW_DETR: dict[str, Key] = {
    **_GROUP_DETR,
    "projector_scale_factors": Same("", "scales", lambda value: tuple(value) if isinstance(value, list) else value),
    "batch_norm_eps": Only("as published", (1e-5,)),
    "num_feature_levels": Special("as many as projector_scale_factors"),
    **_all(NoEffect("follow from d_model"), "projector_in_channels", "projector_out_channels"),
}
RF_DETR: dict[str, Key] = {
    **_GROUP_DETR,
    "num_feature_levels": Only("the maps' own stride", (1,)),
    "layer_norm_eps": Only("of the projector: 1e-6 by its authors, 1e-5 by transformers", (1e-5, 1e-6)),
    **_all(
        NoEffect("of masks, which a model with boxes alone has not"),
        "mask_point_sample_ratio",
        "mask_downsample_ratio",
        "mask_class_loss_coefficient",
        "mask_dice_loss_coefficient",
        "segmentation_head_activation_function",
        "intermediate_size",
    ),
}


def _levels_of_strides(value: Any) -> int:
    return next((levels for levels in (2, 3) if value in ([8, 16, 32][-levels:], (8, 16, 32)[-levels:])), -1)


def _level_of_attention(value: Any) -> int:
    """[2] -> 3 levels: attention within the third."""
    return next((levels for levels in (2, 3) if value in ([levels - 1], (levels - 1,))), -1)


def _three_times(value: Any) -> int:
    return round(3 * value) if isinstance(value, (int, float)) and abs(value) < 1 << 16 else -1


def _points_of_levels(value: Any, raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """One number for all levels, or one for each."""
    each = value if isinstance(value, list) else [value] * len(raw.get("encoder_in_channels", (0, 0, 0)))
    good = all(isinstance(number, int) and not isinstance(number, bool) and 0 < number < 1 << 16 for number in each)
    return tuple(each) if each and good else None


D_FINE: dict[str, Key] = {
    **RT_DETR,
    "decoder_offset_scale": RT_DETR_V2["decoder_offset_scale"],
    "decoder_method": RT_DETR_V2["decoder_method"],
    **_all(
        NoEffect("of the loss and its matching, which training has and inference has not"),
        "weight_loss_fgl",
        "weight_loss_ddf",
    ),
    "encoder_in_channels": Only(
        "one for each of C3, C4, C5, or of the last two; the widths are the backbone's own", (3, 2), _length
    ),
    "decoder_in_channels": Only("one for each level", (3, 2), _length),
    "activation_function": Only("transformers gives another one to half of a fusion block alone", ("silu", "swish")),
    "feat_strides": Same("C3, C4, C5, or the last two", "levels", _levels_of_strides, (8, 16, 32)),
    "encode_proj_layers": Same("attention within C5 alone", "levels", _level_of_attention, (2,)),
    "num_feature_levels": Same("as many as the encoder gives", "levels", default=3),
    "hidden_expansion": Special("the tensors tell the width inside the fusion blocks"),
    "depth_mult": Same("three times it, rounded", "fusion_blocks", _three_times, 1.0),
    "decoder_n_points": Read("", "points", 4, of=_points_of_levels),
    "eval_idx": Only("the last layer is the answer; for an earlier one use model.decoder_layers", (-1,)),
    "layer_scale": Only("all layers are equally wide", (1,)),
    "max_num_bins": Same("", "reg_max", default=32),
    "reg_scale": Same("", "reg_scale", default=4.0),
    "up": Same("", "reg_up", default=0.5),
    "top_prob_values": Only("as published", (4,)),
    "lqe_hidden_dim": Only("as published", (64,)),
    "lqe_layers": Only("as published", (2,)),
    "head_dim": Special("it follows from the width and the number of heads"),
}


def _level_within(value: Any, raw: Mapping[str, Any]) -> int | None:
    """Levels, of which the last has attention; the lite encoder has two, and none."""
    if raw.get("encoder_type") == "lite":
        return 2 if isinstance(value, list) and [type(level) for level in value] == [int] else None
    levels = _level_of_attention(value)
    return levels if levels > 0 else None


def _points_of_feature_levels(value: Any, raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    return _points_of_levels(value, {"encoder_in_channels": [0] * int(raw.get("num_feature_levels", 3))})


DEIMV2: dict[str, Key] = {
    **{key: entry for key, entry in D_FINE.items() if key not in ("encoder_in_channels", "encoder_hidden_dim")},
    **_all(
        NoEffect("of the loss and its matching, which training has and inference has not"),
        "weight_loss_mal",
        "use_dense_one_to_one",
        "mal_alpha",
    ),
    "encoder_ffn_dim": Special("the tensors tell it; the lite encoder has none"),
    "encoder_type": Same("", "lite", lambda value: {"lite": True, "hybrid": False}.get(str(value), -1), "hybrid"),
    "encoder_in_channels": Special("one for each level that the encoder reads; the widths are the backbone's own"),
    "encoder_hidden_dim": Same("as wide as the decoder", "hidden"),
    "encoder_fuse_op": Only("levels are added", ("sum",)),
    "encoder_has_trailing_conv": Same("", "smooth", default=True),
    "feat_strides": Only("the backbone's levels", ([8, 16, 32], [16, 32], [16])),
    "encode_proj_layers": Read("levels, with attention within the last alone", "levels", [2], of=_level_within),
    "use_gateway": Same("", "gate", default=True),
    "share_bbox_head": Same("", "shared_boxes", default=False),
    "spatial_tuning_adapter_inplanes": Special("the tensors tell the width of the adapter"),
    "decoder_activation_function": Read(
        "between the Linears of a position", "position_activation", "relu", {"relu": "relu", "silu": "silu"}
    ),
    "decoder_n_points": Read("", "points", 4, of=_points_of_feature_levels),
}

# Of a nested backbone_config. Its sizes must be those of the tensors, as `TransformersConfig.agree` compares.
_RESNET: dict[str, Key] = {
    **GENERIC,
    "num_channels": Only("images have three channels", (3,)),
    **_all(Special("must agree with the tensors"), "embedding_size", "hidden_sizes", "depths", "layer_type"),
    "hidden_act": Only("as published", ("relu",)),
    "downsample_in_first_stage": Only("as published", (False,)),
    "downsample_in_bottleneck": Only("the 3x3 convolution has the stride", (False,)),
    **_all(Special("the levels that the model takes"), "out_features", "out_indices"),
    "stage_names": Only("", (["stem", "stage1", "stage2", "stage3", "stage4"],)),
}
_HGNETV2: dict[str, Key] = {
    **GENERIC,
    "num_channels": Only("images have three channels", (3,)),
    **_all(NoEffect("numbers for other modules; stem_channels and stage_... build the network"), "depths"),
    **_all(NoEffect("numbers for other modules; the tensors tell the widths"), "embedding_size", "hidden_sizes"),
    "hidden_act": Only("as published", ("relu",)),
    **_all(
        Special("must agree with the tensors"),
        "stem_channels",
        "stage_in_channels",
        "stage_mid_channels",
        "stage_out_channels",
        "stage_num_blocks",
        "stage_numb_of_layers",
        "stage_light_block",
        "stage_kernel_size",
        "use_learnable_affine_block",
    ),
    "stem_strides": Only("as published", ([2, 1, 1, 2, 1],)),
    "stage_downsample": Only("as published", ([False, True, True, True], [False, True, True])),
    "stage_downsample_strides": Only("as published", ([2, 2, 2, 2], [2, 2, 2])),
    "initializer_range": NoEffect("the first weights, which training replaced"),
    **_all(Special("the levels that the model takes"), "out_features", "out_indices"),
    "stage_names": Only("", (["stem", "stage1", "stage2", "stage3", "stage4"], ["stem", "stage1", "stage2", "stage3"])),
}
_TIMM: dict[str, Key] = {
    **GENERIC,
    "backbone": Special("a ResNet by timm's name"),
    "num_channels": Only("images have three channels", (3,)),
    "features_only": Only("a detector takes feature maps", (True,)),
    "freeze_batch_norm_2d": NoEffect("at inference BatchNorm is frozen in any case"),
    "use_pretrained_backbone": NoEffect("the first weights, which training replaced"),
    "output_stride": Special("16: C5 is dilated"),
    **_all(Special("the levels that the model takes"), "out_features", "out_indices"),
    "stage_names": NoEffect("timm's names of the stages"),
}
BACKBONES: dict[str, dict[str, Key]] = {
    "resnet": _RESNET,
    "rt_detr_resnet": _RESNET,
    "hgnet_v2": _HGNETV2,
    "timm_backbone": _TIMM,
}
_WINDOWED: dict[str, Key] = {
    **GENERIC,
    "num_channels": Only("images have three channels", (3,)),
    "hidden_size": Special("must agree with the tensors"),
    "patch_size": Special("must agree with the tensors"),
    "num_attention_heads": Special("must be those of the transformer with this width"),
    "num_hidden_layers": NoEffect("the last map that is read tells how many blocks there are"),
    **_all(Special("the blocks whose maps are read"), "out_features", "out_indices"),
    "stage_names": NoEffect("follow from num_hidden_layers"),
    "num_windows": Special("per side here"),
    "mlp_ratio": Only("as published", (4,)),
    "hidden_act": Only("as published", ("gelu",)),
    "layer_norm_eps": Only("as published", (1e-6,)),
    "qkv_bias": Only("as published", (True,)),
    "image_size": NoEffect("the tensor of positions tells its size, and other sizes are interpolated"),
    "initializer_range": NoEffect("the first weights, which training replaced"),
}
WINDOWED_VITS: dict[str, dict[str, Key]] = {
    "lw_detr_vit": {
        **_WINDOWED,
        "pretrain_image_size": NoEffect("the tensor of positions tells its size, and other sizes are interpolated"),
        "window_block_indices": Special("the other blocks attend to the whole image"),
        "num_windows_side": NoEffect("follows from num_windows"),
        "use_absolute_position_embeddings": Only("as published", (True,)),
        "cae_init_values": NoEffect("the first weights, which training replaced"),
        "dropout_prob": NoEffect("nothing is dropped at inference"),
    },
    "rf_detr_dinov2": {
        **_WINDOWED,
        "window_block_indexes": Special("follow from out_indices: transformers computes them anew"),
        "apply_layernorm": Only("maps are normalized", (True,)),
        "reshape_hidden_states": Only("maps, and not tokens", (True,)),
        "use_mask_token": NoEffect("of hidden patches, which a detector has not"),
        "use_swiglu_ffn": Only("as published", (False,)),
        "layerscale_value": NoEffect("the first weights, which training replaced"),
        **_all(
            NoEffect("nothing is dropped at inference"),
            "drop_path_rate",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
        ),
        "num_register_tokens": Only("transformers' RF-DETR has none", (0,)),
    },
}

# config.json of a backbone whose weights a training starts from (model.backbone_weights).
VIT_HEAD = 64  # channels per head, in all sizes of the paper
_VIT: dict[str, Key] = {
    **GENERIC,
    **_all(
        Special("the tensors tell them"),
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "image_size",
        "patch_size",
        "qkv_bias",
    ),
    "num_attention_heads": Special("with hidden_size"),
    "hidden_act": Only("as published", ("gelu",)),
    "layer_norm_eps": Only("as published by either library", (1e-12, 1e-6)),
    "num_channels": Only("images have three channels", (3,)),
    **_all(
        NoEffect("nothing is dropped at inference; training has its own"),
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ),
    "initializer_range": NoEffect("the first weights, which training replaced"),
    **_all(
        NoEffect("of masked image modeling and of the classifier, which are left out"),
        "encoder_stride",
        "pooler_output_size",
        "pooler_act",
    ),
}
_DINOV2: dict[str, Key] = {
    **{key: entry for key, entry in _VIT.items() if key != "layer_norm_eps"},
    "layer_norm_eps": Only("as published", (1e-6,)),
    "mlp_ratio": Special("the tensors tell it"),
    "layerscale_value": NoEffect("the first factors, which training replaced"),
    "drop_path_rate": NoEffect("nothing is dropped at inference; training has its own"),
    "use_swiglu_ffn": Only("small and base have none", (False,)),
    "num_register_tokens": Special("the tensors tell it"),
    **_all(NoEffect("of a pyramid, which a detector has of its own"), "apply_layernorm", "reshape_hidden_states"),
    **_all(
        NoEffect("which outputs are read, which the detector decides"), "out_features", "out_indices", "stage_names"
    ),
    "use_mask_token": NoEffect("for hidden patches in pretraining"),
}
_DINOV3: dict[str, Key] = {
    **{key: entry for key, entry in _DINOV2.items() if key not in ("layer_norm_eps", "hidden_act", "use_swiglu_ffn")},
    "layer_norm_eps": Only("as published", (1e-5,)),
    "hidden_act": Only("as published, SiLU in a gated block", ("gelu", "silu")),
    "use_gated_mlp": Special("the tensors tell it"),
    "rope_theta": Only("as published", (100.0, 100)),
    **_all(Special("the tensors tell them"), "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    **_all(NoEffect("of training"), "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "attention_dropout"),
    "return_class_token": NoEffect("which outputs are read, which the detector decides"),
}
# Beside DEIMv2's detail: which of its sizes it has is compared with the tensors.
BACKBONES["dinov3_vit"] = {
    **_DINOV3,
    "layer_norm_eps": Only("as published by either library", (1e-5, 1e-6)),
    "patch_size": Only("the adapter has the levels around stride 16", (16,)),
    "reshape_hidden_states": Only("maps, and not tokens", (True,)),
    **_all(Special("of the design that the tensors are of"), "apply_layernorm", "out_features", "out_indices"),
    "return_class_token": Only("maps alone", (False,)),
}
ALONE: dict[str, dict[str, Key]] = {
    "resnet": _RESNET,
    "rt_detr_resnet": _RESNET,
    "hgnet_v2": _HGNETV2,
    "vit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _DINOV3,
}


def last_level(raw: Mapping[str, Any]) -> list[int]:
    """Stages of the backbone (0 = stem, 1..4) that a model of one feature map takes."""
    return [4]


def three_levels(raw: Mapping[str, Any]) -> list[int]:
    return [2, 3, 4]


def levels_of_encoder(raw: Mapping[str, Any]) -> list[int]:
    """The last stages, as many as the encoder reads."""
    return [2, 3, 4][-max(_length(raw.get("encoder_in_channels", [0, 0, 0])), 1) :]


def levels_of_deimv2(raw: Mapping[str, Any]) -> list[int]:
    """The lite encoder reads one stage, of stride 16; the others the last ones, as many as they read."""
    return [3] if raw.get("encoder_type") == "lite" else levels_of_encoder(raw)


@dataclass(frozen=True)
class TransformersClass:
    """A class of transformers that a member reads, under its model_type in Member.transformers.

    architecture  name of the class in config.json
    keys          of its configuration
    timm          whether the backbone is timm's if config.json does not say
    levels        config.json -> the stages of the backbone that the model takes
    windowed_vit  model_type of its nested backbone where that is a windowed transformer, or ""
    queries_key   config.json -> the key that counts its queries, where several could
    """

    architecture: str
    keys: dict[str, Key]
    timm: bool = True
    levels: Callable[[Mapping[str, Any]], list[int]] = last_level
    queries_key: Callable[[Mapping[str, Any]], str] | None = None
    windowed_vit: str = ""
