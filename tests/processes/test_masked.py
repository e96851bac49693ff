"""Schedules, masks, hitting times and orders of masked diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from genjax_lab.processes import masked

SCHEDULES = {
    "linear": masked.linear(),
    "polynomial": masked.polynomial(2.0),
    "cosine": masked.cosine(),
    "logarithmic": masked.logarithmic(),
    "log_linear": masked.log_linear(),
}
MASK = 9


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def test_schedules_go_from_no_mask_to_all(schedule):
    t = jnp.linspace(0, 1, 101)
    share = schedule.masked(t)
    assert share[0] == pytest.approx(0, abs=1e-6)
    assert share[-1] == pytest.approx(1, abs=2e-3)
    assert np.all(np.diff(share) > 0)
    np.testing.assert_allclose(schedule.time_of(share), t, atol=2e-3)


def test_rates_are_derivatives_and_weights_their_quotients(schedule):
    t = jnp.linspace(0.05, 0.95, 19)
    slope = jax.vmap(jax.grad(schedule.masked))(t)
    np.testing.assert_allclose(schedule.rate(t), slope, rtol=1e-5)
    np.testing.assert_allclose(schedule.weight(t), slope / schedule.masked(t), rtol=1e-5)


def test_tokens_are_masked_each_for_itself():
    tokens = jnp.zeros((2, 50_000), jnp.int32)
    hidden, is_masked = masked.mask_tokens(jax.random.key(0), tokens, jnp.array([0.2, 0.9]), MASK)
    np.testing.assert_array_equal(hidden == MASK, is_masked)
    np.testing.assert_allclose(np.mean(is_masked, axis=1), [0.2, 0.9], atol=0.01)


def test_a_count_is_met_and_every_set_is_as_probable():
    tokens = jnp.zeros((20_000, 4), jnp.int32)
    hidden, is_masked = masked.mask_count(jax.random.key(0), tokens, 2, MASK)
    np.testing.assert_array_equal(np.sum(is_masked, axis=1), 2)
    np.testing.assert_array_equal(hidden == MASK, is_masked)
    sets = np.asarray(is_masked) @ (2 ** np.arange(4))
    _, found = np.unique(sets, return_counts=True)
    assert len(found) == 6 and scipy.stats.chisquare(found).pvalue > 1e-4


def test_hitting_times_are_order_statistics(schedule):
    length, number = 5, 4000
    times = masked.hitting_times(jax.random.split(jax.random.key(1), number), length, schedule)
    share = np.asarray(schedule.masked(times))
    assert np.all(np.diff(share, axis=1) < 0)
    for i in range(length):  # the i-th largest of `length` uniform numbers
        law = scipy.stats.beta(length - i, i + 1)
        assert scipy.stats.kstest(share[:, i], law.cdf).pvalue > 1e-4
        assert np.mean(share[:, i]) == pytest.approx((length - i) / (length + 1), abs=0.02)


def test_orders_are_permutations_with_masked_tokens_first():
    is_masked = jnp.asarray([[True, False, True, True, False]] * 6000)
    keys = jax.random.split(jax.random.key(2), 6000)
    order = np.asarray(masked.reveal_order(keys, is_masked))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(5), (6000, 1)))
    assert set(np.unique(order[:, :3])) == {0, 2, 3}
    _, found = np.unique(order[:, :3] @ [100, 10, 1], return_counts=True)
    assert len(found) == 6 and scipy.stats.chisquare(found).pvalue > 1e-4


def test_equal_schedules_are_one():
    assert masked.linear() is masked.linear()
    assert masked.polynomial(2.0) is masked.polynomial(2.0)


@pytest.mark.parametrize("make", [lambda: masked.polynomial(0.0), lambda: masked.log_linear(1.0)])
def test_mistakes_are_named(make):
    with pytest.raises(ValueError):
        make()
