"""Negative-aware fine-tuning (NFT, arXiv 2505.18116): supervised learning from wrong answers, too.

With r_q the rate of right answers of the policy pi that answered, Bayes' rule splits it into the
policies of its right and wrong answers, r_q pi+ + (1 - r_q) pi- = pi. So a model of pi+ implies one
of pi-, whose likelihood wrong answers train:

    R = pi_theta / pi,     pi-_theta / pi = (1 - r_q R) / (1 - r_q)

    loss = -sum omega(q) [r log R + lambda (1 - r) log max_v((1 - r_q R) / (1 - r_q), epsilon)]

for each token, R being that of the token. max_v has the value of the maximum and the gradient of
its first argument. lambda = 0 is rejection sampling fine-tuning (RFT). At R = 1 and epsilon <= 1
gradients are those of Dr.GRPO for omega = 1 - r_q and of GRPO for sqrt((1 - r_q) / r_q).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from genjax_lab.objectives.aggregation import aggregate, aggregation_weights, masked_mean
from genjax_lab.objectives.groups import Groups, PromptWeight, prompt_weight

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
RATIOS = ("token", "sequence", "sequence-mean")

_RATE_RANGE = (0.02, 0.98)


def straight_through_max(
    x: Float[Array, "..."], floor: float | Float[Array, ""]
) -> Float[Array, "..."]:
    """max(x, floor) with the gradient of x everywhere (arXiv 2505.18116, Eq. 8)."""
    # x + (max(x, floor) - x) would have the digits of x, which may be far below the floor.
    return jax.lax.stop_gradient(jnp.maximum(x, floor)) + (x - jax.lax.stop_gradient(x))


def likelihood_log_ratio(
    log_probs: Float[Array, "batch length"],
    old_log_probs: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    *,
    ratio: str = "token",
    max_log_ratio: float = 10.0,
) -> Float[Array, "batch length"]:
    """log R of the model and the policy that answered, at most `max_log_ratio`, float32 at least.

    Args:
        log_probs: of the model; gradients go through them alone.
        old_log_probs: of the policy.
        mask: which tokens count; where not, log R is 0.
        ratio: "token", of each token; "sequence", of the answer up to its end, the same at each of
            its tokens; "sequence-mean", that divided by its number of tokens (GSPO, 2507.18071).
        max_log_ratio: beyond it there is no gradient.

    Raises:
        ValueError: for another ratio or shapes that do not fit.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}, not in {RATIOS}")
    if log_probs.ndim != 2 or not log_probs.shape == old_log_probs.shape == mask.shape:
        raise ValueError(
            "log_probs, old_log_probs and mask must be [batch, length], got "
            f"{log_probs.shape}, {old_log_probs.shape} and {mask.shape}"
        )
    exact = jnp.promote_types(log_probs.dtype, jnp.float32)
    old = jax.lax.stop_gradient(old_log_probs.astype(exact))
    mask = mask.astype(bool)
    # Both are replaced where hidden: a NaN there would come back in gradients.
    log_ratio = jnp.where(mask, log_probs.astype(exact), 0) - jnp.where(mask, old, 0)
    if ratio != "token":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
        if ratio == "sequence-mean":
            log_ratio /= jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        log_ratio = jnp.where(mask, log_ratio, 0)
    return jnp.minimum(log_ratio, max_log_ratio)


def implicit_negative_ratio(
    log_ratio: Float[Array, "batch length"], rate: Float[Array, "batch 1"]
) -> Float[Array, "batch length"]:
    """pi-_theta / pi = (1 - r_q R) / (1 - r_q); negative where R > 1 / r_q, exactly 1 at R = 1."""
    # (1 - r R) / (1 - r) = 1 - r (R - 1) / (1 - r)
    return 1 - rate * jnp.expm1(log_ratio) / (1 - rate)


