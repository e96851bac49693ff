"""Confidence-ordered sampling of masked tokens (arXiv 2202.04200, 2502.09992).

Every call draws a token for each masked position, and those that the network is surest of stand.
That is another law than the model's: see `first_hitting` for that one.

    "confidence"  log-probability of the drawn token
    "margin"      probability of the most probable token less that of the next
    "entropy"     minus the entropy
    "random"      none, which is ancestral sampling with a fixed number of tokens in each call

all of them at temperature 1, whatever the temperature of the draw. A fixed number of calls shares
the masks out evenly, the first calls taking one more where they do not divide; a threshold takes
all that are sure enough, at least one (Fast-dLLM, arXiv 2505.22618).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState
from genjax_lab.samplers.tokens import (
    DrawOptions,
    TokenDenoiser,
    check_sequences,
    draw_rows,
    masks_left,
    split_keys,
)

RANKS = ("confidence", "margin", "entropy", "random")


class ConfidenceReport(NamedTuple):
    """What is told beside the samples.

    Attributes:
        revealed_at: [batch, length], the step after which a token stood; -1 where none was drawn.
        masks_left: [batch], tokens that are masked still.
    """

    revealed_at: Int[Array, "batch length"]
    masks_left: Int[Array, "batch"]


class _History(NamedTuple):
    first_masks: Int[Array, "batch"]  # masked tokens at the start
    revealed_at: Int[Array, "batch length"]


def confidence(
    denoiser: TokenDenoiser,
    length: int,
    *,
    num_steps: int | None = None,
    threshold: float | Float[Array, ""] | None = None,
    rank: str = "confidence",
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
) -> Sampler:
    """The sampler; its samples are int32 tokens [batch, length].

    `initial` may have tokens that stand, around masks. Reports a `ConfidenceReport`.

    Args:
        denoiser: the network, which is not told the time.
        length: tokens of a sequence.
        num_steps: calls, among which the masks of each sequence are shared out.
        threshold: in its place, the rank that a token must exceed to stand: a probability in (0, 1)
            for "confidence" and "margin", an entropy in nats that it must be below for "entropy".
            Stops when no token of the batch is masked.
        rank: one of `RANKS`.
        temperature, top_k, top_p, min_p: of the draws, see `exact_categorical` and `logit_floor`.

    Raises:
        ValueError: if not just one of `num_steps` and `threshold` is given, or a number is out of
            range; in sampling, if the shape is another.
    """
    if rank not in RANKS:
        raise ValueError(f"rank is {rank!r}, not in {RANKS}")
    if (num_steps is None) == (threshold is None):
        raise ValueError("one of num_steps and threshold must be given")
    if length < 1 or (num_steps is not None and not 1 <= num_steps <= length):
        raise ValueError(
            f"length must be positive and num_steps in [1, length], got {length} and {num_steps}"
        )
    if threshold is not None:
        top = math.inf if rank == "entropy" else 1
        if rank == "random":
            raise ValueError("threshold needs another rank than 'random'")
        if not isinstance(threshold, jax.core.Tracer) and not 0 < threshold < top:
            raise ValueError(f"threshold is {threshold}; it must be in (0, {top})")
    options = DrawOptions(temperature, top_k, top_p, min_p).checked(denoiser.vocab_size)
    return Sampler(
        init=Partial(_init, denoiser, length),
        predict=Partial(_predict, denoiser),
        transition=Partial(_transition, denoiser, num_steps, threshold, rank, options),
        num_steps=length if num_steps is None else num_steps,
        finished=None if threshold is None else Partial(_finished, denoiser),
        report=Partial(_report, denoiser),
    )


def _init(denoiser, length, keys, shape, condition):
    del keys
    check_sequences(shape, length)
    sample = jnp.full(shape, denoiser.mask_id, jnp.int32)
    history = _History(jnp.zeros(shape[:1], jnp.int32), jnp.full(shape, -1, jnp.int32))
    return SamplerState(
        ExampleState(sample, condition, history), SharedState(jnp.int32(0), (), jnp.int32(0))
    )


def _predict(denoiser, state):
    example, shared = state
    logits = denoiser.predict(example.sample, None, example.condition, None)
    evaluations = shared.evaluations + denoiser.evaluations
    return logits, SamplerState(example, shared._replace(evaluations=evaluations))


def _transition(denoiser, num_steps, threshold, rank, options, keys, state, logits):
    example, shared = state
    history = example.history
    masked = example.sample == denoiser.mask_id
    number = jnp.sum(masked, axis=1, dtype=jnp.int32)
    first = jnp.where(shared.step == 0, number, history.first_masks)
    draw_keys, rank_keys = split_keys(keys)
    positions = jnp.broadcast_to(jnp.arange(masked.shape[1], dtype=jnp.int32), masked.shape)
    draw = draw_rows(draw_keys, logits, positions, options)
    score = {
        "confidence": lambda: draw.log_probability,
        "margin": lambda: draw.margin,
        "entropy": lambda: -draw.entropy,
        "random": lambda: jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:]))(
            rank_keys
        ),
    }[rank]()
    score = jnp.where(masked, score, -jnp.inf)
    place_of = jnp.argsort(jnp.argsort(-score, axis=1), axis=1)
    if threshold is None:
        count = first // num_steps + (shared.step < first % num_steps)
        chosen = place_of < count[:, None]
    else:
        limit = {"confidence": jnp.log, "margin": lambda x: x, "entropy": lambda x: -x}[rank](
            threshold
        )
        chosen = (score > limit) | (place_of == 0)
    chosen &= masked & (draw.token < denoiser.mask_id)
    sample = jnp.where(chosen, draw.token, example.sample)
    history = _History(first, jnp.where(chosen, shared.step, history.revealed_at))
    return SamplerState(example._replace(sample=sample, history=history), shared)


def _finished(denoiser, state):
    return jnp.all(masks_left(state, denoiser.mask_id) == 0)


def _report(denoiser, state):
    return ConfidenceReport(state.example.history.revealed_at, masks_left(state, denoiser.mask_id))
