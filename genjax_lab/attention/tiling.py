"""Tokens of a grid in tiles, and which tiles a neighborhood visits (arXiv 2504.16922, section 4).

A fused kernel works on blocks of consecutive tokens. Where those are boxes of the grid, windows
cover few of them, so tokens are put in order: dilation groups first, then tiles, then tokens of a
tile, each in row-major order. All other operations of a transformer are token-wise, so that a model
may permute its tokens once and work on them as they are.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax_lab.attention.simulator import axis_tiles
from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec
from pallas_kernels.tiles import TilePlan


def token_permute(x: Array, tile: Sequence[int], dilation: int | Sequence[int] = 1) -> Array:
    """Puts the tokens of a grid in tiles, with zeros where the grid is no multiple of them.

    Args:
        x: [batch, *grid, ...] with an axis of the grid for each edge of `tile`.
        tile: edges of the tiles, at least 1.
        dilation: of each axis, at least 1; one number for all.

    Returns:
        [batch * groups, tokens, ...], with `groups` the product of the dilations, faster than the
        batch, and `tokens` the padded ones of a group.

    Raises:
        ValueError: too few axes, or numbers below 1.
    """
    tile, dilation = _checked_tiling(tile, dilation)
    axes = len(tile)
    if x.ndim < 1 + axes:
        raise ValueError(f"x must be [batch, *grid, ...] with {axes} grid axes, got {x.shape}")
    padding = [
        (0, -length % (edge * step))
        for length, edge, step in zip(x.shape[1:], tile, dilation, strict=False)
    ]
    x = jnp.pad(x, [(0, 0), *padding, *[(0, 0)] * (x.ndim - 1 - axes)])
    grid, tiled, sizes = _pattern(tile, dilation)
    return einops.rearrange(x, f"{grid} -> {tiled}", **sizes)


def token_unpermute(
    x: Array,
    grid: Sequence[int],
    tile: Sequence[int],
    dilation: int | Sequence[int] = 1,
) -> Array:
    """Undoes `token_permute` and drops its padding.

    Args:
        x: [batch * groups, tokens, ...] as `token_permute` returns it.
        grid: tokens along each axis of the result.
        tile: as given to `token_permute`.
        dilation: as given to `token_permute`.

    Returns:
        [batch, *grid, ...].

    Raises:
        ValueError: if x has another number of tokens or groups, or as `token_permute`.
    """
    tile, dilation = _checked_tiling(tile, dilation, grid)
    rests = _tiles_along(grid, tile, dilation)
    groups, tokens = math.prod(dilation), math.prod(rests) * math.prod(tile)
    if x.ndim < 2 or x.shape[0] % groups or x.shape[1] != tokens:
        raise ValueError(
            f"x must be [batch * {groups}, {tokens}, ...] for the grid {tuple(grid)} in tiles "
            f"{tile} with dilation {dilation}, got {x.shape}"
        )
    whole, tiled, sizes = _pattern(tile, dilation)
    sizes |= {f"r{axis}": rest for axis, rest in enumerate(rests)}
    x = einops.rearrange(x, f"{tiled} -> {whole}", **sizes)
    return x[(slice(None), *(slice(length) for length in grid))]


def plan_tiles(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
) -> TilePlan:
    """Lists the pairs of tiles that a neighborhood visits, full ones first.

    Visited and full pairs are as many as `simulate` counts. Padded keys are in no full pair; padded
    queries may be, and are known by their empty bounds.

    Args:
        grid: tokens along each axis.
        spec: the neighborhood; its borders are "shift" or "mask".
        q_tile: edges of the tiles of queries.
        kv_tile: edges of the tiles of keys.

    Returns:
        A plan of numpy arrays, kept for the next call; not to be written to.

    Raises:
        ValueError: for border="wrap", windows that do not fit the grid, or tiles with another
            number of axes.
    """
    grid = tuple(int(length) for length in grid)
    (q_tile, _), (kv_tile, _) = (_checked_tiling(tile, 1, grid) for tile in (q_tile, kv_tile))
    return _plan(grid, spec, q_tile, kv_tile)


@functools.lru_cache(maxsize=64)
def _plan(grid, spec, q_tile, kv_tile) -> TilePlan:
    axes = spec.axes(grid)
    if any(axis.border == "wrap" for axis in axes):
        raise ValueError(
            "border='wrap' has windows that are no boxes, so they are not computed in tiles; "
            "use border='shift' or 'mask', or implementation='xla'"
        )
    dilation = tuple(axis.dilation for axis in axes)
    q_grid = _tiles_along(grid, q_tile, dilation)
    kv_grid = _tiles_along(grid, kv_tile, dilation)
    pairs, bounds = [], []
    for groups in itertools.product(*map(range, dilation)):
        along = [
            _axis_pairs(axis, q_edge, kv_edge, group)
            for axis, q_edge, kv_edge, group in zip(axes, q_tile, kv_tile, groups, strict=True)
        ]
        pairs.append(_box_pairs(along, q_grid, kv_grid))
        bounds.append(_bounds(axes, groups, q_grid, q_tile))
    forward = _lists([(q, kv, full) for q, kv, full in pairs], math.prod(q_grid))
    backward = _lists([(kv, q, full) for q, kv, full in pairs], math.prod(kv_grid))
    start, end = (np.stack(arrays) for arrays in zip(*bounds, strict=True))
    return TilePlan(q_tile, kv_tile, q_grid, kv_grid, *forward, *backward, start, end)


def _axis_pairs(axis: AxisWindow, q_tile: int, kv_tile: int, group: int) -> tuple:
    """(tile of queries, tile of keys, whether full) of each visited pair along one axis."""
    tiles = axis_tiles(axis, q_tile, kv_tile, group)
    counts = tiles.high - tiles.low
    q = np.repeat(np.arange(len(counts)), counts)
    kv = np.arange(len(q)) - np.repeat(np.cumsum(counts) - counts - tiles.low, counts)
    return q, kv, (kv >= tiles.full_low[q]) & (kv < tiles.full_high[q])


def _box_pairs(along: list[tuple], q_grid: tuple[int, ...], kv_grid: tuple[int, ...]) -> tuple:
    """The same over all axes: every combination of the axes' pairs."""
    q, kv, full = np.zeros(1, int), np.zeros(1, int), np.ones(1, bool)
    for (q_axis, kv_axis, full_axis), q_tiles, kv_tiles in zip(along, q_grid, kv_grid, strict=True):
        q = (q[:, None] * q_tiles + q_axis).ravel()
        kv = (kv[:, None] * kv_tiles + kv_axis).ravel()
        full = (full[:, None] & full_axis).ravel()
    return q, kv, full


