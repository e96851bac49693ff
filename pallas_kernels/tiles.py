"""What the kernels of neighborhood attention (arXiv 2504.16922) share: tiles and their masks.

Tokens are in tiles: boxes of the grid whose tokens lie together, tile after tile. A kernel works on
a pair of tiles at a time, and a plan lists the pairs in which some query sees some key. In a full
pair every query sees every key, and no mask is needed; in the others a query sees the keys between
its bounds on every axis. The derivative is made here for all kernels, from their two passes:

    dS = P (dP - delta),  dP = dO V^T,  delta = rowsum(dO O) - dLSE
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

NO_KEYS = 1e38  # takes the place of lse = -inf in gradients: exp(logit - NO_KEYS) is 0, not NaN


class TilePlan(NamedTuple):
    """Which tiles of keys each tile of queries visits, in each of G dilation groups; all int32.

    Attributes:
        q_tile, kv_tile: edges of the boxes of queries and of keys.
        q_grid, kv_grid: tiles along each axis.
        kv_tiles: [G, tiles of queries, most], the tiles of keys that each tile of queries visits,
            the full ones first; what follows the last visited repeats it.
        kv_full, kv_visited: [G, tiles of queries], how many of them are full, and visited.
        q_tiles, q_full, q_visited: the same with the parts of queries and keys exchanged.
        query_start, query_end: [G, axes, queries], along each axis the keys that a query sees are
            start <= position < end, for queries in their tiled order; padding has both 0.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    q_grid: tuple[int, ...]
    kv_grid: tuple[int, ...]
    kv_tiles: np.ndarray
    kv_full: np.ndarray
    kv_visited: np.ndarray
    q_tiles: np.ndarray
    q_full: np.ndarray
    q_visited: np.ndarray
    query_start: np.ndarray
    query_end: np.ndarray

    @property
    def num_full(self) -> int:
        """Pairs of tiles that need no mask."""
        return int(self.kv_full.sum())

    @property
    def num_visited(self) -> int:
        """Pairs of tiles that are computed."""
        return int(self.kv_visited.sum())


class Visits(NamedTuple):
    """For each tile of one side, the tiles of the other that it visits, as in a `TilePlan`."""

    tiles: Array
    full: Array
    visited: Array


class Bounds(NamedTuple):
    """`TilePlan.query_start` and `query_end`."""

    start: Array
    end: Array


class Problem(NamedTuple):
    """What a kernel is compiled for; edges of tiles are powers of two."""

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    kv_grid: tuple[int, ...]
    scale: float
    num_additional: int
    additional_block: int  # additional keys are taken so many at a time
    interpret: bool

    @property
    def q_block(self) -> int:
        """Queries of a tile."""
        return math.prod(self.q_tile)

    @property
    def kv_block(self) -> int:
        """Keys of a tile."""
        return math.prod(self.kv_tile)


class Operands(NamedTuple):
    """Tokens in tiles: [batch * G, tokens, heads, width]; additional ones [batch, extra, ...]."""

    query: Array
    key: Array
    value: Array
    additional_keys: Array | None
    additional_values: Array | None
    kv_mask: Array | None  # int32 [batch * G, tokens]


class Cotangents(NamedTuple):
    """Of one attention: dout like `out`; lse and delta [batch * G, heads, queries], both finite."""

    dout: Array
    lse: Array
    delta: Array


class Kernels(NamedTuple):
    """The three programs of a platform.

    Attributes:
        forward: (problem, visits, bounds, operands) -> (out, lse [batch * G, heads, queries]).
        query_gradient: (problem, visits, bounds, operands, cotangents) -> dquery.
        key_gradient: (problem, visits of the keys' tiles, bounds or None for no mask, operands,
            cotangents) -> (dkey, dvalue), in float32 for additional keys, which stand in for the
            grid's, [batch * G, ...].
        least_block: additional keys that are taken at a time, at least, where there are as many.
    """

    forward: Callable[..., Any]
    query_gradient: Callable[..., Any]
    key_gradient: Callable[..., Any]
    least_block: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernels: Kernels, problem: Problem, tables: tuple, operands: Operands) -> Any:
    """(out, lse) of a platform's kernels; tables are (visits of queries, of keys, bounds)."""
    visits, _, bounds = tables
    return kernels.forward(problem, visits, bounds, operands)


def _attend_forward(kernels, problem, tables, operands):
    out, lse = attend(kernels, problem, tables, operands)
    return (out, lse), (tables, operands, out, lse)


