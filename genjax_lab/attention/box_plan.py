"""Which box of keys each tile of queries is computed with: plans made before anything runs.

Queries of a grid are cut into tiles. What the queries of a tile see together lies in a box of
keys, the product of one interval for each axis, so all of this happens axis by axis. Where not
every query of a tile sees its whole box, the rest is masked: the queries of a tile that have equal
intervals make one class, and a class has a penalty for each key.

Axes are counted in units of `tile` tokens, 1 unless tokens are stored tile by tile.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

Bounds = tuple[np.ndarray, np.ndarray]

# Nanoseconds of one core, for choosing tiles: of a multiply-add, of the rest of a pair of tokens,
# of a number of a box of keys, of a tile. Only their ratios matter.
_MULTIPLY_ADD, _PAIR, _KEY_NUMBER, _TILE = 0.026, 0.6, 0.25, 15e3
_LARGEST_TILE = 1024  # queries
_MOST_TILES = 1024  # along an axis, where tiles are chosen


class AxisPlan(NamedTuple):
    """The tiles of one axis, for n sets of windows.

    Attributes:
        q_edge: units of a tile of queries.
        kv_edge: units of a box of keys.
        first: [tiles] first unit of each tile of queries.
        skipped: [tiles] leading tokens of a tile that the tile before has already: the last tile of
            a segment is moved inward.
        kv_first: [n, tiles] first unit of each box.
        group: [n, tiles, tokens of a tile] the class of each query; None where nothing is masked.
        seen: [n, tiles, classes, 2] interval of the box that a class sees, in tokens.
    """

    q_edge: int
    kv_edge: int
    first: np.ndarray
    skipped: np.ndarray
    kv_first: np.ndarray
    group: np.ndarray | None
    seen: np.ndarray | None

    @property
    def num_classes(self) -> int:
        """Classes of a tile; 0 where nothing is masked."""
        return 0 if self.group is None else self.seen.shape[2]


def segment_tiles(segments: Sequence[int], edge: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Cuts segments of an axis into tiles of one size.

    Returns:
        (edge, first, skipped): the edge, at most that of the smallest segment, and see `AxisPlan`,
        both in the units of `segments`.
    """
    edge = min(edge, *segments)
    first, skipped, origin = [], [], 0
    for length in segments:
        regular = origin + np.arange(0, length, edge)
        inside = np.minimum(regular, origin + length - edge)
        first.append(inside)
        skipped.append(regular - inside)
        origin += length
    return edge, np.concatenate(first), np.concatenate(skipped)


