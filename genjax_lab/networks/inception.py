"""Inception-v3 as the Frechet Inception distance uses it: the graph of 2015-12-05, inference only.

The network of Szegedy et al. (arXiv 1512.00567) with the details in which the published FID graph
departs from common re-implementations: average pools do not count their padding, and the last block
pools by maximum. Batch normalisation is folded into each convolution's kernel and bias, so the
module is 94 convolutions with bias and ReLU. Sub-modules carry the names of the usual PyTorch
export (see `genjax_lab.pretrained.inception`). Auxiliary heads are left out.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FEATURE_DIM = 2048
NUM_CLASSES = 1008
INPUT_SIZE = 299

_average_pool = partial(
    nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)
_max_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
_halving_max_pool = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class Conv(NamedTuple):
    """One convolution of a branch: name, output channels, kernel, and a stride of 1 or 2.

    Stride 1 keeps the size (zero padding), stride 2 pads nothing.
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class ConvUnit(nn.Module):
    """Convolution with bias, then ReLU; the bias holds a folded batch normalisation."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the activated convolution of `x`."""
        kernel = self.param(
            "kernel",
            nn.initializers.he_normal(),
            (*self.kernel, x.shape[-1], self.features),
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return nn.relu(y + bias)


def _chain(x: Array, *convs: Conv) -> Array:
    """Apply convolutions one after another, as sub-modules of the calling module."""
    for conv in convs:
        padding = "SAME" if conv.stride == 1 else "VALID"
        x = ConvUnit(conv.features, conv.kernel, conv.stride, padding, name=conv.name)(x)
    return x


def _concatenate(branches: Sequence[Array]) -> Array:
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
    """Block at 35 x 35: 1x1, 5x5, double 3x3 and pooled branches."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the concatenated branches, 224 + pool_features channels."""
        return _concatenate(
            [
                _chain(x, Conv("branch1x1", 64)),
                _chain(x, Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
                _chain(
                    x,
                    Conv("branch3x3dbl_1", 64),
                    Conv("branch3x3dbl_2", 96, (3, 3)),
                    Conv("branch3x3dbl_3", 96, (3, 3)),
                ),
                _chain(_average_pool(x), Conv("branch_pool", self.pool_features)),
            ]
        )


class InceptionB(nn.Module):
    """Halving block from 35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the concatenated branches, 480 channels more than came in."""
        return _concatenate(
            [
                _chain(x, Conv("branch3x3", 384, (3, 3), 2)),
                _chain(
                    x,
                    Conv("branch3x3dbl_1", 64),
                    Conv("branch3x3dbl_2", 96, (3, 3)),
                    Conv("branch3x3dbl_3", 96, (3, 3), 2),
                ),
                _halving_max_pool(x),
            ]
        )


class InceptionC(nn.Module):
    """Block at 17 x 17 with 7x7 convolutions factorised into 1x7 and 7x1."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the concatenated branches, 768 channels."""
        return _concatenate(
            [
                _chain(x, Conv("branch1x1", 192)),
                _chain(
                    x,
                    Conv("branch7x7_1", self.width),
                    Conv("branch7x7_2", self.width, (1, 7)),
                    Conv("branch7x7_3", 192, (7, 1)),
                ),
                _chain(
                    x,
                    Conv("branch7x7dbl_1", self.width),
                    Conv("branch7x7dbl_2", self.width, (7, 1)),
                    Conv("branch7x7dbl_3", self.width, (1, 7)),
                    Conv("branch7x7dbl_4", self.width, (7, 1)),
                    Conv("branch7x7dbl_5", 192, (1, 7)),
                ),
                _chain(_average_pool(x), Conv("branch_pool", 192)),
            ]
        )


class InceptionD(nn.Module):
    """Halving block from 17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the concatenated branches, 512 channels more than came in."""
        return _concatenate(
            [
                _chain(x, Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
                _chain(
                    x,
                    Conv("branch7x7x3_1", 192),
                    Conv("branch7x7x3_2", 192, (1, 7)),
                    Conv("branch7x7x3_3", 192, (7, 1)),
                    Conv("branch7x7x3_4", 192, (3, 3), 2),
                ),
                _halving_max_pool(x),
            ]
        )


class InceptionE(nn.Module):
    """Block at 8 x 8 whose 3x3 convolutions fan out into 1x3 beside 3x1."""

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "..."]:
        """Return the concatenated branches, 2048 channels."""
        single = _chain(x, Conv("branch3x3_1", 384))
        double = _chain(x, Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)))
        return _concatenate(
            [
                _chain(x, Conv("branch1x1", 320)),
                _chain(single, Conv("branch3x3_2a", 384, (1, 3))),
                _chain(single, Conv("branch3x3_2b", 384, (3, 1))),
                _chain(double, Conv("branch3x3dbl_3a", 384, (1, 3))),
                _chain(double, Conv("branch3x3dbl_3b", 384, (3, 1))),
                _chain(self.pool(x), Conv("branch_pool", 192)),
            ]
        )


