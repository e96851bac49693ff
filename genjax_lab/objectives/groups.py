"""Statistics of groups of answers to the same question, as reinforcement learning on them needs.

All are computed once over everything that was sampled and are then carried by each answer, so that
shuffling answers and cutting them into batches, microbatches or shards changes nothing.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Groups(NamedTuple):
    """What an answer knows of its group; every field is [batch], float32 but `ids`.

    Attributes:
        ids: which group it belongs to, integers.
        size: answers of the group, K.
        rate: correctness rate r_q of the policy that answered, as estimated from the outcomes.
        reward: its own reward; the outcome where no other was given.
        mean: of the group's rewards.
        std: of the group's rewards, of the population: divided by K, not by K - 1.
    """

    ids: Int[Array, "batch"]
    size: Float[Array, "batch"]
    rate: Float[Array, "batch"]
    reward: Float[Array, "batch"]
    mean: Float[Array, "batch"]
    std: Float[Array, "batch"]


def group_mean(
    values: Float[Array, "batch"], ids: Int[Array, "batch"], *, num_groups: int | None = None
) -> Float[Array, "batch"]:
    """The mean of the group of each, for ids in any order."""
    total, size = _group_sum(values, ids, num_groups), _group_sum(values * 0 + 1, ids, num_groups)
    return total / size


def correctness_rate(
    outcome: Float[Array, "batch"],
    ids: Int[Array, "batch"],
    *,
    estimate: str = "mean",
    prior: tuple[float, float] = (1.0, 1.0),
    num_groups: int | None = None,
) -> Float[Array, "batch"]:
    """Estimates r_q of each answer's question (arXiv 2505.18116, section 3).

    Args:
        outcome: in [0, 1].
        ids: integers in [0, num_groups).
        estimate: "mean" of the group; "leave_one_out", of the other answers, kept half an answer
            away from 0 and 1 where the group has both right and wrong ones, so that the only right
            one counts; "beta", the mean of the posterior under a Beta prior,
            (sum + a) / (K + a + b).
        prior: (a, b) of "beta", positive.
        num_groups: the batch size if None.

    Raises:
        ValueError: if the estimate is not one of these or shapes do not fit.
    """
    total, size = _group_sum(outcome, ids, num_groups), _group_sum(outcome * 0 + 1, ids, num_groups)
    if estimate == "mean":
        return total / size
    if estimate == "leave_one_out":
        others = (total - outcome) / jnp.maximum(size - 1, 1)
        mixed = (total > 0) & (total < size)
        others = jnp.where(mixed, jnp.clip(others, 0.5 / size, 1 - 0.5 / size), others)
        return jnp.where(size > 1, others, jnp.nan)
    if estimate == "beta" and min(prior) > 0:
        return (total + prior[0]) / (size + prior[0] + prior[1])
    raise ValueError(
        f"estimate is {estimate!r} with prior={prior}; it must be 'mean', 'leave_one_out' or "
        "'beta' with positive numbers"
    )


def group_statistics(
    outcome: Float[Array, "batch"],
    ids: Int[Array, "batch"],
    *,
    reward: Float[Array, "batch"] | None = None,
    rate: Float[Array, "batch"] | None = None,
    num_groups: int | None = None,
    estimate: str = "mean",
    prior: tuple[float, float] = (1.0, 1.0),
) -> Groups:
    """Gathers what each answer must know of its group.

    Args:
        outcome: of the verifier, in [0, 1], never shaped.
        ids: which answers belong together, integers in [0, num_groups).
        reward: whatever policy gradients are to use instead of the outcome.
        rate: r_q of each answer, such as of a history; else `correctness_rate`.
        num_groups: the batch size if None.
        estimate, prior: see `correctness_rate`.

    Raises:
        ValueError: if shapes do not fit, outcomes are not in [0, 1], or not finite.
    """
    outcome, ids = jnp.asarray(outcome), jnp.asarray(ids)
    reward = outcome if reward is None else jnp.asarray(reward)
    if outcome.ndim != 1 or not outcome.size or not outcome.shape == ids.shape == reward.shape:
        raise ValueError(
            "outcome, ids and reward must be [batch], got shapes "
            f"{outcome.shape}, {ids.shape} and {reward.shape}"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    count = len(ids) if num_groups is None else num_groups
    concrete = not any(isinstance(x, jax.core.Tracer) for x in (outcome, ids, reward))
    if concrete:
        if not ((np.asarray(outcome) >= 0) & (np.asarray(outcome) <= 1)).all():
            raise ValueError("outcome must be in [0, 1]; a shaped reward goes to reward")
        if not np.isfinite(np.asarray(reward)).all():
            raise ValueError("reward must be finite")
        if np.min(ids) < 0 or np.max(ids) >= count:
            raise ValueError(f"ids must be in [0, {count}), got {np.min(ids)}..{np.max(ids)}")
    if rate is not None and np.shape(rate) != outcome.shape:
        raise ValueError(f"rate must be [batch], {outcome.shape}, got {np.shape(rate)}")
    return _statistics(outcome, ids, reward, rate, count, estimate, tuple(prior))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _statistics(outcome, ids, reward, rate, num_groups: int, estimate: str, prior) -> Groups:
    exact = jnp.promote_types(outcome.dtype, jnp.float32)
    outcome, reward = outcome.astype(exact), reward.astype(exact)
    if rate is None:
        rate = correctness_rate(outcome, ids, estimate=estimate, prior=prior, num_groups=num_groups)
    mean = group_mean(reward, ids, num_groups=num_groups)
    # Of the deviations, not of the squares: equal rewards have the deviation 0, exactly.
    deviation = jnp.where(_is_constant(reward, ids, num_groups), 0, reward - mean)
    variance = group_mean(jnp.square(deviation), ids, num_groups=num_groups)
    size = _group_sum(jnp.ones_like(outcome), ids, num_groups)
    return Groups(ids, size, jnp.asarray(rate, exact), reward, mean, jnp.sqrt(variance))


def overlong_penalty(
    length: Int[Array, "batch"], *, max_length: int, buffer: int, factor: float = 1.0
) -> Float[Array, "batch"]:
    """DAPO's soft punishment of long answers (arXiv 2503.14476, Eq. 13), to be added to rewards.

    Args:
        length: in tokens.
        max_length: tokens from which on it is -factor.
        buffer: tokens before that in which it falls linearly from 0.
        factor: at least 0.

    Raises:
        ValueError: if the buffer is not in (0, max_length].
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be in (0, max_length={max_length}]")
    return factor * jnp.clip((max_length - buffer - length) / buffer, -1.0, 0.0)


