"""The residual block that DDPM++, NCSN++ and ADM have in common (arXiv 2206.00364, app. F).

Two 3x3 convolutions around group norms, with the noise embedding added before the second norm
(DDPM++, NCSN++) or as its scale and shift (ADM), optional factor-two resampling, and optional
self-attention through a function that the network receives. Parameter names are those of the
published checkpoints: norm0, conv0, affine, norm1, conv1, skip, norm2, qkv, proj.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.convolution import conv_general_dilated
from genjax_lab.networks.resampling import downsample, upsample


class BlockInitializers(NamedTuple):
    """How a network draws its weights.

    Attributes:
        kernel: of most layers.
        attention_kernel: of the query-key-value projection.
        final_kernel: of layers that end a residual branch or the network, (nearly) zero.
        bias: function of a layer's fan-in that returns an initializer; final layers have zeros.
    """

    kernel: Initializer
    attention_kernel: Initializer
    final_kernel: Initializer
    bias: Callable[[int], Initializer]


class PointwiseConv(nn.Module):
    """A 1x1 convolution as a matrix product, whose gradients are faster on a CPU.

    Attributes:
        features: number of output channels.
        kernel_init: initializer of `kernel` [1, 1, in, out].
        bias_init: initializer of `bias` [out].
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel_init: Initializer
    bias_init: Initializer
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        """Apply the layer."""
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        kernel, bias = kernel[0, 0].astype(self.dtype), bias.astype(self.dtype)
        return jnp.dot(x.astype(self.dtype), kernel) + bias


def group_norm(channels: int, *, epsilon: float, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Make the group norm of the EDM networks: `min(32, channels // 4)` groups.

    Raises:
        ValueError: if the channels do not divide into such groups.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{channels} channels do not divide into the {groups} groups of a group norm; choose "
            "model_channels and channel_mult such that widths are multiples of 4, and of 32 "
            "beyond 128."
        )
    # The fast variance, E[x^2] - E[x]^2, cancels where a mean is large against its deviation.
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def check_unet_input(
    x: Array, c_noise: Array, augment_labels: Array | None, *, levels: int, augment_dim: int
) -> None:
    """Raise a ValueError unless the inputs fit a U-Net of `levels` resolutions."""
    if x.ndim != 4:
        raise ValueError(f"x must have shape [batch, height, width, channels], got {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, scaled to unit variance; got {x.dtype}.")
    factor = 2 ** (levels - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"x has height and width {x.shape[1:3]}, which must be multiples of {factor} for "
            f"{levels} levels of channel_mult; pad the images or use fewer levels."
        )
    batch = x.shape[0]
    if c_noise.shape != (batch,):
        raise ValueError(f"c_noise must have shape ({batch},), got {c_noise.shape}.")
    if augment_labels is not None and augment_labels.shape != (batch, augment_dim):
        raise ValueError(
            f"augment_labels must have shape ({batch}, {augment_dim}), got "
            f"{augment_labels.shape}; without augmentation pass None."
        )


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention (arXiv 2206.00364, app. F).

    Attributes:
        features: number of output channels.
        init: initializers of the weights.
        mode: "keep", "down" or "up": whether height and width are kept, halved or doubled.
        num_heads: number of attention heads; 0 for no attention.
        adaptive_scale: the embedding scales and shifts the second norm's output (ADM) instead of
            being added to its input.
        resample_proj: a block that resamples has a 1x1 convolution on its skip path even when it
            keeps the number of channels.
        resample_filter: taps of the resampling filter.
        skip_scale: factor of every residual sum.
        epsilon: of the group norms.
        dropout: probability of dropping an activation of the residual branch.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        dtype: dtype of the computation; parameters and embedding are float32.
    """

    features: int
    init: BlockInitializers
    mode: str = "keep"
    num_heads: int = 0
    adaptive_scale: bool = True
    resample_proj: bool = False
    resample_filter: tuple[float, ...] = (1, 1)
    skip_scale: float = 1.0
    epsilon: float = 1e-5
    dropout: float = 0.0
    attention: AttentionFunction = dense_attention
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        emb: Float[Array, "batch emb_channels"],
        train: bool = False,
    ) -> Float[Array, "batch out_height out_width features"]:
        """Apply the block; `train` turns dropout on (rng "dropout")."""
        y = self._resample(nn.silu(self._norm("norm0", x.shape[-1])(x)))
        y = self._conv("conv0", y.shape[-1])(y)
        y = self._condition(y, emb)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = nn.Conv(
            self.features,
            (3, 3),
            kernel_init=self.init.final_kernel,
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name="conv1",
        )(y)

        skip = self._resample(x)
        if x.shape[-1] != self.features or (self.resample_proj and self.mode != "keep"):
            skip = self._pointwise("skip", x.shape[-1], self.features)(skip)
        x = (skip + y) * self.skip_scale
        if self.num_heads:
            x = (x + self._attend(x)) * self.skip_scale
        return x

    def _resample(self, x: Array) -> Array:
        if self.mode == "down":
            return downsample(x, self.resample_filter)
        if self.mode == "up":
            return upsample(x, self.resample_filter)
        return x

    def _condition(self, y: Array, emb: Array) -> Array:
        """Normalise, with the embedding added before or modulating after, and activate."""
        width = self.features * (2 if self.adaptive_scale else 1)
        affine = nn.Dense(
            width,
            kernel_init=self.init.kernel,
            bias_init=self.init.bias(emb.shape[-1]),
            name="affine",
        )(emb)
        affine = affine[:, None, None, :].astype(self.dtype)
        norm = self._norm("norm1", self.features)
        if not self.adaptive_scale:
            return nn.silu(norm(y + affine))
        scale, shift = jnp.split(affine, 2, axis=-1)
        return nn.silu(norm(y) * (1 + scale) + shift)

    def _attend(self, x: Array) -> Array:
        """Self-attention among all pixels, up to the residual sum."""
        batch, height, width, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(
                f"{channels} channels do not divide into {self.num_heads} attention heads; choose "
                "model_channels so that attending widths are multiples of 64."
            )
        y = self._norm("norm2", channels)(x)
        qkv = PointwiseConv(
            3 * channels,
            self.init.attention_kernel,
            self.init.bias(channels),
            self.dtype,
            name="qkv",
        )(y)
        # The published weights order these channels by head, then channel, then q, k, v.
        qkv = qkv.reshape(batch, height, width, self.num_heads, channels // self.num_heads, 3)
        query, key, value = jnp.moveaxis(qkv, -1, 0)
        out = self.attention(query, key, value).reshape(x.shape)
        return PointwiseConv(
            channels, self.init.final_kernel, nn.initializers.zeros, self.dtype, name="proj"
        )(out)

    def _norm(self, name: str, channels: int) -> nn.GroupNorm:
        return group_norm(channels, epsilon=self.epsilon, dtype=self.dtype, name=name)

    def _conv(self, name: str, channels: int) -> nn.Conv:
        return nn.Conv(
            self.features,
            (3, 3),
            kernel_init=self.init.kernel,
            bias_init=self.init.bias(9 * channels),
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name=name,
        )

    def _pointwise(self, name: str, channels: int, features: int) -> PointwiseConv:
        return PointwiseConv(
            features, self.init.kernel, self.init.bias(channels), self.dtype, name=name
        )
