"""The factor of the log-ratios with which few rows are saturated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import adaptive_beta


def share(beta, deltas, threshold=3.0):
    return np.mean(np.abs(beta * deltas) > threshold)


@pytest.mark.parametrize("max_share", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("size", [7, 1000])
def test_the_share_of_saturated_rows_keeps_to_its_bound_and_no_more_is_taken(max_share, size):
    for seed in range(20):
        deltas = np.random.default_rng(seed).normal(size=size).astype(np.float32) * 40
        beta = adaptive_beta(1.0, deltas, max_share=max_share)
        assert beta < 1
        assert share(beta, deltas) <= max_share
        assert share(beta * 1.00001, deltas) > max_share - 1e-9
        # One row more would be too many.
        assert np.sum(np.abs(beta * 1.00001 * deltas) > 3) == np.floor(max_share * size) + 1


def test_a_beta_that_saturates_little_stays():
    deltas = jnp.linspace(-10, 10, 101)
    assert adaptive_beta(0.3, deltas) == np.float32(0.3)
    assert adaptive_beta(0.3, deltas, max_share=0.0) < 0.3 + 1e-7
    assert adaptive_beta(0.3, jnp.zeros(5), max_share=0.0) == np.float32(0.3)
    assert adaptive_beta(1.0, deltas, max_share=0.0, threshold=5.0) == pytest.approx(0.5)
    # As many as may be saturated are.
    assert adaptive_beta(10.0, jnp.array([1.0, 2.0, 3.0, 4.0]), max_share=0.25) == pytest.approx(1)


def test_it_is_compiled():
    deltas = jnp.array([100.0, -200.0])
    compiled = jax.jit(lambda beta, deltas: adaptive_beta(beta, deltas, max_share=0.0))
    assert compiled(1.0, deltas) == pytest.approx(3 / 200)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.0, np.ones(3)), {}, "beta must be positive"),
        ((1.0, np.ones(3)), {"threshold": 0.0}, "threshold must be positive"),
        ((1.0, np.ones(3)), {"max_share": 1.0}, r"max_share must be in \[0, 1\)"),
        ((1.0, np.ones(0)), {}, "at least one"),
        ((1.0, np.array([1.0, np.nan])), {}, "finite"),
        ((1.0, np.ones(3, int)), {}, "floating point"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_beta(*arguments, **options)
