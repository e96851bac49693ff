"""Dense scaled dot-product attention, the reference that every other attention is compared with.

    out_i = sum_j softmax_j(scale <q_i, k_j>) v_j        (arXiv 1706.03762, Eq. 1)

Every query sees every key of its example, so the shape of the grid does not matter and is
flattened. Queries may share keys and values within groups of heads (arXiv 2305.13245). Masks and
positional biases are left out: they belong to attention functions of their own.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense_attention(
    query: Float[Array, "batch *query_grid heads head_dim"],
    key: Float[Array, "batch *key_grid kv_heads head_dim"],
    value: Float[Array, "batch *key_grid kv_heads value_dim"],
    *,
    scale: float | None = None,
) -> Float[Array, "batch *query_grid heads value_dim"]:
    """Let every query attend to every key of the same example.

    Logits and softmax are computed in float32 (float64 when the inputs are), whatever the inputs'
    precision: in bfloat16 a softmax over many keys loses the small weights.

    Args:
        query: `[batch, *grid, heads, head_dim]`, a grid of rank one or more.
        key: `[batch, *key_grid, kv_heads, head_dim]`; the grid may differ from the query's in shape
            and rank (cross attention). `heads` is a multiple of `kv_heads`: query head `h` reads
            key-value head `h // (heads / kv_heads)`.
        value: `[batch, *key_grid, kv_heads, value_dim]`.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default.

    Returns:
        `[batch, *grid, heads, value_dim]` in the query's dtype.

    Raises:
        ValueError: when shapes or dtypes do not fit together.
    """
    _check(query, key, value)
    batch, *grid, heads, head_dim = query.shape
    kv_heads, value_dim = value.shape[-2:]
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    accumulate = jnp.promote_types(query.dtype, jnp.float32)

    queries = query.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    keys = key.reshape(batch, -1, kv_heads, head_dim)
    values = value.reshape(batch, -1, kv_heads, value_dim)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", queries, keys, preferred_element_type=accumulate)
    weights = jax.nn.softmax(logits * scale, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, values, preferred_element_type=accumulate)
    return out.reshape(batch, *grid, heads, value_dim).astype(query.dtype)


def _check(query: Array, key: Array, value: Array) -> None:
    """Raise a ValueError unless the three arrays form one attention problem."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim < 4:
            raise ValueError(
                f"{name} must be [batch, *grid, heads, head_dim] with a grid of rank >= 1, "
                f"got shape {array.shape}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")
        if array.size == 0:
            raise ValueError(f"{name} must have no empty axis, got shape {array.shape}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "key and value must agree in batch, grid and heads, "
            f"got shapes {key.shape} and {value.shape}"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must agree in batch, got shapes {query.shape} and {key.shape}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must agree in head_dim, got shapes {query.shape} and {key.shape}"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "the heads of query must be a multiple of those of key and value, "
            f"got {query.shape[-2]} and {key.shape[-2]}"
        )
