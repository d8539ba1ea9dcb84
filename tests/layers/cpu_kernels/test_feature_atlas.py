"""Sums of bilinear samples: values and gradients are those of torch's grid_sample, and of finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgedetr.layers.cpu_kernels.feature_atlas import FeatureAtlas, bilinear_sum
from edgedetr.layers.deformable_attention import DeformableAttention

SHAPES, POINTS = [(4, 6), (2, 3), (1, 2)], [3, 2, 1]
BATCH, QUERIES, HEADS, WIDTH = 2, 5, 3, 4
TOKENS = sum(h * w for h, w in SHAPES)


def case(kind: torch.dtype) -> list[torch.Tensor]:
    """Values, x, y, weight; positions reach more than two cells beyond every border."""
    torch.manual_seed(0)
    shape = (BATCH, QUERIES, HEADS, sum(POINTS))
    coordinates = []
    for axis in (1, 0):
        cells = torch.tensor([s[axis] for s, count in zip(SHAPES, POINTS) for _ in range(count)])
        coordinates.append(torch.rand(shape, dtype=kind) * (cells + 6) - 3.5)
    value = torch.randn(BATCH, TOKENS, HEADS * WIDTH, dtype=kind)
    return [tensor.requires_grad_() for tensor in (value, *coordinates, torch.randn(shape, dtype=kind))]


def by_grid_sample(value: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, N, M, D], a map at a time."""
    values, out, start, point = value.unflatten(-1, (HEADS, WIDTH)), 0.0, 0, 0
    for (height, width), count in zip(SHAPES, POINTS):
        maps = values[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, WIDTH, height, width)
        part = slice(point, point + count)
        grid = torch.stack([(2 * x[..., part] + 1) / width - 1, (2 * y[..., part] + 1) / height - 1], dim=-1)
        seen = F.grid_sample(maps, grid.transpose(1, 2).flatten(0, 1), align_corners=False)  # [B M, D, N, count]
        out = out + (seen.unflatten(0, (BATCH, HEADS)).permute(0, 3, 1, 4, 2) * weight[..., part, None]).sum(-2)
        start, point = start + height * width, point + count
    return out


def by_atlas(value: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    atlas = FeatureAtlas.of(SHAPES, POINTS, x)
    return bilinear_sum(value, x + atlas.corner[:, 0], y + atlas.corner[:, 1], weight, atlas)


def agree(inputs: list[torch.Tensor]) -> None:
    got, wanted = by_atlas(*inputs), by_grid_sample(*inputs)
    torch.testing.assert_close(got, wanted)
    seed = torch.randn_like(wanted)
    for one, other in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(wanted, inputs, seed)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)  # float32: positions are scaled to -1..1 and back


def test_values_and_gradients_are_those_of_grid_sample() -> None:
    agree(case(torch.float32))


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(by_atlas, case(torch.float64))


def test_on_a_cells_center_the_gradient_is_that_just_above_it() -> None:
    """As grid_sample's; attention starts there, because the first offsets are whole cells."""
    value, x, y, weight = case(torch.float64)
    x, y = (coordinate.detach().floor().requires_grad_() for coordinate in (x, y))
    above = [coordinate.detach().add(1e-9).requires_grad_() for coordinate in (x, y)]
    exact = torch.autograd.grad(by_atlas(value, x, y, weight).square().sum(), (x, y))
    moved = torch.autograd.grad(by_atlas(value, *above, weight).square().sum(), above)
    outside = (x < 0) | (y < 0)  # half in the image: a border is another kink
    for one, other in zip(exact, moved):
        torch.testing.assert_close(one[~outside], other[~outside], atol=1e-6, rtol=1e-6)


