"""Factor-two resampling of images with a separable filter, as the EDM networks do it.

The depthwise convolution of EDM's `Conv2d` (arXiv 2206.00364): zero-padded by `(K - 1) // 2`,
stride two, filter `f f^T / (sum f)^2`; upsampling is its transpose times four. The filter is
applied along one axis at a time as a sum of strided slices, since depthwise convolutions are slow
on a CPU.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def check_filter(resample_filter: Sequence[float]) -> None:
    """Raise a ValueError unless the filter has an even number of taps with a nonzero sum."""
    taps = len(resample_filter)
    if taps < 2 or taps % 2 or sum(resample_filter) == 0:
        raise ValueError(
            "resample_filter must have an even number of taps with a nonzero sum, such as "
            f"(1, 1) or (1, 3, 3, 1); got {tuple(resample_filter)}."
        )


def downsample(
    x: Float[Array, "batch height width channels"],
    resample_filter: Sequence[float],
    *,
    padding: int | None = None,
) -> Float[Array, "batch half_height half_width channels"]:
    """Halve height and width.

    Args:
        x: images; height and width even.
        resample_filter: even number of taps `K`, in any scale.
        padding: zeros on each side, `(K - 1) // 2` by default; 0 for an image that already carries
            its margin, whose sides then shrink to `(side - K) // 2 + 1`.

    Returns:
        Filtered and decimated images in the dtype of `x`.

    Raises:
        ValueError: for a bad filter, or odd sides.
    """
    check_filter(resample_filter)
    taps = [tap / sum(resample_filter) for tap in resample_filter]
    if padding is None:
        padding = (len(taps) - 1) // 2
    for axis in (1, 2):
        if x.shape[axis] % 2:
            raise ValueError(f"height and width must be even to be halved, got {x.shape}.")
        x = _decimate(x, taps, axis, padding)
    return x


def upsample(
    x: Float[Array, "batch height width channels"], resample_filter: Sequence[float]
) -> Float[Array, "batch double_height double_width channels"]:
    """Double height and width; the transpose of `downsample`, with unit gain.

    Args:
        x: images.
        resample_filter: even number of taps, in any scale.

    Returns:
        Interpolated images in the dtype of `x`.

    Raises:
        ValueError: for a bad filter.
    """
    check_filter(resample_filter)
    taps = [2 * tap / sum(resample_filter) for tap in resample_filter]
    for axis in (1, 2):
        x = _interpolate(x, taps, axis)
    return x


def _decimate(x: Array, taps: Sequence[float], axis: int, padding: int) -> Array:
    """Compute `y[i] = sum_k taps[k] x[2 i + k - padding]` along an axis."""
    x = _pad(x, axis, padding)
    last = x.shape[axis] - len(taps)
    return sum(
        tap * jax.lax.slice_in_dim(x, offset, offset + last + 1, stride=2, axis=axis)
        for offset, tap in enumerate(taps)
    )


def _interpolate(x: Array, taps: Sequence[float], axis: int) -> Array:
    """Compute `y[j] = sum_i x[i] taps[j + padding - 2 i]` along an axis, one parity at a time."""
    length, margin, padding = x.shape[axis], len(taps) // 2, (len(taps) - 1) // 2
    padded = _pad(x, axis, margin)
    phases = []
    for parity in (0, 1):
        start = (parity + padding) % 2  # taps of the other parity meet the inserted zeros
        terms = []
        for k in range(start, len(taps), 2):
            offset = margin + (parity + padding - k) // 2
            terms.append(taps[k] * jax.lax.slice_in_dim(padded, offset, offset + length, axis=axis))
        phases.append(sum(terms))
    shape = (*x.shape[:axis], 2 * length, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def _pad(x: Array, axis: int, padding: int) -> Array:
    """Put zeros on both sides of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (padding, padding)
    return jnp.pad(x, widths) if padding else x
