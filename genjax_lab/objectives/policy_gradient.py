"""Policy gradients that negative-aware fine-tuning is compared with, in the same form.

All take (log_probs, old_log_probs, mask, outcome, group) as `nft_loss` does and return
(loss, metrics). They differ in the advantage, in how the ratio R = pi_theta / pi_old is cut, and in
how tokens are summed up. Rewards are those of `group`: the outcome, unless another was given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from genjax_lab.objectives.aggregation import aggregate, aggregation_weights, masked_mean
from genjax_lab.objectives.groups import Groups
from genjax_lab.objectives.negative_aware import Loss, likelihood_log_ratio, ratio_metrics

KL_ESTIMATES = ("k1", "abs", "k2", "k3")


def group_advantage(group: Groups, *, std: str | None = "sample") -> Float[Array, "batch"]:
    """The reward less its group's mean, divided by its deviation.

    Args:
        group: of at least two answers each.
        std: "sample", divided by K - 1 as in GRPO's programs; "population", by K; each plus 1e-6.
            None: the difference alone (Dr.GRPO, arXiv 2503.20783).

    Raises:
        ValueError: for another deviation.
    """
    centred = jnp.where(group.std > 0, group.reward - group.mean, 0)
    if std is None:
        return centred
    if std not in ("sample", "population"):
        raise ValueError(f"std is {std!r}; it must be 'sample', 'population' or None")
    deviation = group.std
    if std == "sample":
        deviation = deviation * jnp.sqrt(group.size / jnp.maximum(group.size - 1, 1))
    return centred / (deviation + 1e-6)


def clipped_policy_loss(
    log_probs: Float[Array, "batch length"],
    old_log_probs: Float[Array, "batch length"],
    mask: Shaped[Array, "batch length"],
    advantage: Float[Array, "batch"],
    *,
    epsilon_low: float | None = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    ratio: str = "token",
    max_log_ratio: float = 20.0,
    aggregation: str = "seq-mean-token-mean",
    constant: float | None = None,
    weights: Float[Array, "batch"] | None = None,
    importance: Float[Array, "batch length"] | None = None,
) -> Loss:
    """The clipped surrogate of PPO, max(-A R, -A clip(R, 1 - low, 1 + high)) (arXiv 1707.06347).

    Args:
        log_probs, old_log_probs, mask: as of `nft_loss`.
        advantage: A of each answer.
        epsilon_low, epsilon_high: how far R may go from 1; `epsilon_high` is `epsilon_low` if None.
            No clipping if `epsilon_low` is None.
        dual_clip: c > 1: where A < 0 the loss is at most -c A (arXiv 1912.09729).
        ratio: as of `likelihood_log_ratio`; "sequence-mean" is GSPO's, whose gradient goes through
            each token's log-probability (arXiv 2507.18071).
        max_log_ratio: of either sign.
        aggregation, constant, weights, importance: as of `nft_loss`.

    Raises:
        ValueError: for numbers out of range or shapes that do not fit.
    """
    high = epsilon_low if epsilon_high is None else epsilon_high
    if epsilon_low is not None and not (0 <= epsilon_low <= 1 and high >= 0):
        raise ValueError(
            f"epsilon_low={epsilon_low} must be in [0, 1], epsilon_high={high} not negative"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1")
    if advantage.shape != log_probs.shape[:1]:
        raise ValueError(f"advantage must be {log_probs.shape[:1]}, got {advantage.shape}")
    log_ratio = likelihood_log_ratio(
        log_probs, old_log_probs, mask, ratio=ratio, max_log_ratio=max_log_ratio
    )
    log_ratio = jnp.maximum(log_ratio, -max_log_ratio)
    mask = mask.astype(bool)
    if ratio == "sequence-mean":
        # The value of the sequence's ratio, and at each token the gradient of its own.
        own = jnp.where(mask, log_probs.astype(log_ratio.dtype), 0)
        log_ratio = jax.lax.stop_gradient(log_ratio - own) + own
    if weights is None:
        weights = aggregation_weights(mask, aggregation, constant=constant)
    value = jnp.exp(log_ratio)
    advantage = jax.lax.stop_gradient(advantage)[:, None]
    loss = -advantage * value
    clipped = jnp.zeros_like(mask)
    if epsilon_low is not None:
        cut = -advantage * jnp.clip(value, 1 - epsilon_low, 1 + high)
        clipped = cut > loss
        loss = jnp.maximum(loss, cut)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        clipped |= (advantage < 0) & (loss > bound)
        loss = jnp.where(advantage < 0, jnp.minimum(loss, bound), loss)
    if importance is not None:
        loss *= jax.lax.stop_gradient(importance)
    metrics = ratio_metrics(log_ratio, mask)
    metrics["share_clipped"] = masked_mean(1.0 * clipped, mask)
    return aggregate(loss, mask, weights), metrics


def grpo_loss(
    log_probs, old_log_probs, mask, outcome, group: Groups, *, std: str | None = "sample", **options
) -> Loss:
    """Group relative policy optimisation (arXiv 2402.03300); `options` of `clipped_policy_loss`."""
    del outcome
    return clipped_policy_loss(
        log_probs, old_log_probs, mask, group_advantage(group, std=std), **options
    )


def dr_grpo_loss(log_probs, old_log_probs, mask, outcome, group: Groups, **options) -> Loss:
    """GRPO "done right": neither deviation nor length divides (arXiv 2503.20783)."""
    options = {"aggregation": "seq-mean-token-sum-norm"} | options
    return grpo_loss(log_probs, old_log_probs, mask, outcome, group, std=None, **options)


def dapo_loss(log_probs, old_log_probs, mask, outcome, group: Groups, **options) -> Loss:
    """DAPO (arXiv 2503.14476): wider above than below, all tokens alike; see `overlong_penalty`."""
    options = {"epsilon_low": 0.2, "epsilon_high": 0.28, "aggregation": "token-mean"} | options
    return grpo_loss(log_probs, old_log_probs, mask, outcome, group, **options)


def gspo_loss(log_probs, old_log_probs, mask, outcome, group: Groups, **options) -> Loss:
    """Group sequence policy optimisation (arXiv 2507.18071)."""
    options = {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "ratio": "sequence-mean"} | options
    return grpo_loss(log_probs, old_log_probs, mask, outcome, group, **options)


def rloo_loss(log_probs, old_log_probs, mask, outcome, group: Groups, **options) -> Loss:
    """REINFORCE with the mean of the other answers' rewards as baseline (arXiv 2402.14740)."""
    del outcome
    options = {"epsilon_low": None, "aggregation": "seq-mean-token-sum"} | options
    advantage = group_advantage(group, std=None) * group.size / jnp.maximum(group.size - 1, 1)
    return clipped_policy_loss(log_probs, old_log_probs, mask, advantage, **options)


