"""Ancestral sampling of masked diffusion, with and without remasking.

From time t to s < t a masked token stays the mask with probability (1 - alpha(s)) / (1 - alpha(t))
and is else a token of the model's law (arXiv 2406.07524, 2406.04329). Remasking (ReMDM, arXiv
2503.00307) also masks tokens again, with probability sigma, and makes up for it:

    token -> mask          sigma,   0 <= sigma <= min(1, (1 - alpha_s) / alpha_t)
    mask  -> token ~ p     (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

which keeps the law of x_t at every time whatever sigma is. Forward-backward sampling (arXiv
2205.14987) and the corrector of discrete flow matching (arXiv 2407.15595) are choices of sigma.

A network that is not told the time is evaluated again only when a token of the batch has changed.
In a large batch some token always has; with `asynchronous`, each sequence keeps a clock of its own,
and the network waits until all have changed: at most one evaluation for each token, for any number
of steps, and the same law.
Tokens are drawn in two stages, whether and which, or jointly from the V + 1 classes with the mask
among them: in exact arithmetic the same, but with float32 noise the second draws improbable tokens
too rarely and too late (arXiv 2409.02908); it is kept to study that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from genjax_lab.processes.masked import MaskSchedule, linear
from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState
from genjax_lab.samplers.categorical import exact_categorical
from genjax_lab.samplers.tokens import (
    DrawOptions,
    TokenDenoiser,
    check_sequences,
    draw_rows,
    masks_left,
    place,
    split_keys,
)

DRAWS = ("two_stage", "joint", "joint_float32", "joint_float64")
STRATEGIES = ("cap", "rescale", "confidence", "loop", "forward_backward", "flow_corrector")
ROWS = 16  # of each sequence that are drawn at once


class AncestralReport(NamedTuple):
    """What is told beside the samples.

    Attributes:
        revealed_at: [batch, length], the step after which a token stood last; -1 where none was
            drawn.
        masks_filled: [batch], tokens that were masked when the time had run out, and were filled
            with the most probable ones.
        masks_left: [batch], tokens that are masked still.
    """

    revealed_at: Int[Array, "batch length"]
    masks_filled: Int[Array, "batch"]
    masks_left: Int[Array, "batch"]


class _Path(NamedTuple):
    """What happens in each step, [num_steps]."""

    t: Array  # of the network
    reveal: Array  # probability that a mask becomes a token, without remasking
    masked: Array  # 1 - alpha before the step
    sigma: Array  # probability of remasking
    spreads: Array  # whether sigma is spread by confidence


class _History(NamedTuple):
    clock: Int[Array, "batch"]  # steps that each example has made
    revealed_at: Int[Array, "batch length"]
    log_probability: Float[Array, "batch length"]  # with which each token was drawn
    filled: Int[Array, "batch"]


class _Settings(NamedTuple):
    draw: str
    options: DrawOptions
    time_conditioned: bool
    num_steps: int
    fills: bool
    remasks: bool
    asynchronous: bool
    rows: int  # of each sequence that are drawn at once

    @property
    def end(self) -> int:
        """What clocks show when all is done."""
        return self.num_steps + self.fills


def ancestral(
    denoiser: TokenDenoiser,
    length: int,
    *,
    num_steps: int,
    schedule: MaskSchedule | None = None,
    times: Float[np.ndarray, "steps"] | None = None,
    draw: str = "two_stage",
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    time_conditioned: bool = False,
    asynchronous: bool = False,
) -> Sampler:
    """The sampler; its samples are int32 tokens [batch, length].

    `initial` may have tokens that stand, around masks. Reports an `AncestralReport`; evaluations
    are counted as they are made.

    Args:
        denoiser: the network.
        length: tokens of a sequence.
        num_steps: T.
        schedule: linear if None.
        times: num_steps + 1 falling times from at most 1 to at least 0; even steps from 1 to 0 if
            None. Where they end above 0, masks that are left are filled with the most probable
            tokens in one more step.
        draw: "two_stage"; "joint", from V + 1 classes, exactly; "joint_float32", likewise with the
            default float32 noise of `jax.random.gumbel`; "joint_float64", with float64 noise, which
            needs `jax_enable_x64`.
        temperature, top_k, top_p, min_p: of the tokens, see `exact_categorical` and `logit_floor`.
        time_conditioned: whether the network is told the time; it is then evaluated in every step.
        asynchronous: whether each sequence goes on until one of its own tokens changes before the
            network is evaluated again. There is then no trajectory, and no time for the network.

    Raises:
        ValueError: if a number is out of range; in sampling, if the shape is another.
    """
    if asynchronous and time_conditioned:
        raise ValueError("asynchronous sequences have no common time to tell the network")
    schedule = linear() if schedule is None else schedule
    times = _times(num_steps, times)
    share = np.asarray(schedule.masked(jnp.asarray(times, jnp.float32)), np.float64)
    zero = np.zeros(num_steps)
    path = _Path(times[:-1], 1 - share[1:] / share[:-1], share[:-1], zero, zero.astype(bool))
    options = DrawOptions(temperature, top_k, top_p, min_p).checked(denoiser.vocab_size)
    return _sampler(
        denoiser, length, path, draw, options, time_conditioned, times[-1] > 0, asynchronous
    )


def tau_leaping(
    denoiser: TokenDenoiser,
    length: int,
    *,
    num_steps: int,
    schedule: MaskSchedule | None = None,
    times: Float[np.ndarray, "steps"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    time_conditioned: bool = False,
    asynchronous: bool = False,
) -> Sampler:
    """Ancestral sampling with the rates of the beginning of each step (arXiv 2310.16834, Eq. 18).

    A mask becomes a token with the probability min(1, -alpha'(t) (t - s) / (1 - alpha(t))) in place
    of the exact one, which is the same where alpha is linear. Masks that are left at the end are
    filled with the most probable tokens in one more step.

    Args:
        denoiser, length, num_steps, schedule, times, temperature: as of `ancestral`.
        time_conditioned, asynchronous: as of `ancestral`.

    Raises:
        ValueError: as `ancestral`.
    """
    if asynchronous and time_conditioned:
        raise ValueError("asynchronous sequences have no common time to tell the network")
    schedule = linear() if schedule is None else schedule
    times = _times(num_steps, times)
    start = jnp.asarray(times[:-1], jnp.float32)
    share, rate = (np.asarray(f(start), np.float64) for f in (schedule.masked, schedule.rate))
    zero = np.zeros(num_steps)
    reveal = np.minimum(1.0, rate * (times[:-1] - times[1:]) / share)
    path = _Path(times[:-1], reveal, share, zero, zero.astype(bool))
    options = DrawOptions(temperature).checked(denoiser.vocab_size)
    return _sampler(
        denoiser, length, path, "two_stage", options, time_conditioned, True, asynchronous
    )


def remasking(
    denoiser: TokenDenoiser,
    length: int,
    *,
    num_steps: int,
    strategy: str = "rescale",
    eta: float = 0.02,
    schedule: MaskSchedule | None = None,
    loop: tuple[float, float] = (0.55, 0.05),
    loop_alpha: float = 0.9,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    time_conditioned: bool = False,
) -> Sampler:
    """Ancestral sampling that masks tokens again, by ReMDM's strategies and two older ones.

    With sigma_max = min(1, (1 - alpha_s) / alpha_t), sigma is

        "cap"               min(eta, sigma_max)
        "rescale"           eta sigma_max
        "confidence"        sigma_max softmax(-p)_i over the tokens that stand, of which each was
                            drawn with probability p
        "loop"              eta in the loop, where alpha stays at `loop_alpha`; else 0
        "forward_backward"  (alpha_s - alpha_t) / alpha_t
        "flow_corrector"    10 t^(1/4) (1 - t)^(1/4) times that

    each at most sigma_max.

    Args:
        denoiser, length, num_steps, schedule: as for `ancestral`.
        strategy: one of the above.
        eta: strength, at least 0; 0 is ancestral sampling.
        loop: times (on, off) between which "loop" stays.
        loop_alpha: share of tokens that stand in the loop.
        temperature, top_k, top_p, min_p, time_conditioned: as for `ancestral`.

    Raises:
        ValueError: as `ancestral`, and for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, not in {STRATEGIES}")
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta is {eta}; it must be at least 0")
    on, off = loop
    if not (1 > on > off > 0 and 0 < loop_alpha < 1):
        raise ValueError(
            "loop must be two falling times within (0, 1), and loop_alpha within (0, 1), got "
            f"{loop} and {loop_alpha}"
        )
    schedule = linear() if schedule is None else schedule
    times = _times(num_steps, None)
    share = np.asarray(schedule.masked(jnp.asarray(times, jnp.float32)), np.float64)
    in_loop = np.zeros(num_steps, bool)
    if strategy == "loop":
        # To loop_alpha until `on`, there until `off`, and to 1.
        share = np.where(
            times >= on,
            1 - loop_alpha * (1 - times) / (1 - on),
            np.where(times > off, 1 - loop_alpha, (1 - loop_alpha) * times / off),
        )
        in_loop = np.isclose(share[1:], share[:-1])
        times = np.asarray(schedule.time_of(jnp.asarray(share, jnp.float32)), np.float64)
    alpha_t, alpha_s = 1 - share[:-1], 1 - share[1:]
    with np.errstate(divide="ignore"):
        most = np.minimum(1, np.where(alpha_t > 0, share[1:] / alpha_t, 1))
        growth = np.where(alpha_t > 0, (alpha_s - alpha_t) / alpha_t, 0)
    t = times[:-1]
    sigma = {
        "cap": np.minimum(eta, most),
        "rescale": eta * most,
        "confidence": most,
        "loop": np.where(in_loop, np.minimum(eta, most), 0),
        "forward_backward": growth,
        "flow_corrector": 10 * (t * (1 - t)) ** 0.25 * growth,
    }[strategy]
    sigma = np.where(alpha_t > 0, np.minimum(sigma, most), 0)
    spreads = np.full(num_steps, strategy == "confidence")
    path = _Path(t, 1 - share[1:] / share[:-1], share[:-1], sigma, spreads)
    options = DrawOptions(temperature, top_k, top_p, min_p).checked(denoiser.vocab_size)
    return _sampler(denoiser, length, path, "two_stage", options, time_conditioned, False)


def _times(num_steps: int, times) -> np.ndarray:
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be positive")
    if times is None:
        return np.linspace(1, 0, num_steps + 1)
    times = np.asarray(times, np.float64)
    falls = times.shape == (num_steps + 1,) and np.all(np.diff(times) < 0)
    if not falls or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must be {num_steps + 1} falling numbers in [0, 1], got {times}")
    return times


def _sampler(
    denoiser, length, path, draw, options, time_conditioned, fills, asynchronous=False
) -> Sampler:
    if length < 1:
        raise ValueError(f"length is {length}; it must be positive")
    if draw not in DRAWS:
        raise ValueError(f"draw is {draw!r}, not in {DRAWS}")
    if draw == "joint_float64" and not jax.config.jax_enable_x64:
        raise ValueError("draw='joint_float64' needs jax_enable_x64")
    plain = options._replace(temperature=1.0).cuts == DrawOptions().cuts
    if draw != "two_stage" and not (plain and options.temperature == 1.0):
        raise ValueError(f"draw={draw!r} is for temperature 1 without cuts, got {options}")
    num_steps = len(path.t)
    settings = _Settings(
        draw,
        options,
        bool(time_conditioned),
        num_steps,
        bool(fills),
        bool(np.any(path.sigma)),
        bool(asynchronous),
        # Of many steps few draw more than a token of a sequence; more steps of a loop draw those.
        min(length, ROWS, -(-2 * length // num_steps))
        if draw == "two_stage"
        else min(length, ROWS),
    )
    path = jax.tree.map(lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32), path)
    transition = Partial(_transition, denoiser, settings, path)
    finished = None
    if asynchronous:
        transition = Partial(_until_change, denoiser, settings, path)
        finished = Partial(_finished, denoiser, settings)
    return Sampler(
        init=Partial(_init, denoiser, length, settings),
        predict=Partial(_predict, denoiser, settings, path),
        transition=transition,
        num_steps=min(length + 1, settings.end) if asynchronous else settings.end,
        finished=finished,
        report=Partial(_report, denoiser),
    )


def _init(denoiser, length, settings, keys, shape, condition):
    del keys
    check_sequences(shape, length)
    zeros = jnp.zeros((shape[0],), jnp.int32)
    history = _History(zeros, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), zeros)
    sample = jnp.full(shape, denoiser.mask_id, jnp.int32)
    memory = ()
    if not (settings.time_conditioned or settings.asynchronous):
        logits = jax.eval_shape(denoiser.predict, sample, None, condition, None)
        memory = (jnp.zeros(logits.shape, logits.dtype), jnp.bool_(True))
    return SamplerState(
        ExampleState(sample, condition, history), SharedState(jnp.int32(0), memory, jnp.int32(0))
    )


def _predict(denoiser, settings, path, state):
    example, shared = state
    if settings.time_conditioned:
        t = path.t[jnp.minimum(shared.step, settings.num_steps - 1)]
        t = jnp.broadcast_to(t, example.sample.shape[:1])
        logits = denoiser.predict(example.sample, t, example.condition, None)
        count = denoiser.evaluations
    elif settings.asynchronous:
        logits = denoiser.predict(example.sample, None, example.condition, None)
        count = denoiser.evaluations
    else:
        cached, changed = shared.memory
        logits = jax.lax.cond(
            changed,
            lambda: denoiser.predict(example.sample, None, example.condition, None),
            lambda: cached,
        )
        count = denoiser.evaluations * changed
        shared = shared._replace(memory=(logits, jnp.bool_(False)))
    shared = shared._replace(evaluations=shared.evaluations + count)
    return logits, SamplerState(example, shared)


def _transition(denoiser, settings, path, keys, state, logits):
    example, shared = state
    move_keys, draw_keys = split_keys(keys)
    moves = _moves(denoiser, settings, path, move_keys, example)
    new = _made(denoiser, settings, path, draw_keys, example, logits, moves)
    if not settings.time_conditioned:
        memory = (shared.memory[0], jnp.any(new.sample != example.sample))
        shared = shared._replace(memory=memory)
    return SamplerState(new, shared)


def _until_change(denoiser, settings, path, keys, state, logits):
    """Steps of every example until one of its tokens changes."""

    def keys_of(example):
        return split_keys(jax.vmap(jax.random.fold_in)(keys, example.history.clock))

    def wait(carry):
        """Until a token is to be drawn: which it is, has no part in that."""
        example, moves, waits = carry
        found = _moves(denoiser, settings, path, keys_of(example)[0], example) & waits[:, None]
        passes = waits & ~jnp.any(found, axis=1)
        clock = example.history.clock + passes
        passes &= clock < settings.end
        example = example._replace(history=example.history._replace(clock=clock))
        return example, moves | found, passes

    def step(carry):
        """Whether a token is drawn, is part of the draw."""
        example, waits = carry
        move_keys, draw_keys = keys_of(example)
        moves = _moves(denoiser, settings, path, move_keys, example)
        new = _made(denoiser, settings, path, draw_keys, example, logits, moves, waits)
        changed = jnp.any(new.sample != example.sample, axis=1)
        return new, waits & ~changed & (new.history.clock < settings.end)

    example, shared = state
    waits = (example.history.clock < settings.end) & jnp.any(
        example.sample == denoiser.mask_id, axis=1
    )
    if settings.draw == "two_stage":
        moves = jnp.zeros(example.sample.shape, bool)
        example, moves, _ = jax.lax.while_loop(
            lambda carry: jnp.any(carry[2]), wait, (example, moves, waits)
        )
        draws = waits & (example.history.clock < settings.end)
        draw_keys = keys_of(example)[1]
        example = _made(denoiser, settings, path, draw_keys, example, logits, moves, draws)
    else:
        example, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), step, (example, waits))
    return SamplerState(example, shared)


