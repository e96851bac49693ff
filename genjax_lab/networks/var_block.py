"""The block of VAR (arXiv 2404.02905): attention and MLP under scales, shifts and gates."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# Learned scales of normalised queries, exp of a parameter, start at 4 and stay below 100.
_INITIAL_LOG_SCALE = math.log(4.0)
_MAX_LOG_SCALE = math.log(100.0)


class VARBlock(nn.Module):
    """Transformer block whose norms and residual branches are conditioned on the class.

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        mlp_ratio: width of the hidden layer in units of the tokens' width.
        normalize: normalise queries and keys, and scale the former per head by a learned factor.
        depth: number of blocks of the network, which scales the initial residual branches.
        dtype: dtype of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    normalize: bool = True
    depth: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens features"],
        condition: Float[Array, "batch features"],
        mask: Bool[Array, "tokens tokens"] | None = None,
        past: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "batch tokens features"], tuple[Array, Array]]:
        """Apply the block.

        Args:
            x: tokens.
            condition: embedding of the class.
            mask: which token sees which; all see all if None.
            past: keys and values [batch, past tokens, heads, head_dim] that all tokens see too.

        Returns:
            The tokens, and their own keys and values.
        """
        features = x.shape[-1]
        std = initial_std(features)
        normal, branch_init = (
            nn.initializers.normal(std / share) for share in (1, math.sqrt(2 * self.depth))
        )
        modulation = dense(6 * features, self.dtype, "adaln", _adaln_init(std))(nn.silu(condition))
        gate_a, gate_m, scale_a, scale_m, shift_a, shift_m = jnp.split(
            modulation[:, None, :], 6, axis=-1
        )

        y = layer_norm(self.dtype, "norm1")(x) * (1 + scale_a) + shift_a
        query, key, value = self._queries_keys_values(y, normal)
        own = (key, value)
        if past is not None:
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip(past, own, strict=True))
        scale = 1.0 if self.normalize else 0.25 / math.sqrt(features // self.num_heads)
        y = _attend(query, key, value, scale, mask).reshape(x.shape)
        x = x + gate_a * dense(features, self.dtype, "proj", branch_init)(y)

        y = layer_norm(self.dtype, "norm2")(x) * (1 + scale_m) + shift_m
        hidden = dense(round(self.mlp_ratio * features), self.dtype, "mlp_in", normal)(y)
        y = dense(features, self.dtype, "mlp_out", branch_init)(nn.gelu(hidden, approximate=True))
        return x + gate_m * y, own

    def _queries_keys_values(
        self, y: Array, kernel_init: nn.initializers.Initializer
    ) -> tuple[Array, Array, Array]:
        """Project; queries and values have a bias, keys have none."""
        batch, tokens, features = y.shape
        heads = (batch, tokens, self.num_heads, features // self.num_heads)
        qkv = nn.Dense(
            3 * features,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=kernel_init,
            name="qkv",
        )(y)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        query += self.param("q_bias", nn.initializers.zeros, (features,)).astype(query.dtype)
        value += self.param("v_bias", nn.initializers.zeros, (features,)).astype(value.dtype)
        query, key, value = (part.reshape(heads) for part in (query, key, value))
        if self.normalize:
            log_scale = self.param(
                "log_scale", nn.initializers.constant(_INITIAL_LOG_SCALE), (self.num_heads,)
            )
            factor = jnp.exp(jnp.minimum(log_scale, _MAX_LOG_SCALE))[:, None]
            query, key = _unit(query) * factor.astype(query.dtype), _unit(key)
        return query, key, value


def _attend(query: Array, key: Array, value: Array, scale: float, mask: Array | None) -> Array:
    """Scaled dot-product attention with logits and softmax in float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * scale
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _unit(x: Array) -> Array:
    """Normalise the last axis; a zero vector, whose norm has no gradient, stays what it is."""
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(x.dtype)


def initial_std(width: int) -> float:
    """Deviation of all initial weights; the original's cut at +-2 lies beyond 30 of them."""
    return math.sqrt(1 / (3 * width))


def _adaln_init(std: float) -> nn.initializers.Initializer:
    """Residual branches start nearly closed, their scales and shifts at half of the usual."""

    def init(key, shape, dtype=jnp.float32):
        weights = nn.initializers.normal(std)(key, shape, dtype)
        return weights * jnp.where(jnp.arange(shape[-1]) < shape[-1] // 3, 1e-5, 0.5)

    return init


def dense(
    features: int, dtype: DTypeLike, name: str, kernel_init: nn.initializers.Initializer
) -> nn.Dense:
    """Make a linear layer with the initial weights that are given."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Make a layer norm without parameters, since the conditioning supplies them."""
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype, name=name)