def test_any_number_of_threads_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for threads in (1, 2, 4, 7):  # six heads of images: parts of unequal size, and fewer than threads
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        inputs = case(torch.float32)
        out = by_atlas(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_without_numba_attention_reads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgedetr.layers import deformable_attention

    torch.manual_seed(1)
    made, query, tokens = DeformableAttention(16, 2, POINTS), torch.randn(2, 9, 16), torch.randn(2, TOKENS, 16)
    monkeypatch.setattr(deformable_attention, "LARGE", 0)
    expected = made(query, torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(2)), tokens, SHAPES)
    monkeypatch.setattr(deformable_attention, "compiled_here", lambda: False)
    monkeypatch.setattr(deformable_attention, "bilinear_sum", None)
    found = made(query, torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(2)), tokens, SHAPES)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "shapes",
    [[(4, 6)], [(1, 2), (2, 3), (4, 6)], [(2, 6), (3, 5), (4, 4)], [(3, 2), (3, 2), (3, 2)]],
    ids=["one map", "widest last", "a column higher than the widest", "equal maps"],
)
def test_a_sheet_holds_every_map_among_zeros(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    value = torch.randn(2, sum(h * w for h, w in shapes), 2 * 3)
    atlas = FeatureAtlas.of(shapes, [1] * len(shapes), value)
    packed = atlas.pack(value, heads=2)
    assert torch.equal(atlas.unpack(packed), value)
    assert packed.count_nonzero() == value.numel(), "zeros elsewhere"
    map_0 = value[1, : shapes[0][0] * shapes[0][1], 3:].unflatten(0, shapes[0])
    left, top = atlas.corner[0].int().tolist()
    assert torch.equal(packed[1, 1, top : top + shapes[0][0], left : left + shapes[0][1]], map_0), (
        "head 1, channels 3.."
    )
    for (height, width), (left, top) in zip(shapes, atlas.corner.int().tolist()):
        with_border = packed[:, :, top - 2 : top + height + 2, left - 2 : left + width + 2]
        assert with_border.shape[2:4] == (height + 4, width + 4), "two cells on each side are on the atlas"
        assert with_border.count_nonzero() == 2 * height * width * 6, "and are zeros"


def test_a_nan_coordinate_gives_nan_at_its_sample_alone() -> None:
    """A training that diverges ends with its own message, not inside a kernel."""
    value, x, y, weight = (tensor.detach() for tensor in case(torch.float32))
    wanted = by_atlas(value, x, y, weight)
    x[0, 1, 2, 3], y[1, 0, 0, 0] = torch.nan, torch.nan
    out = by_atlas(value, x.requires_grad_(), y, weight)
    broken = torch.zeros_like(wanted, dtype=torch.bool)
    broken[0, 1, 2], broken[1, 0, 0] = True, True
    assert torch.equal(out.isnan(), broken)
    torch.testing.assert_close(out[~broken], wanted[~broken])
    out.sum().backward()
    assert x.grad is not None and not x.grad[~broken.any(-1)].isnan().any()


@pytest.mark.parametrize("needed", [0, 1, 3])
def test_only_the_gradients_that_are_needed_are_made(needed: int) -> None:
    inputs = [tensor.detach().requires_grad_(index == needed) for index, tensor in enumerate(case(torch.float32))]
    by_atlas(*inputs).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [index == needed for index in range(4)]


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_gives_the_same_in_every_sampling(coordinates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first by compiled loops, whatever its size."""
    results = []
    for sampling in ("auto", "auto", "gather", "grid_sample"):
        monkeypatch.setattr("edgedetr.layers.deformable_attention.LARGE", 1 << 19 if results else 0)
        torch.manual_seed(1)
        made = DeformableAttention(16, 2, POINTS, sampling)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        query, tokens = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, TOKENS, 16, requires_grad=True)
        reference = (torch.rand(2, 9, coordinates) * 1.4 - 0.2).requires_grad_()
        out = made(query, reference, tokens, SHAPES)
        out.square().sum().backward()
        results.append([out, query.grad, tokens.grad, reference.grad, *(p.grad for p in made.parameters())])
    for other in results[:3]:
        for one, wanted in zip(other, results[3]):
            torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)


def test_under_autocast_attention_samples_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places and values are those that the Linears give in bfloat16; what is read there is not rounded again."""
    torch.manual_seed(1)
    made, seen = DeformableAttention(16, 2, POINTS, "auto"), []
    monkeypatch.setattr("edgedetr.layers.deformable_attention.LARGE", 0)
    monkeypatch.setattr(
        "edgedetr.layers.deformable_attention.bilinear_sum",
        lambda *tensors: seen.append(tensors) or bilinear_sum(*tensors),
    )
    query, tokens = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, TOKENS, 16, requires_grad=True)
    reference = torch.rand(2, 9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(query, reference, tokens, SHAPES)
    assert [tensor.dtype for tensor in seen[0][:4]] == [torch.bfloat16] + [torch.float32] * 3
    assert bilinear_sum(*seen[0]).dtype == torch.float32
    exact = made(query, reference, tokens, SHAPES)
    assert float((out - exact).detach().abs().max()) <= 3 * 2**-8 * float(exact.detach().abs().max())
    out.float().square().sum().backward()
    assert tokens.grad is not None and torch.isfinite(tokens.grad).all() and tokens.grad.abs().sum() > 0
