"""Direct discriminative optimisation of token models (arXiv 2503.01103), exact or by a bound.

Autoregressive and next-scale models have exact log-likelihoods; masked ones the integrand of their
bound, for which times and masks are drawn, the same for network and reference, data and samples.
Rows whose label was dropped, for classifier-free guidance, are trained without the samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.discriminative import check_alpha_and_beta, ddo_loss
from genjax_lab.objectives.discriminative_denoising import (
    paired,
    paired_labels,
    reference_terms,
    require_reference,
    split_reference,
)
from genjax_lab.objectives.log_ratio import member_log_likelihoods, paired_log_likelihoods
from genjax_lab.objectives.members import alpha_and_beta_of_members, members_of, sum_of_members

UNCOND_MODES = ("alpha0", "mle")
# Keeps the draws of dropped labels apart from those of times and masks.
_DROPOUT_STREAM = 2**31


class LabelDropout(NamedTuple):
    """How labels are dropped while fine-tuning, so that the model can still be guided.

    Attributes:
      null_label: "no class", which replaces the label of data and sample in such a row; if None
        labels are taken as they come, dropped or not.
      rate: probability of dropping the label of a row of a batch that has no "label_dropped".
      mode: rows with a dropped label have "alpha0", the data term of the loss only, or "mle", plain
        maximum likelihood: the negative log-likelihood per token.
    """

    null_label: int | None = None
    rate: float = 0.0
    mode: str = "alpha0"


def ddo_tokens(
    log_likelihood: Callable[..., Float[Array, "batch"]],
    *,
    alpha: float,
    beta: float,
    draw: Callable[..., tuple[Array, ...]] | None = None,
    label_dropout: LabelDropout = LabelDropout(),  # noqa: B008 (a constant)
    normalize_by_alpha: bool = True,
) -> Objective:
    """The DDO objective of a token model.

    Args:
      log_likelihood: (variables, tokens, condition, *draws) -> [batch], of
        `autoregressive_log_likelihood` or `masked_log_likelihood`.
      alpha: weight of the samples, at least 0; [10, 100] for VAR.
      beta: factor of the log-ratios, positive; 0.02 for VAR.
      draw: (key, [batch, length]) -> draws, such as `draw_times_and_masks`; none if None.
      label_dropout: what happens to labels and to the rows without.
      normalize_by_alpha: divides the loss, but not the "mle" rows, by max(alpha, 1).

    Returns:
      An objective of batches {"tokens" and "fake_tokens": [batch, length] int, "label" and
      "fake_label": both or neither, "label_dropped": [batch] bool, optional}, of variables as
      `ddo_denoising`. Optional "inputs" and "fake_inputs", [batch, ...], are what the network sees
      of tokens, such as features of a codebook; `condition` is then (label, inputs), else the
      label. Optional "reference_terms" and "fake_reference_terms", [batch], are recorded
      log-likelihoods of the reference, with which it is not evaluated; [batch, 2], with the label
      and with `null_label`, where labels are replaced here; not together with `draw`. Metrics are
      those of `ddo_loss`, over all rows, and "mle_loss", the negative log-likelihood of the data
      per token.

    Raises:
      ValueError: for an unknown mode, a rate that is not in [0, 1] or has no `null_label`, a
        negative alpha or a beta that is not positive.
    """
    check_alpha_and_beta(alpha, beta)
    _check_dropout(label_dropout)

    def objective(variables, batch, key):
        network, reference = split_reference(variables)
        rows, kept, length = _rows(batch, key, draw, label_dropout)
        recorded = _recorded(batch, draw, label_dropout, kept)
        if recorded is None:
            require_reference(reference)
            own, frozen = paired_log_likelihoods(log_likelihood, network, reference, *rows)
        else:
            own, frozen = log_likelihood(network, *rows), recorded
        return _loss(own, frozen, kept, alpha, beta, length, label_dropout.mode, normalize_by_alpha)

    return objective


def ddo_tokens_grid(
    log_likelihood: Callable[..., Float[Array, "batch"]],
    *,
    alpha: Sequence[float],
    beta: Sequence[float],
    draw: Callable[..., tuple[Array, ...]] | None = None,
    label_dropout: LabelDropout = LabelDropout(),  # noqa: B008 (a constant)
    normalize_by_alpha: bool = True,
) -> Objective:
    """`ddo_tokens` of several (alpha, beta) at once, on the same draws and one reference.

    Arguments and batches are those of `ddo_tokens`, but `alpha` and `beta` have one entry for each
    member; variables, loss, metrics and errors are as for `ddo_denoising_grid`.
    """
    alpha, beta = alpha_and_beta_of_members(alpha, beta)
    check_alpha_and_beta(alpha, beta)
    _check_dropout(label_dropout)

    def objective(variables, batch, key):
        network, reference = split_reference(variables)
        members = members_of(network, len(alpha))
        rows, kept, length = _rows(batch, key, draw, label_dropout)
        frozen = _recorded(batch, draw, label_dropout, kept)
        if frozen is None:
            require_reference(reference)
            own, frozen = member_log_likelihoods(log_likelihood, members, reference, *rows)
        else:
            own = jax.vmap(lambda member: log_likelihood(member, *rows))(members)
        of_member = lambda own, alpha, beta: _loss(  # noqa: E731
            own, frozen, kept, alpha, beta, length, label_dropout.mode, normalize_by_alpha
        )
        return sum_of_members(*jax.vmap(of_member)(own, alpha, beta))

    return objective


def _loss(
    own: Float[Array, "rows"],
    frozen: Float[Array, "..."],
    kept: Float[Array, "batch"] | None,
    alpha: float,
    beta: float,
    length: int,
    mode: str,
    normalize_by_alpha: bool,
) -> tuple[Array, dict[str, Array]]:
    """Loss and metrics of log-likelihoods of pairs of rows."""
    own = own.reshape(-1, 2)
    ratio = own - frozen.reshape(own.shape)
    value, metrics = ddo_loss(
        ratio[:, 0],
        ratio[:, 1],
        alpha,
        beta,
        real_weight=kept if mode == "mle" else None,
        fake_weight=kept,
        normalize_by_alpha=normalize_by_alpha,
    )
    nll = -own[:, 0] / length
    if kept is not None and mode == "mle":
        value = value + jnp.mean((1 - kept) * nll)
    return value, metrics | {"mle_loss": jnp.mean(nll)}


def _rows(
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
    draw: Callable | None,
    dropout: LabelDropout,
) -> tuple[tuple[PyTree, ...], Float[Array, "batch"] | None, int]:
    """((tokens, condition, *draws) of pairs of rows, 0 where a label was dropped, tokens each)."""
    real, fake = _paired_tokens(batch)
    dropped = _dropped(batch, len(real), key, dropout)
    label = paired_labels(batch)
    if dropped is not None and dropout.null_label is not None:
        if label is None:
            raise ValueError('batch has "label_dropped" but no "label" that could be dropped')
        label = jnp.where(paired(dropped, dropped), dropout.null_label, label)
    condition = label
    if ("inputs" in batch) != ("fake_inputs" in batch):
        raise ValueError('batch must have both "inputs" and "fake_inputs" or neither')
    if "inputs" in batch:
        condition = (label, paired(batch["inputs"], batch["fake_inputs"]))
    draws = () if draw is None else draw(key, real.shape)
    rows = (paired(real, fake), condition, *(paired(value, value) for value in draws))
    kept = None if dropped is None else 1 - dropped.astype(jnp.float32)
    return rows, kept, real.shape[1]


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


def _dropped(
    batch: Mapping[str, Array], rows: int, key: PRNGKeyArray, dropout: LabelDropout
) -> Array | None:
    if "label_dropped" not in batch:
        if not dropout.rate:
            return None
        return jax.random.bernoulli(jax.random.fold_in(key, _DROPOUT_STREAM), dropout.rate, (rows,))
    dropped = jnp.asarray(batch["label_dropped"])
    if dropped.shape != (rows,) or dropped.dtype != jnp.bool_:
        raise ValueError(
            f"batch['label_dropped'] must be bool [{rows}], got {dropped.dtype} "
            f"{list(dropped.shape)}"
        )
    return dropped


def _recorded(
    batch: Mapping[str, Array],
    draw: Callable | None,
    dropout: LabelDropout,
    kept: Float[Array, "batch"] | None,
) -> Float[Array, "batch two"] | None:
    """Recorded terms of the reference for data and samples, or None."""
    if draw is not None:
        if "reference_terms" in batch:
            raise ValueError(
                "batch has recorded reference terms, which know of no draws: leave out `draw`, or "
                "these entries"
            )
        return None
    replaced = kept is not None and dropout.null_label is not None
    recorded = reference_terms(
        *(batch, len(batch["tokens"]), 2 if replaced else 1),
        "with label and with null_label" if replaced else "one for each row",
    )
    if recorded is None:
        return None
    return jnp.where(kept[:, None] > 0, *recorded.swapaxes(0, 1)) if replaced else recorded[:, 0]


def _check_dropout(dropout: LabelDropout) -> None:
    if dropout.mode not in UNCOND_MODES:
        raise ValueError(f"label_dropout.mode is {dropout.mode!r}; it must be in {UNCOND_MODES}")
    if not 0 <= dropout.rate <= 1:
        raise ValueError(f"label_dropout.rate is {dropout.rate}; it must be in [0, 1]")
    if dropout.rate and dropout.null_label is None:
        raise ValueError(f"label_dropout.rate={dropout.rate} needs a null_label")
