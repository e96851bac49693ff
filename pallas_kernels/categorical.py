"""Exact draws from softmax(logits) in one pass over the vocabulary, with what ranks them.

An exponential race: token v of row r draws an exponential variable E from 64 random bits that are
a function of the row's key and counter and of v alone, and the largest logit - temperature * log E
wins, which for temperature 1 is a draw from the softmax. The same pass gives the log-probability of
the winner, the entropy, and the margin of the two most probable tokens, all of softmax(logits),
without temperature. Since the race is decided by comparisons only, the winner does not depend on
tiles or shards; parts of a vocabulary are put together by `merge`.

`draw_in_jnp` is the same in plain jnp; the kernels read each logit once and write a few numbers
for each row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.random_bits import log_exponential, threefry_2x32

LOWEST = float(jnp.finfo(jnp.float32).min)
NO_TOKEN = 2**31 - 1


class Race(NamedTuple):
    """What is known after some tokens of each row; all of one shape.

    Attributes:
        best: the largest noisy logit.
        token: int32, whose it is; NO_TOKEN for none.
        chosen: its logit.
        top, second: the two largest logits.
        total: sum of exp(logit - top).
        tilt: sum of exp(logit - top) (logit - top).
    """

    best: Array
    token: Array
    chosen: Array
    top: Array
    second: Array
    total: Array
    tilt: Array


class Draw(NamedTuple):
    """Tokens and what ranks them, [rows] each.

    Attributes:
        token: int32; the size of the vocabulary where no logit is finite, or one is NaN.
        log_probability: of the token.
        entropy: in nats.
        margin: probability of the most probable token less that of the next.
    """

    token: Int[Array, "rows"]
    log_probability: Float[Array, "rows"]
    entropy: Float[Array, "rows"]
    margin: Float[Array, "rows"]


def race_of(
    words: tuple[Array, Array],
    counter: Array,
    logits: Float[Array, "rows tokens"],
    ids: Int[Array, "1 tokens"],
    temperature: Array,
    floor: Array,
) -> Race:
    """The race among some tokens of each row.

    Args:
        words: of each row's key, uint32 [rows, 1].
        counter: uint32 [rows, 1].
        logits: float32; tokens with -inf, or below the floor, do not take part.
        ids: int32, the tokens' places in the whole vocabulary.
        temperature: scalar.
        floor: [rows, 1].

    Returns:
        Fields of shape [rows, 1].
    """
    logits = jnp.where(logits >= floor, logits, jnp.where(logits == logits, -jnp.inf, logits))
    noise = log_exponential(
        threefry_2x32(words, (counter, lax.bitcast_convert_type(ids, jnp.uint32)))
    )
    scores = jnp.where(logits == -jnp.inf, -jnp.inf, logits - temperature * noise)
    best = _max(scores)
    token = _min(jnp.where((scores == best) & (best > -jnp.inf), ids, NO_TOKEN))
    top = jnp.maximum(_max(logits), LOWEST)
    first = _min(jnp.where(logits == top, ids, NO_TOKEN))
    above = jnp.where(logits == -jnp.inf, 0.0, logits - top)
    weights = jnp.where(logits == -jnp.inf, 0.0, jnp.exp(above))
    return Race(
        best,
        token,
        _max(jnp.where(ids == token, logits, -jnp.inf)),
        top,
        _max(jnp.where(ids == first, -jnp.inf, logits)),
        jnp.sum(weights, axis=1, keepdims=True),
        jnp.sum(weights * above, axis=1, keepdims=True),
    )


def _max(x: Array) -> Array:
    return jnp.max(x, axis=1, keepdims=True)


def _min(x: Array) -> Array:
    return jnp.min(x, axis=1, keepdims=True)


def start_of_race(shape: tuple[int, ...]) -> Race:
    """The race among no tokens."""
    full = functools.partial(jnp.full, shape, dtype=jnp.float32)
    token = jnp.full(shape, NO_TOKEN, jnp.int32)
    return Race(
        full(-jnp.inf), token, full(-jnp.inf), full(LOWEST), full(-jnp.inf), full(0), full(0)
    )


def merge(left: Race, right: Race) -> Race:
    """The race among the tokens of both; where they tie, the left's token wins."""
    wins = right.best > left.best
    top = jnp.maximum(left.top, right.top)
    total, tilt = 0.0, 0.0
    for part in (left, right):
        shift = part.top - top
        total += part.total * jnp.exp(shift)
        tilt += (part.tilt + part.total * shift) * jnp.exp(shift)
    best, token, chosen = (
        jnp.where(wins, getattr(right, name), getattr(left, name))
        for name in ("best", "token", "chosen")
    )
    second = jnp.maximum(jnp.maximum(left.second, right.second), jnp.minimum(left.top, right.top))
    # NaN anywhere is NaN everywhere: `wins` is False for it.
    best = jnp.where(right.best == right.best, best, right.best)
    return Race(best, token, chosen, top, second, total, tilt)


def finish(race: Race, vocabulary: int) -> Draw:
    """Tokens and statistics of a race among all tokens."""
    log_total = jnp.log(race.total)
    return Draw(
        jnp.where(race.best > -jnp.inf, race.token, vocabulary).astype(jnp.int32),
        race.chosen - race.top - log_total,
        log_total - race.tilt / race.total,
        (1 - jnp.exp(race.second - race.top)) / race.total,
    )


