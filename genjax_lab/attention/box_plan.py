"""Which box of keys each tile of queries is computed with: plans made before anything runs.

Queries of a grid are cut into tiles. What the queries of a tile see together lies in a box of
keys, the product of one interval for each axis, so all of this happens axis by axis. Where not
every query of a tile sees its whole box, each query's interval says what of it is masked.

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
# of a masked axis of a pair, of a number of a box of keys in products, of one that is copied, of a
# tile, of a part's loop. Only their ratios matter.
_MULTIPLY_ADD, _PAIR, _MASKED, _KEY, _COPY, _TILE, _PART = 0.008, 0.35, 0.01, 0.13, 0.14, 5e3, 1e5
_LARGEST_TILE = 1024  # queries
_MOST_PIECES = 4  # of what is new in a ring
_MOST_TILES = 1024  # along an axis, where tiles are chosen


class Ring(NamedTuple):
    """How a box along an axis becomes that of the next tile.

    Attributes:
        slots: units that it holds.
        advance: at most so many units are new in a tile.
        piece: units that are always in slots beside each other.
    """

    slots: int
    advance: int
    piece: int


class AxisPlan(NamedTuple):
    """Tiles of one axis that have boxes of one size, for n sets of windows.

    Attributes:
        q_edge: units of a tile of queries.
        kv_edge: units of a box of keys.
        first: [tiles] first unit of each tile of queries.
        skipped: [tiles] leading units of a tile that the tile before has already: the last tile of
            a piece is moved inward.
        kv_first: [n, tiles] first unit of each box.
        seen: [n, tiles, tokens of a tile, 2] interval of the box that a query sees, in tokens;
            None where every query sees all of it.
    """

    q_edge: int
    kv_edge: int
    first: np.ndarray
    skipped: np.ndarray
    kv_first: np.ndarray
    seen: np.ndarray | None

    @property
    def ring(self) -> Ring | None:
        """None where boxes do not move on tile by tile, or share nothing."""
        if not isinstance(self.kv_first, np.ndarray):
            return None
        advances = np.diff(self.kv_first, axis=1)
        advance = int(advances.max(initial=0))
        if np.any(advances < 0) or not 0 < advance < self.kv_edge:
            return None
        step = int(np.gcd.reduce(advances, axis=None))
        piece = math.gcd(step, self.kv_edge)
        if advance // piece <= _MOST_PIECES:
            return Ring(self.kv_edge, advance, piece)
        if self.seen is None or advance // step > _MOST_PIECES:
            return None
        return Ring(-(-self.kv_edge // step) * step, advance, step)  # what is too much is masked


def plan_axis(
    bounds: Bounds,
    kv_length: int,
    segments: Sequence[int],
    edge: int,
    tile: int = 1,
    span: int | None = None,
    merged: int = 1,
) -> tuple[AxisPlan, ...]:
    """Plans one axis.

    At the ends of an axis many queries have the same window. Their tiles need no mask and smaller
    boxes than those between, and several can be one: they are a part of their own.

    Args:
        bounds: (start, end), int [n, tokens]: query i sees the keys start[i] <= j < end[i].
        kv_length: units of the keys.
        segments: units of each run of queries with bounds that never decrease.
        edge: units of a tile of queries.
        tile: tokens of a unit.
        span: needed where the bounds are traced: at most so many keys lie between the first that a
            query sees and the last, and at most one more with each further query.
        merged: tiles that are one where queries have the same window.

    Returns:
        One plan, or that of the sliding windows and that of the others.
    """
    edge = min(edge, *segments)
    origins = np.cumsum([0, *segments[:-1]])
    whole = list(zip(origins.tolist(), segments, strict=True))
    if span is None:
        equal, sliding = _split(bounds, whole, edge, tile)
        if equal and sliding:
            parts = (
                _plan_pieces(bounds, kv_length, sliding, edge, tile),
                _plan_pieces(bounds, kv_length, equal, edge * merged, tile),
            )
            if parts[0].seen is not None or parts[0].kv_edge != parts[1].kv_edge:
                return parts
    return (_plan_pieces(bounds, kv_length, whole, edge, tile, span),)


def _split(bounds: Bounds, segments: list[tuple[int, int]], edge: int, tile: int) -> tuple:
    """Pieces (origin, units) of queries that share the first or last window; and all others.

    Pieces begin and end where tiles of `edge` units would.
    """
    stacked = np.stack(bounds)
    equal, sliding = [], []
    for origin, length in segments:
        inside = stacked[..., origin * tile : (origin + length) * tile]
        moved_first = np.any(inside != inside[..., :1], axis=(0, 1))
        moved_last = np.any(inside != inside[..., -1:], axis=(0, 1))[::-1]
        if not moved_first.any():
            equal.append((origin, length))
            continue
        ahead = int(np.argmax(moved_first)) // (tile * edge) * edge
        behind = length - int(np.argmax(moved_last)) // tile
        behind = min(-(-behind // edge) * edge, length)
        pieces = ((0, ahead, equal), (ahead, behind, sliding), (behind, length, equal))
        for begin, end, kind in pieces:
            if end > begin:
                kind.append((origin + begin, end - begin))
    return equal, sliding


def _tiles(pieces: list[tuple[int, int]], edge: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(edge, first, skipped) of `AxisPlan`: the edge is at most that of the smallest piece."""
    edge = min(edge, *(length for _, length in pieces))
    first, skipped = [], []
    for origin, length in pieces:
        regular = origin + np.arange(0, length, edge)
        inside = np.minimum(regular, origin + length - edge)
        first.append(inside)
        skipped.append(regular - inside)
    return edge, np.concatenate(first), np.concatenate(skipped)


