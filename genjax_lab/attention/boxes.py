"""Attention of tiles of queries to boxes of keys, in plain XLA: no array has queries by all keys.

A loop runs over examples, heads and tiles. A tile takes its box out of the keys and values, and
two matrix products of the tile's size do the rest; memory grows with the number of tokens, time
with the keys that are seen. What a query does not see of its tile's box is masked where
exponentials are taken, by its interval along each axis: two small integers, no table of pairs.

A softmax needs a number to subtract from each query's logits, usually their maximum, which reads
all of them once more. The product of the query's norm and of the largest norm of the keys that it
sees is as good as long as it is small, and cheaper; where it is not, the maximum is taken, in a
loop of its own beforehand.

The backward pass recomputes each tile (arXiv 2205.14135, Algorithm 4):

    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q,
    delta = rowsum(dO * O) - dLSE

and adds what it finds for keys and values to their places.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention import box_plan
from genjax_lab.attention.box_ring import RingBox, empty_rings, filled_rings
from genjax_lab.attention.box_step import HIDDEN, Box, BoxPlan, in_lines, line_width
from genjax_lab.attention.logit_bounds import logit_bounds, norms

# Largest bound of the logits that is subtracted instead of their maximum: exp(-2 * 30) is far from
# what float32 cannot hold.
_LARGEST_SHIFT = 30.0
_NARROW = 2**14  # tokens of a box whose places, also turned in a ring, are counted in 16 bits
_TRACED_TILE = 256  # queries of a tile where windows are not known beforehand


def box_attention(
    query: Float[Array, "batch *q_grid heads head_dim"],
    key: Float[Array, "batch *kv_grid kv_heads head_dim"],
    value: Float[Array, "batch *kv_grid kv_heads value_dim"],
    bounds: Sequence[tuple[Int[Array, "n length"], Int[Array, "n length"]]],
    *,
    scale: float,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    key_mask: Bool[Array, "batch *kv_grid"] | None = None,
    bias: Float[Array, "heads ..."] | None = None,
    bias_places: Sequence[Int[np.ndarray, " length"]] | None = None,
    rows: Int[Array, " batch"] | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    spans: Sequence[int] | None = None,
    q_tile: Sequence[int] | None = None,
    stored_tile: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Array, Array]:
    """Lets each query attend to a box of keys.

    Args:
        query: a grid of one to three axes; tokens that are stored tile by tile are
            `[batch, *(tiles along each axis), *stored_tile, heads, head_dim]`.
        key: a grid of as many axes, stored in the same way.
        value: the keys' grid.
        bounds: (start, end) for each axis: query i of the axis sees its keys start <= j < end. n
            sets of bounds, of which `rows` says which an example takes.
        scale: factor of the logits, a number or a scalar array.
        additional_keys: keys that every query sees.
        additional_values: their values.
        key_mask: False for keys that no query sees; they may hold anything finite or not.
        bias: added to the logits by relative position: `bias[head, j - bias_places[i], ...]`, an
            index for each axis, for the key j of the query i; clipped to what there is.
        bias_places: for each axis and query, the key that has the index 0; may be negative.
        rows: set of bounds of each example; by default example b has set b modulo n.
        segments: lengths of the runs of each axis along which bounds never decrease, in units of
            `stored_tile`.
        spans: see `box_plan.plan_axis`; needed where bounds are traced.
        q_tile: edges of the tiles of queries, in units of `stored_tile`.
        stored_tile: edges of the tiles in which tokens are stored; None for a plain grid.
        precision: of the matrix products.

    Returns:
        (out, lse): the first in the query's type and the place of its tokens, the second in
        float32, or float64 where the inputs are.
    """
    rank = len(bounds)
    tile = (1,) * rank if stored_tile is None else tuple(stored_tile)
    if stored_tile is None:
        query, key, value = (
            x.reshape(*x.shape[: rank + 1], *tile, *x.shape[-2:]) for x in (query, key, value)
        )
        key_mask = None if key_mask is None else key_mask.reshape(key.shape[:-2])
    exact = jnp.promote_types(query.dtype, jnp.float32)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    q_lengths, kv_lengths = query.shape[1 : rank + 1], key.shape[1 : rank + 1]
    segments = [(length,) for length in q_lengths] if segments is None else segments
    if spans is None:
        parts = box_plan.choose_tiles(
            bounds,
            kv_lengths,
            segments,
            rows_per_query=heads // kv_heads,
            width=key.shape[-1] + value.shape[-1],
            tile=tile,
            q_tile=q_tile,
        )
    else:  # windows are not known yet: tiles as wide as high
        edge = round(_TRACED_TILE ** (1 / rank))
        q_tile = [max(1, edge // step) for step in tile] if q_tile is None else q_tile
        parts = [
            box_plan.plan_axis(*arguments)
            for arguments in zip(bounds, kv_lengths, segments, q_tile, tile, spans, strict=True)
        ]
    loops = tuple(itertools.product(*parts))
    longest = spans
    if spans is None:
        longest = [max(1, int(np.max(end - start))) for start, end in bounds]
    plan = BoxPlan(loops, tile, kv_lengths, kv_heads, tuple(longest), precision, exact)
    count = max(len(start) for start, _ in bounds)
    rows = jnp.arange(len(query)) % count if rows is None else rows
    tables = {
        "bounds": tuple((jnp.asarray(start), jnp.asarray(end)) for start, end in bounds),
        "rows": rows,
        "key_mask": key_mask,
        "places": () if bias is None else tuple(jnp.asarray(places) for places in bias_places),
        "loops": tuple(_arrays(axes, tile, heads // kv_heads) for axes in loops),
    }
    if key_mask is not None:  # whatever hidden tokens hold
        key, value = (jnp.where(key_mask[..., None, None], x, 0) for x in (key, value))
    # Of keys as they are: of those in lines they would be computed from another copy.
    tables["key_norms"] = norms(jax.lax.stop_gradient(key), exact)
    tensors = {
        "query": query,
        "key": in_lines(key, rank),
        "value": in_lines(value, rank),
        "scale": jnp.asarray(scale, exact),
    }
    if additional_keys is not None and additional_keys.shape[1]:
        tensors |= {"extra_key": additional_keys, "extra_value": additional_values}
    if bias is not None:
        tensors["bias"] = bias
    out, lse = _attend(plan, tensors, tables)
    if stored_tile is None:
        out = out.reshape(out.shape[0], *q_lengths, *out.shape[-2:])
        lse = lse.reshape(lse.shape[0], *q_lengths, lse.shape[-1])
    return out, lse


def _arrays(axes: Sequence[box_plan.AxisPlan], tile: Sequence[int], group: int) -> tuple:
    """What a loop looks up, and what may be traced: for each axis.

    The first key of the box that a query sees along the axis, and how many, are [n, tiles, rows]:
    those of a tile's rows beside each other, so that vector instructions can load them.
    """
    arrays = []
    for number, axis in enumerate(axes):
        arrays.append({"kv_first": jnp.asarray(axis.kv_first, jnp.int32)})
        if axis.seen is None:
            continue
        narrow = axis.kv_edge * tile[number] < _NARROW
        seen = jnp.asarray(axis.seen, jnp.uint16 if narrow else jnp.uint32)
        shape = [1] * (2 * len(axes) + 1)
        shape[number], shape[len(axes) + number] = axis.q_edge, tile[number]
        rows = (*(axis.q_edge for axis in axes), *tile, group)
        first, end = (
            jnp.broadcast_to(x.reshape(*x.shape[:2], *shape), (*x.shape[:2], *rows)).reshape(
                *x.shape[:2], -1
            )
            for x in jnp.moveaxis(seen, -1, 0)
        )
        arrays[-1] |= {"first": first, "length": end - first}
    return tuple(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: BoxPlan, tensors: dict, tables: dict) -> tuple[Array, Array]:
    query, value = tensors["query"], tensors["value"]
    shifts = _shifts(plan, tensors, tables)

    def visit(box, carry):
        out, lse = carry
        shift = box.take_queries(shifts)[:, 0]
        weights = jnp.exp(box.logits() - shift[:, None])
        total = jnp.sum(weights, axis=1)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        tile_out = box.dot(weights, box.values()) / safe[:, None]
        tile_lse = jnp.where(seen, shift + jnp.log(safe), -jnp.inf)
        out = box.put_queries(out, tile_out.astype(out.dtype))
        return out, box.put_queries(lse, tile_lse[:, None])

    empty = (
        jnp.zeros((*query.shape[:-1], line_width(plan, value)), query.dtype),
        jnp.zeros((*query.shape[:-1], 1), plan.exact),
    )
    out, lse = _run_loops(plan, tensors, tables, visit, empty, with_rings=True)
    return out, lse[..., 0]


def _shifts(plan: BoxPlan, tensors: dict, tables: dict) -> Array:
    """What is subtracted from each query's logits, [batch, *units, *tile, heads, 1]."""
    bounds = logit_bounds(plan, tensors, tables)[..., None]

    def visit(box, shifts):
        shift = box.take_queries(bounds)
        # Only rows whose bound is too large take their maximum, so that no row's result depends on
        # what others see.
        too_large = _is_too_large(shift)

        def with_maximum():
            top = jnp.max(box.logits(), axis=1, keepdims=True)
            return jnp.where(too_large, jnp.where(top > HIDDEN / 2, top, 0), shift)

        shift = jax.lax.cond(jnp.any(too_large), with_maximum, lambda: shift)
        return box.put_queries(shifts, shift)

    return jax.lax.cond(
        jnp.any(_is_too_large(bounds)),
        lambda: _run_loops(plan, tensors, tables, visit, bounds),
        lambda: bounds,
    )