def _finished(denoiser, settings, state):
    history = state.example.history
    return jnp.all((history.clock >= settings.end) | (masks_left(state, denoiser.mask_id) == 0))


def _chances(settings, path, example, masked):
    """(probability that a mask becomes a token [batch], that a token is masked [batch, length])."""
    step = jnp.minimum(example.history.clock, settings.num_steps - 1)
    sigma, share, spreads = path.sigma[step], path.masked[step], path.spreads[step]
    # Where sigma is spread over the tokens that stand, those that do not have none, as in ReMDM.
    reveal = path.reveal[step] + jnp.where(spreads, 0, sigma) * (1 - share) / share
    sigma = sigma[:, None]
    if settings.remasks:
        sigma = sigma * jnp.where(spreads[:, None], _spread(example, masked), 1.0)
    return reveal, sigma


def _moves(denoiser, settings, path, keys, example):
    """Which tokens change to or from the mask, [batch, length]; all masks where they are filled."""
    masked = example.sample == denoiser.mask_id
    reveal, sigma = _chances(settings, path, example, masked)
    moves = _happens(keys, jnp.where(masked, reveal[:, None], sigma))
    fills = (example.history.clock >= settings.num_steps)[:, None]
    return jnp.where(fills, masked, moves)


def _made(denoiser, settings, path, keys, example, logits, moves, acts=None):
    """The examples after a step, of those that act, by default all."""
    masked = example.sample == denoiser.mask_id
    history = example.history
    acts = jnp.ones(masked.shape[:1], bool) if acts is None else acts
    masked, moves = masked & acts[:, None], moves & acts[:, None]
    fills = history.clock >= settings.num_steps
    sample, log_probability = example.sample, history.log_probability
    if settings.draw == "two_stage":
        chosen = masked & moves & ~fills[:, None]
        sample, log_probability = _draw(settings, keys, example, logits, chosen)
    else:
        reveal, _ = _chances(settings, path, example, masked)
        sample = _draw_jointly(settings, keys, sample, logits, masked & ~fills[:, None], reveal)
    if settings.fills:
        to_fill = masked & fills[:, None]
        sample = jax.lax.cond(jnp.any(to_fill), _filled, lambda x, *_: x, sample, logits, to_fill)
    stands = example.sample != denoiser.mask_id
    sample = jnp.where(stands & moves, denoiser.mask_id, sample)
    revealed = masked & (sample != denoiser.mask_id)
    history = _History(
        history.clock + acts,
        jnp.where(revealed, history.clock[:, None], history.revealed_at),
        log_probability,
        jnp.where(fills & acts, jnp.sum(revealed, axis=1, dtype=jnp.int32), history.filled),
    )
    return example._replace(sample=sample, history=history)