def _lists(pairs: list[tuple], num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(columns of each row, full ones first; how many are full; how many there are), by group."""
    visited = np.stack([np.bincount(row, minlength=num_rows) for row, _, _ in pairs])
    full = np.stack([np.bincount(row[whole], minlength=num_rows) for row, _, whole in pairs])
    tables = []
    for (row, column, whole), counts in zip(pairs, visited, strict=True):
        order = np.lexsort((column, ~whole, row))
        row, column = row[order], column[order]
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.zeros((num_rows, max(1, visited.max())), np.int32)
        table[row, place] = column
        last = table[np.arange(num_rows), np.maximum(counts - 1, 0)]
        beyond = np.arange(table.shape[1]) >= counts[:, None]
        tables.append(np.where(beyond, last[:, None], table))
    return np.stack(tables), full.astype(np.int32), visited.astype(np.int32)


def _bounds(axes, groups, q_grid, q_tile) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) [axes, queries] of one dilation group, in tiled order, 0 for padding."""
    rank = len(axes)
    real = np.ones(1, bool)
    windows = []
    for number, (axis, group) in enumerate(zip(axes, groups, strict=True)):
        shape = [1] * (2 * rank)
        shape[number], shape[rank + number] = q_grid[number], q_tile[number]
        window = np.zeros((2, q_grid[number] * q_tile[number]), np.int32)
        bounds = np.stack(axis.bounds(group))
        window[:, : bounds.shape[1]] = bounds
        inside = np.arange(window.shape[1]) < bounds.shape[1]
        real = real & inside.reshape(shape)
        windows.append(window.reshape(2, *shape))
    start, end = (
        np.stack([np.where(real, window[side], 0).ravel() for window in windows])
        for side in range(2)
    )
    return start, end


def _tiles_along(grid, tile, dilation) -> tuple[int, ...]:
    return tuple(
        -(-length // (edge * step)) for length, edge, step in zip(grid, tile, dilation, strict=True)
    )


def _pattern(tile, dilation) -> tuple[str, str, dict[str, int]]:
    """einops patterns of the grid and of the tiles: x = (rest * edge + offset) * d + group."""
    axes = range(len(tile))
    names = {letter: " ".join(f"{letter}{axis}" for axis in axes) for letter in "rog"}
    grid = "b " + " ".join(f"(r{axis} o{axis} g{axis})" for axis in axes) + " ..."
    tiled = f"(b {names['g']}) ({names['r']} {names['o']}) ..."
    sizes = {f"o{axis}": tile[axis] for axis in axes}
    return grid, tiled, sizes | {f"g{axis}": dilation[axis] for axis in axes}


def _checked_tiling(tile, dilation, grid=None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tile = (tile,) if isinstance(tile, int) else tuple(int(edge) for edge in tile)
    dilation = (dilation,) * len(tile) if isinstance(dilation, int) else tuple(dilation)
    if not tile or len(dilation) != len(tile) or min(*tile, *dilation) < 1:
        raise ValueError(
            f"tile and dilation must have a positive number for each axis, got {tile}, {dilation}"
        )
    if grid is not None and len(grid) != len(tile):
        raise ValueError(
            f"a tile must have an edge for each axis of the grid {tuple(grid)}, got {tile}"
        )
    return tile, dilation
