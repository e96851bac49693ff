"""Threefry-2x32 (Salmon et al. 2011) in plain jnp, for kernels: random words by counter.

A word pair is a function of a key and a counter alone, so it does not depend on who computes it,
in which tiles, or on which device.
"""

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two random words for each counter.

    Args:
        key: two words, uint32, of shapes that broadcast against the counter's.
        counter: two words, uint32.

    Returns:
        Two words, uint32; the same as `jax.random`'s generator makes of this key and counter.
    """
    words = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + words[0], counter[1] + words[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation)))
        x = x + words[(turn + 1) % 3]
        y = y + words[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return x, y


def log_exponential(words: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The logarithm of a standard exponential variable, from 64 random bits.

    The uniform (word + 1/2) 2^-64 is never formed near 1, where float32 would round it: there its
    complement is. So the result is right to rounding at both ends, from log(2^-65) = -45.05 to
    log(45.05) = 3.81, and -log E is a Gumbel variable whose upper tail ends at 45.05.

    Args:
        words: two words, uint32: high and low.

    Returns:
        float32.
    """
    high, low = words
    is_lower = high < jnp.uint32(1 << 31)
    high, low = (jnp.where(is_lower, word, ~word) for word in (high, low))
    # In two pieces each: int32 to float32 is exact for neither half of a word.
    uniform = _float(high) * np.float32(2.0**-32) + (_float(low) + 0.5) * np.float32(2.0**-64)
    return jnp.log(jnp.where(is_lower, -jnp.log1p(-uniform), -jnp.log(uniform)))


def _float(word: jax.Array) -> jax.Array:
    """A word as float32; through int32, which every backend converts."""
    top = (word >> jnp.uint32(16)).astype(jnp.int32).astype(jnp.float32)
    bottom = (word & jnp.uint32(0xFFFF)).astype(jnp.int32).astype(jnp.float32)
    return top * np.float32(65536.0) + bottom
