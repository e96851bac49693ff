"""Resizing of feature maps as two small matrices, one for each axis.

The bicubic and the area interpolation of PyTorch are linear and separable, so a resize is
`rows @ x @ columns^T` with matrices that depend on the sizes alone. They are built in float64 by
NumPy and reproduce PyTorch's `interpolate(mode="bicubic", align_corners=False)`, which is Keys'
cubic convolution (1981) with a = -0.75 and no antialiasing, and `mode="area"`; `jax.image.resize`
has a = -0.5 and other borders.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_A = -0.75


@functools.cache
def bicubic_matrix(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Weights of bicubic interpolation from `size` to `new_size` samples of an axis.

    Sample i of the output lies at s = (i + 1/2) size / new_size - 1/2; it mixes the four samples
    around s, those beyond the border being the border's.

    Returns:
        float64 [new_size, size]; rows sum to 1.

    Raises:
        ValueError: if a size is not positive.
    """
    _check_sizes(size, new_size)
    position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    left = np.floor(position).astype(int)
    matrix = np.zeros((new_size, size))
    for tap in range(-1, 3):
        weight = _cubic(np.abs(position - left - tap))
        np.add.at(matrix, (np.arange(new_size), np.clip(left + tap, 0, size - 1)), weight)
    matrix.setflags(write=False)
    return matrix


@functools.cache
def area_matrix(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Weights of the means over bins [floor(i size / new_size), ceil((i + 1) size / new_size)).

    Bins overlap where the sizes do not divide.

    Returns:
        float64 [new_size, size]; rows sum to 1.

    Raises:
        ValueError: if a size is not positive.
    """
    _check_sizes(size, new_size)
    bins = np.arange(new_size)
    start, end = bins * size // new_size, -(-(bins + 1) * size // new_size)
    samples = np.arange(size)
    inside = (start[:, None] <= samples) & (samples < end[:, None])
    matrix = inside / inside.sum(axis=1, keepdims=True)
    matrix.setflags(write=False)
    return matrix


def resize_bicubic(
    x: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Resize to (height, width) by `bicubic_matrix`, in the precision of `x`."""
    return _resize(x, bicubic_matrix(x.shape[1], size[0]), bicubic_matrix(x.shape[2], size[1]))


def resize_area(
    x: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Resize to (height, width) by `area_matrix`, in the precision of `x`."""
    return _resize(x, area_matrix(x.shape[1], size[0]), area_matrix(x.shape[2], size[1]))


def _resize(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    # Without HIGHEST an accelerator would round the factors to bfloat16.
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision=jax.lax.Precision.HIGHEST)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel: a cubic on [0, 1] and another on [1, 2]."""
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = _A * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _check_sizes(size: int, new_size: int) -> None:
    if size < 1 or new_size < 1:
        raise ValueError(f"size and new_size must be positive, got {size} and {new_size}.")
