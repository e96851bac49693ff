"""Maximum likelihood of autoregressive token models, next-scale ones among them.

    loss = -(1 / L) sum_i log p(token_i | tokens before i, class)

in nats per token; a share of the examples is trained without its class, for classifier-free
guidance (arXiv 2207.12598).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.likelihood import token_log_probabilities


def autoregressive(
    apply: Callable[..., Array],
    *,
    null_label: int | None = None,
    label_dropout: float = 0.0,
) -> Objective:
    """The objective of a token model.

    Args:
      apply: called as `apply(variables, tokens, condition, train=False)`; returns
        [batch, length, vocab], the logits of position i given the condition and the tokens before
        i (of earlier scales, for a next-scale network).
      null_label: "no class".
      label_dropout: probability of replacing the label of a row by it.

    Returns:
      An objective of batches {"tokens": [batch, length] int, "label": [batch] int, optional}.
      Optional "inputs", [batch, ...], are what the network sees of tokens, such as features of a
      codebook; `condition` is then (label, inputs), else the label. The loss is a mean over
      tokens, in nats, as is the metric "mle_loss"; "accuracy" is the share of tokens that the
      network thinks the most probable. It raises ValueError for a batch without "tokens" or whose
      tokens are not of this form.

    Raises:
      ValueError: if `label_dropout` is not in [0, 1] or has no `null_label`.
    """
    if not 0 <= label_dropout <= 1 or (label_dropout and null_label is None):
        raise ValueError(
            f"label_dropout is {label_dropout}; it must be in [0, 1] and needs a null_label, got "
            f"{null_label}"
        )

    def objective(variables, batch, key):
        if "tokens" not in batch:
            raise ValueError(f'batch must have the entry "tokens", got {sorted(batch)}')
        tokens = jnp.asarray(batch["tokens"])
        if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"batch['tokens'] must be integers [batch, length], got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        label = batch.get("label")
        if label_dropout:
            if label is None:
                raise ValueError(f"label_dropout={label_dropout}, but the batch has no label")
            dropped = jax.random.bernoulli(key, label_dropout, (len(tokens),))
            label = jnp.where(dropped, null_label, label)
        condition = (label, batch["inputs"]) if "inputs" in batch else label
        logits = apply(variables, tokens, condition, train=False)
        loss = -jnp.mean(token_log_probabilities(logits, tokens))
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == tokens)
        return loss, {"mle_loss": loss, "accuracy": accuracy}

    return objective
