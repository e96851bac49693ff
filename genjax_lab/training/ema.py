"""Exponential moving averages of parameters: by half-life, by power function, and after the fact.

Half-life (EDM, arXiv 2206.00364): the weight of a parameter vector halves with every
`half_life_images` training images. Power function (EDM2, arXiv 2312.02696, section 3): the average
at time t weighs the past by p(tau) proportional to tau^gamma on [0, t], so its width stays the same
fraction of the run; gamma follows from that relative width. From averages of a few widths that were
stored during training, the average of any other width is then found by least squares between their
profiles (arXiv 2312.02696, section 3.2 and appendix C).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree


class ParameterAverage(NamedTuple):
    """A rule that averages parameters over training, as a pair of pure functions.

    Attributes:
        init: `(params) -> average`, the average before the first step.
        update: `(average, params, step, batch_size) -> average`, where `params` are the parameters
            after `step` optimiser steps (1 for the first) of `batch_size` images each.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, Int[Array, ""], int], PyTree]


def half_life_decay(
    step: Int[Array, "*shape"] | int,
    batch_size: int,
    half_life_images: float,
    rampup_ratio: float | None = 0.05,
) -> Float[Array, "*shape"]:
    """The decay 0.5^(batch_size / half-life) of EDM's average at optimiser step `step` (from 1).

    The half-life is `half_life_images`, or `rampup_ratio` times the images seen before this step
    while that is smaller; without a ratio there is no such ramp, as fine-tuning wants it.
    """
    half_life = jnp.asarray(half_life_images, jnp.float32)
    if rampup_ratio is not None:
        images_seen = (jnp.asarray(step, jnp.float32) - 1.0) * batch_size
        half_life = jnp.minimum(half_life, rampup_ratio * images_seen)
    # exp2(-inf) = 0: before anything was seen, the average is the first parameter vector.
    return jnp.exp2(-batch_size / half_life)


def power_decay(step: Int[Array, "*shape"] | int, gamma: float) -> Float[Array, "*shape"]:
    """The decay (1 - 1/t)^(gamma + 1) of the power-function average at step t = 1, 2, ...

    With it the average is exactly the integral of the profile tau^gamma over the piecewise constant
    trajectory (arXiv 2312.02696, equation 127); at t = 1 it is 0.
    """
    return (1.0 - 1.0 / jnp.asarray(step, jnp.float32)) ** (gamma + 1.0)


def half_life_ema(half_life_images: float, rampup_ratio: float | None = 0.05) -> ParameterAverage:
    """EDM's average, whose memory halves every `half_life_images` training images.

    Args:
        half_life_images: half-life in images (not steps); positive.
        rampup_ratio: at most this fraction of the images seen so far; `None` for no ramp-up.

    Raises:
        ValueError: the half-life or the ratio is not positive.
    """
    if not half_life_images > 0 or (rampup_ratio is not None and not rampup_ratio > 0):
        raise ValueError(
            "half_life_images and rampup_ratio must be positive, got "
            f"{half_life_images} and {rampup_ratio}; rampup_ratio=None means no ramp-up"
        )
    return _average(
        lambda step, batch_size: half_life_decay(step, batch_size, half_life_images, rampup_ratio)
    )


def power_ema(sigma_rel: float) -> ParameterAverage:
    """EDM2's power-function average with a profile of relative width `sigma_rel`.

    Args:
        sigma_rel: standard deviation of the profile divided by the length of the run; the paper
            stores 0.05 and 0.10.

    Raises:
        ValueError: `std_to_exp` has no exponent for that width.
    """
    gamma = float(std_to_exp(sigma_rel))
    return _average(lambda step, batch_size: power_decay(step, gamma))


def _average(decay: Callable[[Array, int], Array]) -> ParameterAverage:
    def update(average: PyTree, params: PyTree, step: Array, batch_size: int) -> PyTree:
        beta = decay(step, batch_size)
        # beta * average + (1 - beta) * params, in the form that keeps equal values equal.
        return jax.tree.map(
            lambda mean, value: value + beta.astype(value.dtype) * (mean - value), average, params
        )

    return ParameterAverage(init=lambda params: jax.tree.map(jnp.array, params), update=update)


def ema_from_config(config: Mapping[str, Mapping[str, Any]]) -> dict[str, ParameterAverage]:
    """Builds named averages from plain settings.

    Args:
        config: name of each average to its arguments, those of `half_life_ema`
            (`{"half_life_images": 500_000, "rampup_ratio": 0.05}`) or of `power_ema`
            (`{"sigma_rel": 0.05}`).

    Raises:
        ValueError: settings that fit neither.
    """
    averages = {}
    for name, settings in config.items():
        if set(settings) == {"sigma_rel"}:
            averages[name] = power_ema(**settings)
        elif "half_life_images" in settings and set(settings) <= {
            "half_life_images",
            "rampup_ratio",
        }:
            averages[name] = half_life_ema(**settings)
        else:
            raise ValueError(
                f"ema.{name} has the settings {sorted(settings)}; expected half_life_images "
                "(and rampup_ratio), or sigma_rel"
            )
    return averages