def _happens(keys, probability):
    """True with these probabilities, to 2^-32."""
    bits = jax.vmap(lambda key: jax.random.bits(key, probability.shape[1:], jnp.uint32))(keys)
    high, low = (bits >> 16).astype(jnp.float32), (bits & 0xFFFF).astype(jnp.float32)
    # In two steps, since a float32 in [0, 1) has but 24 bits.
    scaled = probability * 65536.0
    whole = jnp.floor(scaled)
    return (high < whole) | ((high == whole) & (low < (scaled - whole) * 65536.0))


def _spread(example, masked):
    """softmax over the tokens that stand of minus the probability that they were drawn with."""
    confidence = jnp.exp(example.history.log_probability)
    return jax.nn.softmax(jnp.where(masked, -jnp.inf, -confidence), axis=1, where=~masked)


def _filled(sample, logits, to_fill):
    """With the most probable tokens, but where no logit is finite."""
    is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(to_fill & is_finite, best, sample)


def _draw(settings, keys, example, logits, chosen):
    """Draws the chosen positions, some rows at a time."""
    rows, options = settings.rows, settings.options

    def some(carry):
        sample, log_probability, left = carry
        positions = _first(left, rows)
        picked = jnp.take_along_axis(left, positions, axis=1)
        draw = draw_rows(
            keys, jnp.take_along_axis(logits, positions[..., None], axis=1), positions, options
        )
        write = picked & (draw.token < logits.shape[-1])
        sample = place(sample, positions, draw.token, write)
        log_probability = jax.vmap(
            lambda row, at, new, old: row.at[at].set(jnp.where(old, new, row[at]))
        )(log_probability, positions, draw.log_probability, write)
        left = place(left, positions, jnp.zeros_like(picked), picked)
        return sample, log_probability, left

    carry = (example.sample, example.history.log_probability, chosen)
    sample, log_probability, _ = jax.lax.while_loop(lambda c: jnp.any(c[2]), some, carry)
    return sample, log_probability


