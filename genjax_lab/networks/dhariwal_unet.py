"""ADM, the U-Net of Dhariwal and Nichol (arXiv 2105.05233), as EDM trains it.

Compared with DDPM++ the embedding scales and shifts the second norm of each block, attention has
heads of 64 channels and follows every block of its resolutions, and nothing rescales the residual
sums (arXiv 2206.00364, app. F.2). Parameter names are those of the published checkpoints with the
dot after "enc" and "dec" replaced by an underscore. The preconditioning belongs to
`genjax_lab.processes`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.convolution import conv_general_dilated
from genjax_lab.networks.embeddings import positional_embedding
from genjax_lab.networks.labels import class_vectors, drop_labels
from genjax_lab.networks.unet_block import (
    BlockInitializers,
    UNetBlock,
    check_unet_input,
    group_norm,
)

_CHANNELS_PER_HEAD = 64
_EPSILON = 1e-5


def _uniform_bias(fan_in: int) -> Initializer:
    """Uniform in `[-1, 1] / sqrt(fan_in)`, PyTorch's default, which ADM keeps."""
    bound = fan_in**-0.5

    def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


_UNIFORM_KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_INIT = BlockInitializers(
    kernel=_UNIFORM_KERNEL,
    attention_kernel=_UNIFORM_KERNEL,
    final_kernel=nn.initializers.zeros,
    bias=_uniform_bias,
)


