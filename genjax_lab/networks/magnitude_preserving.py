"""Layers that keep the expected magnitude of activations and weights at one (arXiv 2312.02696).

The magnitude of a vector is its root mean square. Every operation here returns unit magnitude when
its inputs have it and are uncorrelated, so that neither activations nor updates drift during
training: weight-normalised convolutions (Eq. 47), `mp_silu` (Eq. 81), `mp_sum` (Eq. 88), `mp_cat`
(Eq. 103) and Fourier features (Eq. 75). Forced weight normalisation (Eq. 66), which the original
performs inside its training forward pass, is the projection `normalize_weights` here: apply it to
the parameters after each optimiser update.
"""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from genjax_lab.networks.convolution import conv2d

# Kept in the denominator of every normalisation; published weights were trained with this value.
EPSILON = 1e-4

# Root mean square of silu(z) for z ~ N(0, 1), to the three digits of the paper.
SILU_MAGNITUDE = 0.596


def normalize_magnitude(x: Float[Array, "*shape"], axis: int | tuple[int, ...]) -> Array:
    """Divide by `EPSILON` plus the root mean square over `axis`.

    Args:
        x: any array; the magnitude is computed in float32 at least.
        axis: axes that form one vector.

    Returns:
        An array of the shape and dtype of `x`; vectors of zeros stay zero, with zero gradient
        through their magnitude.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=axis, keepdims=True)
    # sqrt has an infinite derivative at zero, which would turn into NaN times zero.
    positive = mean_square > 0
    magnitude = jnp.where(positive, jnp.sqrt(jnp.where(positive, mean_square, 1.0)), 0.0)
    return (wide / (magnitude + EPSILON)).astype(x.dtype)


def mp_silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """SiLU scaled to unit magnitude on standard normal inputs (Eq. 81)."""
    return nn.silu(x) / SILU_MAGNITUDE


def mp_sum(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], balance: float
) -> Float[Array, "*shape"]:
    """Weighted sum of uncorrelated inputs that keeps their magnitude (Eq. 88).

    Args:
        a: array of unit magnitude.
        b: array of unit magnitude and the same shape.
        balance: share of `b` in [0, 1]; 0 returns `a`.

    Returns:
        `((1 - balance) a + balance b) / sqrt((1 - balance)^2 + balance^2)`.
    """
    norm = np.sqrt((1 - balance) ** 2 + balance**2)
    return a * float((1 - balance) / norm) + b * float(balance / norm)


def mp_cat(
    a: Float[Array, "*shape a_channels"], b: Float[Array, "*shape b_channels"], balance: float
) -> Float[Array, "*shape channels"]:
    """Concatenate channels so that each input's share of the squared sum is chosen (Eq. 103).

    Args:
        a: array of unit magnitude.
        b: array of unit magnitude, the same shape but for the channels.
        balance: share of `b` in [0, 1], whatever the two channel counts; 0.5 weighs both alike.

    Returns:
        The scaled `a`, then the scaled `b`, along the last axis.
    """
    a_channels, b_channels = a.shape[-1], b.shape[-1]
    total = np.sqrt((a_channels + b_channels) / ((1 - balance) ** 2 + balance**2))
    a_scale = float(total / np.sqrt(a_channels) * (1 - balance))
    b_scale = float(total / np.sqrt(b_channels) * balance)
    return jnp.concatenate([a * a_scale, b * b_scale], axis=-1)


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude, `sqrt(2) cos(f t + p)` (Eq. 75).

    The frequencies `f ~ 2 pi N(0, 1)` and phases `p ~ 2 pi U(0, 1)` are drawn at initialisation
    from the "params" rng and never trained: `freqs` and `phases` of the collection "buffers".

    Attributes:
        num_channels: number of features.
    """

    num_channels: int

    @nn.compact
    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch num_channels"]:
        """Embed `t` [batch]; float32 out."""
        shape = (self.num_channels,)
        freqs = self.variable(
            "buffers",
            "freqs",
            lambda: 2 * jnp.pi * jax.random.normal(self.make_rng("params"), shape),
        )
        phases = self.variable(
            "buffers",
            "phases",
            lambda: 2 * jnp.pi * jax.random.uniform(self.make_rng("params"), shape),
        )
        angles = t.astype(jnp.float32)[:, None] * freqs.value + phases.value
        return jnp.cos(angles) * np.float32(np.sqrt(2))


def _unit_kernel(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Draw a normal kernel and normalise it, as the first training pass of the original does."""
    return normalize_magnitude(jax.random.normal(key, shape, dtype), tuple(range(len(shape) - 1)))


class MPConv(nn.Module):
    """Convolution or dense layer with normalised weights and no bias (Eq. 47).

    The weights in use are `kernel / |kernel|` per output unit, times `gain`: outputs have unit
    magnitude for uncorrelated unit inputs, and the gradient is orthogonal to the stored kernel.

    Attributes:
        features: number of output channels.
        kernel_size: odd spatial sizes, such as `(3, 3)`; `()` is a dense layer.
        dtype: dtype of the computation; the kernel is stored and normalised in float32.
    """

    features: int
    kernel_size: tuple[int, ...] = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *grid channels"], gain: float | Float[Array, ""] = 1.0
    ) -> Float[Array, "batch *grid features"]:
        """Apply the layer to `x` [batch, *grid, channels], zero-padded to keep the grid's shape."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _unit_kernel, shape)
        kernel = normalize_magnitude(kernel, tuple(range(kernel.ndim - 1)))
        kernel = kernel * (gain / np.sqrt(np.prod(shape[:-1])))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if all(size == 1 for size in self.kernel_size):
            return jnp.dot(x, kernel.reshape(shape[-2:]))  # gradients of matmuls are faster on CPU
        return conv2d(x, kernel)


def normalize_weights(params: Mapping[str, Any], *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Project every `MPConv` kernel back to unit magnitude: forced weight normalisation (Eq. 66).

    To be applied after each optimiser update. It does not change what the network computes, but
    it keeps the size of the weights, and so the effective learning rate, from drifting. Gains are
    left alone. Applying it twice changes a kernel that had magnitude `r` by a relative
    `EPSILON |1 - 1/r|` at most (to first order), because of the epsilon in the denominator.

    Args:
        params: the "params" collection of an `EDM2UNet`, or the parameters of its parts.
        skip: names at the top of `params` to leave as they are. A loss that does not train the
            uncertainty head leaves its weights alone with `skip=("logvar_linear",)`.

    Returns:
        A new tree of the same structure.

    Raises:
        ValueError: when `params` has a leaf that no magnitude-preserving network has (a bias, an
            embedding table), or `skip` names nothing in `params`.
    """
    unknown = sorted(set(skip) - set(params))
    if unknown:
        raise ValueError(f"skip names {unknown}, but params has only {sorted(params)}.")

    def project(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path[-1].key
        if name not in ("kernel", "emb_gain", "out_gain"):
            raise ValueError(
                f"params has the leaf {jax.tree_util.keystr(path)}, which is no part of a "
                "magnitude-preserving network; pass the parameters of an EDM2UNet."
            )
        if name != "kernel" or path[0].key in skip:
            return leaf
        return normalize_magnitude(leaf, tuple(range(leaf.ndim - 1)))

    return jax.tree_util.tree_map_with_path(project, dict(params))
