"""Masked diffusion (arXiv 2409.02908): tokens are replaced by a mask, each for itself.

    q(x_t | x_0): each token is kept with probability alpha(t) and is else the mask,
    alpha(0) = 1, alpha(1) = 0.

For s < t a masked token is the mask still at time s with probability (1 - alpha(s)) /
(1 - alpha(t)), and a token of the model's law otherwise. How many tokens are masked says all of the
time that a sample knows; schedules differ in the time axis only. The mask's id is the size of the
vocabulary, V, everywhere.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class MaskSchedule(NamedTuple):
    """Which share of the tokens is masked at time t in [0, 1]; functions of arrays.

    Attributes:
        masked: t -> 1 - alpha(t), from 0 to 1.
        rate: t -> -alpha'(t).
        time_of: the inverse of `masked`.
    """

    masked: Callable[[Array], Array]
    rate: Callable[[Array], Array]
    time_of: Callable[[Array], Array]

    def weight(self, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """What the cross-entropy at time t counts in the bound: -alpha'(t) / (1 - alpha(t))."""
        return self.rate(t) / self.masked(t)


@functools.cache  # equal schedules are one, and programs of them compile once
def linear() -> MaskSchedule:
    """alpha = 1 - t (arXiv 2406.04329, 2406.07524)."""
    return MaskSchedule(lambda t: t, jnp.ones_like, lambda share: share)


@functools.cache
def polynomial(power: float) -> MaskSchedule:
    """alpha = 1 - t^power.

    Raises:
        ValueError: if `power` is not positive.
    """
    if not power > 0:
        raise ValueError(f"power is {power}; it must be positive")
    return MaskSchedule(
        lambda t: t**power,
        lambda t: power * t ** (power - 1),
        lambda share: share ** (1 / power),
    )


@functools.cache
def cosine() -> MaskSchedule:
    """alpha = 1 - cos(pi / 2 (1 - t)) (arXiv 2406.04329)."""
    return MaskSchedule(
        lambda t: jnp.sin(jnp.pi / 2 * t),
        lambda t: jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t),
        lambda share: 2 / jnp.pi * jnp.arcsin(share),
    )


@functools.cache
def logarithmic() -> MaskSchedule:
    """alpha = 1 - log2(1 + t)."""
    return MaskSchedule(
        lambda t: jnp.log1p(t) / jnp.log(2.0),
        lambda t: 1 / ((1 + t) * jnp.log(2.0)),
        lambda share: jnp.expm1(share * jnp.log(2.0)),
    )


@functools.cache
def log_linear(eps: float = 1e-3) -> MaskSchedule:
    """alpha = 1 - (1 - eps) t, of a total noise -log(alpha) that ends finite (arXiv 2406.07524).

    A share eps of the tokens is left at t = 1: the bound counts it not at all, as in that work.

    Raises:
        ValueError: if `eps` is not in [0, 1).
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps is {eps}; it must be in [0, 1)")
    return MaskSchedule(
        lambda t: (1 - eps) * t,
        lambda t: jnp.full_like(t, 1 - eps),
        lambda share: share / (1 - eps),
    )


SCHEDULES = {
    "linear": linear,
    "polynomial": polynomial,
    "cosine": cosine,
    "logarithmic": logarithmic,
    "log_linear": log_linear,
}


def mask_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, "batch length"],
    share: Float[Array, "batch"] | float,
    mask_id: int,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Masks each token with probability `share`, for itself.

    Returns:
        (masked tokens, which of them are masked).
    """
    share = jnp.broadcast_to(jnp.asarray(share, jnp.float32), tokens.shape[:1])
    masked = jax.random.uniform(key, tokens.shape) < share[:, None]
    return jnp.where(masked, mask_id, tokens), masked


def mask_count(
    key: Key[Array, ""],
    tokens: Int[Array, "batch length"],
    count: Int[Array, "batch"] | int,
    mask_id: int,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Masks `count` tokens of each sequence, any set of them as probable as any other.

    Returns:
        (masked tokens, which of them are masked).
    """
    ranks = ranks_of(jax.random.bits(key, tokens.shape, jnp.uint32))
    masked = ranks < jnp.broadcast_to(jnp.asarray(count), tokens.shape[:1])[:, None]
    return jnp.where(masked, mask_id, tokens), masked


def hitting_times(
    keys: Key[Array, "batch"], length: int, schedule: MaskSchedule | None = None
) -> Float[Array, "batch length"]:
    """When tokens are unmasked, the first to be so first: decreasing times, one for each call.

    With n tokens masked since time tau_n the next is unmasked at tau_{n-1}, where

        1 - alpha(tau_{n-1}) = (1 - alpha(tau_n)) u^{1/n},  u uniform in (0, 1),  tau_L = 1.

    So the shares masked then are the order statistics of `length` uniform numbers.

    Args:
        keys: one for each example.
        length: masked tokens at time 1.
        schedule: linear if None.
    """
    number = jnp.arange(length, 0, -1)

    def shares(key):
        exponentials = jax.random.exponential(key, (length,))
        return jnp.exp(-jnp.cumsum(exponentials / number))

    times = jax.vmap(shares)(keys)
    return times if schedule is None else schedule.time_of(times)


def reveal_order(
    keys: Key[Array, "batch"], masked: Bool[Array, "batch length"]
) -> Int[Array, "batch length"]:
    """The masked positions in random order, any order as probable as any other; then the others.

    Args:
        keys: one for each example.
        masked: which tokens are.

    Returns:
        A permutation of the positions for each example.
    """
    length = masked.shape[1]
    random = jax.vmap(lambda key: jax.random.bits(key, (length,), jnp.uint32))(keys)
    return jnp.lexsort((random, ~masked), axis=1).astype(jnp.int32)


def ranks_of(values: Array) -> Int[Array, "batch length"]:
    """The place of each value in the order of its row, 0 for the smallest."""
    return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1)