def _is_too_large(bound: Array) -> Array:
    """So is NaN, where a norm of 0 meets one beyond float32."""
    return ~(bound <= _LARGEST_SHIFT)


def _forward(plan, tensors, tables):
    out, lse = _attend(plan, tensors, tables)
    return (out, lse), (tensors, tables, out, lse)


def _backward(plan, residuals, cotangents):
    tensors, tables, out, lse = residuals
    out_bar, lse_bar = (x.astype(plan.exact) for x in cotangents)
    delta = jnp.sum(out_bar * out.astype(plan.exact), axis=-1) - lse_bar
    seen = lse > -jnp.inf
    # Queries that see nothing have no gradient: exp(logits - inf) is zero.
    lse = jnp.where(seen, lse, jnp.inf)
    per_row = jnp.stack([jnp.where(seen, delta, 0), lse], axis=-1)

    def visit(box, bars):
        out_bar_tile = box.take_queries(out_bar)
        delta_tile, lse_tile = jnp.moveaxis(box.take_queries(per_row), -1, 0)
        if box.has_overlaps():
            own = box.is_own()
            out_bar_tile = jnp.where(own[:, None], out_bar_tile, 0)
            delta_tile = jnp.where(own, delta_tile, 0)
            lse_tile = jnp.where(own, lse_tile, jnp.inf)
        queries, keys, values = box.queries(), box.keys(), box.values()
        # By keys and rows, the order that these products are fastest in.
        weights = jnp.exp(box.logits(keys_first=True) - lse_tile)
        logits_bar = weights * (box.dot(values, out_bar_tile.T) - delta_tile)
        # Queries are scaled already.
        bars = box.add_keys(bars, "key", "extra_key", box.dot(logits_bar, queries))
        bars = box.add_keys(bars, "value", "extra_value", box.dot(weights, out_bar_tile))
        query_bar = box.dot(logits_bar.T, keys)
        bars["query"] = box.put_queries(bars["query"], query_bar * tensors["scale"])
        bars["scale"] += jnp.sum(query_bar * box.take_queries(tensors["query"]))
        if "bias" in bars:
            bars["bias"] = bars["bias"] + box.bias_gradient(logits_bar)
        return bars

    bars = {name: jnp.zeros(x.shape, plan.exact) for name, x in tensors.items()}
    bars = _run_loops(plan, tensors, tables, visit, bars)
    return {name: bars[name].astype(x.dtype) for name, x in tensors.items()}, None


