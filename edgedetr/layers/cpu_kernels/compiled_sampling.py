"""Sums of bilinear samples and their gradients as loops that numba compiles, for training on a CPU.

One pass per query and head, which writes only the result to memory. Compiled once per number of channels, which takes
seconds, and cached on disk. Import this module only where it is needed: numba is optional and takes half a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

Loop = Callable[..., None]


def parallel_for(loop: Loop, units: int, *arguments: Any) -> None:
    """loop(*arguments, first, last) over all units, in equal parts on torch's number of threads."""
    threads = min(torch.get_num_threads(), units)
    bounds = [units * part // threads for part in range(threads + 1)]
    if threads == 1:
        loop(*arguments, 0, units)
    else:
        list(_pool(threads).map(lambda first, last: loop(*arguments, first, last), bounds, bounds[1:]))


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "edgedetr-sampling")


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _compiled(function: Callable[..., Any]) -> Any:
    # No flag lets the compiler assume that there is no NaN: NaN must propagate.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no writable cache folder
        return numba.njit(function, **options)


@numba.njit(inline="always")
def _find(
    x: Any, y: Any, low: Any, high: Any, line: Any, last: Any, size: Any, first: Any, right: Any, down: Any
) -> None:
    """For each point: the offset of its upper left cell in the table, and the point's distance right and down of it."""
    kind = right.dtype.type
    for p in range(len(first)):
        across, along = x[p], y[p]
        across = low[0, p] if across < low[0, p] else across  # NaN stays
        across = high[0, p] if across > high[0, p] else across
        along = low[1, p] if along < low[1, p] else along
        along = high[1, p] if along > high[1, p] else along
        column, line_ = np.int32(across), np.int32(along)  # both are above 0: as floor
        right[p], down[p] = across - kind(column), along - kind(line_)
        # NaN is in no cell; whichever cell it reads, the sum is NaN
        first[p] = np.uint32(min(max(line_ * line + column, np.int32(0)), last)) * size


@numba.njit(inline="always")
def _bilinear_weights(weight: Any, right: Any, down: Any) -> tuple[Any, Any, Any, Any]:
    """The bilinear weights of a point's four cells: upper left and right, lower left and right."""
    lower = weight * down
    upper = weight - lower
    lower_right, upper_right = lower * right, upper * right
    return upper - upper_right, upper_right, lower - lower_right, lower_right


@_compiled
def sums(
    channels: Any,
    table: Any,
    x: Any,
    y: Any,
    weight: Any,
    low: Any,
    high: Any,
    line: Any,
    out: Any,
    begin: int,
    end: int,
) -> None:
    """Per unit from `begin` to `end`, the weighted sum of its points' bilinear samples.

    A unit is one head of one image; its table has a row per cell of the atlas, see feature_atlas.py.

    channels      a tuple as long as a row: the compiler knows the length of a tuple, and unrolls loops over it
    table         [B M, cells, channels]
    x, y, weight  [B, N, M, P]   positions in cells of the atlas, and weights
    low, high     [2, P]         x and y are clamped to these
    line          cells of a line of the atlas
    out           [B, N, M, channels], written
    """
    queries, heads, points = x.shape[1:]
    size, kind = np.uintp(len(channels)), table.dtype.type
    below = np.uintp(line) * size
    last = np.int32(table.shape[1] - line - 2)
    first, right, down = np.empty(points, np.uint32), np.empty(points, table.dtype), np.empty(points, table.dtype)
    total = np.empty(len(channels), table.dtype)
    for unit in range(begin, end):
        image, head = unit // heads, unit % heads
        cells = table[unit].reshape(-1)
        for n in range(queries):
            factor, written = weight[image, n, head], out[image, n, head]
            _find(
                x[image, n, head],
                y[image, n, head],
                low,
                high,
                np.int32(line),
                last,
                np.uint32(size),
                first,
                right,
                down,
            )
            for d in range(size):
                total[d] = kind(0)
            for p in range(points):
                upper_left, upper_right, lower_left, lower_right = _bilinear_weights(factor[p], right[p], down[p])
                a = np.uintp(first[p])  # a b
                b, c = a + size, a + below  # c e: the four cells
                e = c + size
                for d in range(size):
                    total[d] += (
                        upper_left * cells[a + d]
                        + upper_right * cells[b + d]
                        + lower_left * cells[c + d]
                        + lower_right * cells[e + d]
                    )
            for d in range(size):
                written[d] = total[d]


