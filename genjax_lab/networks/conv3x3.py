"""A 3 x 3 convolution as one matrix product with shifted copies of its input.

XLA's convolutions run on a CPU many times slower within `lax.scan` than outside, which makes
training steps in a scan slow. Small networks lose nothing by gathering the nine neighbours of each
pixel themselves; parameters are those of `nn.Conv(features, (3, 3))`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def convolve3x3(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "3 3 channels features"],
    bias: Float[Array, " features"],
    *,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "batch height width features"]:
    """Convolve images that are zero-padded by one pixel; `precision` is the product's."""
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = [
        padded[:, row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    ]
    flat = kernel.reshape(9 * channels, -1)
    return jnp.matmul(jnp.concatenate(neighbours, axis=-1), flat, precision=precision) + bias


class Conv3x3(nn.Module):
    """The convolution with its parameters.

    Attributes:
        features: channels of the output.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        """Convolve."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return convolve3x3(x, kernel, bias)
