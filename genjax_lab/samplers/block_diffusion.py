"""Block diffusion: block after block, each by first hitting given the blocks before it.

A block of masked tokens is unmasked as by `first_hitting`, in random order, while the network sees
it whole and the blocks before it as they stand (BD3-LM, arXiv 2503.09573). One block of all tokens
is masked diffusion; blocks of one token are an autoregressive model. What a finished block's keys
and values are does not depend on what follows, so they are kept, and this is exact: a call of the
network is one of a block, and finishing a block takes one more, which is counted. Sequences may
end early, with a token that says so.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree, UInt32

from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState
from genjax_lab.samplers.tokens import (
    DrawOptions,
    check_sequences,
    draw_rows,
    masks_left,
    place,
    split_keys,
)


class BlockDenoiser(NamedTuple):
    """A network that predicts the masked tokens of a block.

    Attributes:
        predict: (tokens [batch, block], start, past, rows [batch, k]) -> (logits [batch, k,
            vocabulary], keys and values of the block). Each leaf of `past` and of the latter is
            [batch, tokens, ...]; of `past` what comes before `start` is seen.
        vocab_size: the vocabulary, without the mask, whose id this is.
    """

    predict: Callable[..., tuple[Float[Array, "batch rows vocabulary"], PyTree]]
    vocab_size: int

    @property
    def mask_id(self) -> int:
        """The token that stands for "masked"."""
        return self.vocab_size


class BlockReport(NamedTuple):
    """What is told beside the samples.

    Attributes:
        revealed_at: [batch, length], the step after which a token stood; -1 where none was drawn.
        lengths: [batch], tokens up to the drawn one that ends the sequence, with it.
        masks_left: [batch], tokens that are masked still: 0 but for networks that give NaN.
    """

    revealed_at: Int[Array, "batch length"]
    lengths: Int[Array, "batch"]
    masks_left: Int[Array, "batch"]


class _History(NamedTuple):
    priority: UInt32[Array, "batch length"]  # masked tokens of a block are drawn in its order
    rows: Int[Array, "batch k"]  # of the block, that are being drawn
    revealed_at: Int[Array, "batch length"]
    cache: PyTree  # [batch, length, ...]


class _Settings(NamedTuple):
    length: int
    block: int
    tokens_per_step: int
    options: DrawOptions
    end_token: int | None

    @property
    def calls(self) -> int:
        """Of the network for each block."""
        return -(-self.block // self.tokens_per_step) + 1


def block_denoiser(
    apply: Callable[..., Any], variables: Mapping[str, Any], vocab_size: int
) -> BlockDenoiser:
    """A `networks.MaskedTransformer` with its variables, that keeps keys and values.

    Args:
        apply: called as `apply(variables, tokens, rows=rows, positions=positions, mask=mask,
            past=past, with_cache=True)`, see `networks.MaskedTransformer`.
        variables: its variables.
        vocab_size: tokens that it predicts; the mask's id.

    Raises:
        ValueError: if `vocab_size` is not positive.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be positive")
    return BlockDenoiser(Partial(_predict_block, apply, variables), int(vocab_size))


def _predict_block(apply, variables, tokens, start, past, rows):
    block, earlier = tokens.shape[1], jax.tree.leaves(past)[0].shape[1] if past else 0
    seen = jnp.concatenate([jnp.arange(earlier) < start, jnp.ones(block, bool)])
    logits, cache = apply(
        variables,
        tokens,
        rows=rows,
        positions=start + jnp.arange(block),
        mask=jnp.broadcast_to(seen, (block, len(seen))),
        past=tuple(jnp.moveaxis(x, 2, 0) for x in past) if past else None,
        with_cache=True,
    )
    return logits, tuple(jnp.moveaxis(x, 0, 2) for x in cache)  # [batch, tokens, depth, ...]


def block_diffusion(
    denoiser: BlockDenoiser,
    length: int,
    *,
    block: int,
    tokens_per_step: int = 1,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
    min_p: float | Float[Array, ""] = 0.0,
    end_token: int | None = None,
) -> Sampler:
    """The sampler; its samples are int32 tokens [batch, length].

    `initial` may have tokens that stand, around masks. Reports a `BlockReport`.

    Args:
        denoiser: of a network without time, trained for blocks of this size.
        length: tokens of a sequence, whole blocks.
        block: tokens of a block.
        tokens_per_step: tokens of each sequence that are drawn from one prediction.
        temperature, top_k, top_p, min_p: of the tokens, see `exact_categorical` and `logit_floor`.
        end_token: ends a sequence when it is drawn, not where it stands from the first: when its
            block is finished, all drawn and masked tokens behind it become it, and when all
            sequences have ended no more blocks are drawn. There is then no trajectory.

    Raises:
        ValueError: if a number is out of range; in sampling, if the shape is another.
    """
    if block < 1 or length < 1 or length % block or not 1 <= tokens_per_step <= block:
        raise ValueError(
            "block must be positive, length whole blocks, and tokens_per_step in [1, block], got "
            f"{block}, {length} and {tokens_per_step}"
        )
    if end_token is not None and not 0 <= end_token < denoiser.vocab_size:
        raise ValueError(f"end_token must be in [0, {denoiser.vocab_size}), got {end_token}")
    options = DrawOptions(temperature, top_k, top_p, min_p).checked(denoiser.vocab_size)
    settings = _Settings(length, block, tokens_per_step, options, end_token)
    return Sampler(
        init=Partial(_init, denoiser, settings),
        predict=Partial(_predict, denoiser, settings),
        transition=Partial(_transition, denoiser, settings),
        # The last block need not be kept.
        num_steps=length // block * settings.calls - 1,
        finished=None if end_token is None else Partial(_finished, settings),
        report=Partial(_report, denoiser, settings),
    )