class InceptionOutput(NamedTuple):
    """Pooled features [batch, 2048] and class logits [batch, 1008]."""

    features: Float[Array, "batch 2048"]
    logits: Float[Array, "batch 1008"]


class InceptionV3(nn.Module):
    """The FID Inception network on images already resized and scaled by `preprocess`."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> InceptionOutput:
        """Return pooled features and logits; height and width are 299, at least 75."""
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 75:
            raise ValueError(
                f"x has shape {x.shape}; expected [batch, height, width, 3] with height and width "
                "of at least 75, as `preprocess` makes it"
            )
        x = ConvUnit(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(x)
        x = ConvUnit(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvUnit(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halving_max_pool(x)
        x = ConvUnit(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvUnit(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _halving_max_pool(x)
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        x = InceptionC(192, name="Mixed_6e")(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(_average_pool, name="Mixed_7b")(x)
        x = InceptionE(_max_pool, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        head = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")
        return InceptionOutput(features, head(features))


def preprocess(
    images: Float[Array, "batch height width channels"], *, size: int = INPUT_SIZE
) -> Float[Array, "batch {size} {size} 3"]:
    """Return images in [-1, 1] resized and scaled as the FID graph does.

    Pixels u = 127.5 (x + 1) in [0, 255] are resized bilinearly with TensorFlow 1's sampling, where
    output pixel i reads position i * (old size / new size) without half-pixel offsets or
    anti-aliasing, and then become (u - 128) / 128. Grey images are repeated to three channels.
    Re-implementations that resize with half-pixel centres give slightly different distances.

    Args:
        images: [batch, height, width, 1 or 3] in [-1, 1], quantised to 256 levels beforehand.
        size: height and width of the result.

    Raises:
        ValueError: if `images` is not of that shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images has shape {images.shape}; expected [batch, height, width, 1 or 3]"
        )
    pixels = 127.5 * (images + 1)
    if pixels.shape[-1] == 1:
        pixels = jnp.repeat(pixels, 3, axis=-1)
    rows = _interpolation(images.shape[1], size)
    columns = _interpolation(images.shape[2], size)
    resized = jnp.einsum(
        "ij,kl,bjlc->bikc", rows, columns, pixels, precision=jax.lax.Precision.HIGHEST
    )
    return (resized - 128) / 128


def _interpolation(old_size: int, new_size: int) -> Float[np.ndarray, "{new_size} {old_size}"]:
    """Return the matrix of linear interpolation at positions i * old_size / new_size."""
    # The positions are float32 as in TensorFlow, so that they fall on the same side of a pixel.
    positions = np.arange(new_size, dtype=np.float32) * np.float32(old_size / new_size)
    below = positions.astype(np.int32)
    above = np.minimum(below + 1, old_size - 1)
    fraction = positions - below.astype(np.float32)
    matrix = np.zeros((new_size, old_size), dtype=np.float32)
    output = np.arange(new_size)
    np.add.at(matrix, (output, below), 1 - fraction)
    np.add.at(matrix, (output, above), fraction)
    return matrix
