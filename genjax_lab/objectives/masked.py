"""The bound of masked diffusion in three forms that are equal on average (arXiv 2409.02908).

    by count   (1/n) E_{n tokens masked} sum over masked tokens of -log p(x_i | x_unmasked),
               summed over n = 1 .. L: n is drawn uniformly, and weighs L / n
    by time    integral of -alpha'(t) / (1 - alpha(t)) times that sum, each token masked with
               probability 1 - alpha(t)
    by steps   the same in T steps: T (alpha(s) - alpha(t)) / (1 - alpha(t)), s = t - 1/T

The first has no time at all. A network that is told the time is, given the count, told a draw from
its posterior: 1 - alpha(t) ~ Beta(n, L - n + 1).

Block diffusion (BD3-LM, arXiv 2503.09573) predicts block after block, each by masked diffusion
given the blocks before it, whose bounds add up. All blocks are trained in one call: the network
sees the masked sequence and, behind it, the sequence itself, under `block_diffusion_mask`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.likelihood import token_log_probabilities
from genjax_lab.processes import masked
from genjax_lab.processes.masked import MaskSchedule

FORMS = ("count", "time", "steps")


def masked_diffusion_loss(
    apply: Callable[..., Array],
    mask_id: int,
    *,
    form: str = "count",
    schedule: MaskSchedule | None = None,
    num_steps: int = 1000,
    time_conditioned: bool = False,
    max_rows: int | None = None,
    shares: tuple[float, float] = (0.0, 1.0),
    block: int | None = None,
) -> Objective:
    """The objective of a masked diffusion model.

    Args:
        apply: called as `apply(variables, tokens, t, condition, rows=rows, train=True, rngs=...)`;
            returns the logits [batch, rows, vocabulary] at the positions `rows`, int32 [batch,
            rows], of all positions if None. `t` is [batch], or None without `time_conditioned`.
        mask_id: the token that stands for "masked".
        form: "count", "time" or "steps".
        schedule: `processes.masked.linear()` if None. It changes the variance of the last two forms
            and what time a network is told, but not the bound.
        num_steps: T of the form "steps".
        time_conditioned: whether the network is told the time.
        max_rows: at most so many masked positions of each sequence, chosen at random, are
            predicted, which saves most of the last layer; all if None. The mean stays the same.
        shares: masked shares that are trained on, as in BD3-LM (arXiv 2503.09573), by the form
            "time" only. Narrower ranges have less variance, but the loss is then no bound.
        block: tokens of a block, of which a sequence has whole ones, for block diffusion; the
            network is then also called with `positions` and `mask`, on sequences twice as long.

    Returns:
        An objective of batches {"tokens": [batch, length] int; optional "may_mask": [batch, length]
        bool, False for prompts and padding; optional "condition"}. The loss is in nats for each
        token that may be masked. Metrics: "nelbo", the same; "masked_nll" and "masked_accuracy" of
        the masked tokens, unweighted. The draws of a batch are stratified: their counts, or times,
        are evenly spread. It raises ValueError for a batch without such tokens.

    Raises:
        ValueError: for an unknown form or numbers out of range.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, not in {FORMS}")
    if num_steps < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"num_steps and max_rows must be positive, got {num_steps} and {max_rows}")
    if block is not None and (block < 1 or time_conditioned):
        raise ValueError(
            f"block must be positive, and blocks have no common time, got block={block} and "
            f"time_conditioned={time_conditioned}"
        )
    low, high = shares
    if not 0 <= low < high <= 1 or (form != "time" and (low, high) != (0, 1)):
        raise ValueError(
            f"shares must be in order within [0, 1], and (0, 1) but for form='time', got {shares}"
        )
    schedule = masked.linear() if schedule is None else schedule

    def objective(variables, batch, key):
        tokens, may_mask = tokens_of(batch)
        draw_key, row_key, dropout_key = jax.random.split(key, 3)
        blocks = may_mask
        if block is not None:
            if may_mask.shape[1] % block:
                raise ValueError(f"{may_mask.shape[1]} tokens are no whole blocks of {block}")
            # The first blocks of all sequences, then the second: counts that are spread evenly
            # over all are then so over the blocks of a sequence, too.
            blocks = may_mask.reshape(len(tokens), -1, block).swapaxes(0, 1).reshape(-1, block)
        is_masked, t, weight = draw_masks(draw_key, blocks, form, schedule, num_steps, (low, high))
        weight = jnp.broadcast_to(weight[:, None], blocks.shape)
        if block is not None:
            is_masked, weight = (
                x.reshape(-1, len(tokens), block).swapaxes(0, 1).reshape(may_mask.shape)
                for x in (is_masked, weight)
            )
        rows = chosen = None
        if max_rows is not None and max_rows < tokens.shape[1]:
            keys = jax.random.split(row_key, len(tokens))
            rows = masked.reveal_order(keys, is_masked)[:, :max_rows]
            number = jnp.sum(is_masked, axis=1)
            scale = number / jnp.maximum(jnp.minimum(number, max_rows), 1)
            chosen, weight = (jnp.take_along_axis(x, rows, axis=1) for x in (is_masked, weight))
            weight = weight * scale[:, None]
        shown = jnp.where(is_masked, mask_id, tokens)
        options = {}
        if block is not None:
            length = tokens.shape[1]
            shown = jnp.concatenate([shown, tokens], axis=1)
            options["positions"] = jnp.tile(jnp.arange(length), 2)
            options["mask"] = jnp.asarray(block_diffusion_mask(length, block))
        wanted = rows
        if block is not None and rows is None:
            wanted = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        logits = apply(
            variables,
            shown,
            t if time_conditioned else None,
            batch.get("condition"),
            rows=wanted,
            train=True,
            rngs={"dropout": dropout_key},
            **options,
        )
        targets = tokens if rows is None else jnp.take_along_axis(tokens, rows, axis=1)
        chosen = is_masked if chosen is None else chosen
        terms = jnp.where(chosen, -token_log_probabilities(logits, targets), 0)
        hits = jnp.where(chosen, jnp.argmax(logits, axis=-1) == targets, 0)
        loss = jnp.sum(weight * terms) / jnp.sum(may_mask)
        number = jnp.maximum(jnp.sum(chosen), 1)
        return loss, {
            "nelbo": loss,
            "masked_nll": jnp.sum(terms) / number,
            "masked_accuracy": jnp.sum(hits) / number,
        }

    return objective