def _init(denoiser, settings, keys, shape, condition):
    check_sequences(shape, settings.length)
    if condition is not None:
        raise ValueError("block diffusion has no condition, got one")
    order_keys, _ = split_keys(keys)
    batch = shape[0]
    bits = jax.vmap(lambda key: jax.random.bits(key, (settings.length,), jnp.uint32))(order_keys)
    rows = jnp.zeros((batch, settings.tokens_per_step), jnp.int32)
    tokens = jnp.zeros((batch, settings.block), jnp.int32)
    _, cache = jax.eval_shape(denoiser.predict, tokens, jnp.int32(0), (), rows)
    cache = jax.tree.map(
        lambda x: jnp.zeros((batch, settings.length, *x.shape[2:]), x.dtype), cache
    )
    history = _History(bits >> 1, rows, jnp.full(shape, -1, jnp.int32), cache)
    sample = jnp.full(shape, denoiser.mask_id, jnp.int32)
    return SamplerState(
        ExampleState(sample, None, history), SharedState(jnp.int32(0), (), jnp.int32(0))
    )


def _place_of(settings, shared):
    """(first token of the block, whether this call keeps it)."""
    number, call = shared.step // settings.calls, shared.step % settings.calls
    return number * settings.block, call == settings.calls - 1


def _block_of(settings, x, start):
    return jax.lax.dynamic_slice_in_dim(x, start, settings.block, axis=1)


def _predict(denoiser, settings, state):
    example, shared = state
    history = example.history
    start, keeps = _place_of(settings, shared)
    tokens, priority = (_block_of(settings, x, start) for x in (example.sample, history.priority))
    order = jnp.where(tokens == denoiser.mask_id, priority, jnp.uint32(2**32 - 1))
    rows = jax.lax.top_k(~order, settings.tokens_per_step)[1].astype(jnp.int32)
    logits, own = denoiser.predict(tokens, start, history.cache, rows)

    def kept(whole, part):  # in place: only the block is written
        part = jnp.where(keeps, part, _block_of(settings, whole, start))
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)

    cache = jax.tree.map(kept, history.cache, own)
    shared = shared._replace(evaluations=shared.evaluations + 1)
    example = example._replace(history=history._replace(rows=rows, cache=cache))
    return logits, SamplerState(example, shared)


def _transition(denoiser, settings, keys, state, logits):
    example, shared = state
    history = example.history
    start, keeps = _place_of(settings, shared)
    draw_keys, _ = split_keys(keys)
    positions = start + history.rows
    draw = draw_rows(draw_keys, logits, positions, settings.options)
    write = jnp.take_along_axis(example.sample, positions, axis=1) == denoiser.mask_id
    write &= ~keeps & (draw.token < denoiser.mask_id)  # no token where the network gives NaN
    sample = place(example.sample, positions, draw.token, write)
    step = jnp.broadcast_to(shared.step, positions.shape)
    history = history._replace(revealed_at=place(history.revealed_at, positions, step, write))
    example = example._replace(sample=sample, history=history)
    if settings.end_token is not None:
        last = shared.step % settings.calls == settings.calls - 2
        ended = jnp.cumsum(_ends(settings, example), axis=1) > 0
        ours = (history.revealed_at >= 0) | (sample == denoiser.mask_id)
        sample = jnp.where(last & ended & ours, settings.end_token, sample)
        example = example._replace(sample=sample)
    return SamplerState(example, shared)


def _ends(settings, example):
    """Which tokens end a sequence, [batch, length]; tokens that stood from the first do not."""
    return (example.sample == settings.end_token) & (example.history.revealed_at >= 0)


def _finished(settings, state):
    """All sequences have ended, and their blocks are whole."""
    whole = state.shared.step % settings.calls == settings.calls - 1
    return whole & jnp.all(jnp.any(_ends(settings, state.example), axis=1))


def _report(denoiser, settings, state):
    lengths = jnp.full(state.sample.shape[:1], settings.length, jnp.int32)
    if settings.end_token is not None:
        ends = _ends(settings, state.example)
        lengths = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, lengths)
    return BlockReport(
        state.example.history.revealed_at, lengths, masks_left(state, denoiser.mask_id)
    )