def _plan_pieces(
    bounds: Bounds,
    kv_length: int,
    pieces: list[tuple[int, int]],
    edge: int,
    tile: int,
    span: int | None = None,
) -> AxisPlan:
    """Plans the tiles of some pieces of an axis."""
    edge, first, skipped = _tiles(pieces, edge)
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
    # What queries see that another tile answers for does not matter: nothing to mask for them.
    first_own = np.broadcast_to((skipped * tile)[:, None, None], (*seen.shape[:2], 1, 1))
    seen = xp.where(own[..., None], seen, xp.take_along_axis(seen, first_own, axis=2))
    if span is None and np.all(seen == (0, kv_edge * tile)):
        seen = None
    return AxisPlan(edge, kv_edge, first, skipped, kv_first, seen)


def choose_tiles(
    bounds: Sequence[Bounds],
    kv_lengths: Sequence[int],
    segments: Sequence[Sequence[int]],
    *,
    rows_per_query: int,
    width: int,
    tile: Sequence[int],
    q_tile: Sequence[int] | None = None,
) -> list[tuple[AxisPlan, ...]]:
    """Plans of all axes that should take the least time on one core.

    Args:
        bounds: of each axis.
        kv_lengths: units of keys along each axis.
        segments: units of each run of queries, for each axis.
        rows_per_query: heads that share their keys.
        width: sum of the widths of keys and values.
        tile: tokens of a unit, for each axis.
        q_tile: edges of the tiles that slide, if they are given.
    """

    def nanoseconds(plans: Sequence[tuple[AxisPlan, ...]]) -> float:
        total = 0.0
        for parts in itertools.product(*plans):
            tiles = math.prod(len(part.first) for part in parts)
            volume = lambda edges: math.prod(e * t for e, t in zip(edges, tile, strict=True))  # noqa: E731
            queries = rows_per_query * volume(part.q_edge for part in parts)
            keys, copied = volume(part.kv_edge for part in parts), 1.0
            if (ring := parts[-1].ring) is not None:
                keys *= ring.slots / parts[-1].kv_edge
                copied = ring.advance / ring.slots
            masked = sum(part.seen is not None for part in parts)
            pair = _MULTIPLY_ADD * width + _PAIR + _MASKED * masked
            total += tiles * (
                queries * keys * pair + keys * width * (_KEY + copied * _COPY) + _TILE
            )
            if queries > _LARGEST_TILE * rows_per_query:
                return math.inf
        return total + _PART * math.prod(len(parts) for parts in plans)

    options = []
    for number, (pair, length, parts, step) in enumerate(
        zip(bounds, kv_lengths, segments, tile, strict=True)
    ):
        edges = _candidate_edges(pair, parts, step) if q_tile is None else [q_tile[number]]
        plans = {}
        for edge, merged in itertools.product(edges, (1, 2, 4)):
            plan = plan_axis(pair, length, parts, edge, step, merged=merged)
            plans.setdefault(tuple((part.q_edge, len(part.first)) for part in plan), plan)
        options.append(list(plans.values()))
    # The best of each axis by turns, from small tiles.
    best = [plans[0] for plans in options]
    for _ in range(3):
        for axis, plans in enumerate(options):
            others = lambda plan, axis=axis: [*best[:axis], plan, *best[axis + 1 :]]  # noqa: E731
            best[axis] = min(plans, key=lambda plan: nanoseconds(others(plan)))
    return best


def _candidate_edges(bounds: Bounds, segments: Sequence[int], tile: int) -> list[int]:
    """Edges worth trying.

    Powers of two, equal parts of the axis, and multiples of the run in which windows stay.
    """
    longest = max(segments)
    changes = np.flatnonzero(np.diff(np.asarray(bounds[0])[0])) + 1
    stride = int(np.gcd.reduce(changes)) if len(changes) else longest * tile
    edges = {2**power for power in range(11)}
    edges |= {-(-longest // parts) for parts in range(1, 9)}
    edges |= {max(1, multiple * stride // tile) for multiple in (1, 2, 3)}
    edges = {min(edge, longest) for edge in edges if edge <= _LARGEST_TILE}
    return sorted(edge for edge in edges if edge * _MOST_TILES >= longest)


@functools.lru_cache(maxsize=256)
def tile_order(counts: tuple[int, ...]) -> np.ndarray:
    """Indices [tiles, axes] of all tiles, last ones first.

    In this order a token that lies in several tiles is written last by the one that it belongs to.
    """
    return np.array(list(np.ndindex(*counts)), np.int32)[::-1]
