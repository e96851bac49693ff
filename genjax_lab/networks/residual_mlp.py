"""A residual multilayer perceptron over all pixels at once: a denoiser for very small images.

Blocks are those of a transformer without attention, modulated by noise level and class through
adaptive layer norm whose gates start at zero (adaLN-zero, arXiv 2212.09748), so that the network
is all matrix products, which CPUs do well. It knows nothing of translation: beyond some hundred
pixels a U-Net or DiT is the better choice.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from genjax_lab.networks.embeddings import FourierEmbedding
from genjax_lab.networks.labels import class_vectors, drop_labels


class ResidualMLP(nn.Module):
    """Residual MLP conditioned on noise level and class.

    The "params" collection holds the weights, "buffers" the noise embedding's fixed frequencies. At
    initialisation the output is zero.

    Attributes:
        num_classes: number of classes; 0 for an unconditional network.
        width: features between blocks.
        num_blocks: residual blocks.
        expansion: hidden features of a block, in units of `width`.
        dropout: probability of dropping a hidden activation.
        label_dropout: probability of dropping the class of an example in training.
        dtype: dtype of the computation; parameters and output are float32.
    """

    num_classes: int = 0
    width: int = 256
    num_blocks: int = 4
    expansion: int = 2
    dropout: float = 0.0
    label_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        c_noise: Float[Array, " batch"],
        labels: Int[Array, " batch"] | Float[Array, "batch num_classes"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch height width channels"]:
        """Map scaled noisy images to the network's output.

        Args:
            x: images, already scaled by c_in.
            c_noise: noise level of each image.
            labels: classes, `num_classes` meaning none; or class vectors.
            train: whether dropout acts; it needs the rng "dropout".

        Raises:
            ValueError: if `x` is no batch of images or the others do not match it.
        """
        if x.ndim != 4 or c_noise.shape != x.shape[:1]:
            raise ValueError(
                f"x must be [batch, height, width, channels] and c_noise [batch], got {x.shape} "
                f"and {c_noise.shape}"
            )
        classes = class_vectors(labels, num_classes=self.num_classes, batch=len(x))
        condition = nn.Dense(self.width, name="noise")(
            FourierEmbedding(32, scale=1.0, name="fourier")(c_noise)
        )
        if classes is not None:
            if train and self.label_dropout:
                classes = drop_labels(self.make_rng("dropout"), classes, self.label_dropout)
            condition = condition + nn.Dense(self.width, use_bias=False, name="label")(classes)
        condition = nn.silu(
            nn.Dense(self.width, dtype=self.dtype, name="embed")(nn.silu(condition))
        )

        h = nn.Dense(self.width, dtype=self.dtype, name="first")(x.reshape(len(x), -1))
        for i in range(self.num_blocks):
            h = _Block(self.expansion, self.dropout, self.dtype, name=f"block{i}")(
                h, condition, train
            )
        h = nn.LayerNorm(dtype=self.dtype)(h)
        last = nn.Dense(x[0].size, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="last")
        return last(h).astype(jnp.float32).reshape(x.shape)


class _Block(nn.Module):
    """h + gate * Dense(silu(Dense(norm(h) * (1 + scale) + shift)))."""

    expansion: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h, condition, train):
        width = h.shape[-1]
        modulation = nn.Dense(
            3 * width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(condition)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        normalised = nn.LayerNorm(use_scale=False, use_bias=False, dtype=self.dtype)(h)
        hidden = nn.Dense(self.expansion * width, dtype=self.dtype, name="up")(
            normalised * (1 + scale) + shift
        )
        hidden = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(hidden))
        return h + gate * nn.Dense(width, dtype=self.dtype, name="down")(hidden)
