"""Bounds of logits by norms: what a softmax can subtract in place of the largest logit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax_lab.attention.box_step import BoxPlan


def norms(x: Array, dtype: jnp.dtype) -> Array:
    """Euclidean norms along the last axis."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)  # XLA's sums of more axes are slow
    return jnp.linalg.norm(rows, axis=-1).reshape(x.shape[:-1])


def logit_bounds(plan: BoxPlan, tensors: dict, tables: dict) -> Array:
    """Bounds of each query's logits by norms, [batch, *units, *tile, heads].

    The largest norm is that among the keys that the query sees, not of others.
    """

    query = tensors["query"]
    largest = _positions(tables["key_norms"], plan.rank)
    for number, (start, end) in enumerate(tables["bounds"]):
        largest = _largest_between(
            largest, number + 1, start, end, tables["rows"], plan.longest[number]
        )
    largest = _in_tiles(largest, query.shape, plan.rank)
    if "extra_key" in tensors:
        extra = jnp.max(norms(tensors["extra_key"], plan.exact), axis=1)
        extra = extra.reshape(len(query), *(1,) * (2 * plan.rank), -1)
        largest = jnp.maximum(largest, extra)
    heads = query.shape[-2]
    largest = jnp.repeat(largest, heads // plan.kv_heads, axis=-1)
    shift = jnp.abs(tensors["scale"]) * norms(query, plan.exact) * largest
    if "bias" in tensors:
        bias = tensors["bias"].astype(plan.exact)
        shift += jnp.max(jnp.abs(bias).reshape(heads, -1), axis=-1)
    # Whole numbers, so that the last bits of norms decide nothing.
    return jnp.ceil(shift)


def _positions(x: Array, rank: int) -> Array:
    """[batch, *units, *tile, heads] -> [batch, *tokens, heads]."""
    order = [axis for number in range(rank) for axis in (1 + number, 1 + rank + number)]
    shape = [x.shape[1 + number] * x.shape[1 + rank + number] for number in range(rank)]
    return x.transpose(0, *order, 2 * rank + 1).reshape(len(x), *shape, x.shape[-1])


def _in_tiles(x: Array, shape: Sequence[int], rank: int) -> Array:
    """The inverse of `_positions`, for a grid stored as an array of `shape` is."""
    pairs = [n for number in range(rank) for n in (shape[1 + number], shape[1 + rank + number])]
    x = x.reshape(len(x), *pairs, x.shape[-1])
    units = range(1, 2 * rank + 1, 2)
    return x.transpose(0, *units, *(axis + 1 for axis in units), 2 * rank + 1)


def _largest_between(
    x: Array, axis: int, start: Array, end: Array, rows: Array, longest: int
) -> Array:
    """Largest of start <= j < end along an axis; 0 of none. By runs of 1, 2, 4, ... elements."""
    runs = [x]
    while 2 ** len(runs) <= min(longest, x.shape[axis]):
        last, reach = runs[-1], 2 ** (len(runs) - 1)
        later = jax.lax.slice_in_dim(last, reach, None, axis=axis)
        fill = [(0, reach) if number == axis else (0, 0) for number in range(x.ndim)]
        runs.append(jnp.maximum(last, jnp.pad(later, fill)))
    length = jnp.maximum(end - start, 1)
    level = jnp.asarray(np.log2(np.arange(1, x.shape[axis] + 1)).astype(np.int32))[length - 1]
    stacked = jnp.stack(runs, axis=axis)
    flat = stacked.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def take(index: Array) -> Array:
        index = index + level * x.shape[axis]
        if len(index) == 1:
            return jnp.take(flat, index[0], axis=axis)
        return jax.vmap(lambda f, i: jnp.take(f, i, axis=axis - 1))(flat, index[rows])

    largest = jnp.maximum(take(start), take(end - 2**level))
    visible = (end > start) if len(end) == 1 else (end > start)[rows]
    shape = [1] * x.ndim
    shape[0], shape[axis] = visible.shape
    return jnp.where(visible.reshape(shape), largest, 0)
