"""How fast a neighborhood can be at best: what a kernel in tiles computes, and what it wastes.

A kernel works on tiles of queries and of keys. It visits every pair of tiles in which some query
sees some key (arXiv 2504.16922, section 4), so windows that do not line up with tiles cost more
than their share of the dense computation. With tiles that are boxes of the grid the pairs are
products of those along the axes and are counted in no time.

    bound = tile pairs of dense attention / tile pairs visited
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec, mean_keys

TILINGS = ("multi", "flat")


class SimResult(NamedTuple):
    """What a neighborhood costs in tiles.

    Attributes:
        grid: tokens along each axis.
        spec: the neighborhood.
        q_tile, kv_tile: edges of the tiles of queries and keys.
        visited: pairs of tiles that are computed.
        full: those of them in which every query sees every key, so that no mask is needed.
        dense: pairs of tiles of dense attention on the flat sequence.
        bound: dense / visited, the speed-up at best.
        flop_bound: the speed-up by the numbers of keys alone.
        padding: share of the tiled queries that are padding.
    """

    grid: tuple[int, ...]
    spec: NeighborhoodSpec
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    visited: int
    full: int
    dense: int
    bound: float
    flop_bound: float
    padding: float

    @property
    def partial(self) -> int:
        """Pairs of tiles that need a mask."""
        return self.visited - self.full


class AxisTiles(NamedTuple):
    """Tiles of keys that each tile of queries visits along one axis, in one dilation group.

    Attributes:
        low, high: [tiles of queries]; the tiles low <= k < high are visited.
        full_low, full_high: those of them in which every query sees every key, empty if none.
    """

    low: np.ndarray
    high: np.ndarray
    full_low: np.ndarray
    full_high: np.ndarray


def axis_tiles(axis: AxisWindow, q_tile: int, kv_tile: int, group: int = 0) -> AxisTiles:
    """The tiles of one axis.

    Raises:
        ValueError: for border="wrap", whose windows are no intervals.
    """
    if axis.border == "wrap":
        raise ValueError("border='wrap' is computed without tiles and cannot be simulated")
    start, end = axis.bounds(group)
    length = len(start)
    first = np.arange(0, length, q_tile)
    last = np.minimum(first + q_tile, length) - 1
    low, high = start[first] // kv_tile, -(-end[last] // kv_tile)
    # Bounds never decrease: all queries of a tile see what its last one starts and its first ends.
    full_low = -(-start[last] // kv_tile)
    full_high = np.maximum(end[first] // kv_tile, full_low)
    return AxisTiles(low, high, full_low, full_high)


def simulate(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    *,
    tiling: str = "multi",
    num_additional: int = 0,
) -> SimResult:
    """Counts the tiles of a neighborhood.

    Args:
        grid: tokens along each axis.
        spec: the neighborhood.
        q_tile: edges of the boxes of queries; with tiling="flat" only their volume counts.
        kv_tile: edges of the boxes of keys.
        tiling: "multi", tiles are boxes of the grid; "flat", runs of the row-major sequence.
        num_additional: keys beside the grid that every query sees.

    Raises:
        ValueError: for windows that do not fit the grid, tiles with another number of axes,
            another tiling, or a negative number.
    """
    grid = _checked_grid(grid)
    axes = spec.axes(grid)
    q_tile, kv_tile = (_checked_tile(tile, grid) for tile in (q_tile, kv_tile))
    if tiling not in TILINGS or num_additional < 0:
        raise ValueError(
            f"tiling must be in {TILINGS} and num_additional not negative, got {tiling!r} and "
            f"{num_additional}"
        )
    q_volume, kv_volume, tokens = math.prod(q_tile), math.prod(kv_tile), math.prod(grid)
    dense = _ceil(tokens, q_volume) * _ceil(tokens, kv_volume)
    full = 0
    if tiling == "multi":
        visited, full, num_q = 1, 1, 1
        for axis, q_edge, kv_edge in zip(axes, q_tile, kv_tile, strict=True):
            counts = _axis_counts(axis, q_edge, kv_edge)
            visited, full, num_q = visited * counts[0], full * counts[1], num_q * counts[2]
    else:
        visited, num_q = _flat_counts(axes, q_volume, kv_volume)
    additional = _ceil(num_additional, kv_volume)
    visited, full = visited + num_q * additional, full + num_q * (num_additional // kv_volume)
    dense += _ceil(tokens, q_volume) * additional
    return SimResult(
        grid=tuple(grid),
        spec=spec,
        q_tile=q_tile,
        kv_tile=kv_tile,
        visited=visited,
        full=full,
        dense=dense,
        bound=dense / visited,
        flop_bound=(tokens + num_additional) / (mean_keys(grid, spec) + num_additional),
        padding=1 - tokens / (num_q * q_volume),
    )


def suggest(
    grid: Sequence[int],
    window: int | Sequence[int],
    tiles: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> list[SimResult]:
    """The smallest strides that visit the fewest tiles, for each pair of tiles that a kernel has.

    Smaller strides move windows less. Tiles visited are a product over the axes, so the best stride
    of each axis is found alone.

    Args:
        grid: tokens along each axis.
        window: keys along each axis.
        tiles: pairs (q_tile, kv_tile).
        dilation: of each axis.
        is_causal: of each axis.

    Returns:
        A result for each pair, the largest bound first.

    Raises:
        ValueError: as `simulate`.
    """
    grid = _checked_grid(grid)
    fixed = NeighborhoodSpec(window, 1, dilation, is_causal)
    axes = fixed.axes(grid)
    results = []
    for pair in tiles:
        if np.ndim(pair) == 0 or len(pair) != 2:
            raise ValueError(f"tiles must be pairs (q_tile, kv_tile), got {pair!r}")
        q_tile, kv_tile = pair
        strides = []
        for axis, q_edge, kv_edge in zip(
            axes, _checked_tile(q_tile, grid), _checked_tile(kv_tile, grid), strict=True
        ):
            counts = [
                _axis_counts(axis._replace(stride=stride), q_edge, kv_edge)[0]
                for stride in range(1, axis.window + 1)
            ]
            strides.append(1 + int(np.argmin(counts)))
        spec = NeighborhoodSpec(window, tuple(strides), dilation, is_causal)
        results.append(simulate(grid, spec, q_tile, kv_tile))
    return sorted(results, key=lambda result: (-result.bound, math.prod(result.spec.stride)))


def roofline_seconds(
    result: SimResult,
    *,
    heads: int,
    head_dim: int,
    flops_per_second: float,
    bytes_per_second: float,
    itemsize: int = 2,
) -> float:
    """The least time of the forward pass on a machine, for one example.

    Args:
        result: of `simulate`.
        heads: attention heads.
        head_dim: their width, of keys and of values.
        flops_per_second: peak of the machine's matrix products.
        bytes_per_second: bandwidth of its memory.
        itemsize: bytes of a number.

    Returns:
        The larger of the time of two matrix products over all visited pairs, and of reading
        queries, keys and values and writing the output once.
    """
    q_volume, kv_volume = math.prod(result.q_tile), math.prod(result.kv_tile)
    flops = 4 * result.visited * q_volume * kv_volume * head_dim * heads
    moved = 4 * math.prod(result.grid) * heads * head_dim * itemsize
    return max(flops / flops_per_second, moved / bytes_per_second)


def _axis_counts(axis: AxisWindow, q_tile: int, kv_tile: int) -> tuple[int, int, int]:
    """(pairs visited, full pairs, tiles of queries) along one axis, over its dilation groups."""
    visited = full = num_q = 0
    for group in range(axis.dilation):
        tiles = axis_tiles(axis, q_tile, kv_tile, group)
        visited += int(np.sum(tiles.high - tiles.low))
        full += int(np.sum(tiles.full_high - tiles.full_low))
        num_q += len(tiles.low)
    return visited, full, num_q


def _flat_counts(axes: Sequence[AxisWindow], q_volume: int, kv_volume: int) -> tuple[int, int]:
    """(pairs visited, tiles of queries) where tiles are runs of a dilation group's tokens."""
    visited = num_q = 0
    for groups in itertools.product(*(range(axis.dilation) for axis in axes)):
        bounds = [axis.bounds(group) for axis, group in zip(axes, groups, strict=True)]
        lengths = [len(start) for start, _ in bounds]
        tokens, row = math.prod(lengths), lengths[-1]
        strides = [math.prod(lengths[axis + 1 :]) for axis in range(len(axes))]
        for first in range(0, tokens, q_volume):
            last = min(first + q_volume, tokens) - 1
            touched = np.zeros(_ceil(tokens, kv_volume), bool)
            for line in range(first // row, last // row + 1):  # along the last axis
                begin, end = max(first - line * row, 0), min(last - line * row, row - 1)
                outer = np.unravel_index(line, lengths[:-1]) if len(axes) > 1 else ()
                boxes = [
                    np.arange(start[at], stop[at]) * stride
                    for (start, stop), at, stride in zip(bounds, outer, strides, strict=False)
                ]
                origins = np.zeros(1, int)
                for box in boxes:
                    origins = (origins[:, None] + box).ravel()
                low = (origins + bounds[-1][0][begin]) // kv_volume
                high = (origins + bounds[-1][1][end] - 1) // kv_volume
                for shift in range(int(np.max(high - low)) + 1):
                    touched[np.minimum(low + shift, high)] = True
            visited, num_q = visited + int(touched.sum()), num_q + 1
    return visited, num_q


def _checked_tile(tile: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    edges = (tile,) * len(grid) if np.ndim(tile) == 0 else tuple(tile)
    if len(edges) != len(grid) or not all(
        isinstance(edge, int | np.integer) and edge > 0 for edge in edges
    ):
        raise ValueError(
            f"tiles must have a positive edge for each axis of {tuple(grid)}, got {tile!r}"
        )
    return tuple(int(edge) for edge in edges)


def _checked_grid(grid: Any) -> tuple[int, ...]:
    if np.ndim(grid) != 1 or not np.size(grid):
        raise ValueError(f"grid must have a length for each axis, got {grid!r}")
    return tuple(grid)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
