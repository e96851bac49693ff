"""Attention over several sets of keys as one, from the attention over each of them."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attentions(
    outs: Sequence[Float[Array, "batch *grid heads value_dim"]],
    lses: Sequence[Float[Array, "batch *grid heads"]],
) -> tuple[Float[Array, "batch *grid heads value_dim"], Float[Array, "batch *grid heads"]]:
    """Joins attentions of the same queries to disjoint sets of keys.

        lse = log sum_n exp lse_n,    out = sum_n exp(lse_n - lse) out_n

    Computed in float32 (float64 where the inputs are), differentiable in outputs and in `lses`.

    Args:
        outs: an output for each set, of any floating type.
        lses: natural logarithms of the sums of exponentials of each set's logits; -inf for a set
            without keys, whose output does not count.

    Returns:
        (out, lse) over all keys, the first in the type of `outs[0]`; 0 and -inf for queries without
        any keys.

    Raises:
        ValueError: if the lists are empty, or lengths or shapes differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != outs[0].shape[:-1]:
            raise ValueError(
                f"outs must have the shape {outs[0].shape} and lses {outs[0].shape[:-1]}, got "
                f"{out.shape} and {lse.shape}"
            )
    exact = jnp.promote_types(jnp.result_type(*lses), jnp.float32)
    lses = [jnp.asarray(lse, exact) for lse in lses]
    is_empty = [jnp.isneginf(lse) for lse in lses]
    # Whatever is subtracted cancels; 0 stands in for -inf so that no gradient is NaN.
    top = functools.reduce(
        jnp.maximum,
        (jnp.where(e, jnp.finfo(exact).min, x) for e, x in zip(is_empty, lses, strict=True)),
    )
    top = jnp.where(functools.reduce(jnp.logical_and, is_empty), 0, top)
    weights = [jnp.exp(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    nothing = total == 0
    safe = jnp.where(nothing, 1, total)
    # One after the other: stacked, they would be copied first.
    out = functools.reduce(
        jnp.add,
        (
            w[..., None] * jnp.where(e[..., None], 0, jnp.asarray(x, exact))
            for w, e, x in zip(weights, is_empty, outs, strict=True)
        ),
    )
    merged = jnp.where(nothing, -jnp.inf, top + jnp.log(safe))
    return (out / safe[..., None]).astype(outs[0].dtype), merged
