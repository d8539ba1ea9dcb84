"""Own multi-head attention equals torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedetr.layers.attention import MultiHeadAttention, attend


def equal_pair(dim: int, heads: int) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(dim, heads), nn.MultiheadAttention(dim, heads, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    with torch.no_grad():
        packed = zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3))
        for part, weight, bias in packed:
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("dim, heads", [(32, 1), (32, 8), (96, 8)])
@pytest.mark.parametrize("masked", ["nothing", "keys", "pairs"])
def test_equals_torch(dim: int, heads: int, masked: str) -> None:
    ours, theirs = equal_pair(dim, heads)
    query, key, value = torch.randn(2, 5, dim), torch.randn(2, 7, dim), torch.randn(2, 7, dim)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    pairs = torch.rand(5, 7) < 0.4
    pairs[:, 0] = False  # every query keeps one key
    if masked == "keys":
        got = ours(query, key, value, padding[:, None, None])
        expected = theirs(query, key, value, key_padding_mask=padding)[0]
    elif masked == "pairs":
        got, expected = ours(query, key, value, pairs), theirs(query, key, value, attn_mask=pairs)[0]
    else:
        got, expected = ours(query, key, value), theirs(query, key, value)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)  # float32 sums of 96 products; measured 6e-7


def test_a_query_that_may_see_nothing_stays_finite() -> None:
    ours, _ = equal_pair(32, 4)
    x = torch.randn(1, 3, 32, requires_grad=True)
    out = ours(x, x, x, torch.ones(3, 3, dtype=torch.bool))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="30 channels cannot be split over 8 heads"):
        MultiHeadAttention(30, 8)


def test_under_autocast_on_a_cpu_it_is_float32() -> None:
    """Scores in bfloat16 keep 8 bits, and torch's kernel takes three times as long for their gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8).bfloat16().requires_grad_() for _ in range(3))
    mask = torch.rand(5, 5) < 0.3
    mask.fill_diagonal_(False)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, v, mask, 0.5)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = (0.5 * exact[0] @ exact[1].mT).masked_fill(mask, -torch.inf)
    wanted = scores.softmax(-1) @ exact[2]
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-5)
    got.sum().backward()
    wanted.sum().backward()
    for one, other in zip((q, k, v), exact):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-3, rtol=2**-8)  # stored in bfloat16
