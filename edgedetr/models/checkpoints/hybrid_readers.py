"""What tensors of a member with a hybrid encoder tell of its configuration, where members share their names."""

from __future__ import annotations

from edgedetr.models.checkpoints.config_from_state_dict import Reader, StateDict, count_of, has, rows_of

NORM = "decoder.layers.0.feedforward_norm.weight"  # of the decoder's width


def encoder_width(state: StateDict) -> int | None:
    """Channels of the hybrid encoder where they are not those of the decoder; 0 where they are."""
    encoder = state.rows("encoder.project.0.conv.weight")
    return None if encoder is None else 0 if encoder == state.rows(NORM) else encoder


def number_of(name: str) -> Reader:
    """The only number of a tensor."""
    return lambda state: round(float(state.weights[name]), 6) if state.has(name) else None


def _reg_max(state: StateDict) -> int | None:
    rows = state.rows("decoder.boxes.box.0.layers.2.weight")
    return None if rows is None else rows // 4 - 1


ENCODER: dict[str, Reader] = {
    "encoder_layers": count_of(r"encoder\.attention\.(\d+)\."),
    "encoder_ffn": rows_of("encoder.attention.0.feedforward.up.weight"),
}
DECODER: dict[str, Reader] = {
    "decoder_ffn": rows_of("decoder.layers.0.feedforward.up.weight"),
    "learned_content": has("selector.content.weight"),
}
SIDES: dict[str, Reader] = {  # boxes whose sides are distributions
    "reg_max": _reg_max,
    "reg_scale": number_of("decoder.boxes.bins.scale"),
    "reg_up": number_of("decoder.boxes.bins.up"),
}