class DhariwalUNet(nn.Module):
    """U-Net of ADM (arXiv 2105.05233, 2206.00364). The output is zero at initialisation.

    Attention follows every block at the resolutions in `attn_resolutions` and the first block at
    the bottom; it has one head per 64 channels, hence **none where a block has fewer than 64**.

    Attributes:
        resolution: height of the images of which the network is made: names its blocks and says
            where `attn_resolutions` lie. Inputs of other sizes are accepted if divisible by
            `2 ** (len(channel_mult) - 1)`.
        num_classes: number of classes; 0 for an unconditional network.
        augment_dim: features that describe an augmentation; 0 for none.
        out_channels: channels of the output; None for those of the input.
        model_channels: channels at the highest resolution, before `channel_mult`.
        channel_mult: multiplier of the channels for each resolution, highest first.
        channel_mult_emb: multiplier for the embedding.
        num_blocks: blocks per resolution in the encoder; the decoder has one more.
        attn_resolutions: resolutions at which blocks attend.
        dropout: probability of dropping an activation of a residual branch.
        label_dropout: probability of dropping the class of an example in training.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the blocks; embeddings, parameters and output are float32.
    """

    resolution: int
    num_classes: int = 0
    augment_dim: int = 0
    out_channels: int | None = None
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.10
    label_dropout: float = 0.0
    attention: AttentionFunction = dense_attention
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        augment_labels: Float[Array, "batch augment_dim"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch height width out_channels"]:
        """Evaluate the network.

        Args:
            x: scaled noisy images (`c_in x`, of unit variance), NHWC.
            c_noise: noise level, `ln(sigma) / 4` in EDM.
            labels: integers (`num_classes` for no class), label vectors, or None for no class.
            augment_labels: description of each example's augmentation; None for no augmentation.
            train: whether dropout of activations and labels is on (rng "dropout").

        Returns:
            The raw output `F`, float32.

        Raises:
            ValueError: when shapes do not fit the network.
        """
        check_unet_input(
            x,
            c_noise,
            augment_labels,
            levels=len(self.channel_mult),
            augment_dim=self.augment_dim,
        )
        vectors = class_vectors(labels, num_classes=self.num_classes, batch=x.shape[0])
        if vectors is not None and train and self.label_dropout:
            vectors = drop_labels(self.make_rng("dropout"), vectors, self.label_dropout)
        emb = self._embed(c_noise, vectors, augment_labels)
        out_channels = self.out_channels or x.shape[-1]
        x = self._decode(self._encode(x.astype(self.dtype), emb, train), emb, train)
        norm = group_norm(x.shape[-1], epsilon=_EPSILON, dtype=self.dtype, name="out_norm")
        conv = nn.Conv(
            out_channels,
            (3, 3),
            kernel_init=_INIT.final_kernel,
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name="out_conv",
        )
        return conv(nn.silu(norm(x))).astype(jnp.float32)

    def _embed(self, c_noise: Array, vectors: Array | None, augment_labels: Array | None) -> Array:
        """Map noise level, class and augmentation to one float32 vector per example."""
        emb = positional_embedding(c_noise, self.model_channels, endpoint=False)
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = jnp.zeros((c_noise.shape[0], self.augment_dim))
            emb += nn.Dense(
                self.model_channels,
                use_bias=False,
                kernel_init=_INIT.final_kernel,
                name="map_augment",
            )(augment_labels)
        width = self.model_channels * self.channel_mult_emb
        emb = nn.silu(self._dense("map_layer0", width, emb.shape[-1])(emb))
        emb = self._dense("map_layer1", width, width)(emb)
        if vectors is not None:
            # Unit deviation, whatever the number of classes: an embedding table of N(0, 1).
            emb += nn.Dense(
                width,
                use_bias=False,
                kernel_init=nn.initializers.normal(1.0),
                name="map_label",
            )(vectors)
        return nn.silu(emb)

    def _encode(self, x: Array, emb: Array, train: bool) -> list[Array]:
        """Run the encoder; returns its feature maps, the last of which is its output."""
        channels = self.model_channels * self.channel_mult[0]
        x = nn.Conv(
            channels,
            (3, 3),
            kernel_init=_INIT.kernel,
            bias_init=_INIT.bias(9 * x.shape[-1]),
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name=f"enc_{self._at(0)}_conv",
        )(x)
        skips = [x]
        for level, mult in enumerate(self.channel_mult):
            at = self._at(level)
            if level > 0:
                x = self._block(f"enc_{at}_down", x.shape[-1], mode="down")(x, emb, train)
                skips.append(x)
            attends = self.resolution >> level in self.attn_resolutions
            for i in range(self.num_blocks):
                features = self.model_channels * mult
                x = self._block(f"enc_{at}_block{i}", features, attends=attends)(x, emb, train)
                skips.append(x)
        return skips

    def _decode(self, skips: list[Array], emb: Array, train: bool) -> Array:
        """Run the decoder on the encoder's feature maps."""
        x = skips[-1]
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            at = self._at(level)
            if level == len(self.channel_mult) - 1:
                x = self._block(f"dec_{at}_in0", x.shape[-1], attends=True)(x, emb, train)
                x = self._block(f"dec_{at}_in1", x.shape[-1])(x, emb, train)
            else:
                x = self._block(f"dec_{at}_up", x.shape[-1], mode="up")(x, emb, train)
            attends = self.resolution >> level in self.attn_resolutions
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                features = self.model_channels * mult
                x = self._block(f"dec_{at}_block{i}", features, attends=attends)(x, emb, train)
        return x

    def _at(self, level: int) -> str:
        resolution = self.resolution >> level
        return f"{resolution}x{resolution}"

    def _dense(self, name: str, features: int, fan_in: int) -> nn.Dense:
        return nn.Dense(features, kernel_init=_INIT.kernel, bias_init=_INIT.bias(fan_in), name=name)

    def _block(
        self, name: str, features: int, mode: str = "keep", attends: bool = False
    ) -> UNetBlock:
        block = nn.remat(UNetBlock, static_argnums=(3,)) if self.remat else UNetBlock
        return block(
            features,
            _INIT,
            mode=mode,
            num_heads=features // _CHANNELS_PER_HEAD if attends else 0,
            epsilon=_EPSILON,
            dropout=self.dropout,
            attention=self.attention,
            dtype=self.dtype,
            name=name,
        )


def adm_imagenet64(**overrides: Any) -> DhariwalUNet:
    """ADM as EDM trains it on ImageNet-64: 1000 classes, 296M parameters (2206.00364, Table 7).

    Args:
        **overrides: attributes of `DhariwalUNet` that replace those of the preset.
    """
    return DhariwalUNet(**({"resolution": 64, "num_classes": 1000} | overrides))
