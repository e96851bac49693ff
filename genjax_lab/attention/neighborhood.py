"""Generalized neighborhood attention over 1-D, 2-D and 3-D grids (arXiv 2504.16922).

Each query sees a box of keys around it, as `windows` says, and any additional keys, in one softmax:

    out_i = sum_j p_ij v_j,  p_ij = exp(scale <q_i, k_j> - lse_i),  lse_i = log sum_j exp(...)

over the keys j that query i sees. `functools.partial(neighborhood_attention, spec=spec)` is an
attention function that networks take.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.attention.windows import NeighborhoodSpec, axis_mask

IMPLEMENTATIONS = ("reference",)


def neighborhood_attention(
    query: Float[Array, "batch *grid heads head_dim"],
    key: Float[Array, "batch *grid kv_heads head_dim"],
    value: Float[Array, "batch *grid kv_heads value_dim"],
    spec: NeighborhoodSpec,
    *,
    scale: float | None = None,
    additional_keys: Float[Array, "batch extra kv_heads head_dim"] | None = None,
    additional_values: Float[Array, "batch extra kv_heads value_dim"] | None = None,
    kv_mask: Bool[Array, "batch *grid"] | None = None,
    grid_sizes: Int[Array, "batch axes"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, Array]:
    """Lets every query attend to the keys of its neighborhood.

    Args:
        query: a grid of one, two or three axes.
        key: the same grid; `heads` is a multiple of `kv_heads`: query head `h` reads key-value head
            `h // (heads / kv_heads)`.
        value: the same grid.
        spec: the neighborhood.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default.
        additional_keys: keys that every query sees, such as those of a text; with
            `additional_values`.
        additional_values: their values.
        kv_mask: False for keys that no query sees.
        grid_sizes: tokens that there really are along each axis of each example, at least 1; what
            lies beyond is padding, and windows are shifted inward from the real ends. Of an axis
            that is shorter than the window all is seen. None: the whole grid.
        return_lse: whether to return `lse` too.
        implementation: "reference" computes all pairs of tokens; None chooses.
        precision: of the matrix products.

    Returns:
        `out` [batch, *grid, heads, value_dim] in the query's type, or (out, lse). `lse`, [batch,
        *grid, heads], is in float32 (float64 where the inputs are), by the natural logarithm. A
        query without any key, and padding, have out 0 and lse -inf.

    Raises:
        ValueError: shapes or types that do not fit together, windows that do not fit the grid, an
            unknown implementation.
    """
    _check(query, key, value, additional_keys, additional_values, kv_mask, grid_sizes)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}, not in {IMPLEMENTATIONS}")
    batch, *grid, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[-2:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    exact = jnp.promote_types(query.dtype, jnp.float32)
    visible = _visible(grid, spec, kv_mask, grid_sizes)

    queries = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    keys = key.reshape(batch, -1, kv_heads, head_dim)
    values = value.reshape(batch, -1, kv_heads, value_dim)
    if additional_keys is not None:
        keys = jnp.concatenate([keys, additional_keys.astype(keys.dtype)], axis=1)
        values = jnp.concatenate([values, additional_values.astype(values.dtype)], axis=1)
        extra = jnp.ones((*visible.shape[:-1], additional_keys.shape[1]), bool)
        visible = jnp.concatenate([visible, extra], axis=-1)
    if grid_sizes is not None:
        visible &= _is_real(grid, grid_sizes).reshape(batch, -1)[..., None]
    visible = visible[:, None, None]  # [batch or 1, 1, 1, queries, keys]
    logits = jnp.einsum(
        "bqhgd,bkhd->bhgqk", queries, keys, preferred_element_type=exact, precision=precision
    )
    logits = jnp.where(visible, logits * scale, -jnp.inf)
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
    if not return_lse:
        return out
    lse = jnp.where(seen, jax.lax.stop_gradient(top)[..., 0] + jnp.log(safe), -jnp.inf)
    return out, jnp.moveaxis(lse, -1, 1).reshape(batch, *grid, heads)


def _visible(
    grid: Sequence[int],
    spec: NeighborhoodSpec,
    kv_mask: Array | None,
    grid_sizes: Array | None,
) -> Bool[Array, "batch queries keys"]:
    """Which keys of the grid each query sees; a batch of one where all examples are alike."""
    axes = spec.axes(grid)
    mask = jnp.ones((1, 1, 1), bool)
    for number, axis in enumerate(axes):
        length = None if grid_sizes is None else jnp.asarray(grid_sizes)[:, number]
        along = jnp.atleast_3d(axis_mask(axis, length, jnp))
        along = along.reshape(-1, axis.length, axis.length)
        mask = mask[:, :, None, :, None] & along[:, None, :, None, :]
        mask = mask.reshape(len(mask), mask.shape[1] * axis.length, -1)
    if kv_mask is not None:
        mask = mask & kv_mask.reshape(len(kv_mask), 1, -1)
    return mask


def _is_real(grid: Sequence[int], grid_sizes: Array) -> Bool[Array, "batch *grid"]:
    real = jnp.ones((len(grid_sizes), *grid), bool)
    for axis, length in enumerate(grid):
        inside = jnp.arange(length) < jnp.asarray(grid_sizes)[:, axis, None]
        real &= inside.reshape(-1, *(length if a == axis else 1 for a in range(len(grid))))
    return real


def _check(query, key, value, additional_keys, additional_values, kv_mask, grid_sizes) -> None:
    """Raises a ValueError unless the arrays form one attention problem."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim not in (4, 5, 6) or array.size == 0:
            raise ValueError(
                f"{name} must be [batch, *grid, heads, head_dim] with a grid of one to three axes "
                f"and none of them empty, got shape {array.shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            "query, key and value must agree in batch and grid, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "key and value must have as many heads, and query a multiple of them, got shapes "
            f"{query.shape}, {key.shape} and {value.shape}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in head_dim, got shapes {query.shape} and {key.shape}"
        )
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None:
        extra = additional_keys.shape[1] if additional_keys.ndim == 4 else "extra"
        for name, array, like in (
            ("additional_keys", additional_keys, key),
            ("additional_values", additional_values, value),
        ):
            expected = (like.shape[0], extra, *like.shape[-2:])
            if array.shape != expected:
                raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if kv_mask is not None and (kv_mask.shape != key.shape[:-2] or kv_mask.dtype != jnp.bool_):
        raise ValueError(
            f"kv_mask must be bool {key.shape[:-2]}, got {kv_mask.dtype} {kv_mask.shape}"
        )
    if grid_sizes is not None:
        expected = (query.shape[0], query.ndim - 3)
        if grid_sizes.shape != expected or not jnp.issubdtype(grid_sizes.dtype, jnp.integer):
            raise ValueError(
                f"grid_sizes must be integers {expected}, got {grid_sizes.dtype} {grid_sizes.shape}"
            )
