"""The first-hitting sampler of masked diffusion (arXiv 2409.02908), exact and in L calls.

With n tokens masked, the time at which the next is unmasked has a closed form, and which one it is,
is uniform. So one goes from hit to hit: every call unmasks one token of every sequence,

    1 - alpha(tau_{n-1}) = (1 - alpha(tau_n)) u^{1/n},   position uniform among the masked,
    token ~ p(x_i | unmasked tokens [, tau_{n-1}]),      n = L .. 1,

whose law is that of ancestral sampling in infinitely many steps. A network that is not told the
time needs no times. Positions differ from sequence to sequence, but their number does not, so a
batch stays in step; of an `initial` iterate only masked tokens are drawn, and sequences with fewer
of them are done earlier. Only the rows that are drawn are predicted: the network's last layer and
the draw cost one row for each call and sequence.

Faster and inexact: `tokens_per_step` tokens for each call; `extrapolate`, each of them from the law
extrapolated to its own time; `corrector_sweeps`, after each group its tokens are masked and drawn
again one by one, given the others. The last two are ours. No extrapolation of one token's law
removes the error of drawing several as if they were independent; sweeps do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree, UInt32

from genjax_lab.processes.masked import MaskSchedule, linear
from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState
from genjax_lab.samplers.tokens import (
    DrawOptions,
    TokenDenoiser,
    check_sequences,
    draw_rows,
    masks_left,
    place,
    split_keys,
)


class FirstHittingReport(NamedTuple):
    """What is told beside the samples.

    Attributes:
        revealed_at: [batch, length], the step after which a token stood; -1 where none was drawn.
        log_probability: [batch], sum over the drawn tokens, of the laws that they were drawn from
            at temperature 1.
        masks_left: [batch], tokens that are masked still: 0 but for networks that give NaN.
    """

    revealed_at: Int[Array, "batch length"]
    log_probability: Float[Array, "batch"]
    masks_left: Int[Array, "batch"]


class _History(NamedTuple):
    priority: UInt32[Array, "batch length"]  # masked tokens are drawn in its order
    uniform: Float[Array, "batch k"]  # of the next hits
    share: Float[Array, "batch"]  # 1 - alpha at the last hit
    rows: Int[Array, "batch k"]  # the group that is being drawn
    revealed_at: Int[Array, "batch length"]
    log_probability: Float[Array, "batch"]
    earlier: PyTree  # (probabilities [batch, length, vocabulary], share) of the last call


class _Settings(NamedTuple):
    tokens_per_step: int
    options: DrawOptions
    schedule: MaskSchedule
    time_conditioned: bool
    extrapolate: bool
    corrector_sweeps: int

    @property
    def calls(self) -> int:
        """Of the network for each group of tokens."""
        return 1 + self.corrector_sweeps * self.tokens_per_step


def first_hitting(
    denoiser: TokenDenoiser,
    length: int,
    *,
    tokens_per_step: int = 1,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    schedule: MaskSchedule | None = None,
    time_conditioned: bool = False,
    extrapolate: bool = False,
    corrector_sweeps: int = 0,
    stop_early: bool = False,
) -> Sampler:
    """The sampler; its samples are int32 tokens [batch, length].

    `initial` may have tokens that stand, around masks (`denoiser.mask_id`). Reports a
    `FirstHittingReport`.

    Args:
        denoiser: the network.
        length: tokens of a sequence.
        tokens_per_step: tokens of each sequence that are drawn from one prediction.
        temperature: what logits are divided by; 0 takes the most probable token.
        top_k, top_p, min_p: cuts, see `logit_floor`.
        schedule: tells a network that is told the time what it is; linear if None.
        time_conditioned: whether the network is told the time of the hit.
        extrapolate: whether tokens are drawn from p_b + (tau - tau_b) / (tau_b - tau_a) (p_b -
            p_a), cut off at 0, with the laws p_a and p_b of the last two calls. Needs the laws of
            all positions, [batch, length, vocabulary].
        corrector_sweeps: how often each token of a group is drawn again; a call for each.
        stop_early: whether to stop when no token of the batch is masked, which saves calls for an
            `initial` with few masks, but leaves no trajectory.

    Raises:
        ValueError: if a number is out of range; in sampling, if the shape is another.
    """
    if length < 1 or not 1 <= tokens_per_step <= length or corrector_sweeps < 0:
        raise ValueError(
            "length must be positive, tokens_per_step in [1, length] and corrector_sweeps at least "
            f"0, got {length}, {tokens_per_step} and {corrector_sweeps}"
        )
    if extrapolate and corrector_sweeps:
        raise ValueError("extrapolate and corrector_sweeps do not go together")
    options = DrawOptions(temperature, top_k, top_p, min_p).checked(denoiser.vocab_size)
    settings = _Settings(
        tokens_per_step,
        options,
        linear() if schedule is None else schedule,
        bool(time_conditioned),
        bool(extrapolate),
        corrector_sweeps,
    )
    return Sampler(
        init=Partial(_init, denoiser, length, settings),
        predict=Partial(_predict, denoiser, settings),
        transition=Partial(_transition, denoiser, settings),
        num_steps=-(-length // tokens_per_step) * settings.calls,
        finished=Partial(_finished, denoiser, settings) if stop_early else None,
        report=Partial(_report, denoiser),
    )


def _init(denoiser, length, settings, keys, shape, condition):
    check_sequences(shape, length)
    order_keys, time_keys = split_keys(keys)
    batch = shape[0]
    priority = jax.vmap(lambda key: jax.random.bits(key, (length,), jnp.uint32))(order_keys)
    earlier = ()
    if settings.extrapolate:
        earlier = (
            jnp.zeros((batch, length, denoiser.vocab_size), jnp.float32),
            jnp.full((batch,), jnp.inf, jnp.float32),  # no call yet
        )
    history = _History(
        priority >> 1,  # the largest number is free for what is not masked
        _uniforms(time_keys, settings.tokens_per_step),
        jnp.ones((batch,), jnp.float32),
        jnp.zeros((batch, settings.tokens_per_step), jnp.int32),
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        earlier,
    )
    sample = jnp.full(shape, denoiser.mask_id, jnp.int32)
    return SamplerState(
        ExampleState(sample, condition, history), SharedState(jnp.int32(0), (), jnp.int32(0))
    )


def _uniforms(keys, number):
    return jax.vmap(lambda key: 1 - jax.random.uniform(key, (number,), jnp.float32))(
        keys
    )  # in (0, 1]


def _next_rows(sample, priority, mask_id, number):
    """The masked positions that come next; where there are fewer, others fill up."""
    priority = jnp.where(sample == mask_id, priority, jnp.uint32(2**32 - 1))
    if number == 1:
        return jnp.argmin(priority, axis=1)[:, None].astype(jnp.int32)
    smallest = jax.lax.top_k(~priority, number)[1]
    return smallest.astype(jnp.int32)


def _hit_shares(history, sample, mask_id):
    """1 - alpha at the next hits, [batch, k]."""
    masked = jnp.sum(sample == mask_id, axis=1, dtype=jnp.int32)[:, None]
    left = jnp.maximum(masked - jnp.arange(history.uniform.shape[1]), 1)
    return history.share[:, None] * jnp.exp(jnp.cumsum(jnp.log(history.uniform) / left, axis=1))


def _predict(denoiser, settings, state):
    example, shared = state
    history, mask_id = example.history, denoiser.mask_id
    number = shared.step % settings.calls  # 0: draw a group; i > 0: draw its token i - 1 again
    drafts = number == 0
    fresh = _next_rows(example.sample, history.priority, mask_id, settings.tokens_per_step)
    hidden, rows = example.sample, fresh
    if settings.corrector_sweeps:
        rows = jnp.where(drafts, fresh, history.rows)
        again = (number - 1) % settings.tokens_per_step == jnp.arange(settings.tokens_per_step)
        again = jnp.broadcast_to(again & ~drafts, rows.shape)
        # What was not masked before stands, also where it fills up a group.
        again &= jnp.take_along_axis(history.revealed_at, rows, axis=1) >= 0
        hidden = place(hidden, rows, jnp.full(rows.shape, mask_id), again)
    shares = _hit_shares(history, example.sample, mask_id)
    t = None
    if settings.time_conditioned:
        now = jnp.where(drafts, shares[:, 0], history.share)
        t = settings.schedule.time_of(now)
    wanted = None if settings.extrapolate else rows
    logits = denoiser.predict(hidden, t, example.condition, wanted)
    shared = shared._replace(evaluations=shared.evaluations + denoiser.evaluations)
    example = example._replace(history=history._replace(rows=rows))
    return logits, SamplerState(example, shared)


def _transition(denoiser, settings, keys, state, logits):
    example, shared = state
    history, mask_id = example.history, denoiser.mask_id
    draw_keys, time_keys = split_keys(keys)
    number = shared.step % settings.calls
    drafts = number == 0
    rows = history.rows
    shares = _hit_shares(history, example.sample, mask_id)
    earlier = history.earlier
    if settings.extrapolate:
        logits, earlier = _extrapolated(logits, rows, earlier, shares, history.share)
    draw = draw_rows(draw_keys, logits, rows, settings.options)
    masked = jnp.take_along_axis(example.sample, rows, axis=1) == mask_id
    write = masked
    if settings.corrector_sweeps:
        again = (number - 1) % settings.tokens_per_step == jnp.arange(settings.tokens_per_step)
        drawn_before = jnp.take_along_axis(history.revealed_at, rows, axis=1) >= 0
        write = jnp.where(drafts, masked, again & drawn_before)
    write &= draw.token < mask_id  # no token where the network gives NaN
    sample = place(example.sample, rows, draw.token, write)
    step = jnp.broadcast_to(shared.step, rows.shape)
    used = jnp.sum(masked, axis=1, dtype=jnp.int32)[:, None] - 1  # hits that were used
    last = jnp.take_along_axis(shares, jnp.maximum(used, 0), axis=1)[:, 0]
    history = history._replace(
        uniform=jnp.where(drafts, _uniforms(time_keys, settings.tokens_per_step), history.uniform),
        share=jnp.where(drafts & (used[:, 0] >= 0), last, history.share),
        revealed_at=place(history.revealed_at, rows, step, write),
        log_probability=history.log_probability
        + jnp.sum(jnp.where(write & drafts, draw.log_probability, 0), axis=1),
        earlier=earlier,
    )
    return SamplerState(example._replace(sample=sample, history=history), shared)


def _extrapolated(logits, rows, earlier, shares, share):
    """(logits of the rows at the times of their hits, what the next call extrapolates from)."""
    before, share_before = earlier
    now = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    p_b, p_a = (jnp.take_along_axis(p, rows[..., None], axis=1) for p in (now, before))
    is_first = jnp.isinf(share_before)
    between = jnp.where(is_first, 1, share - share_before)[:, None]
    ratio = jnp.where(is_first[:, None], 0, (shares - share[:, None]) / between)
    p = jnp.maximum(p_b + ratio[..., None] * (p_b - p_a), 0)
    return jnp.log(p), (now, share)


def _finished(denoiser, settings, state):
    whole = state.shared.step % settings.calls == 0
    return whole & jnp.all(masks_left(state, denoiser.mask_id) == 0)


def _report(denoiser, state):
    history = state.example.history
    return FirstHittingReport(
        history.revealed_at, history.log_probability, masks_left(state, denoiser.mask_id)
    )
