"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Llama and GPT-NeoX.

Feature i of the first half and feature i of the second are a pair, which is turned by the angle
position * base^(-2 i / head_dim). Angles and rotation are float32: bfloat16 has no number 257.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(
    positions: Int[Array, "*batch length"], head_dim: int, *, base: float = 10_000.0
) -> Float[Array, "*batch length half"]:
    """Angles by which pairs of features are rotated."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions.astype(jnp.float32)[..., None] * frequencies


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "*batch length half"]
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (i, i + head_dim / 2) of features."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    rotated = [left * cosine - right * sine, right * cosine + left * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