def std_to_exp(sigma_rel: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
    """The exponent gamma of the power profile whose relative standard deviation is `sigma_rel`.

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma >= 0, where the width
    falls monotonically (arXiv 2312.02696, equation 126).

    Raises:
        ValueError: `sigma_rel` is outside (0, 12^-0.5); the bound is the uniform average, gamma 0.
    """
    sigma_rel = np.asarray(sigma_rel, np.float64)
    if not np.all((sigma_rel > 0) & (sigma_rel < 12**-0.5)):
        raise ValueError(
            f"sigma_rel must lie between 0 and 0.2887, the uniform average's; got {sigma_rel}"
        )
    # Bisection; the width at gamma = 1/sigma is below sigma, so the root is bracketed.
    low, high = np.zeros_like(sigma_rel), 1.0 / sigma_rel
    for _ in range(100):
        middle = (low + high) / 2.0
        too_wide = exp_to_std(middle) > sigma_rel
        low, high = np.where(too_wide, middle, low), np.where(too_wide, high, middle)
    return low


def exp_to_std(gamma: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
    """The relative standard deviation of the power profile tau^gamma (equation 123)."""
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def _inner_products(
    steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray
) -> np.ndarray:
    """Inner products of the power profiles of unit mass: an array [a, b].

    The integral of (g+1)(h+1) tau^(g+h) / (s^(g+1) t^(h+1)) up to min(s, t) (arXiv 2312.02696,
    equation 151), written with powers of min/max so that nothing overflows.
    """
    s, g = steps_a[:, None], gammas_a[:, None]
    t, h = steps_b[None, :], gammas_b[None, :]
    exponent = np.where(s < t, h, g)
    ratio = np.minimum(s, t) / np.maximum(s, t)
    return (g + 1.0) * (h + 1.0) / (g + h + 1.0) * ratio**exponent / np.maximum(s, t)


def posthoc_weights(
    steps: Sequence[int],
    sigma_rels: Sequence[float],
    *,
    target_step: int,
    target_sigma_rel: float,
) -> Float[np.ndarray, "snapshots"]:
    """Weights that combine stored power-function averages into one of another width.

    Minimises the squared distance between the combined profile and the target's
    (arXiv 2312.02696, algorithm 3), in float64.

    Args:
        steps: the optimiser steps after which the averages were stored; positive.
        sigma_rels: the relative width of each; each pair (step, width) at most once.
        target_step: the step at which the wanted average stands; at most the last stored one.
        target_sigma_rel: the wanted relative width.

    Returns:
        One weight per stored average; they sum to 1, and some are negative.

    Raises:
        ValueError: the lists differ in length or repeat a pair, or the target lies beyond the
            stored steps.
    """
    stored = list(zip(steps, sigma_rels, strict=False))
    if len(steps) != len(sigma_rels) or not stored or len(set(stored)) != len(stored):
        raise ValueError(
            "steps and sigma_rels must be equally long and hold no pair twice, got "
            f"{list(steps)} and {list(sigma_rels)}"
        )
    if min(steps) < 1 or not 1 <= target_step <= max(steps):
        raise ValueError(
            f"target_step={target_step} must lie in [1, {max(steps)}], the last stored step"
        )
    times, gammas = np.asarray(steps, np.float64), std_to_exp(np.asarray(sigma_rels))
    target_time = np.asarray([target_step], np.float64)
    target_gamma = std_to_exp(np.asarray([target_sigma_rel]))
    gram = _inner_products(times, gammas, times, gammas)
    projection = _inner_products(times, gammas, target_time, target_gamma)[:, 0]
    # Profiles of unit norm: the solution loses fewer digits than with the raw Gram matrix.
    norms = np.sqrt(np.diag(gram))
    weights = np.linalg.solve(gram / np.outer(norms, norms), projection / norms) / norms
    # Unit mass, as every profile has: an average of equal parameters must be those parameters.
    return weights / weights.sum()


def posthoc_ema(
    weights: Float[np.ndarray, "snapshots"], averages: Iterable[PyTree]
) -> PyTree[np.ndarray]:
    """The weighted sum of stored averages, with `posthoc_weights`; numpy arrays.

    Args:
        weights: one weight per average.
        averages: the parameter trees in the same order; read one at a time, so that a generator
            never holds more than one of them in memory.

    Raises:
        ValueError: the numbers of weights and averages differ, or there are none.
    """

    def accumulate(total: PyTree, weight: float, average: PyTree) -> PyTree:
        scaled = jax.tree.map(lambda leaf: weight * np.asarray(leaf, np.float64), average)
        return scaled if total is None else jax.tree.map(np.add, total, scaled)

    total, average = None, None
    for weight, average in zip(weights, averages, strict=True):
        total = accumulate(total, float(weight), average)
    if total is None:
        raise ValueError("averages must hold at least one tree; got none")
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), total, average)
