"""The non-leaky augmentation of EDM (arXiv 2206.00364, Appendix F.2, after arXiv 2006.06676).

Each training image is flipped, scaled, rotated, stretched and shifted, each with some probability,
and the network is told exactly what was done by nine numbers that are all zero for an untouched
image. Sampling with zeros therefore draws from the law of the images themselves: augmentation does
not leak into samples, as it would if the network could not tell.

All geometry but the flips is one affine warp: the image, extended by reflection without end, is
upsampled twofold with the sym6 wavelet, sampled bilinearly where the warp asks, and downsampled
with the same wavelet, which returns an unmoved image as it was. Colours are left alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from genjax_lab.objectives.denoising import Objective

Augmentation = Callable[
    [PRNGKeyArray, Float[Array, "batch height width channels"]],
    tuple[Float[Array, "batch height width channels"], Float[Array, "batch 9"]],
]

NUM_AUGMENT_LABELS = 9
SCALE_STD = 0.2  # of log2 of the scale
ANISOTROPY_STD = 0.2  # of log2 of the stretch
TRANSLATION_STD = 0.125  # in sides of the image

# Decomposition low-pass filter of the least asymmetric Daubechies wavelet with six vanishing
# moments; orthonormal: sum_k h[k] h[k + 2n] is 1 for n = 0 and 0 otherwise.
_SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)
_CENTER = 5  # tap of the filter that lies on the pixel
_EXACT = jax.lax.Precision.HIGHEST  # lower precisions would quantise images and coordinates


class Transforms(NamedTuple):
    """What is done to each image of a batch, in this order; directions as the image is seen.

    Attributes:
      x_flip: mirrored left to right.
      y_flip: mirrored top to bottom.
      scale: z, the image is enlarged by 2^(0.2 z) about its centre.
      rotation: angle in radians by which it is turned counter-clockwise about its centre.
      anisotropy: z, it is stretched by 2^(0.2 z) along an axis and shrunk by as much across it.
      anisotropy_axis: angle in radians of that axis, counter-clockwise from the horizontal.
      translation: (z_x, z_y), it is moved by 0.125 z_x widths to the right and by 0.125 z_y heights
        downwards.
    """

    x_flip: Bool[Array, "batch"]
    y_flip: Bool[Array, "batch"]
    scale: Float[Array, "batch"]
    rotation: Float[Array, "batch"]
    anisotropy: Float[Array, "batch"]
    anisotropy_axis: Float[Array, "batch"]
    translation: Float[Array, "batch 2"]

    @property
    def labels(self) -> Float[Array, "batch 9"]:
        """What the network is told, zeros for an untouched image; the order of public EDM weights.

        x-flip, y-flip, scale, cos(rotation) - 1, sin(rotation), anisotropy cos(axis),
        anisotropy sin(axis), z_x, z_y.
        """
        columns = (
            self.x_flip,
            self.y_flip,
            self.scale,
            jnp.cos(self.rotation) - 1,
            jnp.sin(self.rotation),
            self.anisotropy * jnp.cos(self.anisotropy_axis),
            self.anisotropy * jnp.sin(self.anisotropy_axis),
            self.translation[:, 0],
            self.translation[:, 1],
        )
        return jnp.stack([column.astype(jnp.float32) for column in columns], axis=-1)


def edm_augmentation(probability: float) -> Augmentation:
    """EDM's augmentation for small image sets; the paper takes 0.12 for CIFAR-10.

    The x-flip is always at random (half of the images); each of scaling, rotation, anisotropic
    scaling and translation is applied with the given probability, the y-flip with half of it. An
    anisotropic scaling has an axis drawn uniformly in one half of the cases, and the horizontal one
    in the other.

    Args:
      probability: in [0, 1]; at 0 images are mirrored left to right at random and otherwise the
        same to the bit.

    Returns:
      augment(key, images [batch, height, width, channels]) -> (images, labels [batch, 9]), a pure
      function. What happens to row i depends on the key and on i, not on the batch's size or mesh.
      Working memory is about 20 times the images'. It raises ValueError for images that are not
      float [batch, height, width, channels] with sides of at least 2.

    Raises:
      ValueError: if `probability` is not in [0, 1].
    """
    if isinstance(probability, bool) or not 0 <= probability <= 1:
        raise ValueError(f"probability must be a number in [0, 1], got {probability!r}")

    def augment(key, images):
        _check_images(images)
        transforms = draw_transforms(key, images.shape[0], probability)
        images = flip(images, transforms)
        if probability > 0:
            images = warp(images, transforms)
        return images, transforms.labels

    return augment


def augmented(objective: Objective, augment: Augmentation) -> Objective:
    """The objective on augmented images.

    Args:
      objective: reads batch["image"] and gives batch["augment_label"] to its network, as
        `genjax_lab.objectives.denoising` does.
      augment: (key, images) -> (images, labels), such as `edm_augmentation(0.12)`.

    Returns:
      An objective of batches whose "image" is [batch, height, width, channels] and which have no
      "augment_label" yet; it raises ValueError otherwise.
    """

    def augmented_objective(variables, batch, key):
        if "image" not in batch or "augment_label" in batch:
            raise ValueError(
                'batch must have an "image" and no "augment_label", which is made of it; got '
                f"{sorted(batch)}"
            )
        # Both are folded: the given key itself would repeat its first children in the objective.
        augment_key, objective_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        images, labels = augment(augment_key, batch["image"])
        batch = {**batch, "image": images, "augment_label": labels}
        return objective(variables, batch, objective_key)

    return augmented_objective


def draw_transforms(key: PRNGKeyArray, batch: int, probability: float) -> Transforms:
    """Draws the transforms of `edm_augmentation(probability)`, from one key per row."""

    # One draw for all, since every call of the generator costs a second of compilation on a CPU.
    # The open interval keeps the normal numbers finite.
    def draw(index):
        uniform = jax.random.uniform(
            jax.random.fold_in(key, index), (14,), minval=np.nextafter(np.float32(-1), 0), maxval=1
        )
        x_flip, y_flip, oblique = uniform[:3] < 0
        chosen = uniform[3:8] < 2 * probability - 1
        rotation, axis = jnp.pi * uniform[8:10]
        normal = math.sqrt(2) * jax.lax.erf_inv(uniform[10:])
        return Transforms(
            x_flip=x_flip,
            y_flip=y_flip & chosen[0],
            scale=jnp.where(chosen[1], normal[0], 0),
            rotation=jnp.where(chosen[2], rotation, 0),
            anisotropy=jnp.where(chosen[3], normal[1], 0),
            anisotropy_axis=jnp.where(oblique, axis, 0),
            translation=jnp.where(chosen[4], normal[2:], 0),
        )

    return jax.vmap(draw)(jnp.arange(batch))


def flip(
    images: Float[Array, "batch height width channels"], transforms: Transforms
) -> Float[Array, "batch height width channels"]:
    """Mirrors the images that `x_flip` and `y_flip` name, exactly."""
    images = jnp.where(transforms.x_flip[:, None, None, None], images[:, :, ::-1], images)
    return jnp.where(transforms.y_flip[:, None, None, None], images[:, ::-1], images)


def warp(
    images: Float[Array, "batch height width channels"], transforms: Transforms
) -> Float[Array, "batch height width channels"]:
    """Scales, rotates, stretches and shifts images (the flips are left out); sides at least 2.

    An image's reflections repeat with a period of twice its side less two pixels, so one period of
    the upsampled plane holds all of it.
    """
    height, width = images.shape[1:3]
    plane = _along_sides(_upsampling(height), _upsampling(width), images.astype(jnp.float32))
    rows, columns = _half_pixels(height), _half_pixels(width)
    # Centred coordinates of the output, in pixels; the source lies at inverse @ (output - shift).
    y = (rows - (height - 1) / 2)[:, None]
    x = (columns - (width - 1) / 2)[None, :]

    def sample(plane, inverse, shift):
        from_x, from_y = x - shift[0], y - shift[1]
        source_x = inverse[0, 0] * from_x + inverse[0, 1] * from_y + (width - 1) / 2
        source_y = inverse[1, 0] * from_x + inverse[1, 1] * from_y + (height - 1) / 2
        return _bilinear(plane, 2 * source_y, 2 * source_x)

    shifts = TRANSLATION_STD * transforms.translation * jnp.array([width, height], jnp.float32)
    sampled = jax.vmap(sample)(plane, _inverse_linear(transforms), shifts)
    warped = _along_sides(_downsampling(height), _downsampling(width), sampled)
    return warped.astype(images.dtype)


def _inverse_linear(transforms: Transforms) -> Float[Array, "batch 2 2"]:
    """Linear part of the map from output to source, on (rightward, downward) coordinates."""
    shrink = jnp.exp2(-SCALE_STD * transforms.scale)
    stretch = jnp.exp2(ANISOTROPY_STD * transforms.anisotropy)
    squeeze = jnp.stack([1 / stretch, stretch], axis=-1)[:, :, None]
    to_axis = _clockwise(transforms.anisotropy_axis)
    unstretch = jnp.matmul(jnp.swapaxes(to_axis, 1, 2), squeeze * to_axis, precision=_EXACT)
    unturn = _clockwise(transforms.rotation)
    return shrink[:, None, None] * jnp.matmul(unturn, unstretch, precision=_EXACT)


def _clockwise(angle: Float[Array, "batch"]) -> Float[Array, "batch 2 2"]:
    """Rotation matrices, clockwise as seen since the second axis points down."""
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    rows = (jnp.stack([cosine, -sine], axis=-1), jnp.stack([sine, cosine], axis=-1))
    return jnp.stack(rows, axis=-2)


def _bilinear(
    plane: Float[Array, "rows columns channels"],
    y: Float[Array, "height width"],
    x: Float[Array, "height width"],
) -> Float[Array, "height width channels"]:
    """Values of a plane that repeats without end, between its samples."""
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    row0, column0 = (
        corner.astype(jnp.int32) % period
        for corner, period in zip((top, left), plane.shape[:2], strict=True)
    )
    row1, column1 = (row0 + 1) % plane.shape[0], (column0 + 1) % plane.shape[1]
    upper = plane[row0, column0] * (1 - right) + plane[row0, column1] * right
    lower = plane[row1, column0] * (1 - right) + plane[row1, column1] * right
    return upper * (1 - down) + lower * down


def _half_pixels(side: int) -> np.ndarray:
    """Places of the samples, two for each pixel, that `_downsampling` reads."""
    first, last = -_CENTER, 2 * (side - 1) + len(_SYM6) - 1 - _CENTER
    return np.arange(first, last + 1, dtype=np.float32) / 2


def _upsampling(side: int) -> np.ndarray:
    """Matrix from a side to one period of the twofold upsampling of its endless reflection.

    Sample j lies at pixel j / 2 and is sum_i x[i] h[j + 5 - 2i] over the reflected pixels i.
    """
    period = 2 * (side - 1)
    matrix = np.zeros((2 * period, side))
    for sample in range(2 * period):
        for tap, weight in enumerate(_SYM6):
            if (sample + _CENTER - tap) % 2 == 0:
                pixel = (sample + _CENTER - tap) // 2 % period
                matrix[sample, min(pixel, period - pixel)] += weight
    return matrix.astype(np.float32)


def _downsampling(side: int) -> np.ndarray:
    """Matrix from samples at `_half_pixels` to a side, sum_k h[k] v[2m + k - 5] for pixel m."""
    matrix = np.zeros((side, len(_half_pixels(side))), np.float32)
    for pixel in range(side):
        matrix[pixel, 2 * pixel : 2 * pixel + len(_SYM6)] = _SYM6
    return matrix


def _along_sides(vertical: np.ndarray, horizontal: np.ndarray, images: Array) -> Array:
    """Applies one matrix to the height and one to the width."""
    images = jnp.einsum("ph,bhwc->bpwc", vertical, images, precision=_EXACT)
    return jnp.einsum("qw,bpwc->bpqc", horizontal, images, precision=_EXACT)


def _check_images(images: Array) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim != 4:
        raise ValueError(
            "images must be float [batch, height, width, channels], got "
            f"{images.dtype} {list(images.shape)}"
        )
    if min(images.shape[1:3]) < 2:
        raise ValueError(
            f"images must have sides of at least 2 pixels to be reflected, got {images.shape[1:3]}"
        )