PromptWeight = str | Callable[[Float[Array, "batch"]], Float[Array, "batch"]]


def prompt_weight(rate: Float[Array, "batch"], weighting: PromptWeight) -> Float[Array, "batch"]:
    """omega(q): how much a question counts, given its correctness rate (arXiv 2505.18116, Eq. 9).

    Args:
        rate: r_q.
        weighting: "uniform", 1; "dr_grpo", 1 - r_q; "grpo", sqrt((1 - r_q) / r_q); or a function.

    Raises:
        ValueError: for another name.
    """
    if callable(weighting):
        return weighting(rate)
    if weighting == "uniform":
        return jnp.ones_like(rate)
    if weighting == "dr_grpo":
        return 1 - rate
    if weighting == "grpo":
        return jnp.sqrt((1 - rate) / rate)
    raise ValueError(
        f"weighting is {weighting!r}; it must be 'uniform', 'dr_grpo', 'grpo' or a function"
    )


def _group_sum(values: Array, ids: Array, num_groups: int | None) -> Array:
    count = len(ids) if num_groups is None else num_groups
    return jax.ops.segment_sum(values, ids, count)[ids]


def _is_constant(values: Array, ids: Array, count: int) -> Array:
    extremes = (jax.ops.segment_max(values, ids, count), jax.ops.segment_min(values, ids, count))
    return (extremes[0] == extremes[1])[ids]
