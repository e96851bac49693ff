"""Embeddings of a scalar noise level that the image networks share.

Two maps from `c_noise` (a float per example) to a feature vector: the fixed sinusoids of DDPM and
the transformer, and the random Fourier features of NCSN++ (arXiv 2011.13456). Both return
`[cos, sin]`; a network that wants `[sin, cos]` swaps the halves itself. EDM2's
magnitude-preserving variant lives with EDM2, since its scale and phases differ.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def positional_embedding(
    t: Float[Array, " batch"],
    num_channels: int,
    endpoint: bool = False,
    max_positions: float = 10000.0,
) -> Float[Array, "batch num_channels"]:
    """Sinusoids of geometrically spaced frequencies, `[cos(t f_i), sin(t f_i)]`.

    The frequencies are `f_i = max_positions ** (-i / (num_channels / 2 - endpoint))`, so that with
    `endpoint` the lowest one is exactly `1 / max_positions` (DDPM++), and without it lies one step
    above (ADM, DiT).

    Args:
        t: positions or noise levels, [batch], any real unit.
        num_channels: even number of features.
        endpoint: whether the geometric grid includes `1 / max_positions`.
        max_positions: inverse of the lowest frequency.

    Returns:
        [batch, num_channels] in float32 (angles lose their meaning in lower precision).

    Raises:
        ValueError: if `t` is not one-dimensional or `num_channels` has no such grid.
    """
    if t.ndim != 1:
        raise ValueError(f"t must have shape [batch], got {t.shape}; pass one scalar per example.")
    half = num_channels // 2
    if num_channels % 2 or half <= int(endpoint):
        raise ValueError(
            f"num_channels must be even and at least {4 if endpoint else 2} with "
            f"endpoint={endpoint}, got {num_channels}."
        )
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - int(endpoint))
    frequencies = jnp.float32(max_positions) ** -exponents
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FourierEmbedding(nn.Module):
    """Random Fourier features `[cos(2 pi t f), sin(2 pi t f)]`, `f ~ N(0, scale^2)`.

    The frequencies are drawn at initialisation (from the "params" rng) and never trained; they are
    the variable `freqs` [num_channels / 2] of the collection "buffers" (arXiv 2011.13456, app. C).

    Attributes:
        num_channels: even number of features.
        scale: standard deviation of the frequencies.
    """

    num_channels: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch num_channels"]:
        """Embed `t` [batch]; float32 out. Raises ValueError if shapes do not fit."""
        if t.ndim != 1:
            raise ValueError(
                f"t must have shape [batch], got {t.shape}; pass one scalar per example."
            )
        if self.num_channels < 2 or self.num_channels % 2:
            raise ValueError(f"num_channels must be positive and even, got {self.num_channels}.")

        def draw_frequencies() -> Float[Array, " half"]:
            key = self.make_rng("params")
            return self.scale * jax.random.normal(key, (self.num_channels // 2,))

        freqs = self.variable("buffers", "freqs", draw_frequencies)
        angles = 2 * jnp.pi * t.astype(jnp.float32)[:, None] * freqs.value
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
