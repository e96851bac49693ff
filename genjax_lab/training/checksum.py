"""Checksums of arrays that may be spread over many devices.

The array store below a checkpoint notices missing and shortened files, but a flipped bit in a
data file may come back as a different number. A checksum of the values themselves is stored beside
them and compared on reading. It is computed where the values live, needs no copy, and is the same
for every sharding because integer sums do not depend on their order. Small arrays on a CPU are left
to numpy: compiling a program for every shape would take longer than the sums.
"""

import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped, UInt32

# Up to that many elements numpy takes milliseconds.
_SMALL = 2**20


def tree_checksums(tree: PyTree[Shaped[Array, "..."]]) -> dict[str, int]:
    """A 32-bit checksum of every leaf, by its path in the tree (names joined by "/").

    Equal for equal bit patterns of equal shape and type, whether the leaf is a numpy array or a
    jax array of any sharding. All processes that hold a part of the arrays must call it.
    """
    # One at a time: hundreds of collective programs in flight can lock up XLA's CPU threads.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def tree_digest(tree: PyTree[Shaped[Array, "..."]]) -> str:
    """A name for the values of a tree of arrays: SHA-256 over its paths and checksums, in hex.

    Equal for equal values whatever their sharding; it finds mistakes, not forgeries.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = [[str(np.shape(leaf)), str(leaf.dtype)] for _, leaf in leaves]
    return hashlib.sha256(json.dumps([tree_checksums(tree), shapes]).encode()).hexdigest()


def _checksum(x: Shaped[Array, "..."]) -> int:
    if x.size <= _SMALL and _is_whole_on_host(x):
        return _sum_on_host(np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype)))
    return int(np.asarray(_compiled_sum(x)))


def _is_whole_on_host(x: Shaped[Array, "..."]) -> bool:
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_replicated and all(d.platform == "cpu" for d in x.sharding.device_set)


def _sum_on_host(x: Shaped[np.ndarray, "..."]) -> int:
    """The same as `_compiled_sum`."""
    size, flat = x.dtype.itemsize, np.ascontiguousarray(x).reshape(-1)
    if size < 4:
        words = flat.view(f"uint{8 * size}").astype(np.uint32)[:, None]
    else:
        words = flat.view(np.uint32).reshape(x.size, size // 4)
    position = np.add.outer(np.arange(x.size), np.arange(words.shape[1]) * 0x9E3779B9)
    return (
        x.size + int(np.sum(_mixed(words, position.astype(np.uint32)), dtype=np.uint32))
    ) % 2**32


@jax.jit
def _compiled_sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    total = jnp.uint32(math.prod(x.shape) % 2**32)
    for word, bits in enumerate(_words(x)):
        # The position enters too, so that permuted values do not pass for the same. Built from one
        # index per axis: flattening a split axis would gather the array on every device.
        position = jnp.full(x.shape, word * 0x9E3779B9 % 2**32, jnp.uint32)
        stride = 1
        for axis in reversed(range(x.ndim)):
            position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(
                stride % 2**32
            )
            stride *= x.shape[axis]
        total += jnp.sum(_mixed(bits, position), dtype=jnp.uint32)
    return total


def _mixed(bits: UInt32[Array, "..."], position: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    mixed = (bits ^ (position * np.uint32(0x9E3779B9))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 13)


def _words(x: Array) -> list[Array]:
    """The bit pattern of `x` as arrays of 32-bit words of the same shape."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    if jnp.iscomplexobj(x):
        return [*_words(x.real), *_words(x.imag)]
    size = x.dtype.itemsize
    if size < 4:
        return [jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)]
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return [words] if size == 4 else [words[..., 0], words[..., 1]]