def block_diffusion_mask(length: int, block: int) -> Bool[np.ndarray, "twice twice"]:
    """What the tokens of [masked sequence, sequence] see, [2 length, 2 length].

    A masked token sees the masked tokens of its block, and the blocks before it as they are; a
    token of the sequence itself sees the sequence up to the end of its block.
    """
    number = np.arange(length) // block
    same, earlier = number[:, None] == number, number[:, None] > number
    return np.block([[same, earlier], [np.zeros_like(same), same | earlier]])


def draw_masks(
    key: Key[Array, ""],
    may_mask: Bool[Array, "batch length"],
    form: str = "count",
    schedule: MaskSchedule | None = None,
    num_steps: int = 1000,
    shares: tuple[float, float] = (0.0, 1.0),
) -> tuple[Bool[Array, "batch length"], Float[Array, "batch"], Float[Array, "batch"]]:
    """What is masked, at what time, and how much the masked tokens' sum counts.

    Returns:
        (is_masked [batch, length], t [batch], weight [batch]).
    """
    schedule = masked.linear() if schedule is None else schedule
    even_key, mask_key, time_key = jax.random.split(key, 3)
    batch = len(may_mask)
    length = jnp.sum(may_mask, axis=1)
    even = (jax.random.uniform(even_key) + jnp.arange(batch) / batch) % 1
    if form == "count":
        number = jnp.minimum(1 + jnp.floor(even * length).astype(jnp.int32), length)
        random = jax.random.bits(mask_key, may_mask.shape, jnp.uint32) >> 1
        ranks = masked.ranks_of(jnp.where(may_mask, random, jnp.uint32(2**32 - 1)))
        # Beta needs positive parameters: a sequence without a token that may be masked weighs 0.
        n = jnp.maximum(number, 1)
        share = jax.random.beta(time_key, n, jnp.maximum(length - n, 0) + 1.0)
        is_masked = (ranks < number[:, None]) & may_mask
        return is_masked, schedule.time_of(share), jnp.where(number > 0, length / n, 0)
    if form == "steps":
        t = (jnp.floor(even * num_steps) + 1) / num_steps
        share = schedule.masked(t)
        weight = num_steps * (share - schedule.masked(t - 1 / num_steps)) / share
    else:
        ends = (schedule.time_of(jnp.float32(end)) for end in shares)
        start, stop = ends
        t = stop - (stop - start) * even  # in (start, stop]
        share = schedule.masked(t)
        weight = schedule.weight(t)
    is_masked = (jax.random.uniform(mask_key, may_mask.shape) < share[:, None]) & may_mask
    return is_masked, t, weight


def tokens_of(batch: Any) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """(tokens, may_mask) of a batch; ValueError if it has none of this form."""
    if "tokens" not in batch:
        raise ValueError(f'batch must have the entry "tokens", got {sorted(batch)}')
    tokens = jnp.asarray(batch["tokens"])
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"batch['tokens'] must be integers [batch, length], got {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    may_mask = jnp.asarray(batch.get("may_mask", jnp.ones(tokens.shape, bool)))
    if may_mask.shape != tokens.shape or may_mask.dtype != jnp.bool_:
        raise ValueError(
            f"batch['may_mask'] must be bool {list(tokens.shape)}, got {may_mask.dtype} "
            f"{list(may_mask.shape)}"
        )
    return tokens, may_mask