def plan_axis(
    bounds: Bounds,
    kv_length: int,
    segments: Sequence[int],
    edge: int,
    tile: int = 1,
    span: int | None = None,
) -> AxisPlan:
    """Plans one axis.

    Args:
        bounds: (start, end), int [n, tokens]: query i sees the keys start[i] <= j < end[i].
        kv_length: units of the keys.
        segments: units of each run of queries with bounds that never decrease.
        edge: units of a tile of queries.
        tile: tokens of a unit.
        span: needed where the bounds are traced: at most so many keys lie between the first that a
            query sees and the last, and at most one more with each further query.
    """
    edge, first, skipped = segment_tiles(segments, edge)
    size = edge * tile
    xp = np if span is None else jnp
    tokens = (first[:, None] * tile + np.arange(size))[None]
    rows = np.arange(len(bounds[0]))[:, None, None]
    start, end = bounds[0][rows, tokens], bounds[1][rows, tokens]  # [n, tiles, size]
    own = np.arange(size) >= skipped[:, None] * tile
    sees = own & (end > start)
    low = xp.min(xp.where(sees, start, kv_length * tile), axis=-1) // tile
    if span is None:
        high = -(-xp.max(xp.where(sees, end, 0), axis=-1) // tile)
        kv_edge = max(1, int(np.max(high - low)))
    else:
        kv_edge = min(kv_length, -(-(span + size - 1) // tile) + (tile > 1))
    kv_first = xp.minimum(low, kv_length - kv_edge)
    seen = xp.stack([start, end], axis=-1) - kv_first[..., None, None] * tile
    seen = xp.where(sees[..., None], xp.clip(seen, 0, kv_edge * tile), 0)
    # What queries see that another tile answers for does not matter: no classes of their own.
    first_own = np.broadcast_to((skipped * tile)[:, None, None], (*seen.shape[:2], 1, 1))
    seen = xp.where(own[..., None], seen, xp.take_along_axis(seen, first_own, axis=2))
    if span is not None:
        group = np.broadcast_to(np.arange(size), seen.shape[:3])
        return AxisPlan(edge, kv_edge, first, skipped, kv_first, group, seen)
    if np.all(seen == (0, kv_edge * tile)):
        return AxisPlan(edge, kv_edge, first, skipped, kv_first, None, None)
    changes = np.any(np.diff(seen, axis=2, prepend=seen[:, :, :1]) != 0, axis=-1)
    group = np.cumsum(changes, axis=2)
    intervals = np.zeros((*seen.shape[:2], int(group.max()) + 1, 2), seen.dtype)
    np.put_along_axis(intervals, group[..., None], seen, axis=2)
    return AxisPlan(edge, kv_edge, first, skipped, kv_first, group, intervals)


def choose_tile(
    bounds: Sequence[Bounds],
    kv_lengths: Sequence[int],
    segments: Sequence[Sequence[int]],
    *,
    rows_per_query: int,
    width: int,
    tile: Sequence[int],
) -> tuple[int, ...]:
    """Edges of the tiles of queries, in units, that should take the least time on one core.

    Args:
        bounds: of each axis.
        kv_lengths: units of keys along each axis.
        segments: units of each run of queries, for each axis.
        rows_per_query: heads that share their keys.
        width: sum of the widths of keys and values.
        tile: tokens of a unit, for each axis.
    """
    plans = [
        [
            plan_axis(_thinned(pair), length, parts, edge, step)
            for edge in _candidate_edges(pair, parts, step)
        ]
        for pair, length, parts, step in zip(bounds, kv_lengths, segments, tile, strict=True)
    ]

    def nanoseconds(choice: tuple[AxisPlan, ...]) -> float:
        tiles = math.prod(len(plan.first) for plan in choice)
        queries = rows_per_query * math.prod(
            plan.q_edge * step for plan, step in zip(choice, tile, strict=True)
        )
        keys = math.prod(plan.kv_edge * step for plan, step in zip(choice, tile, strict=True))
        if queries > _LARGEST_TILE * rows_per_query:
            return math.inf
        classes = sum(plan.num_classes for plan in choice)
        pair = _PAIR + _MULTIPLY_ADD * (width + 2 * classes)
        return tiles * (queries * keys * pair + keys * width * _KEY_NUMBER + _TILE)

    best = min(itertools.product(*plans), key=nanoseconds)
    return tuple(plan.q_edge for plan in best)


def _candidate_edges(bounds: Bounds, segments: Sequence[int], tile: int) -> list[int]:
    """Edges worth trying: powers of two, where windows change, and what divides the segments."""
    longest = max(segments)
    start = np.asarray(bounds[0])[0]
    changes = np.flatnonzero(np.diff(start)) + 1
    stride = int(np.gcd.reduce(changes)) if len(changes) else longest * tile
    edges = {2**power for power in range(11)} | {12, 20, 24, 40, 48}
    edges |= {max(1, multiple * stride // tile) for multiple in (1, 2, 3, 4)}
    edges = {min(edge, longest) for edge in edges if edge <= _LARGEST_TILE}
    return sorted(edge for edge in edges if edge * _MOST_TILES >= longest)


def _thinned(bounds: Bounds) -> Bounds:
    """One set of windows stands for all when tiles are chosen."""
    return bounds[0][:1], bounds[1][:1]


@functools.lru_cache(maxsize=256)
def tile_order(counts: tuple[int, ...]) -> np.ndarray:
    """Indices [tiles, axes] of all tiles, last ones first.

    In this order a token that lies in several tiles is written last by the one that it belongs to.
    """
    return np.array(list(np.ndindex(*counts)), np.int32)[::-1]
