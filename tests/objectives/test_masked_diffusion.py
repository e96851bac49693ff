"""Three forms of one bound, against sums over all masks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import draw_masks, masked_diffusion_loss
from genjax_lab.processes import masked

LENGTH, VOCAB = 4, 3
SEQUENCE = np.array([2, 0, 1, 0])
SCHEDULES = {
    "linear": masked.linear(),
    "polynomial": masked.polynomial(2.0),
    "cosine": masked.cosine(),
    "logarithmic": masked.logarithmic(),
}
MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH)))[1:]


@pytest.fixture(scope="module")
def table():
    """log p(x_i | unmasked), which differs for every set of masks: [*states, LENGTH, VOCAB]."""
    logits = np.random.default_rng(0).normal(size=(VOCAB + 1,) * LENGTH + (LENGTH, VOCAB))
    return np.float32(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))


@pytest.fixture(scope="module")
def costs(table):
    """Sum over masked tokens of -log p, for each of `MASKS`."""
    result = []
    for mask in MASKS:
        state = tuple(np.where(mask, VOCAB, SEQUENCE))
        nats = -table[state][np.arange(LENGTH), SEQUENCE]
        result.append(nats[mask].sum(dtype=np.float64))
    return np.array(result)


@pytest.fixture(scope="module")
def bound(costs):
    """sum over n of 1/n times the mean over sets of n masks, for each token."""
    number = MASKS.sum(axis=1)
    means = [costs[number == n].mean() / n for n in range(1, LENGTH + 1)]
    return sum(means) / LENGTH


def apply(table, tokens, t, condition, *, rows=None, train=False, rngs=None):
    logits = table[tuple(tokens[:, i] for i in range(LENGTH))]
    return logits if rows is None else jnp.take_along_axis(logits, rows[..., None], axis=1)


def share_law(share):
    """Probability of each of `MASKS`."""
    number = MASKS.sum(axis=1)
    return share[:, None] ** number * (1 - share[:, None]) ** (LENGTH - number)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(costs, bound, name):
    schedule = SCHEDULES[name]
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t = jnp.asarray((nodes + 1) / 2, jnp.float32)
    share = np.asarray(schedule.masked(t), np.float64)
    integrand = np.asarray(schedule.weight(t)) * (share_law(share) @ costs)
    assert integrand @ weights / 2 / LENGTH == pytest.approx(bound, rel=1e-4)


def test_many_steps_give_the_bound(costs, bound):
    schedule = masked.cosine()
    errors = []
    for steps in (100, 1000):
        t = jnp.arange(1, steps + 1) / steps
        share, before = (np.asarray(schedule.masked(x), np.float64) for x in (t, t - 1 / steps))
        value = np.sum((share - before) / share * (share_law(share) @ costs)) / LENGTH
        errors.append(abs(value - bound))
    assert errors[1] < errors[0] / 5 < errors[0] < 0.01 * bound


@pytest.mark.parametrize(
    "options",
    [
        {"form": "count"},
        {"form": "count", "max_rows": 2},
        {"form": "time"},
        {"form": "time", "schedule": masked.cosine(), "max_rows": 1},
        {"form": "steps", "num_steps": 500},
    ],
)
def test_drawn_losses_have_the_bound_as_their_mean(table, bound, options):
    objective = jax.jit(masked_diffusion_loss(apply, VOCAB, **options))
    batch = {"tokens": jnp.tile(jnp.asarray(SEQUENCE), (4000, 1))}
    losses = [float(objective(jnp.asarray(table), batch, jax.random.key(i))[0]) for i in range(8)]
    error = np.std(losses) / math.sqrt(8) + 1e-3
    assert np.mean(losses) == pytest.approx(bound, abs=5 * error)


def test_counts_are_spread_evenly_and_times_follow_their_posterior():
    may_mask = jnp.ones((4000, LENGTH), bool)
    is_masked, t, weight = draw_masks(jax.random.key(0), may_mask)
    number = np.sum(is_masked, axis=1)
    np.testing.assert_array_equal(np.bincount(number)[1:], 1000)
    np.testing.assert_allclose(weight, LENGTH / number)
    for n in range(1, LENGTH + 1):
        assert np.mean(t[number == n]) == pytest.approx(n / (LENGTH + 1), abs=0.03)


def test_a_network_that_is_told_the_time_has_the_same_bound_by_count_and_by_time():
    """p(x) = sigmoid of something linear in t, so that the posterior of the time matters."""

    def of_time(variables, tokens, t, condition, *, rows=None, train=False, rngs=None):
        logits = jnp.stack([3 * t, -2 * t, 1 - 4 * t], axis=-1)
        return jnp.broadcast_to(logits[:, None], (*tokens.shape, VOCAB))

    batch = {"tokens": jnp.tile(jnp.asarray(SEQUENCE), (4000, 1))}
    means = {}
    for form in ("count", "time"):
        objective = jax.jit(masked_diffusion_loss(of_time, VOCAB, form=form, time_conditioned=True))
        losses = [float(objective({}, batch, jax.random.key(i))[0]) for i in range(8)]
        means[form] = np.mean(losses), np.std(losses) / math.sqrt(8)
    (left, left_error), (right, right_error) = means.values()
    assert abs(left - right) < 5 * math.hypot(left_error, right_error)


def test_prompts_and_padding_are_never_masked_nor_counted(table):
    seen = []

    def watched(table, tokens, *arguments, **options):
        seen.append(tokens)
        return apply(table, tokens, *arguments, **options)

    may_mask = jnp.tile(jnp.asarray([False, True, True, False]), (200, 1))
    batch = {"tokens": jnp.tile(jnp.asarray(SEQUENCE), (200, 1)), "may_mask": may_mask}
    for form in ("count", "time", "steps"):
        loss, _ = masked_diffusion_loss(watched, VOCAB, form=form)(
            jnp.asarray(table), batch, jax.random.key(0)
        )
        assert np.isfinite(loss)
    for tokens in seen:
        np.testing.assert_array_equal(tokens[:, [0, 3]], batch["tokens"][:, [0, 3]])
        assert np.any(tokens[:, 1:3] == VOCAB)


def test_clipped_shares_are_within_their_range():
    may_mask = jnp.ones((2000, 50), bool)
    is_masked, t, _ = draw_masks(
        jax.random.key(0), may_mask, "time", masked.cosine(), shares=(0.3, 0.8)
    )
    share = np.asarray(masked.cosine().masked(t))
    assert share.min() >= 0.3 and share.max() <= 0.8 + 1e-6
    assert np.mean(is_masked) == pytest.approx(np.mean(share), abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sum"}, "form"),
        ({"num_steps": 0}, "num_steps"),
        ({"max_rows": 0}, "max_rows"),
        ({"shares": (0.5, 0.2), "form": "time"}, "shares"),
        ({"shares": (0.0, 0.5)}, "shares"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(apply, VOCAB, **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "tokens"),
        ({"tokens": jnp.zeros((2,), jnp.int32)}, "tokens"),
        ({"tokens": jnp.zeros((2, 4))}, "tokens"),
        ({"tokens": jnp.zeros((2, 4), jnp.int32), "may_mask": jnp.ones((2, 3), bool)}, "may_mask"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(apply, VOCAB)({}, batch, jax.random.key(0))
