"""What right and wrong answers do to a model: numbers to look at, too dear for every step.

Losses of answers begin at 0 and say nothing about progress; these say where a step goes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Shaped

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.groups import Groups


def split_gradient(
    objective: Objective, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> dict[str, Float[Array, ""]]:
    """Norms of the gradients of right and of wrong answers, and the cosine between them.

    Args:
        objective: of `answer_objective`.
        variables: the network's.
        batch: of `answer_batch`; answers with an outcome above 1/2 are right.

    Returns:
        "right_norm", "wrong_norm" and "cosine", which is 0 where one of them vanishes.
    """

    def gradient(chosen: Array) -> Any:
        part = {**batch, "weights": batch["weights"] * chosen}

        def loss(params):
            return objective({**variables, "params": params}, part, jax.random.key(0))[0]

        return jax.grad(loss)(variables["params"])

    right = jnp.asarray(batch["outcome"]) > 0.5
    positive, negative = gradient(right), gradient(~right)
    norms = optax.tree.norm(positive), optax.tree.norm(negative)
    product = norms[0] * norms[1]
    cosine = optax.tree.vdot(positive, negative) / jnp.where(product > 0, product, 1)
    return {"right_norm": norms[0], "wrong_norm": norms[1], "cosine": cosine}


def ratio_quantiles(
    log_ratio: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    quantiles: tuple[float, ...] = (0.01, 0.1, 0.5, 0.9, 0.99),
) -> dict[str, Float[Array, ""]]:
    """Quantiles of R over the tokens of answers, by their names, "ratio_0.5" and so on."""
    ratio = jnp.where(mask, jnp.exp(log_ratio), jnp.nan)
    return {f"ratio_{q}": jnp.nanquantile(ratio, q) for q in quantiles}


def means_by_rate(
    values: Float[Array, "batch"],
    group: Groups,
    *,
    num_bins: int = 4,
    where: Shaped[Array, "batch"] | None = None,
) -> Float[Array, "num_bins"]:
    """Means of `values` of answers to questions of a correctness rate in each part of [0, 1].

    Args:
        values: of each answer, such as its loss: `jax.vmap` of a loss of one answer, or the sum of
            its tokens' terms.
        group: see `group_statistics`.
        num_bins: equal parts; the last has rate 1, too.
        where: which answers count; all if None.

    Returns:
        NaN for parts without answers.

    Raises:
        ValueError: if shapes do not fit or there are no parts.
    """
    if num_bins < 1 or values.shape != group.rate.shape:
        raise ValueError(
            f"num_bins={num_bins} must be positive, and values {values.shape} one for each answer, "
            f"{group.rate.shape}"
        )
    bins = jnp.clip((group.rate * num_bins).astype(jnp.int32), 0, num_bins - 1)
    counted = jnp.ones_like(values) if where is None else where.astype(values.dtype)
    shown = jnp.where(counted > 0, values, 0)
    total, count = (jax.ops.segment_sum(x, bins, num_bins) for x in (shown, counted))
    return jnp.where(count > 0, total / count, jnp.nan)
