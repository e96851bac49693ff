"""The magnitude-preserving U-Net of EDM2 (arXiv 2312.02696, configuration G, Fig. 21).

An ADM-like encoder-decoder without biases, group norms or data-dependent statistics: weights are
normalised, activations keep unit magnitude by construction, and the only scales that are learned
are the scalar gains of the conditioning and of the output. Parameter names are those of the
published checkpoints with the dot after "enc" and "dec" replaced by an underscore. The
preconditioning belongs to `genjax_lab.processes`, the latents' statistics to the data.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from genjax_lab.attention import AttentionFunction, dense_attention
from genjax_lab.networks.labels import class_vectors, drop_labels
from genjax_lab.networks.magnitude_preserving import (
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_magnitude,
)
from genjax_lab.networks.resampling import downsample, upsample
from genjax_lab.networks.unet_block import check_unet_input

# Channels and dropout of arXiv 2312.02696, Table 6, for both ImageNet-64 and ImageNet-512.
_SIZES = {
    "XS": (128, 0.0),
    "S": (192, 0.0),
    "M": (256, 0.1),
    "L": (320, 0.1),
    "XL": (384, 0.1),
    "XXL": (448, 0.1),
}


class EDM2Block(nn.Module):
    """Residual block with optional self-attention (Fig. 21, encoder and decoder flavour).

    An encoder block changes the channels and normalises every pixel before the residual branch; a
    decoder block changes them on the skip path only and does not normalise.

    Attributes:
        features: number of output channels.
        flavor: "enc" or "dec".
        mode: "keep", "down" (mean of 2x2 pixels) or "up" (nearest neighbour).
        num_heads: number of attention heads; 0 for no attention.
        dropout: probability of dropping an activation of the residual branch.
        res_balance: share of the residual branch, in [0, 1].
        attn_balance: share of the attention branch, in [0, 1].
        clip_act: bound of the output's absolute value; None for no clipping.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        dtype: dtype of the computation.
    """

    features: int
    flavor: str
    mode: str = "keep"
    num_heads: int = 0
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    attention: AttentionFunction = dense_attention
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        emb: Float[Array, "batch emb_channels"],
        train: bool = False,
    ) -> Float[Array, "batch out_height out_width features"]:
        """Apply the block; `train` turns dropout on."""
        if self.mode == "down":
            x = downsample(x, (1, 1))
        elif self.mode == "up":
            x = upsample(x, (1, 1))
        reshapes = x.shape[-1] != self.features
        if self.flavor == "enc":
            if reshapes:
                x = self._conv("conv_skip", 1)(x)
            x = normalize_magnitude(x, -1)

        y = self._conv("conv_res0", 3)(mp_silu(x))
        emb_gain = self.param("emb_gain", nn.initializers.zeros, ())
        scale = MPConv(self.features, name="emb_linear")(emb, emb_gain) + 1
        y = mp_silu(y * scale[:, None, None, :].astype(y.dtype))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = self._conv("conv_res1", 3)(y)

        if self.flavor == "dec" and reshapes:
            x = self._conv("conv_skip", 1)(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        if self.clip_act is not None:
            x = jnp.clip(x, -self.clip_act, self.clip_act)
        return x

    def _conv(self, name: str, size: int, features: int | None = None) -> MPConv:
        """Make a convolution of the block under the published name."""
        return MPConv(features or self.features, (size, size), self.dtype, name=name)

    def _attend(self, x: Array) -> Array:
        """Attend with queries, keys and values of unit magnitude (cosine attention)."""
        batch, height, width, channels = x.shape
        qkv = self._conv("attn_qkv", 1, 3 * channels)(x)
        # The published weights order these channels by head, then channel, then q, k, v.
        qkv = qkv.reshape(batch, height, width, self.num_heads, channels // self.num_heads, 3)
        query, key, value = jnp.moveaxis(normalize_magnitude(qkv, -2), -1, 0)
        out = self.attention(query, key, value)
        return self._conv("attn_proj", 1)(out.reshape(x.shape))


class _Stage(NamedTuple):
    """One block of the plan: its name, width, change of resolution, and whether it attends."""

    name: str
    features: int
    mode: str = "keep"
    attends: bool = False


class EDM2UNet(nn.Module):
    """EDM2's network for square images or latents (arXiv 2312.02696).

    The "params" collection holds the trained kernels and gains, "buffers" the fixed frequencies
    and phases of `emb_fourier` and `logvar_fourier`. The output is zero at initialisation, since
    `out_gain` is. Apply `normalize_weights` to the parameters after each optimiser update.

    Attributes:
        resolution: height of the images of which the network is made: names its blocks and says
            where `attn_resolutions` lie. Inputs of other sizes are accepted if divisible by
            `2 ** (len(channel_mult) - 1)`.
        num_classes: number of classes; 0 for an unconditional network.
        out_channels: channels of the output; None for those of the input.
        model_channels: channels at the highest resolution, before `channel_mult`.
        channel_mult: multiplier of the channels for each resolution, highest first.
        channel_mult_noise: multiplier for the noise features; None for `channel_mult[0]`.
        channel_mult_emb: multiplier for the embedding; None for the largest of `channel_mult`.
        num_blocks: blocks per resolution in the encoder; the decoder has one more.
        attn_resolutions: resolutions at which blocks attend.
        channels_per_head: channels of an attention head; widths below it have no attention.
        dropout: probability of dropping an activation of a residual branch.
        label_dropout: probability of dropping an example's class in training, for guidance.
        label_balance: share of the class in the embedding, in [0, 1].
        concat_balance: share of the encoder's skip connection in the decoder's input, in [0, 1].
        res_balance: share of the residual branch in a block, in [0, 1].
        attn_balance: share of the attention in a block, in [0, 1].
        clip_act: bound of the blocks' outputs; None for no clipping.
        logvar_channels: features of the uncertainty head.
        attention: function of query, key, value `[batch, height, width, heads, head_dim]`.
        remat: recompute the blocks' activations in the backward pass instead of storing them.
        dtype: dtype of the blocks; embeddings, parameters and output are float32.
    """

    resolution: int
    num_classes: int = 0
    out_channels: int | None = None
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    dropout: float = 0.0
    label_dropout: float = 0.0
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    logvar_channels: int = 128
    attention: AttentionFunction = dense_attention
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declare the uncertainty head, which `__call__` and `logvar` share."""
        self.logvar_fourier = MPFourier(self.logvar_channels)
        self.logvar_linear = MPConv(1)

    def logvar(self, c_noise: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Estimate the log-variance `u(sigma)` of the denoising error (Eq. 21).

        Args:
            c_noise: the noise level as the network sees it, [batch].

        Returns:
            One float32 per example.
        """
        return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch height width out_channels"]:
        """Evaluate the network.

        Args:
            x: scaled noisy images (`c_in x`, of unit magnitude), NHWC.
            c_noise: noise level, `ln(sigma) / 4` in EDM2.
            labels: integers (`num_classes` for no class), label vectors, or None for no class.
            train: whether dropout of activations and labels is on (rng "dropout").

        Returns:
            The raw output `F`, float32.

        Raises:
            ValueError: when shapes do not fit the network.
        """
        check_unet_input(x, c_noise, None, levels=len(self.channel_mult), augment_dim=0)
        vectors = class_vectors(labels, num_classes=self.num_classes, batch=x.shape[0])
        if train and vectors is not None and self.label_dropout:
            vectors = drop_labels(self.make_rng("dropout"), vectors, self.label_dropout)
        emb = self._embed(c_noise, vectors)
        encoder, decoder = self._plan()
        out_channels = self.out_channels or x.shape[-1]

        # A constant channel takes the place of the biases that the network does not have.
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        first, *rest = encoder
        x = MPConv(first.features, (3, 3), self.dtype, name=first.name)(x)
        skips = [x]
        for stage in rest:
            x = self._block(stage, "enc")(x, emb, train)
            skips.append(x)
        for stage in decoder:
            if "block" in stage.name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = self._block(stage, "dec")(x, emb, train)

        out_gain = self.param("out_gain", nn.initializers.zeros, ())
        out = MPConv(out_channels, (3, 3), self.dtype, name="out_conv")(x, out_gain)
        if self.is_initializing():
            self.logvar(c_noise)  # creates the head's parameters
        return out.astype(jnp.float32)

    def _embed(self, c_noise: Array, vectors: Array | None) -> Array:
        """Embed noise level and class, in float32."""
        first = self.channel_mult[0]
        noise_mult = first if self.channel_mult_noise is None else self.channel_mult_noise
        most = max(self.channel_mult)
        emb_mult = most if self.channel_mult_emb is None else self.channel_mult_emb
        features = emb_mult * self.model_channels

        fourier = MPFourier(noise_mult * self.model_channels, name="emb_fourier")
        emb = MPConv(features, name="emb_noise")(fourier(c_noise))
        if vectors is not None:
            # A one-hot vector has magnitude 1 / sqrt(num_classes).
            unit_vectors = vectors * self.num_classes**0.5
            label_emb = MPConv(features, name="emb_label")(unit_vectors)
            emb = mp_sum(emb, label_emb, self.label_balance)
        return mp_silu(emb)

    def _plan(self) -> tuple[list[_Stage], list[_Stage]]:
        """List the stages of the encoder and of the decoder, in the order of their use."""
        encoder, decoder = [], []
        last = len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            size = self.resolution >> level
            at, features = f"{size}x{size}", mult * self.model_channels
            attends = size in self.attn_resolutions
            if level == 0:
                encoder.append(_Stage(f"enc_{at}_conv", features))
            else:
                encoder.append(_Stage(f"enc_{at}_down", encoder[-1].features, "down"))
            encoder += [
                _Stage(f"enc_{at}_block{i}", features, attends=attends)
                for i in range(self.num_blocks)
            ]
            if level == last:
                entry = [
                    _Stage(f"dec_{at}_in0", features, attends=True),
                    _Stage(f"dec_{at}_in1", features),
                ]
            else:
                wider = self.channel_mult[level + 1] * self.model_channels
                entry = [_Stage(f"dec_{at}_up", wider, "up")]
            blocks = [
                _Stage(f"dec_{at}_block{i}", features, attends=attends)
                for i in range(self.num_blocks + 1)
            ]
            decoder = entry + blocks + decoder
        return encoder, decoder

    def _block(self, stage: _Stage, flavor: str) -> EDM2Block:
        """Make the block of a stage."""
        block = nn.remat(EDM2Block, static_argnums=(3,)) if self.remat else EDM2Block
        return block(
            features=stage.features,
            flavor=flavor,
            mode=stage.mode,
            num_heads=stage.features // self.channels_per_head if stage.attends else 0,
            dropout=self.dropout,
            res_balance=self.res_balance,
            attn_balance=self.attn_balance,
            clip_act=self.clip_act,
            attention=self.attention,
            dtype=self.dtype,
            name=stage.name,
        )


def edm2_imagenet(size: str, **overrides: Any) -> EDM2UNet:
    """Make a network of the paper, for ImageNet-64 pixels or the latents of 512x512 images.

    Both have 1000 classes and 64x64 positions, so one network serves 3 and 4 channels.

    Args:
        size: "XS", "S", "M", "L", "XL" or "XXL": 125M, 280M, 498M, 778M, 1119M, 1523M parameters
            (arXiv 2312.02696, Table 6).
        **overrides: attributes of `EDM2UNet` that replace those of the preset.

    Raises:
        ValueError: for an unknown size.
    """
    if size not in _SIZES:
        raise ValueError(f"size must be one of {list(_SIZES)}, got {size!r}.")
    channels, dropout = _SIZES[size]
    preset = {
        "resolution": 64,
        "num_classes": 1000,
        "model_channels": channels,
        "dropout": dropout,
    }
    return EDM2UNet(**(preset | overrides))
