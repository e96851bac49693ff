"""Direct discriminative optimisation of token models (arXiv 2503.01103), exact or by a bound.

Autoregressive and next-scale models have exact log-likelihoods; masked ones the integrand of their
bound, for which times and masks are drawn, the same for network and reference, data and samples.
Rows whose label was dropped, for classifier-free guidance, are trained without the samples.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.discriminative import check_alpha_and_beta, ddo_loss
from genjax_lab.objectives.discriminative_denoising import (
    paired,
    paired_labels,
    reference_terms,
    require_reference,
    split_reference,
)
from genjax_lab.objectives.log_ratio import paired_log_likelihoods

UNCOND_MODES = ("alpha0", "mle")


def ddo_tokens(
    log_likelihood: Callable[..., Float[Array, "batch"]],
    *,
    alpha: float,
    beta: float,
    draw: Callable[..., tuple[Array, ...]] | None = None,
    null_label: int | None = None,
    uncond_mode: str = "alpha0",
    normalize_by_alpha: bool = True,
) -> Objective:
    """The DDO objective of a token model.

    Args:
      log_likelihood: (variables, tokens, label, *draws) -> [batch], of
        `autoregressive_log_likelihood` or `masked_log_likelihood`.
      alpha: weight of the samples, at least 0; [10, 100] for VAR.
      beta: factor of the log-ratios, positive; 0.02 for VAR.
      draw: (key, [batch, length]) -> draws, such as `draw_times_and_masks`; none if None.
      null_label: "no class", which replaces the label of data and sample in rows with a dropped
        label; if None labels are taken as they come.
      uncond_mode: rows with a dropped label have "alpha0", the data term of the loss only, or
        "mle", plain maximum likelihood: the negative log-likelihood per token.
      normalize_by_alpha: divides the loss, but not the "mle" rows, by max(alpha, 1).

    Returns:
      An objective of batches {"tokens" and "fake_tokens": [batch, length] int, "label" and
      "fake_label": both or neither, "label_dropped": [batch] bool, optional}, of variables as
      `ddo_denoising`. Optional "reference_real" and "reference_fake", [batch], are recorded
      log-likelihoods of the reference, with which it is not evaluated; not together with `draw` or
      with labels that are replaced here. Metrics are those of `ddo_loss`, over all rows, and
      "mle_loss", the negative log-likelihood of the data per token.

    Raises:
      ValueError: for an unknown `uncond_mode`, a negative alpha or a beta that is not positive.
    """
    check_alpha_and_beta(alpha, beta)
    if uncond_mode not in UNCOND_MODES:
        raise ValueError(f"uncond_mode is {uncond_mode!r}; it must be one of {UNCOND_MODES}")

    def objective(variables, batch, key):
        network, reference = split_reference(variables)
        real, fake = _paired_tokens(batch)
        dropped = _dropped(batch, len(real))
        label = paired_labels(batch)
        if dropped is not None and null_label is not None:
            if label is None:
                raise ValueError('batch has "label_dropped" but no "label" that could be dropped')
            label = jnp.where(paired(dropped, dropped), null_label, label)
        draws = () if draw is None else draw(key, real.shape)
        rows = (paired(real, fake), label, *(paired(value, value) for value in draws))
        recorded = reference_terms(batch, len(real), 1)
        if recorded is None:
            require_reference(reference)
            own, frozen = paired_log_likelihoods(log_likelihood, network, reference, *rows)
        else:
            _check_recorded(draw, dropped, null_label)
            own, frozen = log_likelihood(network, *rows), recorded
        own = own.reshape(-1, 2)
        ratio = own - frozen.reshape(own.shape)

        kept = None if dropped is None else 1 - dropped.astype(ratio.dtype)
        value, metrics = ddo_loss(
            ratio[:, 0],
            ratio[:, 1],
            alpha,
            beta,
            real_weight=kept if uncond_mode == "mle" else None,
            fake_weight=kept,
            normalize_by_alpha=normalize_by_alpha,
        )
        nll = -own[:, 0] / real.shape[1]
        if kept is not None and uncond_mode == "mle":
            value = value + jnp.mean((1 - kept) * nll)
        return value, metrics | {"mle_loss": jnp.mean(nll)}

    return objective


def _paired_tokens(batch: Mapping[str, Array]) -> tuple[Array, Array]:
    for name in ("tokens", "fake_tokens"):
        if name not in batch:
            raise ValueError(f'batch must have the entry "{name}", got {sorted(batch)}')
    real, fake = jnp.asarray(batch["tokens"]), jnp.asarray(batch["fake_tokens"])
    integers = all(jnp.issubdtype(tokens.dtype, jnp.integer) for tokens in (real, fake))
    if real.ndim != 2 or real.shape != fake.shape or not real.size or not integers:
        raise ValueError(
            "batch['tokens'] and batch['fake_tokens'] must be integers [batch, length], as many of "
            f"both, got {real.dtype} {list(real.shape)} and {fake.dtype} {list(fake.shape)}"
        )
    return real, fake


def _dropped(batch: Mapping[str, Array], rows: int) -> Array | None:
    if "label_dropped" not in batch:
        return None
    dropped = jnp.asarray(batch["label_dropped"])
    if dropped.shape != (rows,) or dropped.dtype != jnp.bool_:
        raise ValueError(
            f"batch['label_dropped'] must be bool [{rows}], got {dropped.dtype} "
            f"{list(dropped.shape)}"
        )
    return dropped


def _check_recorded(draw: Callable | None, dropped: Array | None, null_label: int | None) -> None:
    if draw is not None or (dropped is not None and null_label is not None):
        raise ValueError(
            "batch has recorded reference terms, which belong to given labels and no draws: leave "
            "out `draw`, and `null_label` where labels are dropped"
        )
