"""DDPM++ and NCSN++, the U-Nets of Song et al. (arXiv 2011.13456) as EDM trains them.

One module with the options of EDM's reimplementation (arXiv 2206.00364, app. F.2): positional or
Fourier noise embedding, class and augmentation labels, and auxiliary image paths beside the
encoder and the decoder. Parameter names are those of the published checkpoints with the dot after
"enc" and "dec" replaced by an underscore. The preconditioning belongs to `genjax_lab.processes`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.convolution import conv_general_dilated
from genjax_lab.networks.embeddings import FourierEmbedding, positional_embedding
from genjax_lab.networks.labels import class_vectors, drop_labels
from genjax_lab.networks.resampling import check_filter, downsample, upsample
from genjax_lab.networks.unet_block import (
    BlockInitializers,
    PointwiseConv,
    UNetBlock,
    check_unet_input,
    group_norm,
)


def _xavier_uniform(scale: float) -> Initializer:
    """Glorot's uniform initializer, its values times `scale`."""
    return nn.initializers.variance_scaling(scale**2, "fan_avg", "uniform")


_INIT = BlockInitializers(
    kernel=_xavier_uniform(1.0),
    attention_kernel=_xavier_uniform(np.sqrt(0.2)),
    final_kernel=_xavier_uniform(1e-5),
    bias=lambda fan_in: nn.initializers.zeros,
)
_EPSILON = 1e-6
_OPTIONS = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module):
    """U-Net of DDPM++ and NCSN++ (arXiv 2011.13456, 2206.00364).

    The "params" collection holds the weights; with Fourier embedding, "buffers" holds the fixed
    frequencies. Attention has one head; it follows every encoder block of the resolutions in
    `attn_resolutions`, the last decoder block of each, and the first block at the bottom.

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
        channel_mult_noise: multiplier for the noise features: 1 for DDPM++, 2 for NCSN++.
        num_blocks: blocks per resolution in the encoder; the decoder has one more.
        attn_resolutions: resolutions at which blocks attend.
        dropout: probability of dropping an activation of a residual branch.
        label_dropout: probability of dropping the class of an example in training.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip".
        decoder_type: "standard" (both) or "skip".
        resample_filter: taps of the resampling filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the blocks; embeddings, parameters and output are float32.
    """

    resolution: int
    num_classes: int = 0
    augment_dim: int = 0
    out_channels: int | None = None
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    label_dropout: float = 0.0
    embedding_type: str = "positional"
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[float, ...] = (1, 1)
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
            ValueError: when shapes do not fit the network, or an option is unknown.
        """
        self._check_options()
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
        skips = self._encode(x.astype(self.dtype), emb, train)
        return self._decode(skips, emb, out_channels, train).astype(jnp.float32)

    def _check_options(self) -> None:
        for name, allowed in _OPTIONS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        check_filter(self.resample_filter)

    def _embed(self, c_noise: Array, vectors: Array | None, augment_labels: Array | None) -> Array:
        """Map noise level, class and augmentation to one float32 vector per example."""
        channels = self.model_channels * self.channel_mult_noise
        if self.embedding_type == "fourier":
            emb = FourierEmbedding(channels, name="map_noise")(c_noise)
        else:
            emb = positional_embedding(c_noise, channels, endpoint=True)
        # EDM swaps the halves, [sin, cos], to agree with DDPM's weights.
        emb = jnp.roll(emb, channels // 2, axis=-1)
        if vectors is not None:
            emb += self._dense("map_label", channels)(vectors * np.sqrt(self.num_classes))
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = jnp.zeros((c_noise.shape[0], self.augment_dim))
            emb += self._dense("map_augment", channels, use_bias=False)(augment_labels)
        width = self.model_channels * self.channel_mult_emb
        emb = nn.silu(self._dense("map_layer0", width)(emb))
        return nn.silu(self._dense("map_layer1", width)(emb))

    def _encode(self, x: Array, emb: Array, train: bool) -> list[Array]:
        """Run the encoder; returns its feature maps, the last of which is its output."""
        aux = x
        x = self._conv(f"enc_{self._at(0)}_conv", self.model_channels)(x)
        skips = [x]
        for level, mult in enumerate(self.channel_mult):
            at = self._at(level)
            if level > 0:
                x = self._block(f"enc_{at}_down", x.shape[-1], mode="down")(x, emb, train)
                x, aux = self._join_auxiliary(at, x, aux)
                skips.append(x)
            attends = self.resolution >> level in self.attn_resolutions
            for i in range(self.num_blocks):
                features = self.model_channels * mult
                block = self._block(f"enc_{at}_block{i}", features, attends=attends)
                x = block(x, emb, train)
                skips.append(x)
        return skips

    def _join_auxiliary(self, at: str, x: Array, aux: Array) -> tuple[Array, Array]:
        """Add the downsampled image path to the features: NCSN++'s progressive input."""
        if self.encoder_type == "skip":
            aux = downsample(aux, self.resample_filter)
            project = PointwiseConv(
                x.shape[-1],
                _INIT.kernel,
                nn.initializers.zeros,
                self.dtype,
                name=f"enc_{at}_aux_skip",
            )
            return x + project(aux), aux
        if self.encoder_type == "residual":
            # Convolution and filter are one operator, padded once for both: the filter sees what
            # the convolution makes of the zeros beyond the border.
            padding = 1 + (len(self.resample_filter) - 1) // 2
            conv = self._conv(f"enc_{at}_aux_residual", x.shape[-1], padding=padding)
            aux = downsample(conv(aux), self.resample_filter, padding=0)
            x = (x + aux) * np.sqrt(0.5)
            return x, x
        return x, aux

    def _decode(self, skips: list[Array], emb: Array, out_channels: int, train: bool) -> Array:
        """Run the decoder on the encoder's feature maps."""
        x = skips[-1]
        aux = None
        lowest = len(self.channel_mult) - 1
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            at = self._at(level)
            if level == lowest:
                x = self._block(f"dec_{at}_in0", x.shape[-1], attends=True)(x, emb, train)
                x = self._block(f"dec_{at}_in1", x.shape[-1])(x, emb, train)
            else:
                x = self._block(f"dec_{at}_up", x.shape[-1], mode="up")(x, emb, train)
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                attends = i == self.num_blocks and self.resolution >> level in self.attn_resolutions
                features = self.model_channels * mult
                x = self._block(f"dec_{at}_block{i}", features, attends=attends)(x, emb, train)
            if self.decoder_type == "skip" or level == 0:
                if aux is not None:
                    aux = upsample(aux, self.resample_filter)
                image = self._to_image(at, x, out_channels)
                aux = image if aux is None else image + aux
        return aux

    def _to_image(self, at: str, x: Array, out_channels: int) -> Array:
        """Read an image out of the decoder's features."""
        norm = group_norm(
            x.shape[-1], epsilon=_EPSILON, dtype=self.dtype, name=f"dec_{at}_aux_norm"
        )
        conv = self._conv(f"dec_{at}_aux_conv", out_channels, kernel_init=_INIT.final_kernel)
        return conv(nn.silu(norm(x)))

    def _at(self, level: int) -> str:
        resolution = self.resolution >> level
        return f"{resolution}x{resolution}"

    def _dense(self, name: str, features: int, use_bias: bool = True) -> nn.Dense:
        return nn.Dense(features, use_bias=use_bias, kernel_init=_INIT.kernel, name=name)

    def _conv(
        self,
        name: str,
        features: int,
        padding: int = 1,
        kernel_init: Initializer = _INIT.kernel,
    ) -> nn.Conv:
        return nn.Conv(
            features,
            (3, 3),
            padding=padding,
            kernel_init=kernel_init,
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name=name,
        )

    def _block(
        self, name: str, features: int, mode: str = "keep", attends: bool = False
    ) -> UNetBlock:
        block = nn.remat(UNetBlock, static_argnums=(3,)) if self.remat else UNetBlock
        return block(
            features,
            _INIT,
            mode=mode,
            num_heads=1 if attends else 0,
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=self.resample_filter,
            skip_scale=float(np.sqrt(0.5)),
            epsilon=_EPSILON,
            dropout=self.dropout,
            attention=self.attention,
            dtype=self.dtype,
            name=name,
        )


_CIFAR10 = {
    "resolution": 32,
    "augment_dim": 9,
    "channel_mult": (2, 2, 2),
    "dropout": 0.13,
}
_NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}


def ddpmpp_cifar10(**overrides: Any) -> SongUNet:
    """DDPM++ as EDM trains it on CIFAR-10: 32x32, 55.7M parameters (arXiv 2206.00364, Table 7).

    Args:
        **overrides: attributes of `SongUNet` that replace those of the preset, such as
            `num_classes=10` for the conditional network.
    """
    return SongUNet(**(_CIFAR10 | overrides))


def ncsnpp_cifar10(**overrides: Any) -> SongUNet:
    """NCSN++ as EDM trains it on CIFAR-10: 32x32, 56.4M parameters (arXiv 2206.00364, Table 7).

    Args:
        **overrides: attributes of `SongUNet` that replace those of the preset, such as
            `num_classes=10` for the conditional network.
    """
    return SongUNet(**(_CIFAR10 | _NCSNPP | overrides))
