"""The block of DiT (arXiv 2212.09748, Fig. 3) and its layers, which other transformers share."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.embeddings import positional_embedding

# Sinusoids of the noise level, as in the original.
_NOISE_FEATURES = 256

XAVIER = nn.initializers.xavier_uniform()
ZEROS = nn.initializers.zeros
SMALL = nn.initializers.normal(0.02)


class DiTBlock(nn.Module):
    """Transformer block whose norms and residual branches are conditioned (adaLN-zero, Fig. 3).

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        mlp_ratio: width of the hidden layer in units of the tokens' width.
        dropout: probability of dropping an activation at the end of a branch.
        attention: function of query, key, value `[batch, *tokens, heads, head_dim]`.
        dtype: dtype of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    attention: AttentionFunction = dense_attention
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *tokens features"],
        condition: Float[Array, "batch features"],
        train: bool = False,
    ) -> Float[Array, "batch *tokens features"]:
        """Apply the block to tokens on a grid or in a row; `train` turns dropout on."""
        *outer, features = x.shape
        drop = nn.Dropout(self.dropout, deterministic=not train)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
            condition, 6, like=x, dtype=self.dtype, name="adaln"
        )

        y = layer_norm(self.dtype, "norm1")(x) * (1 + scale_a) + shift_a
        qkv = dense(3 * features, self.dtype, "qkv")(y)
        qkv = qkv.reshape(*outer, 3, self.num_heads, features // self.num_heads)
        y = self.attention(*jnp.moveaxis(qkv, -3, 0)).reshape(x.shape)
        x = x + gate_a * drop(dense(features, self.dtype, "proj")(y))

        y = layer_norm(self.dtype, "norm2")(x) * (1 + scale_m) + shift_m
        y = nn.gelu(dense(int(self.mlp_ratio * features), self.dtype, "mlp_in")(y))
        return x + gate_m * drop(dense(features, self.dtype, "mlp_out")(y))


def modulation(
    condition: Float[Array, "batch features"],
    count: int,
    *,
    like: Array,
    dtype: DTypeLike,
    name: str,
) -> list[Array]:
    """`count` vectors for each example, 0 at first, that broadcast to the tokens `like`."""
    values = dense(count * like.shape[-1], dtype, name, ZEROS)(nn.silu(condition))
    return split_modulation(values, count, like=like)


def split_modulation(
    values: Float[Array, "batch features"], count: int, *, like: Array
) -> list[Array]:
    """`count` equal parts of each example's values, as they broadcast to the tokens `like`."""
    values = values.reshape(len(values), *[1] * (like.ndim - 2), values.shape[-1])
    return jnp.split(values, count, axis=-1)


def noise_vector(
    c_noise: Float[Array, " batch"], width: int, noise_scale: float
) -> Float[Array, "batch width"]:
    """Embed the noise level, times `noise_scale`, in float32."""
    waves = positional_embedding(noise_scale * c_noise, _NOISE_FEATURES)
    hidden = nn.silu(dense(width, jnp.float32, "noise_in", SMALL)(waves))
    return dense(width, jnp.float32, "noise_out", SMALL)(hidden)


def final_layer(
    tokens: Float[Array, "batch *grid width"],
    condition: Float[Array, "batch width"],
    features: int,
    dtype: DTypeLike,
) -> Float[Array, "batch *grid features"]:
    """The patches of the output, which are 0 at first."""
    shift, scale = modulation(condition, 2, like=tokens, dtype=dtype, name="final_adaln")
    tokens = layer_norm(dtype, "final_norm")(tokens) * (1 + scale) + shift
    return dense(features, dtype, "final_proj", ZEROS)(tokens)


def dense(
    features: int,
    dtype: DTypeLike,
    name: str | None = None,
    kernel_init: nn.initializers.Initializer = XAVIER,
) -> nn.Dense:
    """Make a dense layer with the initialisation of the original."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def layer_norm(dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """Make a layer norm without parameters, since the conditioning supplies them."""
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype, name=name)
