"""Convolutions with stride 1 whose gradients are fast on a CPU too, within loops and without.

XLA's CPU compiler hands a convolution to its fast kernel only if its axes are ordered as in
`x [batch, height, width, in]`, `kernel [height, width, in, out]`. It reorders others, but not in
the body of a loop, where the transposed convolutions that JAX makes of the gradient then run some
twenty times slower. Here both gradients are written in the order that is fast: the one of `x` is a
convolution with the flipped kernel, the one of the kernel, on a CPU, a matrix product of image
patches. It is one bilinear primitive, so both modes of differentiation, `vmap` and higher
derivatives work; `conv_general_dilated` is what `nn.Conv` takes under that name.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
_AXES = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    lhs: Float[Array, "batch height width in"],
    rhs: Float[Array, "kernel_height kernel_width in out"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "batch height_out width_out out"]:
    """`jax.lax.conv_general_dilated`, for `nn.Conv(..., conv_general_dilated=...)`.

    Two-dimensional convolutions of stride 1 in flax's order of axes go the fast way; everything
    else, and whatever is wrong, goes to `jax.lax` unchanged.
    """
    precision = options.pop("precision", None)
    order = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    plain = (
        lhs.ndim == 4
        and order == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, _AXES)
        and lhs.dtype == rhs.dtype
        and lhs.shape[-1] == rhs.shape[2]
        and all(size == 1 for size in window_strides)
        and all(_is_plain(name, value) for name, value in options.items())
        and (isinstance(padding, str) or _fits(padding, rhs.shape[:2]))
    )
    if not plain:
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, precision=precision, **options
        )
    return conv2d(lhs, rhs, padding, precision=precision)


def conv2d(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "kernel_height kernel_width in out"],
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch height_out width_out out"]:
    """Cross-correlates images with a kernel, stride 1.

    Args:
        x: images.
        kernel: the kernel, of the same dtype.
        padding: "SAME", "VALID", or the zeros (before, after) of height and of width, not negative
            and smaller than the kernel.
        precision: see `jax.lax.conv_general_dilated`.

    Raises:
        ValueError: shapes, dtypes or padding do not fit.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            "x must be [batch, height, width, in] and kernel [height, width, in, out], got "
            f"{x.shape} and {kernel.shape}"
        )
    if x.dtype != kernel.dtype:
        raise ValueError(f"x and kernel must have one dtype, got {x.dtype} and {kernel.dtype}")
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, (1, 1), padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    if not _fits(padding, size):
        raise ValueError(
            f"padding must be two pairs of at least 0 and less than the kernel's size {size}, got "
            f"{padding}"
        )
    return _conv_p.bind(x, kernel, padding=padding, precision=precision)


def _fits(padding: Sequence[tuple[int, int]], size: tuple[int, int]) -> bool:
    return len(padding) == 2 and all(
        0 <= p < k for pair, k in zip(padding, size, strict=True) for p in pair
    )


def _is_plain(name: str, value: Any) -> bool:
    if name == "dimension_numbers":
        return True
    if name == "feature_group_count":
        return value == 1
    if name in ("lhs_dilation", "rhs_dilation"):
        return value is None or all(size == 1 for size in value)
    return value is None


def _native(x: Array, kernel: Array, *, padding: Padding, precision: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=_AXES, precision=precision
    )


def _transpose_images(
    cotangent: Array, x: Any, kernel: Array, *, padding: Padding, precision: Any
) -> Array:
    del x
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    pads = tuple(
        (k - 1 - low, k - 1 - high)
        for k, (low, high) in zip(kernel.shape[:2], padding, strict=True)
    )
    return _conv_p.bind(cotangent, flipped, padding=pads, precision=precision)


def _transpose_kernel(
    cotangent: Array, x: Array, kernel: Any, *, padding: Padding, precision: Any
) -> Array:
    shape = kernel.aval.shape

    def as_product(cotangent: Array, x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        height, width = cotangent.shape[1:3]
        patches = jnp.concatenate(
            [
                padded[:, i : i + height, j : j + width]
                for i in range(shape[0])
                for j in range(shape[1])
            ],
            axis=-1,
        )
        product = jnp.einsum("bhwi,bhwo->io", patches, cotangent, precision=precision)
        return product.reshape(shape)

    def as_convolution(cotangent: Array, x: Array) -> Array:
        convolve = functools.partial(_native, x, padding=padding, precision=precision)
        return jax.linear_transpose(convolve, jax.ShapeDtypeStruct(shape, x.dtype))(cotangent)[0]

    return jax.lax.platform_dependent(cotangent, x, cpu=as_product, default=as_convolution)


def _batch(
    arguments: Sequence[Array], axes: Sequence[int | None], *, padding: Padding, precision: Any
) -> tuple[Array, int]:
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    convolve = functools.partial(_conv_p.bind, padding=padding, precision=precision)
    if kernel_axis is None:  # one kernel for all: more images
        x = jnp.moveaxis(x, x_axis, 0)
        out = convolve(x.reshape(-1, *x.shape[2:]), kernel)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    kernel = jnp.moveaxis(kernel, kernel_axis, 0)
    if x_axis is None:  # many kernels for the same images: more features
        joined = jnp.moveaxis(kernel, 0, 3)
        out = convolve(x, joined.reshape(*joined.shape[:3], -1))
        return out.reshape(*out.shape[:3], kernel.shape[0], -1), 3

    # One kernel for each: on a CPU in turn, where grouped convolutions have no fast kernel.
    def in_turn(x: Array, kernel: Array) -> Array:
        return jax.lax.map(lambda pair: convolve(*pair), (x, kernel))

    grouped = jax.vmap(functools.partial(_native, padding=padding, precision=precision))
    x = jnp.moveaxis(x, x_axis, 0)
    return jax.lax.platform_dependent(x, kernel, cpu=in_turn, default=grouped), 0


_conv_p = Primitive("conv2d_stride_1")
_conv_p.def_impl(jax.jit(_native, static_argnames=("padding", "precision")))
_conv_p.def_abstract_eval(
    lambda x, kernel, **options: x.update(
        shape=jax.eval_shape(functools.partial(_native, **options), x, kernel).shape,
        weak_type=False,
    )
)
mlir.register_lowering(_conv_p, mlir.lower_fun(_native, multiple_results=False))
ad.defbilinear(_conv_p, _transpose_images, _transpose_kernel)
batching.primitive_batchers[_conv_p] = _batch
