"""Neighborhood attention for GPUs: Pallas kernels that Triton compiles (arXiv 2504.16922).

A program takes a tile of queries and goes through the tiles of keys that it visits: first the full
ones without a mask, then the partial ones, then the additional keys, with the softmax online.
Gradients need two passes, one like this and one that takes a tile of keys and goes through its
queries, so that nothing is added atomically and results are deterministic.
`tiles.attention_reference` is the same in plain jnp.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tiles import (
    Bounds,
    Cotangents,
    Kernels,
    Operands,
    Problem,
    Visits,
    in_window,
    tiled_attention,
)

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that exp2(-inf - LOWEST) is 0
LOG2E = math.log2(math.e)  # logits are kept in base 2: GPUs have exp2 in hardware


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _token_numbers(size: int, part: Any = 0) -> jax.Array:
    return lax.iota(jnp.int32, size) + part * size


def _hidden(logits, seen):
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def _read_bounds(refs: Bounds, *rows) -> list[tuple]:
    return [(refs.start[axis, *rows], refs.end[axis, *rows]) for axis in range(refs.start.shape[0])]


def _both(left, right):
    return right if left is None else left & right


class _Keys:
    """The keys that a program with a tile of queries goes through, `step` at a time."""

    def __init__(self, problem: Problem, visits: Visits, bounds: Bounds, refs: Operands, step: int):
        self.problem, self.visits, self.refs = problem, visits, refs
        self.bounds = [(start[:, None], end[:, None]) for start, end in _read_bounds(bounds)]
        self.step = min(step, problem.kv_block)
        self.parts = problem.kv_block // self.step

    def over_all(self, attend: Callable, carry: Any) -> Any:
        """Full tiles, partial ones, additional keys; `attend(carry, key, value, seen)`."""

        def near(number, carry, masked):
            tile = self.visits.tiles[lax.div(number, self.parts)]
            part = lax.rem(number, self.parts)
            rows = pl.ds(tile * self.problem.kv_block + part * self.step, self.step)
            seen = None
            if masked:
                tokens = _token_numbers(self.step, part)[None, :]
                seen = in_window(self.problem, tile, tokens, self.bounds)
            if self.refs.kv_mask is not None:
                seen = _both(seen, (self.refs.kv_mask[rows] != 0)[None, :])
            return attend(carry, self.refs.key[rows], self.refs.value[rows], seen)

        carry = _over_tiles(self.visits, near, carry, self.parts)
        size = min(self.step, self.problem.additional_block)

        def far(number, carry, limit=None):
            rows = pl.ds(number * size, size)
            seen = None if limit is None else (_token_numbers(size) < limit)[None, :]
            keys, values = self.refs.additional_keys[rows], self.refs.additional_values[rows]
            return attend(carry, keys, values, seen)

        whole, rest = divmod(self.problem.num_additional, size)
        if whole:
            carry = lax.fori_loop(0, whole, far, carry)
        return far(whole, carry, rest) if rest else carry


def _over_tiles(visits: Visits, step: Callable, carry: Any, parts: int) -> Any:
    """Full tiles, then partial ones, each in parts."""
    full, visited = visits.full[0] * parts, visits.visited[0] * parts
    carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
    return lax.fori_loop(full, visited, functools.partial(step, masked=True), carry)


def _forward_kernel(visits, bounds, refs, out_ref, lse_ref, *, problem: Problem, step: int):
    query = refs.query[...]

    def attend(carry, key, value, seen):
        acc, top, total = carry
        logits = _hidden(_dot(query, key, (1, 1)) * (problem.scale * LOG2E), seen)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - new_top[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + _dot(weights.astype(value.dtype), value, (1, 0))
        return acc, new_top, total

    queries = problem.q_block
    carry = (
        jnp.zeros((queries, refs.value.shape[1]), jnp.float32),
        jnp.full((queries,), LOWEST, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
    )
    keys = _Keys(problem, visits, bounds, refs, step)
    acc, top, total = keys.over_all(attend, carry)
    total = jnp.where(bounds.end[0] > bounds.start[0], total, 0.0)  # padding sees nothing
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    acc = jnp.where(some[:, None], acc / safe[:, None], 0.0)
    out_ref[...] = acc.astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some, (top + jnp.log2(safe)) / LOG2E, -jnp.inf)


def _query_gradient_kernel(visits, bounds, refs, cotangents, dquery_ref, *, problem, step: int):
    query, dout = refs.query[...], cotangents.dout[...]
    lse, delta = cotangents.lse[...] * LOG2E, cotangents.delta[...]

    def attend(dquery, key, value, seen):
        logits = _hidden(_dot(query, key, (1, 1)) * (problem.scale * LOG2E), seen)
        weights = jnp.exp2(logits - lse[:, None])
        dlogits = weights * (_dot(dout, value, (1, 1)) - delta[:, None])
        return dquery + _dot(dlogits.astype(key.dtype), key, (1, 0))

    keys = _Keys(problem, visits, bounds, refs, step)
    dquery = keys.over_all(attend, jnp.zeros(query.shape, jnp.float32))
    dquery_ref[...] = (dquery * problem.scale).astype(dquery_ref.dtype)


def _key_gradient_kernel(
    visits, bounds, refs, cotangents, dkey_ref, dvalue_ref, *, problem: Problem, step: int
):
    """Here logits are [keys, queries], so that weights are ready for the products with queries."""
    key, value = refs.key[...], refs.value[...]
    tile, tokens = pl.program_id(0), _token_numbers(problem.kv_block)[:, None]
    step = min(step, problem.q_block)
    parts = problem.q_block // step
    allowed = None if refs.kv_mask is None else (refs.kv_mask[...] != 0)[:, None]

    def near(number, carry, masked, head):
        dkey, dvalue = carry
        first = visits.tiles[lax.div(number, parts)] * problem.q_block
        rows = pl.ds(first + lax.rem(number, parts) * step, step)
        query, dout = refs.query[rows, head], cotangents.dout[rows, head]
        lse, delta = cotangents.lse[head, rows] * LOG2E, cotangents.delta[head, rows]
        seen = allowed
        if masked and bounds is not None:
            windows = [(start[None], end[None]) for start, end in _read_bounds(bounds, rows)]
            seen = _both(seen, in_window(problem, tile, tokens, windows))
        logits = _hidden(_dot(key, query, (1, 1)) * (problem.scale * LOG2E), seen)
        weights = jnp.exp2(logits - lse[None])
        dvalue += _dot(weights.astype(dout.dtype), dout, (1, 0))
        dlogits = weights * (_dot(value, dout, (1, 1)) - delta[None])
        return dkey + _dot(dlogits.astype(query.dtype), query, (1, 0)), dvalue

    def over_head(head, carry):
        return _over_tiles(visits, functools.partial(near, head=head), carry, parts)

    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    dkey, dvalue = lax.fori_loop(0, refs.query.shape[1], over_head, carry)
    dkey_ref[...] = (dkey * problem.scale).astype(dkey_ref.dtype)
    dvalue_ref[...] = dvalue.astype(dvalue_ref.dtype)


def _of_query(block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block, None, width), lambda i, b, h: (b, i, h, 0))


def _query_side_specs(visits: Visits, bounds: Bounds, operands: Operands, problem: Problem):
    """Block specs of (visits, bounds, operands) where a program takes a tile of queries."""
    groups, axes, _ = bounds.start.shape
    repeats = operands.query.shape[2] // operands.key.shape[2]

    def whole(array, share=1):
        if array is None:
            return None
        shape = (None, array.shape[1], None, array.shape[3])
        return pl.BlockSpec(shape, lambda i, b, h: (lax.div(b, share), 0, lax.div(h, repeats), 0))

    window = pl.BlockSpec((None, axes, problem.q_block), lambda i, b, h: (lax.rem(b, groups), 0, i))
    mask = operands.kv_mask
    return (
        _visits_specs(visits),
        Bounds(window, window),
        Operands(
            _of_query(problem.q_block, operands.query.shape[3]),
            whole(operands.key),
            whole(operands.value),
            whole(operands.additional_keys, groups),
            whole(operands.additional_values, groups),
            None if mask is None else pl.BlockSpec((None, mask.shape[1]), lambda i, b, h: (b, 0)),
        ),
    )


def _visits_specs(visits: Visits) -> Visits:
    groups, _, most = visits.tiles.shape
    tiles = pl.BlockSpec((None, None, most), lambda i, b, h: (lax.rem(b, groups), i, 0))
    count = pl.BlockSpec((None, 1), lambda i, b, h: (lax.rem(b, groups), i))
    return Visits(tiles, count, count)


def _launch(rows: int) -> Any:
    """How a kernel that accumulates so many rows runs.

    Hopper's matrix instructions take 64 rows for four warps: eight on a tile of 64 keys halve the
    speed of their gradient.
    """
    return plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=2)


def _forward(problem: Problem, visits: Visits, bounds: Bounds, operands: Operands) -> Any:
    batch, queries, heads, _ = operands.query.shape
    value_width = operands.value.shape[3]
    out = jax.ShapeDtypeStruct((batch, queries, heads, value_width), operands.query.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    block = problem.q_block
    return pl.pallas_call(
        functools.partial(_forward_kernel, problem=problem, step=64),
        grid=(queries // block, batch, heads),
        in_specs=_query_side_specs(visits, bounds, operands, problem),
        out_specs=(
            _of_query(block, value_width),
            pl.BlockSpec((None, None, block), lambda i, b, h: (b, h, i)),
        ),
        out_shape=(out, lse),
        # Eight warps spill no registers on tiles of 128 queries, and are slower all the same.
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=problem.interpret,
        name="neighborhood_forward",
    )(visits, bounds, operands)


def _query_gradient(problem, visits, bounds, operands, cotangents: Cotangents) -> Any:
    batch, queries, heads, width = operands.query.shape
    value_width, block = operands.value.shape[3], problem.q_block
    row = pl.BlockSpec((None, None, block), lambda i, b, h: (b, h, i))
    step = 32 if max(width, value_width) > 64 else 64
    return pl.pallas_call(
        functools.partial(_query_gradient_kernel, problem=problem, step=step),
        grid=(queries // block, batch, heads),
        in_specs=(
            *_query_side_specs(visits, bounds, operands, problem),
            Cotangents(_of_query(block, value_width), row, row),
        ),
        out_specs=_of_query(block, width),
        out_shape=jax.ShapeDtypeStruct(operands.query.shape, operands.query.dtype),
        compiler_params=_launch(block),
        interpret=problem.interpret,
        name="neighborhood_query_gradient",
    )(visits, bounds, operands, cotangents)


def _key_gradient(problem, visits, bounds, operands, cotangents: Cotangents) -> Any:
    batch, queries, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[1:]
    repeats, share, block = heads // kv_heads, batch // len(operands.key), problem.kv_block

    def all_queries(width):
        shape = (None, queries, repeats, width)
        return pl.BlockSpec(shape, lambda i, b, h: (b, 0, h, 0))

    def of_keys(width, share=1):
        shape = (None, block, None, width)
        return pl.BlockSpec(shape, lambda i, b, h: (lax.div(b, share), i, h, 0))

    rows = pl.BlockSpec((None, repeats, queries), lambda i, b, h: (b, h, 0))
    windows = None
    if bounds is not None:
        groups, axes, _ = bounds.start.shape
        window = pl.BlockSpec((None, axes, queries), lambda i, b, h: (lax.rem(b, groups), 0, 0))
        windows = Bounds(window, window)
    mask = None
    if operands.kv_mask is not None:
        mask = pl.BlockSpec((None, block), lambda i, b, h: (b, i))
    operands = operands._replace(additional_keys=None, additional_values=None)
    dtypes = (operands.key.dtype, operands.value.dtype)
    if share > 1 or bounds is None:
        dtypes = (jnp.float32, jnp.float32)  # to be summed
    return pl.pallas_call(
        functools.partial(_key_gradient_kernel, problem=problem, step=64),
        grid=(keys // block, batch, kv_heads),
        in_specs=(
            _visits_specs(visits),
            windows,
            Operands(
                all_queries(width),
                of_keys(width, share),
                of_keys(value_width, share),
                None,
                None,
                mask,
            ),
            Cotangents(all_queries(value_width), rows, rows),
        ),
        out_specs=(of_keys(width), of_keys(value_width)),
        out_shape=tuple(
            jax.ShapeDtypeStruct((batch, keys, kv_heads, size), dtype)
            for size, dtype in zip((width, value_width), dtypes, strict=True)
        ),
        compiler_params=_launch(block),
        interpret=problem.interpret,
        name="neighborhood_key_gradient",
    )(visits, bounds, operands, cotangents)


KERNELS = Kernels(_forward, _query_gradient, _key_gradient, least_block=16)


def neighborhood_attention_triton(query, key, value, plan, **options) -> tuple:
    """Attention over tokens in tiles, as `tiles.attention_reference`; differentiable once.

    Widths are padded with zeros to powers of two, which Triton needs. Tiles must have at least 16
    tokens, and edges that are powers of two.

    Args:
        query: [batch_groups, queries, heads, head_dim], float32, bfloat16 or float16.
        key: [batch_groups, keys, kv_heads, head_dim], of the same type.
        value: [batch_groups, keys, kv_heads, value_dim], of the same type.
        plan: a `tiles.TilePlan`.
        **options: `scale`, `additional_keys`, `additional_values`, `kv_mask` and `interpret`.

    Returns:
        (out, lse [batch_groups, queries, heads] float32).
    """
    width = value.shape[-1]
    query, key, value = map(_padded, (query, key, value))
    for name in ("additional_keys", "additional_values"):
        if options.get(name) is not None:
            options[name] = _padded(options[name])
    out, lse = tiled_attention(KERNELS, query, key, value, plan, **options)
    return out[..., :width], lse


def _padded(array: jax.Array) -> jax.Array:
    size = max(16, pl.next_power_of_2(array.shape[-1]))
    return jnp.pad(array, [(0, 0)] * 3 + [(0, size - array.shape[-1])])