@_compiled
def gradients(
    channels: Any,
    table: Any,
    x: Any,
    y: Any,
    weight: Any,
    low: Any,
    high: Any,
    line: Any,
    gradient: Any,
    of_table: Any,
    of_x: Any,
    of_y: Any,
    of_weight: Any,
    begin: int,
    end: int,
) -> None:
    """The gradients of the table, the positions and the weights, given that of the sums.

    A unit is one head of one image; its table has a row per cell of the atlas, see feature_atlas.py.

    channels      a tuple as long as a row: the compiler knows the length of a tuple, and unrolls loops over it
    table         [B M, cells, channels]
    x, y, weight  [B, N, M, P]   positions in cells of the atlas, and weights
    low, high     [2, P]         x and y are clamped to these
    line          cells of a line of the atlas
    gradient      [B, N, M, channels]
    of_table      as table, added to; of_x, of_y, of_weight [B, N, M, P], written
    """
    queries, heads, points = x.shape[1:]
    size, kind = np.uintp(len(channels)), table.dtype.type
    below = np.uintp(line) * size
    last = np.int32(table.shape[1] - line - 2)
    first, right, down = np.empty(points, np.uint32), np.empty(points, table.dtype), np.empty(points, table.dtype)
    seed, seen = np.empty(len(channels), table.dtype), np.empty((4, points), table.dtype)
    seen_a, seen_b, seen_c, seen_e = seen[0], seen[1], seen[2], seen[3]
    for unit in range(begin, end):
        image, head = unit // heads, unit % heads
        cells, of_cells = table[unit].reshape(-1), of_table[unit].reshape(-1)
        for n in range(queries):
            factor, given = weight[image, n, head], gradient[image, n, head]
            _find(
                x[image, n, head],
                y[image, n, head],
                low,
                high,
                np.int32(line),
                last,
                np.uint32(size),
                first,
                right,
                down,
            )
            for d in range(size):
                seed[d] = given[d]
            for p in range(points):
                upper_left, upper_right, lower_left, lower_right = _bilinear_weights(factor[p], right[p], down[p])
                a = np.uintp(first[p])  # a b
                b, c = a + size, a + below  # c e: the four cells
                e = c + size
                at_a, at_b, at_c, at_e = kind(0), kind(0), kind(0), kind(0)
                for d in range(size):
                    s = seed[d]
                    at_a += s * cells[a + d]
                    at_b += s * cells[b + d]
                    at_c += s * cells[c + d]
                    at_e += s * cells[e + d]
                seen_a[p], seen_b[p], seen_c[p], seen_e[p] = at_a, at_b, at_c, at_e
                for d in range(size):
                    of_cells[a + d] += upper_left * seed[d]
                    of_cells[b + d] += upper_right * seed[d]
                for d in range(size):
                    of_cells[c + d] += lower_left * seed[d]
                    of_cells[e + d] += lower_right * seed[d]
            to_x, to_y, to_weight = of_x[image, n, head], of_y[image, n, head], of_weight[image, n, head]
            for p in range(points):
                across, across_below = seen_b[p] - seen_a[p], seen_e[p] - seen_c[p]
                above = seen_a[p] + across * right[p]
                step = seen_c[p] + across_below * right[p] - above
                to_weight[p] = above + step * down[p]
                to_y[p] = step * factor[p]
                to_x[p] = (across + (across_below - across) * down[p]) * factor[p]
