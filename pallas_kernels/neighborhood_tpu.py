"""Neighborhood attention for TPUs: Pallas kernels that Mosaic compiles (arXiv 2504.16922).

A program takes a tile of queries, and a step of it one tile of keys, with the softmax online; the
additional keys come after the grid's. Gradients take two passes, over queries and over keys. Logits
are [keys, queries], so that all that belongs to a query (bounds, softmax, lse) lies along the lanes
and nothing is transposed inside. `tiles.attention_reference` is the same in plain jnp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tiles import (
    Bounds,
    Cotangents,
    Kernels,
    Operands,
    Problem,
    Visits,
    tiled_attention,
)
from pallas_kernels.tpu_blocks import (
    Lists,
    QuerySide,
    additional_logits,
    call,
    dot,
    masked_logits,
    visit,
)

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that exp(-inf - LOWEST) is 0


def _forward_kernel(lists, bounds, refs, out_ref, lse_ref, acc_ref, top_ref, total_ref, *, problem):
    number = pl.program_id(3)

    @pl.when(number == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)

    def attend(logits, value):
        top = top_ref[...]
        new_top = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink + dot(value, weights.astype(value.dtype), (1, 0))

    def near(tile, windows):
        logits = masked_logits(problem, refs.query[...], refs.key[...], tile, windows, refs.kv_mask)
        attend(logits, refs.value[...])

    visit(lists, number, near, bounds)
    if problem.num_additional:

        @pl.when(number >= lists.most)
        def _far():
            query, key = refs.query[...], refs.additional_keys[...]
            logits = additional_logits(problem, query, key, number - lists.most)
            attend(logits, refs.additional_values[...])

    @pl.when(number == pl.num_programs(3) - 1)
    def _finish():
        is_real = bounds.end[0:1, :] > bounds.start[0:1, :]  # padding sees nothing
        total = jnp.where(is_real, total_ref[...], 0.0)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[...] = jnp.where(some, acc_ref[...] / safe, 0.0).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some, top_ref[...] + jnp.log(safe), -jnp.inf)


def _query_gradient_kernel(
    lists, bounds, refs, keys_by_lane, cotangents, dquery_ref, acc_ref, *, problem: Problem
):
    number = pl.program_id(3)

    @pl.when(number == 0)
    def _start():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def attend(logits, key, value):
        weights = jnp.exp(logits - cotangents.lse[...])
        dlogits = weights * (dot(value, cotangents.dout[...], (1, 1)) - cotangents.delta[...])
        acc_ref[...] += dot(key, dlogits.astype(key.dtype), (1, 0))

    def near(tile, windows):
        logits = masked_logits(problem, refs.query[...], refs.key[...], tile, windows, refs.kv_mask)
        attend(logits, keys_by_lane[0][...], refs.value[...])

    visit(lists, number, near, bounds)
    if problem.num_additional:

        @pl.when(number >= lists.most)
        def _far():
            query, key = refs.query[...], refs.additional_keys[...]
            logits = additional_logits(problem, query, key, number - lists.most)
            attend(logits, keys_by_lane[1][...], refs.additional_values[...])

    @pl.when(number == pl.num_programs(3) - 1)
    def _finish():
        dquery_ref[...] = (acc_ref[...] * problem.scale).astype(dquery_ref.dtype)


def _key_gradient_kernel(
    lists, bounds, refs, cotangents, dkey_ref, dvalue_ref, dk_ref, dv_ref, *, problem: Problem
):
    step, key_tile = pl.program_id(3), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def near(_, windows):
        query, dout = refs.query[...], cotangents.dout[...]
        logits = masked_logits(problem, query, refs.key[...], key_tile, windows, refs.kv_mask)
        weights = jnp.exp(logits - cotangents.lse[...])
        dv_ref[...] += dot(weights.astype(dout.dtype), dout, (1, 0))
        dlogits = weights * (dot(refs.value[...], dout, (1, 1)) - cotangents.delta[...])
        dk_ref[...] += dot(dlogits.astype(query.dtype), query, (1, 0))

    visit(lists, lax.rem(step, lists.most), near, bounds)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish():
        dkey_ref[...] = (dk_ref[...] * problem.scale).astype(dkey_ref.dtype)
        dvalue_ref[...] = dv_ref[...].astype(dvalue_ref.dtype)


def _heads_first(operands: Operands) -> Operands:
    mask = operands.kv_mask
    arrays = (None if array is None else jnp.swapaxes(array, 1, 2) for array in operands[:5])
    return Operands(*arrays, None if mask is None else mask[..., None])


def _by_lane(array: jax.Array | None) -> jax.Array | None:
    return None if array is None else jnp.swapaxes(array, 2, 3)


def _cotangents_first(cotangents: Cotangents) -> Cotangents:
    rows = (array[:, :, None] for array in cotangents[1:])
    return Cotangents(jnp.swapaxes(cotangents.dout, 1, 2), *rows)


def _forward(problem: Problem, visits: Visits, bounds: Bounds, operands: Operands) -> Any:
    operands = _heads_first(operands)
    dtype, width = operands.query.dtype, operands.value.shape[3]
    batch, heads, queries, _ = operands.query.shape
    side = QuerySide(problem, visits, operands)
    operands = operands._replace(
        value=_by_lane(operands.value), additional_values=_by_lane(operands.additional_values)
    )
    out, lse = call(
        functools.partial(_forward_kernel, problem=problem),
        "neighborhood_forward",
        side.grid,
        side.lists,
        [
            (side.of_bounds(), bounds),
            (side.of_operands(operands, values_by_lane=True), operands),
        ],
        [
            (side.by_lane(width), jax.ShapeDtypeStruct((batch, heads, width, queries), dtype)),
            (side.by_lane(1), jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32)),
        ],
        [(width, problem.q_block), (1, problem.q_block), (1, problem.q_block)],
        problem.interpret,
    )
    return jnp.moveaxis(out, 3, 1), lse[:, :, 0]


def _query_gradient(problem, visits, bounds, operands, cotangents: Cotangents) -> jax.Array:
    operands = _heads_first(operands)
    batch, heads, queries, width = operands.query.shape
    side = QuerySide(problem, visits, operands)
    keys = (_by_lane(operands.key), _by_lane(operands.additional_keys))
    shape = jax.ShapeDtypeStruct((batch, heads, width, queries), operands.query.dtype)
    (dquery,) = call(
        functools.partial(_query_gradient_kernel, problem=problem),
        "neighborhood_query_gradient",
        side.grid,
        side.lists,
        [
            (side.of_bounds(), bounds),
            (side.of_operands(operands), operands),
            ((side.of_keys(width, by_lane=True), side.of_additional(keys[1], by_lane=True)), keys),
            (
                Cotangents(
                    side.of_query(operands.value.shape[3]), side.by_lane(1), side.by_lane(1)
                ),
                _cotangents_first(cotangents),
            ),
        ],
        [(side.by_lane(width), shape)],
        [(width, problem.q_block)],
        problem.interpret,
    )
    return jnp.moveaxis(dquery, 3, 1)


def _key_gradient(problem, visits, bounds, operands, cotangents: Cotangents) -> tuple:
    operands = _heads_first(operands)._replace(additional_keys=None, additional_values=None)
    batch, heads, _, width = operands.query.shape
    kv_heads, keys, value_width = operands.value.shape[1:]
    repeats, share, block = heads // kv_heads, batch // len(operands.key), problem.kv_block
    lists = Lists.of(visits)
    num_kv = keys // block

    def query_at(b, h, i, j, visits):
        row = lax.rem(b, lists.groups) * num_kv + i
        tile = visits.tiles[row * lists.most + lax.rem(j, lists.most)]
        return h * repeats + lax.div(j, lists.most), tile

    def of_query(width):
        def index(b, *rest):
            head, tile = query_at(b, *rest)
            return b, head, tile, 0

        return pl.BlockSpec((None, None, problem.q_block, width), index)

    def row_index(b, *rest):
        head, tile = query_at(b, *rest)
        return b, head, 0, tile

    def of_keys(width, share=1):
        shape = (None, None, block, width)
        return pl.BlockSpec(shape, lambda b, h, i, j, _: (lax.div(b, share), h, i, 0))

    row = pl.BlockSpec((None, None, 1, problem.q_block), row_index)
    windows = mask = None
    if bounds is not None:
        window = pl.BlockSpec(
            (None, len(problem.q_tile), problem.q_block),
            lambda b, *rest: (lax.rem(b, lists.groups), 0, query_at(b, *rest)[1]),
        )
        windows = Bounds(window, window)
    if operands.kv_mask is not None:
        mask = pl.BlockSpec((None, block, 1), lambda b, h, i, j, _: (b, i, 0))
    dtypes = (operands.key.dtype, operands.value.dtype)
    if bounds is None:
        dtypes = (jnp.float32, jnp.float32)  # to be summed
    specs = Operands(
        *(of_query(width), of_keys(width, share), of_keys(value_width, share), None, None, mask)
    )
    slopes = call(
        functools.partial(_key_gradient_kernel, problem=problem),
        "neighborhood_key_gradient",
        (batch, kv_heads, num_kv, repeats * lists.most),
        lists,
        [
            (windows, bounds),
            (specs, operands),
            (Cotangents(of_query(value_width), row, row), _cotangents_first(cotangents)),
        ],
        [
            (of_keys(size), jax.ShapeDtypeStruct((batch, kv_heads, keys, size), dtype))
            for size, dtype in zip((width, value_width), dtypes, strict=True)
        ],
        [(block, width), (block, value_width)],
        problem.interpret,
    )
    return tuple(jnp.swapaxes(slope, 1, 2) for slope in slopes)


KERNELS = Kernels(_forward, _query_gradient, _key_gradient, least_block=128)


def neighborhood_attention_tpu(query, key, value, plan, **options) -> tuple:
    """Attention over tokens in tiles, as `tiles.attention_reference`; differentiable once.

    Edges of tiles are powers of two, and tiles have a multiple of 128 tokens, or all of them. The
    lists of the plan must fit in a core's scalar memory.

    Args:
        query: [batch_groups, queries, heads, head_dim], float32 or bfloat16.
        key: [batch_groups, keys, kv_heads, head_dim], of the same type.
        value: [batch_groups, keys, kv_heads, value_dim], of the same type.
        plan: a `tiles.TilePlan`.
        **options: `scale`, `additional_keys`, `additional_values`, `kv_mask` and `interpret`.

    Returns:
        (out, lse [batch_groups, queries, heads] float32).
    """
    return tiled_attention(KERNELS, query, key, value, plan, **options)
