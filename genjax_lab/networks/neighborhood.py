"""The attention layer of neighborhood attention transformers (arXiv 2204.07143, 2504.16922).

One projection makes queries, keys and values, each token attends to its neighborhood, and another
projection joins the heads: what NATTEN's modules NeighborhoodAttention1D, 2D and 3D do, in one. The
first of the papers adds a learned bias for each relative position (`use_position_bias`).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from genjax_lab.attention import NeighborhoodSpec, neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """Self-attention of tokens on a grid to those around them.

    Attributes:
        num_heads: number of attention heads, a divisor of the width.
        spec: the neighborhood.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        scale: factor of the logits, `1 / sqrt(head_dim)` by default.
        proj_dropout: probability of dropping an output.
        use_position_bias: whether each head learns a bias for each relative position, the parameter
            "position_bias" `[heads, 2 window - 1, ...]` with an axis for each of the grid.
        implementation: of `neighborhood_attention`.
        dtype: dtype of the computation.
    """

    num_heads: int
    spec: NeighborhoodSpec
    qkv_bias: bool = True
    scale: float | None = None
    proj_dropout: float = 0.0
    use_position_bias: bool = False
    implementation: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *grid features"], *, train: bool = False
    ) -> Float[Array, "batch *grid features"]:
        """Apply the layer.

        Args:
            x: tokens on a grid of one, two or three axes.
            train: whether dropout is on (rng "dropout").

        Returns:
            As many features for each token, in `dtype`.

        Raises:
            ValueError: for a grid of another number of axes, features that do not divide among the
                heads, or a grid that is smaller than the windows.
        """
        if x.ndim not in (3, 4, 5) or x.shape[-1] % self.num_heads:
            raise ValueError(
                "x must be [batch, *grid, features] with a grid of one to three axes and features "
                f"that divide among num_heads={self.num_heads} heads, got shape {x.shape}."
            )
        *outer, features = x.shape
        qkv = nn.Dense(3 * features, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*outer, 3, self.num_heads, features // self.num_heads)
        query, key, value = jnp.moveaxis(qkv, -3, 0)
        options = {"scale": self.scale, "implementation": self.implementation}
        if self.use_position_bias:
            shape = [2 * axis.window - 1 for axis in self.spec.axes(outer[1:])]
            options["position_bias"] = self.param(
                "position_bias", nn.initializers.truncated_normal(0.02), (self.num_heads, *shape)
            )
        out = neighborhood_attention(query, key, value, self.spec, **options)
        out = nn.Dense(features, dtype=self.dtype, name="proj")(out.reshape(x.shape))
        return nn.Dropout(self.proj_dropout, deterministic=not train)(out)