def _attend_backward(kernels, problem, residuals, gradients):
    (visits, kv_visits, bounds), operands, out, lse = residuals
    dout, dlse = gradients
    has_keys = lse > -jnp.inf
    products = jnp.einsum("bqhd,bqhd->bhq", dout, out, preferred_element_type=jnp.float32)
    delta = jnp.where(has_keys, products - dlse, 0)
    cotangents = Cotangents(dout, jnp.where(has_keys, lse, NO_KEYS), delta)
    dquery = kernels.query_gradient(problem, visits, bounds, operands, cotangents)
    dkey, dvalue = kernels.key_gradient(problem, kv_visits, bounds, operands, cotangents)
    more = (None, None)
    if problem.num_additional:
        stand_in = operands._replace(
            key=operands.additional_keys, value=operands.additional_values, kv_mask=None
        )
        block = problem.additional_block
        everything = _every_query(operands, problem, stand_in.key.shape[1] // block)
        extra = problem._replace(kv_tile=(block,), kv_grid=())
        slopes = kernels.key_gradient(extra, everything, None, stand_in, cotangents)
        more = tuple(
            jnp.sum(slope.reshape(len(like), -1, *like.shape[1:]), axis=1).astype(like.dtype)
            for slope, like in zip(slopes, stand_in[1:3], strict=True)
        )
    return None, Operands(dquery, dkey, dvalue, *more, None)


attend.defvjp(_attend_forward, _attend_backward)


def _every_query(operands: Operands, problem: Problem, num_tiles: int) -> Visits:
    number = operands.query.shape[1] // problem.q_block
    tiles = np.broadcast_to(np.arange(number, dtype=np.int32), (1, num_tiles, number))
    counts = np.full((1, num_tiles), number, np.int32)
    return Visits(tiles, counts, counts)


def tiled_attention(
    kernels: Kernels,
    query: Float[Array, "batch_groups queries heads head_dim"],
    key: Float[Array, "batch_groups keys kv_heads head_dim"],
    value: Float[Array, "batch_groups keys kv_heads value_dim"],
    plan: TilePlan,
    *,
    scale: float,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch_groups keys"] | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Attention over tokens in tiles by a platform's kernels: see `attention_reference`."""
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    if not extra:
        additional_keys = additional_values = None
    # A power of two: no more than there are, and like the grid's tiles.
    block = min(
        max(math.prod(plan.kv_tile), kernels.least_block),
        max(16, 1 << max(extra - 1, 0).bit_length()),
    )
    problem = Problem(
        plan.q_tile, plan.kv_tile, plan.kv_grid, float(scale), extra, block, bool(interpret)
    )
    if extra:
        pad = -extra % block
        additional_keys, additional_values = (
            jnp.pad(array, ((0, 0), (0, pad), (0, 0), (0, 0)))
            for array in (additional_keys, additional_values)
        )
    tables = (
        Visits(plan.kv_tiles, plan.kv_full, plan.kv_visited),
        Visits(plan.q_tiles, plan.q_full, plan.q_visited),
        Bounds(plan.query_start, plan.query_end),
    )
    mask = None if kv_mask is None else kv_mask.astype(jnp.int32)
    operands = Operands(query, key, value, additional_keys, additional_values, mask)
    out, lse = attend(kernels, problem, tables, operands)
    return out, jnp.swapaxes(lse, 1, 2)


def attention_reference(
    query: Float[Array, "batch_groups queries heads head_dim"],
    key: Float[Array, "batch_groups keys kv_heads head_dim"],
    value: Float[Array, "batch_groups keys kv_heads value_dim"],
    plan: TilePlan,
    *,
    scale: float,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch_groups keys"] | None = None,
) -> tuple[Array, Array]:
    """What the kernels compute, over all pairs of tokens: to compare with.

    Args:
        query: tokens in tiles of `plan.q_tile`; the groups of an example follow each other.
        key: tokens in tiles of `plan.kv_tile`; query head `h` reads head `h // (heads / kv_heads)`.
        value: likewise.
        plan: who sees whom.
        scale: factor of the logits.
        additional_keys: keys that every query of an example sees.
        additional_values: their values.
        kv_mask: False for keys that no query sees.

    Returns:
        (out [batch_groups, queries, heads, value_dim] in the query's type, lse [batch_groups,
        queries, heads] float32, by the natural logarithm). Padding, and queries without any key,
        have out 0 and lse -inf.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    groups = len(plan.query_start)
    seen = jnp.ones((groups, query.shape[1], key.shape[1]), bool)
    for axis, position in enumerate(_positions(plan)):
        start, end = (bound[:, axis, :, None] for bound in (plan.query_start, plan.query_end))
        seen &= (position >= start) & (position < end)
    seen = jnp.tile(seen, (len(query) // groups, 1, 1))
    if kv_mask is not None:
        seen &= kv_mask[:, None, :]
    if additional_keys is not None:
        real = jnp.asarray(plan.query_end[:, 0] > 0)
        real = jnp.tile(real, (len(query) // groups, 1))[..., None]
        more = jnp.broadcast_to(real, (*real.shape[:2], additional_keys.shape[1]))
        seen = jnp.concatenate([seen, more], axis=2)
        key, value = (
            jnp.concatenate([near, jnp.repeat(far, groups, axis=0)], axis=1)
            for near, far in ((key, additional_keys), (value, additional_values))
        )
    key, value = (jnp.repeat(array, heads // kv_heads, axis=2) for array in (key, value))
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, where=seen[:, None])
    weights = jnp.where(seen[:, None], jnp.exp(logits - jnp.maximum(lse, -NO_KEYS)[..., None]), 0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)


def _positions(plan: TilePlan) -> list[np.ndarray]:
    """Along each axis, the position of every key in its dilation group."""
    volume = math.prod(plan.kv_tile)
    tile, offset = np.divmod(np.arange(volume * math.prod(plan.kv_grid)), volume)
    tiles = np.unravel_index(tile, plan.kv_grid)
    offsets = np.unravel_index(offset, plan.kv_tile)
    return [t * edge + o for t, edge, o in zip(tiles, plan.kv_tile, offsets, strict=True)]


def in_window(problem: Problem, tile: Array, token: Array, bounds: list[tuple]) -> Array:
    """Which keys of a tile lie between bounds; usable inside a kernel.

    Args:
        problem: has the tiles of keys.
        tile: scalar, its number.
        token: int32, numbers of keys within the tile, in any shape.
        bounds: for each axis (start, end), of a shape that broadcasts against `token`.
    """
    seen = None
    for axis in reversed(range(len(problem.kv_tile))):
        edge, tiles = problem.kv_tile[axis], problem.kv_grid[axis]
        bits = edge.bit_length() - 1
        position = lax.rem(tile, tiles) * edge + (token & (edge - 1))
        tile, token = lax.div(tile, tiles), lax.shift_right_logical(token, bits)
        start, end = bounds[axis]
        inside = (position >= start) & (position < end)
        seen = inside if seen is None else seen & inside
    return seen
