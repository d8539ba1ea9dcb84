"""DETR's switches: what each of them changes, and that nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from members import CLASSES, HEIGHT, SMALL, WIDTH, sample_images

from edgedetr.layers.attention import MultiHeadAttention
from edgedetr.models import build
from edgedetr.models.deploy import DeployGraph
from edgedetr.models.detector import DetrModel


def make(**switches: object) -> DetrModel:
    torch.manual_seed(0)
    return build("detr", replace(SMALL["detr"], dropout=0.0, **switches), CLASSES).eval()  # type: ignore[type-var]


@torch.no_grad()
def test_content_and_position_multiply_out_to_four_terms() -> None:
    """(c_q + p_q)^T (c_k + p_k), with projections: what DETR's attention compares (Conditional DETR, eq. 2)."""
    attention = MultiHeadAttention(8, 2)
    cq, pq, ck, pk = torch.randn(4, 1, 5, 8)
    for bias in (attention.q.bias, attention.k.bias):
        bias.zero_()
    split = lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
    q, k = (lambda x: split(attention.q(x))), (lambda x: split(attention.k(x)))
    whole = q(cq + pq) @ k(ck + pk).transpose(-1, -2)
    terms = [q(a) @ k(b).transpose(-1, -2) for a in (cq, pq) for b in (ck, pk)]
    torch.testing.assert_close(whole, sum(terms))


def test_dividing_by_the_root_of_the_width_keeps_the_variance_of_scores_at_one() -> None:
    torch.manual_seed(0)
    for width in (16, 256):
        q, k = torch.randn(2, 4000, width)
        raw = (q * k).sum(-1)
        assert float(raw.var()) == pytest.approx(width, rel=0.1)  # 4000 samples: 2 % standard error, twice over
        assert float((raw * MultiHeadAttention(width, 1).scale).var()) == pytest.approx(1, rel=0.1)


@torch.no_grad()
def test_the_first_self_attention_of_empty_queries_is_the_same_vector_for_all() -> None:
    layer = make().decoder.layers[0].self_attention
    layer.v.bias.normal_()
    position, content = torch.randn(1, 12, 32), torch.zeros(1, 12, 32)
    out = layer(content + position, content + position, content)
    torch.testing.assert_close(out, (layer.out(layer.v.bias))[None, None].expand_as(out))  # not zero, yet all alike
    assert out.abs().max() > 1e-3


@torch.no_grad()
def test_skipping_it_leaves_out_its_weights_and_still_detects() -> None:
    plain, skipped = make(), make(skip_first_self_attention=True)
    gone = set(plain.state_dict()) - set(skipped.state_dict())
    assert gone and all(
        name.startswith(("decoder.layers.0.self_attention.", "decoder.layers.0.self_norm.")) for name in gone
    )
    logits, boxes = DeployGraph(skipped, HEIGHT, WIDTH)(sample_images())
    assert torch.isfinite(logits).all() and torch.isfinite(boxes).all()


@torch.no_grad()
def test_position_at_the_input_alone_is_seen_by_no_layer_again() -> None:
    once = make(position_at="input")
    memory = once.encode(once.normalize(sample_images()))
    assert memory.position is None
    # By hand: the projected map plus its position, through the layers without one.
    tokens = once.encoder.project(once.backbone(once.normalize(sample_images()))[-1]).flatten(2).transpose(1, 2)
    tokens = tokens + once.encoder.position(tokens, memory.shapes[0], None)
    for layer in once.encoder.layers:
        tokens = layer(tokens, torch.zeros_like(tokens))
    torch.testing.assert_close(memory.tokens, tokens)


@torch.no_grad()
def test_values_carry_a_position_only_when_asked() -> None:
    plain, carrying = make(), make(position_on_value=True)
    carrying.load_state_dict(plain.state_dict())
    memory = plain.encode(plain.normalize(sample_images()))
    for detector, shifts in ((plain, False), (carrying, True)):
        attention, queries = detector.decoder.layers[0].cross_attention, detector.select(memory)
        before = attention(queries, memory)
        # Moving position from the tokens' own content to `position` changes nothing but the values.
        moved = replace(memory, tokens=memory.tokens - 1, position=memory.position + 1)
        assert torch.allclose(before, attention(queries, moved), atol=1e-5) == shifts


def test_the_box_head_may_be_one_linear() -> None:
    assert len(make(box_layers=1).decoder.boxes.box.layers) == 1
    assert len(make().decoder.boxes.box.layers) == 3