def nft_loss(
    log_probs: Float[Array, "batch length"],
    old_log_probs: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    outcome: Float[Array, "batch"],
    group: Groups,
    *,
    epsilon: float | Float[Array, ""] = 1.0,
    negative_weight: float | Float[Array, ""] = 1.0,
    weighting: PromptWeight = "dr_grpo",
    ratio: str = "token",
    positive_floor: float | Float[Array, ""] = 0.0,
    max_log_ratio: float = 10.0,
    aggregation: str = "token-sum-const",
    constant: float | None = None,
    weights: Float[Array, "batch"] | None = None,
    importance: Float[Array, "batch length"] | None = None,
) -> Loss:
    """The loss of negative-aware fine-tuning (arXiv 2505.18116, Eq. 10).

    Args:
        log_probs: of the answers' tokens under the model, [batch, length].
        old_log_probs: under the policy that gave the answers.
        mask: which tokens are the answer's, with the one that ends it.
        outcome: in [0, 1], whether the answer is right; softly, the loss is linear in it.
        group: see `group_statistics`. Answers to questions that all or none answer right, r_q 0 or
            1, count nothing.
        epsilon: least value of the implicit negative ratio; at most 1 keeps the equality with GRPO.
        negative_weight: lambda of wrong answers; 0 is RFT.
        weighting: omega, see `prompt_weight`.
        ratio: of likelihoods, see `likelihood_log_ratio`. Of sequences there is one term for each
            answer instead of each token.
        positive_floor: least value of R in the logarithm of right answers, in the same way.
        max_log_ratio: see `likelihood_log_ratio`.
        aggregation, constant: see `aggregation_weights`.
        weights: those of the whole batch, where this is a part of it.
        importance: weights of tokens, where answers came from another law than `old_log_probs`.

    Returns:
        The loss, 0 at R = 1, which says nothing about progress; and means over tokens: "ratio",
        "max_ratio", "share_improbable", where r_q R > 1 so that the implicit negative policy is
        none; of tokens of wrong answers, "share_floored", where epsilon is.

    Raises:
        ValueError: for names that are unknown, shapes that do not fit, or epsilon not positive.
    """
    log_ratio = likelihood_log_ratio(
        log_probs, old_log_probs, mask, ratio=ratio, max_log_ratio=max_log_ratio
    )
    if not isinstance(epsilon, jax.core.Tracer) and not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: its logarithm is taken")
    mask = mask.astype(bool)
    if weights is None:
        weights = aggregation_weights(_terms(mask, ratio), aggregation, constant=constant)
    right, rate = _columns(outcome, group.rate, log_ratio.shape)
    useful = (rate > 0) & (rate < 1)
    rate = jnp.where(useful, jnp.clip(rate, *_RATE_RANGE), 0.5)
    negative = implicit_negative_ratio(log_ratio, rate)
    floored = straight_through_max(jnp.exp(log_ratio), positive_floor)
    # log R itself where nothing is floored: the logarithm of exp(log R) would lose digits.
    positive_term = jnp.where(floored > jnp.exp(log_ratio), jnp.log(_safe(floored)), log_ratio)
    negative_term = jnp.log(_safe(straight_through_max(negative, epsilon)))
    # Not a plain sum: a wrong answer that has become impossible has the positive term -inf.
    term = jnp.where(right > 0, right * positive_term, 0) + jnp.where(
        right < 1, negative_weight * (1 - right) * negative_term, 0
    )
    omega = jnp.where(useful, prompt_weight(rate[:, 0], weighting)[:, None], 0)
    loss = -omega * term
    if importance is not None:
        loss *= jax.lax.stop_gradient(importance)
    wrong = mask & (right < 0.5)
    metrics = ratio_metrics(log_ratio, mask) | {
        "share_improbable": masked_mean(1.0 * (rate * jnp.exp(log_ratio) > 1), mask),
        "share_floored": masked_mean(1.0 * (negative < epsilon), wrong),
    }
    return aggregate(loss, _terms(mask, ratio), weights), metrics


def rft_loss(
    log_probs: Float[Array, "batch length"],
    old_log_probs: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    outcome: Float[Array, "batch"],
    group: Groups,
    *,
    weighting: PromptWeight = "uniform",
    **options,
) -> Loss:
    """Rejection sampling fine-tuning: `nft_loss` without wrong answers, all questions alike."""
    options = {"negative_weight": 0.0} | options
    return nft_loss(log_probs, old_log_probs, mask, outcome, group, weighting=weighting, **options)


def ratio_metrics(log_ratio: Array, mask: Array) -> dict[str, Array]:
    """Mean and largest R, and a KL divergence from the old policy, over the tokens of answers."""
    ratio = jnp.exp(log_ratio)
    return {
        "ratio": masked_mean(ratio, mask),
        "max_ratio": jnp.max(jnp.where(mask, ratio, 0)),
        "old_kl": masked_mean(ratio - 1 - log_ratio, mask),
    }


def _terms(mask: Array, ratio: str) -> Array:
    """Which entries are summed: of sequence ratios, which are the same at each token, the first."""
    if ratio == "token":
        return mask
    return mask & (jnp.cumsum(mask, axis=1) == 1)


def _safe(x: Array) -> Array:
    """Keeps logarithms finite where a floor of 0 leaves nothing above it."""
    return straight_through_max(x, jnp.finfo(x.dtype).tiny)


def _columns(outcome: Array, rate: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    if not outcome.shape == rate.shape == shape[:1]:
        raise ValueError(
            f"outcome and group must be of {shape[0]} answers, got {outcome.shape} and {rate.shape}"
        )
    return outcome[:, None], rate[:, None]