def draw_in_jnp(
    words: UInt32[Array, "rows 2"],
    counter: UInt32[Array, "rows"],
    logits: Float[Array, "rows vocabulary"],
    temperature: Float[Array, ""],
    floor: Float[Array, "rows"],
    first: int | Int[Array, ""] = 0,
) -> Race:
    """The race among all tokens in plain jnp, [rows]; `first` is the first token's id."""
    ids = lax.iota(jnp.int32, logits.shape[1])[None] + first
    race = race_of(
        (words[:, :1], words[:, 1:]),
        counter[:, None],
        logits.astype(jnp.float32),
        ids,
        temperature,
        floor[:, None],
    )
    return Race(*(field[:, 0] for field in race))


def _triton_kernel(*refs, tile: int, tiles: int, vocabulary: int):
    """A program takes one row and one part of the vocabulary, `tile` tokens at a time."""
    words, counter, floor, temperature, first, logits_ref, *out_refs = refs
    words, counter = (words[0], words[1]), counter[0]
    floor, temperature, first = floor[0], temperature[0], first[0]
    start = pl.program_id(1) * tiles

    def step(number, race):
        place = (start + number) * tile + lax.iota(jnp.int32, tile)
        inside = place < vocabulary
        logits = plgpu.load(logits_ref.at[place], mask=inside, other=0.0).astype(jnp.float32)
        logits = jnp.where(inside, logits, -jnp.inf)[None]
        return merge(race, race_of(words, counter, logits, place[None] + first, temperature, floor))

    race = lax.fori_loop(0, tiles, step, start_of_race((1, 1)))
    for ref, field in zip(out_refs, race, strict=True):
        ref[...] = field


def draw_on_gpu(
    words: UInt32[Array, "rows 2"],
    counter: UInt32[Array, "rows"],
    logits: Float[Array, "rows vocabulary"],
    temperature: Float[Array, ""],
    floor: Float[Array, "rows"],
    first: int | Int[Array, ""] = 0,
    *,
    tile: int = 1024,
    parts: int = 8,
    interpret: bool = False,
) -> Race:
    """`draw_in_jnp` by a kernel that Triton compiles: a program for each row and part."""
    rows, vocabulary = logits.shape
    tiles = pl.cdiv(pl.cdiv(vocabulary, tile), parts)
    of_row = lambda r, p: (r,)  # noqa: E731
    whole = lambda r, p: (0,)  # noqa: E731
    race = pl.pallas_call(
        functools.partial(_triton_kernel, tile=tile, tiles=tiles, vocabulary=vocabulary),
        grid=(rows, parts),
        in_specs=[
            pl.BlockSpec((None, 2), lambda r, p: (r, 0)),
            pl.BlockSpec((1,), of_row),
            pl.BlockSpec((1,), of_row),
            pl.BlockSpec((1,), whole),
            pl.BlockSpec((1,), whole),
            pl.BlockSpec((None, vocabulary), lambda r, p: (r, 0)),
        ],
        out_specs=[pl.BlockSpec((1, 1), lambda r, p: (r, p))] * len(Race._fields),
        out_shape=_shapes((rows, parts)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="categorical_draw",
    )(words, counter, floor, _scalar(temperature, jnp.float32), _scalar(first, jnp.int32), logits)
    parts_of = [Race(*(field[:, part] for field in race)) for part in range(parts)]
    return functools.reduce(merge, parts_of)


def _scalar(value: Any, dtype: Any) -> Array:
    return jnp.asarray(value, dtype)[None]


def _shapes(shape: tuple[int, int]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(shape, jnp.int32 if name == "token" else jnp.float32)
        for name in Race._fields
    ]


def _tpu_kernel(*refs, tile: int, vocabulary: int):
    """Tiles of a block of rows come one after the other; what is known of the race stays."""
    words, counter, floor, temperature, first, logits_ref, *out_refs = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref, field in zip(out_refs, start_of_race(out_refs[0].shape), strict=True):
            ref[...] = field

    place = pl.program_id(1) * tile + lax.broadcasted_iota(jnp.int32, logits_ref.shape, 1)
    logits = jnp.where(place < vocabulary, logits_ref[...].astype(jnp.float32), -jnp.inf)
    race = race_of(
        (words[:, :1], words[:, 1:]),
        counter[...],
        logits,
        place + first[0],
        temperature[0],
        floor[...],
    )
    race = merge(Race(*(ref[...] for ref in out_refs)), race)
    for ref, field in zip(out_refs, race, strict=True):
        ref[...] = field


def draw_on_tpu(
    words: UInt32[Array, "rows 2"],
    counter: UInt32[Array, "rows"],
    logits: Float[Array, "rows vocabulary"],
    temperature: Float[Array, ""],
    floor: Float[Array, "rows"],
    first: int | Int[Array, ""] = 0,
    *,
    tile: int = 2048,
    block: int = 8,
    interpret: bool = False,
) -> Race:
    """`draw_in_jnp` by a kernel for TPUs: `block` rows at a time."""
    rows, vocabulary = logits.shape
    pad = -rows % block
    words, counter, floor, logits = (
        jnp.pad(x, ((0, pad), (0, 0))) for x in (words, counter[:, None], floor[:, None], logits)
    )
    column = pl.BlockSpec((block, 1), lambda r, t: (r, 0))
    scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
    race = pl.pallas_call(
        functools.partial(_tpu_kernel, tile=tile, vocabulary=vocabulary),
        grid=((rows + pad) // block, pl.cdiv(vocabulary, tile)),
        in_specs=[
            pl.BlockSpec((block, 2), lambda r, t: (r, 0)),
            *(column, column, scalar, scalar),
            pl.BlockSpec((block, tile), lambda r, t: (r, t)),
        ],
        out_specs=[column] * len(Race._fields),
        out_shape=_shapes((rows + pad, 1)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="categorical_draw",
    )(words, counter, floor, _scalar(temperature, jnp.float32), _scalar(first, jnp.int32), logits)
    return Race(*(field[:rows, 0] for field in race))
