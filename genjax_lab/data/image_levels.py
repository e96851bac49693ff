"""What a data set's pixels are, and the two maps between them and [-1, 1].

Networks see float32 images in [-1, 1]; files hold integers 0..max_value (255 for 8-bit images, 16
for scikit-learn's digits). The maps are EDM's (arXiv:2206.00364, public code), written for any
number of levels; with max_value = 255 they are `x / 127.5 - 1` and `uint8(clip(127.5 x + 128, 0,
255))`. Samples are compared with data only after `quantize`: a Frechet distance between integers
and raw floats measures the rounding, not the model.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8


class NonFiniteImagesError(ValueError):
    """Images hold NaN or infinity: a model that drew them has diverged."""


class DatasetInfo(NamedTuple):
    """What the other parts of the library need to know of an image data set.

    Attributes:
        name: The data set's full TFDS name with its version, `"digits/1.0.0"`; "arrays" for data
            given as arrays.
        image_shape: `(height, width, channels)`; None where images differ in size.
        num_classes: Number of classes; 0 if the data carry no labels.
        max_value: The largest pixel value, pixels being integers 0..max_value; None if the pixels
            are floating point numbers, which have no levels.
        num_examples: Number of examples of every split.
    """

    name: str
    image_shape: tuple[int | None, int | None, int | None]
    num_classes: int
    max_value: int | None
    num_examples: dict[str, int]

    @property
    def num_levels(self) -> int | None:
        """The number of values a pixel can take, `max_value + 1`, or None if it is continuous."""
        return None if self.max_value is None else self.max_value + 1


def require_levels(info: DatasetInfo) -> np.float32:
    """Returns `max_value / 2`, the width of one half of [-1, 1] in levels, as float32.

    Raises:
        ValueError: If the data set's pixels have no levels, or do not fit into uint8.
    """
    if info.max_value is None or not 1 <= info.max_value <= 255:
        raise ValueError(
            f"info.max_value must be between 1 and 255 to convert between levels and floats, got "
            f"{info.max_value} (data set {info.name!r}). Images without levels stay floats."
        )
    return np.float32(info.max_value / 2)


def dequantize(
    levels: UInt8[np.ndarray, "*shape"], info: DatasetInfo
) -> Float32[np.ndarray, "*shape"]:
    """Maps integer pixels 0..max_value to float32 in [-1, 1]: `x = 2 k / max_value - 1`.

    Args:
        levels: uint8 pixels of any shape, at most `info.max_value`.
        info: The data set whose pixels they are.

    Returns:
        float32 of the same shape in [-1, 1].

    Raises:
        ValueError: If `levels` are not uint8, or above `info.max_value`.
    """
    half = require_levels(info)
    levels = np.asarray(levels)
    if levels.dtype != np.uint8:
        raise ValueError(f"levels must be uint8, got {levels.dtype}.")
    if levels.size and levels.max() > info.max_value:
        raise ValueError(
            f"levels must not exceed info.max_value = {info.max_value} of {info.name!r}, got "
            f"{levels.max()}."
        )
    return levels.astype(np.float32) / half - np.float32(1)


def quantize(images: Float[np.ndarray, "*shape"], info: DatasetInfo) -> UInt8[np.ndarray, "*shape"]:
    """Maps float images to the integer pixels that the data set's own files hold.

    `k = trunc(clip(x max_value / 2 + (max_value + 1) / 2, 0, max_value))`: the nearest level,
    values outside [-1, 1] going to the ends. For 8-bit images this is EDM's rule. It undoes
    `dequantize` exactly.

    Args:
        images: Floating point images of any shape, nominally in [-1, 1]; NumPy or JAX arrays.
        info: The data set whose levels are wanted.

    Returns:
        uint8 of the same shape, 0..`info.max_value`.

    Raises:
        ValueError: If `images` are not floating point or not finite (`NonFiniteImagesError`), or
            the data set has no levels.
    """
    half = require_levels(info)
    images = np.asarray(images)
    # Listed by what it is not: bfloat16, which JAX hands over, is not an np.floating.
    if images.dtype.kind in "biuc":
        raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}.")
    images = images.astype(np.float32)
    finite = np.isfinite(images)
    if not finite.all():
        position = tuple(int(axis) for axis in np.argwhere(~finite)[0])
        raise NonFiniteImagesError(
            f"images must be finite, got {images[position]} at index {position}."
        )
    levels = images * half + (half + np.float32(0.5))
    return np.clip(levels, 0, info.max_value).astype(np.uint8)
