"""The convolutional encoder and decoder of VAR's tokenizer (arXiv 2404.02905, after 2012.09841).

Residual blocks at several resolutions, with self-attention at the coarsest. Both ends include the
3 x 3 convolution that the original keeps beside them, between the features and the codebook.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax_lab.networks.convolution import conv_general_dilated
from genjax_lab.networks.image_tokenizer import ImageTokenizer
from genjax_lab.networks.multi_scale_quantizer import MultiScaleQuantizer


class VQVAEEncoder(nn.Module):
    """Images to features, 2^(number of levels - 1) times smaller.

    Attributes:
        features: features of a code.
        width: features of the first level, divisible by 32.
        width_multipliers: of every level.
        num_blocks: residual blocks of a level.
    """

    features: int = 32
    width: int = 160
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        """Encode; raises ValueError if the images' sides do not halve that often."""
        coarsest = len(self.width_multipliers) - 1
        if images.shape[1] % 2**coarsest or images.shape[2] % 2**coarsest:
            raise ValueError(
                f"images must have sides divisible by {2**coarsest}, got {images.shape}."
            )
        x = _conv(self.width, "conv_in")(images)
        for level, multiplier in enumerate(self.width_multipliers):
            for i in range(self.num_blocks):
                x = ResidualBlock(self.width * multiplier, name=f"down_{level}_block_{i}")(x)
                if level == coarsest:
                    x = AttentionBlock(name=f"down_{level}_attn_{i}")(x)
            if level < coarsest:
                padding = ((0, 1), (0, 1))
                x = nn.Conv(x.shape[-1], (3, 3), 2, padding, name=f"down_{level}_downsample")(x)
        x = _middle(x)
        x = _conv(self.features, "conv_out")(nn.silu(_group_norm("norm_out")(x)))
        return _conv(self.features, "quant_conv")(x)


class VQVAEDecoder(nn.Module):
    """Features to images, the mirror of `VQVAEEncoder` with one block more in each level.

    Attributes:
        channels: channels of the image.
        width: features of the last level, divisible by 32.
        width_multipliers: of every level, the finest first.
        num_blocks: residual blocks of a level, less one.
    """

    channels: int = 3
    width: int = 160
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch rows columns features"]
    ) -> Float[Array, "batch height width channels"]:
        """Decode; the images are not clipped."""
        coarsest = len(self.width_multipliers) - 1
        x = _conv(features.shape[-1], "post_quant_conv")(features)
        x = _middle(_conv(self.width * self.width_multipliers[-1], "conv_in")(x))
        for level in reversed(range(coarsest + 1)):
            for i in range(self.num_blocks + 1):
                width = self.width * self.width_multipliers[level]
                x = ResidualBlock(width, name=f"up_{level}_block_{i}")(x)
                if level == coarsest:
                    x = AttentionBlock(name=f"up_{level}_attn_{i}")(x)
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(x.shape[-1], f"up_{level}_upsample")(x)
        return _conv(self.channels, "conv_out")(nn.silu(_group_norm("norm_out")(x)))


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a skip connection."""

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        """Apply the block."""
        h = _conv(self.features, "conv1")(nn.silu(_group_norm("norm1")(x)))
        h = _conv(self.features, "conv2")(nn.silu(_group_norm("norm2")(h)))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="nin_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention with one head over all pixels, beside a skip connection."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width features"]
    ) -> Float[Array, "batch height width features"]:
        """Apply the block."""
        features = x.shape[-1]
        qkv = nn.Conv(3 * features, (1, 1), name="qkv")(_group_norm("norm")(x))
        qkv = qkv.reshape(x.shape[0], -1, 3, features)
        query, key, value = jnp.moveaxis(qkv, 2, 0)[:, :, :, None]
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return x + nn.Conv(features, (1, 1), name="proj_out")(h)


def var_tokenizer(**overrides: Any) -> ImageTokenizer:
    """Make the paper's tokenizer of 256 x 256 images: 680 tokens of 4096 codes.

    Args:
        **overrides: attributes of `MultiScaleQuantizer` that replace those of the preset.
    """
    quantizer = MultiScaleQuantizer(**overrides)
    return ImageTokenizer(VQVAEEncoder(quantizer.channels), quantizer, VQVAEDecoder())


def _middle(x: Array) -> Array:
    x = ResidualBlock(x.shape[-1], name="mid_block_1")(x)
    x = AttentionBlock(name="mid_attn_1")(x)
    return ResidualBlock(x.shape[-1], name="mid_block_2")(x)


def _conv(features: int, name: str) -> nn.Conv:
    return nn.Conv(
        features, (3, 3), padding=1, conv_general_dilated=conv_general_dilated, name=name
    )


def _group_norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(32, epsilon=1e-6, name=name)
