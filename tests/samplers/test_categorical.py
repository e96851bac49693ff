"""Exact draws: their law, their bits, and that kernels and plain jnp draw the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.extend.random import threefry_2x32 as jax_threefry

from genjax_lab.samplers import exact_categorical, logit_floor
from pallas_kernels import categorical as kernels
from pallas_kernels.random_bits import log_exponential, threefry_2x32

ROWS, VOCAB = 5, 700
TOP = 2**32 - 1


@pytest.fixture(scope="module")
def race():
    """Arguments of a race: words, counter, logits, temperature, floor."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(ROWS, VOCAB)).astype(np.float32)
    logits[1, 3:600] = -np.inf
    words = jnp.asarray(rng.integers(0, 2**32, (ROWS, 2)), jnp.uint32)
    floor = jnp.full(ROWS, -jnp.inf).at[2].set(1.0)
    counter = jnp.arange(ROWS, dtype=jnp.uint32)
    return words, counter, jnp.asarray(logits), jnp.float32(0.9), floor


@pytest.fixture(scope="module")
def expected(race):
    return kernels.finish(kernels.draw_in_jnp(*race), VOCAB)


def test_words_are_those_of_jax_at_every_key_and_counter():
    rng = np.random.default_rng(1)
    key = jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32)
    count = jnp.asarray(rng.integers(0, 2**32, 64), jnp.uint32)
    ours = jnp.concatenate(threefry_2x32((key[0], key[1]), (count[:32], count[32:])))
    np.testing.assert_array_equal(ours, jax_threefry(key, count))


def test_noise_is_right_to_rounding_at_both_ends():
    rng = np.random.default_rng(2)
    high = np.concatenate([[0, 0, 0, 2**31 - 1, 2**31, TOP, TOP], rng.integers(0, 2**32, 1000)])
    low = np.concatenate([[0, 1, 2**31, TOP, 0, 0, TOP], rng.integers(0, 2**32, 1000)])
    found = log_exponential((jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32)))
    word = [int(top) * 2**32 + int(rest) for top, rest in zip(high, low, strict=True)]
    below = np.array([(2 * w + 1) / 2**65 for w in word])
    above = np.array([(2 * (2**64 - w) - 1) / 2**65 for w in word])
    lower = -np.log1p(-np.minimum(below, 0.5))
    exact = np.log(np.where(below < 0.5, lower, -np.log(above)))
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=3e-7)
    assert found[0] < -45 < -15.95  # where JAX's own float32 noise ends by default


KERNELS = {
    "gpu": functools.partial(kernels.draw_on_gpu, interpret=True),
    "tpu": functools.partial(kernels.draw_on_tpu, interpret=True),
}


@pytest.mark.parametrize(
    ("platform", "options"),
    [
        ("gpu", {"tile": 128, "parts": 4}),
        ("gpu", {"tile": 1024, "parts": 1}),
        ("tpu", {"tile": 128}),
        ("tpu", {"tile": 512, "block": 2}),
    ],
)
def test_kernels_draw_the_same_tokens_whatever_their_tiles(race, expected, platform, options):
    found = kernels.finish(KERNELS[platform](*race, **options), VOCAB)
    np.testing.assert_array_equal(found.token, expected.token)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_parts_of_a_vocabulary_are_merged(race, expected):
    words, counter, logits, temperature, floor = race
    halves = [
        kernels.draw_in_jnp(words, counter, part, temperature, floor, first)
        for part, first in ((logits[:, :300], 0), (logits[:, 300:], 300))
    ]
    found = kernels.finish(kernels.merge(*halves), VOCAB)
    np.testing.assert_array_equal(found.token, expected.token)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_vocabulary_on_eight_devices_draws_the_same(race):
    _, _, logits, _, _ = race
    keys = jax.random.split(jax.random.key(0), ROWS)
    logits = jnp.pad(logits, ((0, 0), (0, 4)))  # 704 = 8 * 88
    mesh = jax.make_mesh((8,), ("tensor",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    one = jax.jit(exact_categorical)(keys, logits)
    eight = jax.jit(exact_categorical)(keys, jax.device_put(logits, split))
    np.testing.assert_array_equal(one.token, eight.token)
    np.testing.assert_allclose(one.entropy, eight.entropy, atol=1e-6)


def test_statistics_are_those_of_the_softmax(race):
    _, _, logits, _, _ = race
    draw = exact_categorical(jax.random.split(jax.random.key(0), ROWS), logits, temperature=0.3)
    exact = np.asarray(logits, np.float64)
    log_probs = exact - np.log(np.sum(np.exp(exact), axis=1, keepdims=True))
    probs = np.exp(log_probs)
    entropy = -np.sum(np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0), 0), axis=1)
    ordered = np.sort(probs, axis=1)
    chosen = log_probs[np.arange(ROWS), draw.token]
    np.testing.assert_allclose(draw.log_probability, chosen, atol=2e-6)
    np.testing.assert_allclose(draw.entropy, entropy, atol=2e-6)
    np.testing.assert_allclose(draw.margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)