def _first(left, rows):
    """Positions of which the first are those that are left."""
    return jax.lax.top_k(left.astype(jnp.int32), rows)[1].astype(jnp.int32)


def _draw_jointly(settings, keys, sample, logits, masked, reveal):
    """Draws from V tokens and the mask."""
    rows, kind = settings.rows, settings.draw
    mask_id = logits.shape[-1]

    def some(carry):
        sample, left = carry
        positions = _first(left, rows)
        picked = jnp.take_along_axis(left, positions, axis=1)
        taken = jnp.take_along_axis(logits, positions[..., None], axis=1).astype(jnp.float32)
        tokens = jax.nn.log_softmax(taken, axis=-1) + jnp.log(reveal)[:, None, None]
        stays = jnp.broadcast_to(jnp.log1p(-reveal)[:, None, None], (*positions.shape, 1))
        classes = jnp.concatenate([tokens, stays], axis=-1)
        if kind == "joint":
            flat = classes.reshape(-1, mask_id + 1)
            drawn = exact_categorical(
                jnp.repeat(keys, rows), flat, counter=positions.reshape(-1)
            ).token.reshape(positions.shape)
        else:
            dtype = jnp.float64 if kind == "joint_float64" else jnp.float32

            def noise(key, position):
                key = jax.random.fold_in(key, position)
                return jax.random.gumbel(key, (mask_id + 1,), dtype, mode="low")

            noises = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(keys, positions)
            drawn = jnp.argmax(classes.astype(dtype) + noises, axis=-1).astype(jnp.int32)
        sample = place(sample, positions, jnp.minimum(drawn, mask_id), picked)
        return sample, place(left, positions, jnp.zeros_like(picked), picked)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), some, (sample, masked))[0]


def _report(denoiser, state):
    history = state.example.history
    return AncestralReport(history.revealed_at, history.filled, masks_left(state, denoiser.mask_id))