_attend.defvjp(_forward, _backward)


def _run_loops(
    plan: BoxPlan,
    tensors: dict,
    tables: dict,
    visit: Callable[[Box, Any], Any],
    carry: Any,
    with_rings: bool = False,
) -> Any:
    """One loop after the other, over tiles of one shape each.

    Args:
        plan: of all loops.
        tensors: what is attended to.
        tables: what loops look up.
        visit: makes the next carry from a step and a carry.
        carry: the first.
        with_rings: whether tiles that follow each other share their keys, where they can.
    """
    with_rings = with_rings and tables["key_mask"] is None and "bias" not in tensors
    for number, axes in enumerate(plan.loops):
        count = len(tensors["query"]) * plan.kv_heads * len(plan.tiles(axes))
        arguments = (plan, number, tensors, tables)
        if with_rings and axes[-1].ring is not None:
            carry = _run_rows(arguments, len(axes[-1].first), count, visit, carry)
            continue

        def step(carry, index, arguments=arguments):
            return visit(Box(*arguments, index), carry), None

        carry, _ = jax.lax.scan(jax.checkpoint(step), carry, jnp.arange(count, dtype=jnp.int32))
    return carry


def _run_rows(arguments: tuple, row_length: int, count: int, visit: Callable, carry: Any) -> Any:
    """A loop over rows of tiles, with rings of keys and values for each row."""
    plan, number, tensors, _ = arguments

    def row(carry, index):
        carry, rings = carry

        def step(carry, index):
            carry, rings = carry
            box = RingBox(*arguments, index, rings)
            return (visit(box, carry), box.rings), None

        rings = filled_rings(Box(*arguments, index), rings)
        indices = index + jnp.arange(row_length, dtype=jnp.int32)
        return jax.lax.scan(step, (carry, rings), indices)[0], None

    carry = carry, empty_rings(plan, number, tensors)
    carry, _ = jax.lax.scan(row, carry, jnp.arange(0, count, row_length, dtype=jnp.int32))
    return carry[0]
