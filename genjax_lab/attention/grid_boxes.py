"""Neighborhoods of grids as boxes of keys, which `boxes` computes.

Axes are put in order by dilation groups, so that windows are intervals; keys are repeated at both
ends where windows go round.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from genjax_lab.attention import box_plan
from genjax_lab.attention.boxes import box_attention
from genjax_lab.attention.layouts import Problem
from genjax_lab.attention.masked import real_tokens
from genjax_lab.attention.windows import AxisWindow, NeighborhoodSpec, bounds_of


class _AxisOrder(NamedTuple):
    """One axis put in order by dilation groups, so that windows are intervals.

    Attributes:
        queries: [length] tokens in that order.
        keys: [n, keys] the same for keys, some of them repeated where windows go round.
        bounds: (start, end), each [n, length], in that order.
        segments: lengths of the groups.
        places: [length] where the key of each query's own token is among the keys.
    """

    queries: np.ndarray
    keys: Any
    bounds: tuple[Any, Any]
    segments: tuple[int, ...]
    places: np.ndarray


def _ordered(axis: AxisWindow, sizes: Int[Array, " batch"] | None) -> _AxisOrder:
    """The order of an axis; `sizes` are tokens that there are in each example."""
    xp = np if sizes is None else jnp
    lengths = axis.group_lengths()
    group = np.repeat(np.arange(axis.dilation), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    total = np.asarray([[axis.length]]) if sizes is None else sizes[:, None]
    count = (total - group + axis.dilation - 1) // axis.dilation
    start, end = bounds_of(place, count, axis, xp)
    start, end = (xp.broadcast_to(x, (len(total), axis.length)) for x in (start, end))
    queries = place * axis.dilation + group
    if axis.border != "wrap":
        first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        return _AxisOrder(
            queries, queries[None], (start + first, end + first), lengths, place + first
        )
    # Keys are repeated at both ends of a group, as far as windows reach.
    margin, reach = axis.window // 2, axis.window
    width = margin + lengths[0] + reach
    origin = group * width + margin
    places = origin + place
    group, place = np.divmod(np.arange(axis.dilation * width), width)
    count = xp.maximum((total - group + axis.dilation - 1) // axis.dilation, 1)
    keys = (place - margin) % count * axis.dilation + group
    return _AxisOrder(queries, keys, (start + origin, end + origin), lengths, places)


def attend_in_boxes(
    problem: Problem,
    query: Array,
    key: Array,
    value: Array,
    *,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    position_bias: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """(out, lse) by `box_attention`."""
    axes = problem.axes
    options["bias"] = position_bias
    if grid_sizes is not None:
        options["spans"] = [axis.window + axis.stride - 1 for axis in axes]
    if problem.layout == "tiled":
        return _in_stored_tiles(
            *(problem, query, key, value, additional_keys, additional_values),
            *(kv_mask, grid_sizes, options),
        )
    mask, real = kv_mask, None
    if grid_sizes is not None:
        real = real_tokens(problem.grid, grid_sizes)
        mask = real if mask is None else mask & real
    orders = [
        _ordered(axis, None if grid_sizes is None else grid_sizes[:, number])
        for number, axis in enumerate(axes)
    ]
    for number, order in enumerate(orders):
        query = _reordered(query, order.queries[None], number + 1)
        key, value = (_reordered(x, order.keys, number + 1) for x in (key, value))
        mask = None if mask is None else _reordered(mask, order.keys, number + 1)
    out, lse = box_attention(
        query,
        key,
        value,
        [order.bounds for order in orders],
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=mask,
        bias_places=[
            order.places - axis.window + 1 for axis, order in zip(axes, orders, strict=True)
        ],
        segments=[order.segments for order in orders],
        q_tile=problem.q_tile,
        **options,
    )
    for number, order in enumerate(orders):
        back = np.argsort(order.queries)[None]
        out, lse = (_reordered(x, back, number + 1) for x in (out, lse))
    if real is not None and additional_keys is not None:
        out = jnp.where(real[..., None, None], out, 0)
        lse = jnp.where(real[..., None], lse, -jnp.inf)
    return out, lse


def box_tile(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    *,
    head_dim: int,
    value_dim: int | None = None,
    heads_per_kv_head: int = 1,
) -> tuple[int, ...]:
    """The tile of queries that implementation="xla" chooses.

    Where queries at the ends of an axis have the same window, several tiles may be one there.

    Args:
        grid: tokens along each axis.
        spec: the neighborhood.
        head_dim: width of queries and keys.
        value_dim: width of values, that of keys by default.
        heads_per_kv_head: heads of queries that share their keys.

    Raises:
        ValueError: for windows that do not fit the grid.
    """
    orders = [_ordered(axis, None) for axis in spec.axes(grid)]
    plans = box_plan.choose_tiles(
        [order.bounds for order in orders],
        [order.keys.shape[1] for order in orders],
        [order.segments for order in orders],
        rows_per_query=heads_per_kv_head,
        width=head_dim + (head_dim if value_dim is None else value_dim),
        tile=(1,) * len(orders),
    )
    return tuple(parts[0].q_edge for parts in plans)


def _reordered(x: Array, index: Any, axis: int) -> Array:
    """Elements of an axis in the order `index`, [1 or batch, elements]."""
    if isinstance(index, np.ndarray) and np.array_equal(index[0], np.arange(x.shape[axis])):
        return x
    if len(index) == 1:
        return jnp.take(x, index[0], axis=axis)
    return jax.vmap(lambda row, order: jnp.take(row, order, axis=axis - 1))(x, index)


def _in_stored_tiles(
    problem: Problem,
    query: Array,
    key: Array,
    value: Array,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """(out, lse) of tokens that are stored tile by tile."""
    axes, tile, counts = problem.axes, problem.q_tile, problem.tiles_along()
    groups = np.array(list(np.ndindex(*(axis.dilation for axis in axes))))
    stored = lambda x: x.reshape(len(x), *counts, *tile, *x.shape[2:])  # noqa: E731
    bounds = []
    real = jnp.ones((len(query), *counts, *tile), bool)
    for number, (axis, edge, tiles) in enumerate(zip(axes, tile, counts, strict=True)):
        xp, total = np, np.asarray([axis.length])
        if grid_sizes is not None:
            xp, total = jnp, grid_sizes[:, number]
        count = (total[:, None] - groups[:, number] + axis.dilation - 1) // axis.dilation
        count = count.reshape(-1, 1)  # [groups, or batch * groups; 1]
        place = np.arange(tiles * edge)
        bounds.append(bounds_of(place, count, axis, xp))
        inside = jnp.tile(place < count, (len(query) // len(count), 1))
        shape = [1] * real.ndim
        shape[0], shape[1 + number], shape[1 + len(axes) + number] = len(query), tiles, edge
        real &= inside.reshape(shape)
    has_padding = grid_sizes is not None or math.prod(problem.grid) < len(groups) * math.prod(
        problem.stored
    )
    if additional_keys is not None:
        additional_keys, additional_values = (
            jnp.repeat(x, len(groups), axis=0) for x in (additional_keys, additional_values)
        )
    key_mask = None if kv_mask is None else stored(kv_mask)
    if has_padding:
        key_mask = real if key_mask is None else key_mask & real
        query = jnp.where(real.reshape(query.shape[:-2])[..., None, None], query, 0)
    out, lse = box_attention(
        *(stored(x) for x in (query, key, value)),
        bounds,
        additional_keys=additional_keys,
        additional_values=additional_values,
        key_mask=key_mask,
        bias_places=[
            np.arange(tiles * edge) - axis.window + 1
            for axis, edge, tiles in zip(axes, tile, counts, strict=True)
        ],
        stored_tile=tile,
        **options,
    )
    if has_padding and additional_keys is not None:
        out = jnp.where(real[..., None, None], out, 0)
        lse = jnp.where(real[..., None], lse, -jnp.inf)
    return out.reshape(*query.shape[:-1], -1), lse.reshape(query.shape[:-1])