def reinforce_loss(log_probs, old_log_probs, mask, outcome, group: Groups, **options) -> Loss:
    """REINFORCE without a baseline: the reward itself is the advantage."""
    del outcome
    options = {"epsilon_low": None, "aggregation": "seq-mean-token-sum"} | options
    return clipped_policy_loss(log_probs, old_log_probs, mask, group.reward, **options)


def signed_likelihood_loss(
    log_probs,
    old_log_probs,
    mask,
    outcome,
    group: Groups,
    *,
    aggregation: str = "token-sum-const",
    constant: float | None = None,
    weights: Float[Array, "batch"] | None = None,
    importance: Float[Array, "batch length"] | None = None,
) -> Loss:
    """-(2 r - 1) log R: likelihood up for right answers and down for wrong ones, without end.

    What negative-aware fine-tuning would be without the implicit negative policy.
    """
    del group
    log_ratio = likelihood_log_ratio(log_probs, old_log_probs, mask)
    mask = mask.astype(bool)
    if weights is None:
        weights = aggregation_weights(mask, aggregation, constant=constant)
    loss = -(2 * outcome - 1)[:, None] * log_ratio
    if importance is not None:
        loss *= jax.lax.stop_gradient(importance)
    return aggregate(loss, mask, weights), ratio_metrics(log_ratio, mask)


def online_dpo_loss(
    log_probs, old_log_probs, mask, outcome, group: Groups, *, beta: float = 0.1
) -> Loss:
    """Direct preference optimisation of right against wrong answers of the same question.

    -log sigmoid(beta (log R(right) - log R(wrong))), log R of whole answers (arXiv 2305.18290,
    Eq. 7), a mean over min(right, wrong) pairs of each group: its i-th right answer in the batch
    with the i-th wrong one. Groups must not be cut: a pair needs both.

    Raises:
        ValueError: if `beta` is not positive or shapes do not fit.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")
    log_ratio = likelihood_log_ratio(log_probs, old_log_probs, mask, max_log_ratio=jnp.inf)
    total = jnp.sum(log_ratio, axis=1)
    right = outcome > 0.5
    real = jnp.any(mask, axis=1)
    same = (group.ids[:, None] == group.ids[None, :]) & real[:, None] & real[None, :]
    before = jnp.tril(jnp.ones_like(same), -1) & same & (right[:, None] == right[None, :])
    place = jnp.sum(before, axis=1)
    pairs = same & right[:, None] & ~right[None, :] & (place[:, None] == place[None, :])
    margin = beta * (total[:, None] - total[None, :])
    count = jnp.maximum(jnp.sum(pairs), 1)
    loss = jnp.sum(jnp.where(pairs, -jax.nn.log_sigmoid(margin), 0)) / count
    metrics = ratio_metrics(log_ratio, mask.astype(bool))
    metrics["pairs"] = jnp.sum(pairs) / jnp.maximum(len(total), 1)
    metrics["preferred"] = jnp.sum(pairs & (margin > 0)) / count
    return loss, metrics


def kl_estimate(
    log_probs: Float[Array, "batch length"],
    reference_log_probs: Float[Array, "batch length"],
    kind: str = "k3",
) -> Float[Array, "batch length"]:
    """Estimates KL(pi_theta, pi_ref) from a token drawn from pi_theta.

    With d = log pi_theta - log pi_ref: "k1", d; "abs", |d|; "k2", d^2 / 2; "k3", e^-d - 1 + d, with
    d between -20 and 20.

    Raises:
        ValueError: for another kind.
    """
    difference = log_probs - jax.lax.stop_gradient(reference_log_probs)
    if kind == "k1":
        return difference
    if kind == "abs":
        return jnp.abs(difference)
    if kind == "k2":
        return jnp.square(difference) / 2
    if kind == "k3":
        inverse = jnp.clip(-difference, -20.0, 20.0)
        return jnp.exp(inverse) - 1 - inverse
    raise ValueError(f"kind is {kind!r}, not in {KL_ESTIMATES}")


def importance_weights(
    log_probs: Float[Array, "batch length"],
    sampler_log_probs: Float[Array, "batch length"],
    *,
    cap: float = 2.0,
) -> Float[Array, "batch length"]:
    """min(pi_train / pi_sampler, cap) of each token, where the two programs differ a little.

    Raises:
        ValueError: if `cap` is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap={cap} must be positive")
    return jnp.minimum(jnp.exp(jnp.minimum(log_probs - sampler_log_probs, 20.0)), cap)
