"""How losses of tokens become one number.

Every mode is a weight w_b of the answer's sum: loss = mean_b w_b sum_t m_bt l_bt. The weights of a
whole batch, computed before it is cut, make the mean over microbatches and devices the same as
that of the batch, whatever the lengths. arXiv 2503.20783 and 2503.14476 say what they do to the
length of answers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

AGGREGATIONS = (
    "token-sum-const",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def aggregation_weights(
    mask: Shaped[Array, "batch length"], aggregation: str, *, constant: float | None = None
) -> Float[Array, "batch"]:
    """The weight of each answer's sum over tokens.

    Args:
        mask: which tokens count.
        aggregation: "token-sum-const", the sum of all divided by `constant`, 1000 by default;
            "token-mean", by the number of tokens; "seq-mean-token-sum", the mean over answers of
            sums; "seq-mean-token-mean", of means; "seq-mean-token-sum-norm", of sums divided by
            `constant`, the arrays' length by default. Answers without tokens are none.
        constant: a positive number.

    Raises:
        ValueError: for another aggregation, or a constant where there is none.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, not in {AGGREGATIONS}")
    has_constant = aggregation in ("token-sum-const", "seq-mean-token-sum-norm")
    if constant is not None and not (has_constant and constant > 0):
        raise ValueError(
            f"constant={constant} must be positive, and None for aggregation={aggregation!r}"
        )
    batch, length = mask.shape
    tokens = jnp.sum(mask, axis=1, dtype=float)
    answers = jnp.maximum(jnp.sum(tokens > 0, dtype=float), 1)
    if aggregation == "token-sum-const":
        weights = jnp.full((batch,), batch / (constant or 1000.0), float)
    elif aggregation == "token-mean":
        weights = jnp.full((batch,), batch) / jnp.maximum(jnp.sum(tokens), 1)
    else:
        each = {
            "seq-mean-token-sum": 1.0,
            "seq-mean-token-mean": jnp.maximum(tokens, 1),
            "seq-mean-token-sum-norm": constant or float(length),
        }[aggregation]
        weights = batch / (answers * each) * jnp.ones_like(tokens)
    return weights


def aggregate(
    loss: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    weights: Float[Array, "batch"],
) -> Float[Array, ""]:
    """mean_b w_b sum_t m_bt l_bt; what a mask hides may be anything, NaN too."""
    return jnp.mean(weights * jnp.sum(jnp.where(mask, loss, 0.0), axis=1))


def masked_mean(
    values: Float[Array, "batch length"], mask: Shaped[Array, "batch length"]
) -> Float[Array, ""]:
    """The mean over what the mask shows; 0 of nothing."""
    mask = jnp.broadcast_to(mask, values.shape).astype(bool)
    count = jnp.maximum(jnp.sum(mask), 1)
    return jnp.sum(jnp.where(mask, values, 0.0)) / count
