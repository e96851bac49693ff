"""Neighborhood attention over all pairs of tokens, which fast implementations are compared with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from genjax_lab.attention.windows import NeighborhoodSpec, axis_mask


def masked_attention(
    query: Array,
    key: Array,
    value: Array,
    spec: NeighborhoodSpec,
    *,
    scale: float,
    additional_keys: Array | None,
    additional_values: Array | None,
    kv_mask: Array | None,
    grid_sizes: Array | None,
    position_bias: Array | None,
    precision: jax.lax.PrecisionLike,
) -> tuple[Array, Array]:
    """(out, lse) of `neighborhood_attention`, whose arguments these are."""
    batch, *grid, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[-2:]
    exact = jnp.promote_types(query.dtype, jnp.float32)
    visible = _visible(grid, spec, kv_mask, grid_sizes)

    queries = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    keys = key.reshape(batch, -1, kv_heads, head_dim)
    values = value.reshape(batch, -1, kv_heads, value_dim)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    if extra:
        keys = jnp.concatenate([keys, additional_keys.astype(keys.dtype)], axis=1)
        values = jnp.concatenate([values, additional_values.astype(values.dtype)], axis=1)
        more = jnp.ones((*visible.shape[:-1], extra), bool)
        visible = jnp.concatenate([visible, more], axis=-1)
    if grid_sizes is not None:
        visible &= real_tokens(grid, grid_sizes).reshape(batch, -1)[..., None]
    visible = visible[:, None, None]  # [batch or 1, 1, 1, queries, keys]
    logits = scale * jnp.einsum(
        "bqhgd,bkhd->bhgqk", queries, keys, preferred_element_type=exact, precision=precision
    )
    if position_bias is not None:
        bias = _bias(grid, spec, position_bias.astype(exact))
        bias = bias.reshape(kv_heads, -1, *bias.shape[1:])
        logits += jnp.pad(bias, [(0, 0)] * 3 + [(0, extra)])
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(exact).min)
    weights = jnp.where(visible, jnp.exp(logits - jax.lax.stop_gradient(top)), 0)
    total = jnp.sum(weights, axis=-1)  # [batch, kv_heads, group, queries]
    seen = total > 0
    safe = jnp.where(seen, total, 1)
    out = jnp.einsum(
        "bhgqk,bkhd->bqhgd",
        (weights / safe[..., None]).astype(values.dtype),
        values,
        preferred_element_type=exact,
        precision=precision,
    )
    out = out.reshape(batch, *grid, heads, value_dim).astype(query.dtype)
    lse = jnp.where(seen, jax.lax.stop_gradient(top)[..., 0] + jnp.log(safe), -jnp.inf)
    return out, jnp.moveaxis(lse, -1, 1).reshape(batch, *grid, heads)


def real_tokens(grid: Sequence[int], grid_sizes: Array) -> Bool[Array, "batch *grid"]:
    """Which tokens of each example are no padding."""
    real = jnp.ones((len(grid_sizes), *grid), bool)
    for axis, length in enumerate(grid):
        inside = jnp.arange(length) < jnp.asarray(grid_sizes)[:, axis, None]
        real &= inside.reshape(-1, *(length if a == axis else 1 for a in range(len(grid))))
    return real


def _visible(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    kv_mask: Array | None,
    grid_sizes: Array | None,
) -> Bool[Array, "batch queries keys"]:
    """Which keys of the grid each query sees; a batch of one where all examples are alike."""
    mask = jnp.ones((1, 1, 1), bool)
    for number, axis in enumerate(spec.axes(grid)):
        length = None if grid_sizes is None else jnp.asarray(grid_sizes)[:, number]
        along = jnp.atleast_3d(axis_mask(axis, length, jnp))
        along = along.reshape(-1, axis.length, axis.length)
        mask = mask[:, :, None, :, None] & along[:, None, :, None, :]
        mask = mask.reshape(len(mask), mask.shape[1] * axis.length, -1)
    if kv_mask is not None:
        mask = mask & kv_mask.reshape(len(kv_mask), 1, -1)
    return mask


def _bias(grid: Sequence[int], spec: NeighborhoodSpec, bias: Array) -> Array:
    """[heads, queries, keys], whatever where the window does not reach."""
    heads = len(bias)
    for number, axis in enumerate(spec.axes(grid)):
        query, key = np.arange(axis.length)[:, None], np.arange(axis.length)
        apart = key // axis.dilation - query // axis.dilation
        if axis.border == "wrap":  # the way round that the window goes
            start = axis.bounds()[0][query // axis.dilation] - query // axis.dilation
            apart = start + (apart - start) % (axis.length // axis.dilation)
        index = np.clip(apart + axis.window - 1, 0, 2 * axis.window - 2)
        # The axis becomes its queries and keys; the pairs before it stay in front.
        bias = jnp.take(bias, index, axis=1 + 2 * number)
    rank = len(grid)
    order = [0, *(1 + 2 * axis for axis in range(rank)), *(2 + 2 * axis for axis in range(rank))]
    tokens = math.prod(grid)
    return bias.transpose(order).reshape(heads, tokens, tokens)