def test_draws_have_the_law_at_any_temperature():
    rows, logits = 40_000, 2 * np.random.default_rng(3).normal(size=30)
    keys = jax.random.split(jax.random.key(1), rows)
    draw = jax.jit(exact_categorical)
    for temperature in (0.5, 1.0):
        tokens = draw(
            keys, jnp.broadcast_to(jnp.float32(logits), (rows, 30)), temperature=temperature
        ).token
        law = np.exp(logits / temperature)
        law *= rows / law.sum()
        found = np.bincount(tokens, minlength=30)
        rare = law < 10
        found = [*found[~rare], found[rare].sum()]
        p = scipy.stats.chisquare(found, [*law[~rare], law[rare].sum()]).pvalue
        assert 1e-4 < p < 1 - 1e-4


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, 1.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(exact_categorical(keys, logits, temperature=0.0).token, [1, 0])


def test_forbidden_tokens_are_never_drawn_and_rows_without_any_give_none():
    logits = jnp.asarray([[-jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [jnp.nan, 0.0]])
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), 3)
        np.testing.assert_array_equal(exact_categorical(keys, logits).token, [1, 2, 2])


def test_half_precision_logits_have_full_precision_noise():
    keys = jax.random.split(jax.random.key(0), 2000)
    logits = jnp.broadcast_to(jnp.linspace(0, 4, 40), (2000, 40)).astype(jnp.bfloat16)
    half = exact_categorical(keys, logits).token
    np.testing.assert_array_equal(half, exact_categorical(keys, logits.astype(jnp.float32)).token)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits = 2 * np.random.default_rng(4).normal(size=(4, 50)).astype(np.float32)
    probs = np.exp(np.float64(logits))
    probs /= probs.sum(axis=1, keepdims=True)
    floor = np.asarray(logit_floor(jnp.asarray(logits), top_p=top_p))
    short = np.asarray(logit_floor(jnp.asarray(logits), top_p=top_p, keep_crossing=False))
    for row in range(4):
        order = np.argsort(-probs[row])
        mass = np.cumsum(probs[row][order])
        number = 50 if top_p == 1 else np.searchsorted(mass, top_p) + 1
        kept = np.flatnonzero(logits[row] >= floor[row])
        np.testing.assert_array_equal(np.sort(kept), np.sort(order[:number]))
        if top_p < 1:
            fewer = np.flatnonzero(logits[row] >= short[row])
            np.testing.assert_array_equal(np.sort(fewer), np.sort(order[: max(number - 1, 1)]))


def test_cuts_come_one_after_the_other():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    kept = lambda **cuts: np.flatnonzero(logits[0] >= logit_floor(logits, **cuts)[0]).tolist()  # noqa: E731
    assert kept(top_k=3) == [0, 1, 2]
    assert kept(min_p=0.7) == [0, 1]
    # Among the three largest, which have 0.44, 0.33 and 0.22, two are needed for 0.75.
    assert kept(top_k=3, top_p=0.75) == [0, 1]
    assert kept(top_p=0.75) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": jnp.zeros((2,))}, "logits"),
        ({"logits": jnp.zeros((2, 3), jnp.int32)}, "logits"),
        ({"keys": jnp.zeros((2, 2), jnp.uint32)}, "keys"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"implementation": "fast"}, "implementation"),
        ({"implementation": "pallas"}, "GPUs and TPUs"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"keys": jax.random.split(jax.random.key(0), 2), "logits": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match=message):
        exact_categorical(**(arguments | change))
