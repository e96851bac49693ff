"""Learning from answers whose outcome is known: any of the losses, through any network.

A batch has, for each answer, prompt and answer as tokens with masks, the log-probabilities of the
policy that gave it, its outcome, what it knows of its group and its weight in the whole batch (see
`answer_batch`): so it may be cut into microbatches and shards at will.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax_lab.objectives.aggregation import aggregate, aggregation_weights, masked_mean
from genjax_lab.objectives.answer_diagnostics import (
    means_by_rate,
    ratio_quantiles,
    split_gradient,
)
from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.groups import Groups
from genjax_lab.objectives.negative_aware import Loss
from genjax_lab.objectives.policy_gradient import kl_estimate

_GROUP = "group_"


def answer_batch(
    prompts: Array,
    prompt_mask: Array,
    answers: Array,
    answer_mask: Array,
    old_log_probs: Array,
    outcome: Array,
    group: Groups,
    *,
    aggregation: str,
    constant: float | None = None,
    counted: Array | None = None,
    **more: Array,
) -> dict[str, np.ndarray]:
    """The batch of `answer_objective`, of numpy arrays with a leading axis of answers.

    Args:
        prompts, prompt_mask: [batch, columns], left-padded.
        answers, answer_mask: [batch, length].
        old_log_probs: [batch, length], of the policy that answered, at the temperature at which it
            is trained.
        outcome: [batch].
        group: see `group_statistics`.
        aggregation, constant: see `aggregation_weights`; of what is one optimiser step together.
        counted: [batch, length], which of the answers' tokens are learned from; all if None.
        **more: "reference_log_probs", "importance": [batch, length].
    """
    counted = answer_mask if counted is None else counted
    weights = aggregation_weights(jnp.asarray(counted), aggregation, constant=constant)
    batch = {
        "prompt": prompts,
        "prompt_mask": prompt_mask,
        "answer": answers,
        "answer_mask": answer_mask,
        "counted": counted,
        "old_log_probs": old_log_probs,
        "outcome": outcome,
        "weights": weights,
    }
    batch |= {f"{_GROUP}{name}": value for name, value in group._asdict().items()} | more
    return {name: np.asarray(value) for name, value in batch.items()}


def answer_objective(
    apply: Callable[..., tuple[Array, Array]],
    loss: Callable[..., Loss],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    kl_coefficient: float = 0.0,
    kl_kind: str = "k3",
    entropy_coefficient: float = 0.0,
    takes_weights: bool = True,
    diagnostics: bool = False,
) -> Objective:
    """The objective of batches of answers.

    Args:
        apply: called as `apply(variables, tokens, start=, token_mask=, temperature=, chunk=,
            method="log_probs")`, see `networks.Decoder.log_probs`.
        loss: such as `nft_loss`, called as `loss(log_probs, old_log_probs, mask, outcome, group,
            weights=, importance=)`.
        temperature: at which the answers were drawn.
        chunk: positions whose logits are held at a time.
        kl_coefficient: of the divergence from "reference_log_probs", which batches then have.
        kl_kind: see `kl_estimate`.
        entropy_coefficient: of the entropy, which is subtracted.
        takes_weights: whether the loss has the last two arguments; `online_dpo_loss` has not.
        diagnostics: whether metrics have `ratio_quantiles`, too, and but for losses of pairs
            `means_by_rate` of answers' losses ("loss_at_rate_0.125" is that of rates below 1/4; NaN
            where no answer is learned from) and `split_gradient`, which takes two more gradients.
            Of a batch that is cut into microbatches they are means over these, and NaN if one is.

    Returns:
        An objective of batches of `answer_batch`. Beside the loss's own metrics: "entropy" of the
        tokens' laws in nats, and "kl" with its coefficient.

    Raises:
        ValueError: for coefficients that are not finite; in the objective for batches that lack
            something.
    """
    if not (np.isfinite(kl_coefficient) and np.isfinite(entropy_coefficient)):
        raise ValueError("kl_coefficient and entropy_coefficient must be finite")

    def objective(variables, batch, key):
        value, metrics, _ = judged(variables, batch)
        return value, metrics

    def judged(variables, batch):
        _check(batch, kl_coefficient)
        tokens = jnp.concatenate([batch["prompt"], batch["answer"]], axis=1)
        seen = jnp.concatenate([batch["prompt_mask"], batch["answer_mask"]], axis=1)
        log_probs, entropies = apply(
            variables,
            tokens,
            start=batch["prompt"].shape[1],
            token_mask=seen,
            temperature=temperature,
            chunk=chunk,
            method="log_probs",
        )
        mask = batch["counted"]
        options = {}
        if takes_weights:
            options = {"weights": batch["weights"], "importance": batch.get("importance")}
        group = Groups(*(batch[f"{_GROUP}{name}"] for name in Groups._fields))
        value, metrics = loss(
            log_probs, batch["old_log_probs"], mask, batch["outcome"], group, **options
        )
        metrics = metrics | {"entropy": masked_mean(entropies, mask)}
        if entropy_coefficient:
            value -= entropy_coefficient * aggregate(entropies, mask, batch["weights"])
        if kl_coefficient:
            # Replaced where hidden: a NaN there would come back in gradients.
            reference = jnp.where(mask, batch["reference_log_probs"], 0)
            divergence = kl_estimate(log_probs, reference, kl_kind)
            value += kl_coefficient * aggregate(divergence, mask, batch["weights"])
            metrics["kl"] = masked_mean(divergence, mask)
        return value, metrics, log_probs

    def diagnosed(variables, batch, key):
        del key
        value, metrics, log_probs = judged(variables, batch)
        fixed = jax.lax.stop_gradient(log_probs)
        log_ratio = fixed - batch["old_log_probs"]
        metrics = metrics | ratio_quantiles(log_ratio, batch["counted"])
        if takes_weights:
            metrics |= _losses_by_rate(loss, fixed, batch)
            split = split_gradient(objective, jax.lax.stop_gradient(variables), batch)
            metrics |= {f"gradient_{name}": norm for name, norm in split.items()}
        return value, metrics

    return diagnosed if diagnostics else objective


def _losses_by_rate(loss, log_probs, batch) -> dict[str, Array]:
    def of_answer(log_probs, part):
        group = Groups(*(part[f"{_GROUP}{name}"] for name in Groups._fields))
        options = {"weights": part["weights"], "importance": part.get("importance")}
        arguments = (log_probs, part["old_log_probs"], part["counted"], part["outcome"])
        return loss(*arguments, group, **options)[0]

    alone = lambda tree: jax.tree.map(lambda x: x[:, None], tree)  # noqa: E731
    losses = jax.vmap(of_answer)(alone(log_probs), alone(dict(batch)))
    group = Groups(*(batch[f"{_GROUP}{name}"] for name in Groups._fields))
    means = means_by_rate(losses, group, where=jnp.any(batch["counted"], axis=1))
    centers = (np.arange(len(means)) + 0.5) / len(means)
    return {f"loss_at_rate_{c:g}": mean for c, mean in zip(centers, means, strict=True)}


def answer_likelihood(
    apply: Callable[..., tuple[Array, Array]], *, chunk: int | None = None
) -> Objective:
    """Supervised learning: sums over tokens of -log p(token) of given answers, by their weights.

    Args:
        apply, chunk: as of `answer_objective`.

    Returns:
        An objective of batches with "prompt", "prompt_mask", "answer", "answer_mask" and "weights".
    """

    def objective(variables, batch, key):
        del key
        log_probs, entropies = apply(
            variables,
            jnp.concatenate([batch["prompt"], batch["answer"]], axis=1),
            start=batch["prompt"].shape[1],
            token_mask=jnp.concatenate([batch["prompt_mask"], batch["answer_mask"]], axis=1),
            temperature=1.0,
            chunk=chunk,
            method="log_probs",
        )
        mask = batch["answer_mask"]
        loss = aggregate(-log_probs, mask, batch["weights"])
        return loss, {
            "nll": masked_mean(-log_probs, mask),
            "entropy": masked_mean(entropies, mask),
        }

    return objective


def _check(batch: Mapping[str, Any], kl_coefficient: float) -> None:
    wanted = ["prompt", "prompt_mask", "answer", "answer_mask", "old_log_probs", "outcome"]
    wanted += ["counted", "weights", *(f"{_GROUP}{name}" for name in Groups._fields)]
    if kl_coefficient:
        wanted.append("reference_log_probs")
    if missing := [name for name in wanted if name not in batch]:
        raise ValueError(f"batch must be one of answer_batch; it lacks {missing}")
