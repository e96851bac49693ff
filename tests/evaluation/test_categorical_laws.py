"""What Gumbel-max draws from when noise ends, against such noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.evaluation import (
    gumbel_cap,
    lattice_categorical_probs,
    truncated_categorical_probs,
)


@pytest.fixture(scope="module")
def log_probs():
    return np.random.default_rng(0).normal(size=(3, 40)) * 2


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("arguments", "cap"),
    [
        ({"dtype": jnp.bfloat16}, 4.85),
        ({"dtype": jnp.float16}, 6.93),
        ({}, 15.94),
        ({"bits": 24}, 16.64),
        ({"bits": 53}, 36.7),
        ({"mode": "highest"}, 44.4),
    ],
)
def test_caps_are_those_of_the_generators(arguments, cap):
    assert gumbel_cap(**arguments) == pytest.approx(cap, abs=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_noise_of_jax_ends_at_the_cap(dtype):
    noise = jax.random.gumbel(jax.random.key(0), (200_000,), dtype, mode="low")
    assert float(jnp.max(noise)) == pytest.approx(gumbel_cap(dtype), abs=0.02)


def test_truncated_law_is_a_law_of_lower_temperature(log_probs):
    probs = softmax(log_probs)
    for cap in (2.0, 4.85, 15.94):
        law = truncated_categorical_probs(log_probs, cap)
        np.testing.assert_allclose(law.sum(axis=-1), 1, atol=1e-12)
        order = np.argsort(probs, axis=-1)
        ratio = np.take_along_axis(law / probs, order, axis=-1)
        assert np.all(np.diff(ratio, axis=-1) >= -1e-9)
    np.testing.assert_allclose(truncated_categorical_probs(log_probs, math.inf), probs, atol=1e-15)
    np.testing.assert_allclose(truncated_categorical_probs(log_probs, 60.0), probs, atol=1e-12)


def test_truncated_law_is_that_of_continuous_noise_that_ends():
    log_probs, cap, number = np.random.default_rng(1).normal(size=8), 2.0, 1_000_000
    law = truncated_categorical_probs(log_probs, cap)
    uniform = np.random.default_rng(2).random((number, 8)) * math.exp(-math.exp(-cap))
    winners = np.argmax(log_probs - np.log(-np.log(uniform)), axis=1)
    np.testing.assert_allclose(np.bincount(winners, minlength=8) / number, law, atol=2e-3)
    assert np.abs(law - softmax(log_probs)).max() > 0.02


def test_lattice_law_is_that_of_real_uniforms_where_the_continuous_one_is_not():
    bits, share, vocab, rows = 14, 0.02, 200, 100_000
    rng = np.random.default_rng(3)
    tokens = softmax(rng.normal(size=vocab)) * share
    log_probs = np.log(np.append(tokens, 1 - share))
    wins = 0
    for _ in range(4):
        uniform = rng.integers(1, 2**bits, (rows // 4, vocab + 1)) / 2**bits
        wins += np.sum(np.argmax(log_probs - np.log(-np.log(uniform)), axis=1) < vocab)
    error = 4 * math.sqrt(share / rows)
    lattice = lattice_categorical_probs(log_probs, bits)
    np.testing.assert_allclose(lattice.sum(), 1)
    assert wins / rows == pytest.approx(1 - lattice[-1], abs=error)
    continuous = truncated_categorical_probs(log_probs, gumbel_cap(bits=bits))
    assert abs(wins / rows - (1 - continuous[-1])) > error


def test_what_cannot_be_drawn_stays_so():
    log_probs = np.array([0.0, -math.inf, -1.0])
    for law in (
        truncated_categorical_probs(log_probs, 3.0),
        lattice_categorical_probs(log_probs, 20),
    ):
        assert law[1] == 0 and law.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: truncated_categorical_probs(np.array([np.nan, 0.0]), 3.0),
        lambda: truncated_categorical_probs(np.array([-np.inf, -np.inf]), 3.0),
        lambda: truncated_categorical_probs(np.zeros(3), math.nan),
        lambda: truncated_categorical_probs(np.float64(0), 3.0),
        lambda: lattice_categorical_probs(np.zeros(3), 0),
        lambda: gumbel_cap(mode="middle"),
        lambda: gumbel_cap(jnp.int32),
        lambda: gumbel_cap(bits=0),
    ],
)
def test_mistakes_are_named(call):
    with pytest.raises(ValueError):
        call()
