"""Policy gradients and what they are made of against formulas written again in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import (
    aggregation_weights,
    clipped_policy_loss,
    dapo_loss,
    dr_grpo_loss,
    group_advantage,
    group_statistics,
    grpo_loss,
    gspo_loss,
    importance_weights,
    kl_estimate,
    online_dpo_loss,
    overlong_penalty,
    reinforce_loss,
    rloo_loss,
    signed_likelihood_loss,
)
from genjax_lab.objectives.aggregation import AGGREGATIONS, aggregate

# Groups of 4, 2, 5 and 1 answers, of which the third is all right.
IDS = np.array([0, 2, 0, 1, 2, 0, 2, 3, 2, 0, 1, 2])
OUTCOME = np.float32([1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1])
BATCH, LENGTH = len(IDS), 6


@pytest.fixture(scope="module")
def answers():
    """(log_probs, old_log_probs, mask, outcome, group); ratios from about 0.1 to 10."""
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(BATCH, LENGTH)).astype(np.float32)
    log_probs = old + 0.7 * rng.normal(size=old.shape).astype(np.float32)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, size=BATCH)[:, None]
    mask[5] = False  # an answer that is padding alone
    reward = OUTCOME + rng.normal(size=BATCH).astype(np.float32)
    reward[IDS == 2] = 0.7
    return log_probs, old, mask, OUTCOME, group_statistics(OUTCOME, IDS, reward=reward)


def advantages(reward, ids, ddof=None):
    result = np.zeros(len(reward))
    for i in set(ids.tolist()):
        own = np.float64(reward[ids == i])
        result[ids == i] = own - own.mean()
        if ddof is not None and len(own) > 1:
            result[ids == i] /= own.std(ddof=ddof) + 1e-6
    return result


def reference_weights(mask, aggregation, constant=None):
    """Of each token in the sum that is the loss."""
    count, answers = mask.sum(axis=1, keepdims=True), max(mask.any(axis=1).sum(), 1)
    each = {
        "token-sum-const": 1 / (constant or 1000),
        "token-mean": 1 / max(mask.sum(), 1),
        "seq-mean-token-sum": 1 / answers,
        "seq-mean-token-mean": 1 / (answers * np.maximum(count, 1)),
        "seq-mean-token-sum-norm": 1 / (answers * (constant or mask.shape[1])),
    }
    return mask * each[aggregation]


def clipped(log_ratio, advantage, low, high, dual=None):
    """Loss of one token, its slope in log R, and whether it was clipped."""
    ratio = math.exp(min(max(log_ratio, -20), 20))
    worst = (-advantage * ratio, -advantage * ratio, False)
    if low is not None:
        cut = -advantage * min(max(ratio, 1 - low), 1 + high)
        worst = (cut, 0.0, True) if cut > worst[0] else worst
    if dual is not None and advantage < 0 and worst[0] > -dual * advantage:
        return -dual * advantage, 0.0, True
    return worst


@functools.partial(jax.jit, static_argnames=("loss", "aggregation", "ratio", "std"))
def jitted(loss, arguments, **options):
    log_probs, *rest = arguments
    of = lambda x: loss(x, *rest, **options)  # noqa: E731
    (value, metrics), slope = jax.value_and_grad(of, has_aux=True)(log_probs)
    return value, slope, metrics


def assert_clipped(found, answers, advantage, weights, low, high, dual=None):
    value, slope, metrics = found
    log_probs, old, mask = answers[:3]
    each = [
        [clipped(x, a, low, high, dual) for x in row]
        for row, a in zip(np.float64(log_probs - old), advantage, strict=True)
    ]
    loss, slopes, cut = np.moveaxis(np.array(each), -1, 0)
    assert value == pytest.approx(np.sum(weights * loss), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(slope, weights * slopes, rtol=2e-5, atol=1e-7)
    assert metrics["share_clipped"] == pytest.approx(cut[mask].mean(), rel=1e-5)
    assert metrics["ratio"] == pytest.approx(np.exp(log_probs - old)[mask].mean(), rel=1e-5)
    return cut[mask].mean()


def test_advantages_are_standardised_rewards_of_their_groups(answers):
    group = answers[4]
    reward, own = np.asarray(group.reward), [i == IDS for i in IDS]
    for std, ddof in ((None, None), ("population", 0), ("sample", 1)):
        found = group_advantage(group, std=std)
        np.testing.assert_allclose(found, advantages(reward, IDS, ddof), rtol=1e-4, atol=1e-6)
        assert not np.any(found[IDS >= 2])  # equal rewards; alone
    np.testing.assert_allclose(group.rate, [OUTCOME[i].mean() for i in own], rtol=1e-6)
    np.testing.assert_array_equal(group.size, np.sum(own, axis=1))
    np.testing.assert_allclose(group.mean, [reward[i].mean() for i in own], rtol=1e-5)
    expected = np.where(IDS < 2, [reward[i].std() for i in own], 0)
    np.testing.assert_allclose(group.std, expected, rtol=1e-5)


def test_equal_rewards_have_no_advantage_whatever_they_are():
    """0.1 has no exact mean of seven, whose deviation would be divided by about 1e-6."""
    reward = np.full(7, 0.1, np.float32)
    group = group_statistics(np.ones(7), np.zeros(7, int), reward=reward)
    assert not np.any(group.std)
    for std in ("sample", "population", None):
        assert not np.any(group_advantage(group, std=std))


def test_signs_as_rewards_double_differences_and_leave_standardised_advantages():
    ids, outcome = np.repeat([0, 1], 8), np.float32([1] * 3 + [0] * 5 + [1] * 7 + [0])
    zero_one = group_statistics(outcome, ids)
    signs = group_statistics(outcome, ids, reward=2 * outcome - 1)
    np.testing.assert_array_equal(zero_one.rate, signs.rate)
    for std, factor in ((None, 2), ("sample", 1), ("population", 1)):
        own, other = (group_advantage(group, std=std) for group in (zero_one, signs))
        np.testing.assert_allclose(other, factor * own, rtol=1e-5)
    # The population's deviation is sqrt(r (1 - r)), the sample's larger by sqrt(K / (K - 1)).
    rate = np.asarray(zero_one.rate)
    expected = np.where(outcome, np.sqrt((1 - rate) / rate), -np.sqrt(rate / (1 - rate)))
    population = group_advantage(zero_one, std="population")
    np.testing.assert_allclose(population, expected, rtol=1e-5)
    sample = group_advantage(zero_one, std="sample")
    np.testing.assert_allclose(sample, math.sqrt(7 / 8) * expected, rtol=1e-5)


def test_order_and_names_of_groups_do_not_matter(answers):
    rng = np.random.default_rng(1)
    outcome = rng.integers(0, 2, size=64).astype(np.float32)
    reward = (outcome + 0.25 * rng.integers(0, 4, size=64)).astype(np.float32)  # sums are exact
    ids = np.repeat(np.arange(8), 8)
    order, names = rng.permutation(64), rng.permutation(8)
    for estimate in ("mean", "leave_one_out", "beta"):
        group = group_statistics(outcome, ids, reward=reward, estimate=estimate)
        other = group_statistics(
            outcome[order], names[ids][order], reward=reward[order], num_groups=8, estimate=estimate
        )
        for name in ("rate", "size", "reward", "mean"):
            np.testing.assert_array_equal(getattr(other, name), getattr(group, name)[order])
        np.testing.assert_allclose(other.std, group.std[order], rtol=1e-6)
        for std in ("sample", "population", None):
            np.testing.assert_allclose(
                group_advantage(other, std=std), group_advantage(group, std=std)[order], rtol=1e-6
            )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses_of_tokens_are_aggregated_in_five_ways(answers, aggregation):
    mask = answers[2]
    loss = np.where(mask, np.random.default_rng(1).normal(size=mask.shape), np.nan)
    has_constant = aggregation in ("token-sum-const", "seq-mean-token-sum-norm")
    for constant in (None, 7.0) if has_constant else (None,):
        weights = aggregation_weights(mask, aggregation, constant=constant)
        expected = np.nansum(reference_weights(mask, aggregation, constant) * loss)
        assert aggregate(loss, mask, weights) == pytest.approx(expected, rel=1e-5)
        # Its parts, of any size that is the same for all.
        parts = [aggregate(loss[i::3], mask[i::3], weights[i::3]) for i in range(3)]
        assert np.mean(parts) == pytest.approx(expected, rel=1e-5)
    nothing = aggregation_weights(np.zeros_like(mask), aggregation)
    assert np.all(np.isfinite(nothing))
    assert aggregate(loss, np.zeros_like(mask), nothing) == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_answers_without_tokens_are_none(answers, aggregation):
    mask = answers[2]
    loss = np.random.default_rng(1).normal(size=mask.shape)
    rows = np.arange(BATCH) != 5
    alone = aggregate(loss[rows], mask[rows], aggregation_weights(mask[rows], aggregation))
    whole = aggregate(loss, mask, aggregation_weights(mask, aggregation))
    assert not mask[5].any() and float(alone) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "dual"),
    [(0.2, 0.28, None), (0.2, 0.2, 3.0), (0.5, 0.1, 1.5), (None, None, 2.0)],
)
def test_clipped_loss_and_its_gradient_are_the_formula(answers, low, high, dual):
    log_probs, old, mask = answers[:3]
    advantage = np.float32(np.linspace(-2, 2, BATCH))
    options = {"epsilon_low": low, "epsilon_high": high, "dual_clip": dual}
    loss = functools.partial(clipped_policy_loss, **options)
    found = jitted(loss, (log_probs, old, mask, advantage), aggregation="token-mean")
    weights = reference_weights(mask, "token-mean")
    assert 0 < assert_clipped(found, answers, advantage, weights, low, high, dual) < 1


def test_gradient_factors_of_a_clipped_loss_are_one_sided():
    """-{r A+ 1[R < 1 + e] + (1 - r) A- 1[R > 1 - e]} at 100 ratios; e = 0.2."""
    ratios = np.geomspace(0.3, 3, 100).astype(np.float32)
    log_probs = jnp.tile(jnp.log(ratios), 2)[:, None]
    advantage = np.repeat(np.float32([1.5, -0.5]), 100)
    mask, zeros = jnp.ones_like(log_probs, bool), jnp.zeros_like(log_probs)
    loss = lambda x: clipped_policy_loss(x, zeros, mask, advantage)[0]  # noqa: E731
    slope = np.asarray(jax.grad(loss)(log_probs))[:, 0].reshape(2, 100) * 200 / ratios
    np.testing.assert_allclose(slope[0], -1.5 * (ratios < 1.2), rtol=1e-5)
    np.testing.assert_allclose(slope[1], 0.5 * (ratios > 0.8), rtol=1e-5)


def test_log_ratios_are_bounded_on_both_sides(answers):
    mask, advantage = np.ones((1, 4), bool), np.float32([-1.0])
    log_probs, old = np.float32([[30.0, 19.0, -30.0, 0.0]]), np.zeros((1, 4), np.float32)
    loss = functools.partial(clipped_policy_loss, epsilon_low=None)
    value, slope, _ = jitted(loss, (log_probs, old, mask, advantage))
    expected = [np.exp(20.0), np.exp(19.0), np.exp(-20.0), 1]
    assert value == pytest.approx(np.mean(expected), rel=1e-5)
    np.testing.assert_allclose(slope[0], np.array([0, np.exp(19.0), 0, 1]) / 4, rtol=1e-5)


def test_named_losses_are_the_clipped_one_with_their_own_numbers(answers):
    reward, mask = np.asarray(answers[4].reward), answers[2]
    cases = {
        grpo_loss: (advantages(reward, IDS, 1), 0.2, 0.2, "seq-mean-token-mean"),
        dapo_loss: (advantages(reward, IDS, 1), 0.2, 0.28, "token-mean"),
        dr_grpo_loss: (advantages(reward, IDS), 0.2, 0.2, "seq-mean-token-sum-norm"),
        reinforce_loss: (reward, None, None, "seq-mean-token-sum"),
    }
    for loss, (advantage, low, high, aggregation) in cases.items():
        weights = reference_weights(mask, aggregation)
        assert_clipped(jitted(loss, answers), answers, advantage, weights, low, high)
    found = jitted(grpo_loss, answers, std="population")
    weights = reference_weights(mask, "seq-mean-token-mean")
    assert_clipped(found, answers, advantages(reward, IDS, 0), weights, 0.2, 0.2)


def test_rloo_compares_with_the_other_answers(answers):
    reward, mask = np.asarray(answers[4].reward), answers[2]
    advantage = np.zeros(BATCH)
    for b in np.flatnonzero(IDS < 2):
        others = (IDS[b] == IDS) & (np.arange(BATCH) != b)
        advantage[b] = reward[b] - reward[others].mean()
    weights = reference_weights(mask, "seq-mean-token-sum")
    assert_clipped(jitted(rloo_loss, answers), answers, advantage, weights, None, None)


def test_gspo_cuts_whole_answers_and_goes_through_each_token(answers):
    log_probs, old, mask, _, group = answers
    advantage = advantages(np.asarray(group.reward), IDS, 1)
    count = np.maximum(mask.sum(axis=1), 1)
    mean = np.sum(np.where(mask, log_probs - old, 0), axis=1, dtype=np.float64) / count
    weights = reference_weights(mask, "seq-mean-token-mean")
    for low, high in ((3e-4, 4e-4), (0.3, 0.2)):
        each = [clipped(x, a, low, high) for x, a in zip(mean, advantage, strict=True)]
        loss, slopes, cut = (np.array(x)[:, None] for x in zip(*each, strict=True))
        options = {} if low == 3e-4 else {"epsilon_low": low, "epsilon_high": high}
        value, slope, metrics = jitted(functools.partial(gspo_loss, **options), answers)
        assert value == pytest.approx(np.sum(weights * loss), rel=1e-5)
        np.testing.assert_allclose(slope, weights * slopes, rtol=2e-5, atol=1e-7)
        assert metrics["share_clipped"] == pytest.approx(np.mean((mask & cut)[mask]), rel=1e-5)
    assert 0 < np.mean((mask & cut)[mask]) < 1


def test_signed_likelihood_pushes_all_tokens_alike(answers):
    log_probs, old, mask, outcome, _ = answers
    value, slope, _ = jitted(signed_likelihood_loss, answers)
    sign = (2 * outcome - 1)[:, None] * mask / 1000
    assert value == pytest.approx(-np.sum(sign * (log_probs - old)), rel=1e-5)
    np.testing.assert_allclose(slope, -sign, rtol=1e-6)


def test_weights_of_tokens_multiply_losses(answers):
    mask = answers[2]
    importance = np.random.default_rng(3).random(mask.shape).astype(np.float32)
    importance[~mask] = np.nan
    for loss in (grpo_loss, gspo_loss, rloo_loss, signed_likelihood_loss):
        value, slope, _ = jitted(loss, answers, importance=importance)
        _, plain, _ = jitted(loss, answers)
        assert np.isfinite(value)
        np.testing.assert_allclose(slope, np.where(mask, importance, 0) * plain, rtol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_harms_neither_value_nor_gradient(answers, junk):
    log_probs, old, mask, outcome, group = answers
    dirty = [np.where(mask, x, junk).astype(np.float32) for x in (log_probs, old)]
    for loss in (grpo_loss, gspo_loss, signed_likelihood_loss, online_dpo_loss):
        clean = jitted(loss, answers)
        found = jitted(loss, (*dirty, mask, outcome, group))
        assert np.isfinite(found[0]) and np.any(found[1])
        jax.tree.map(np.testing.assert_array_equal, clean, found)


def test_divergences_are_estimated_in_four_ways():
    difference = np.float32([-3, -0.5, 0, 0.25, 2])
    log_probs = np.float32([[-1.0, -2, -0.5, -4, -6]])
    reference = log_probs - difference
    expected = {
        "k1": (difference, np.ones(5)),
        "abs": (np.abs(difference), np.sign(difference)),
        "k2": (difference**2 / 2, difference),
        "k3": (np.exp(-difference) - 1 + difference, 1 - np.exp(-difference)),
    }
    for kind, (value, slope) in expected.items():
        found = kl_estimate(log_probs, reference, kind)
        np.testing.assert_allclose(found[0], value, rtol=1e-5, atol=1e-6)
        total = lambda x, y, kind=kind: jnp.sum(kl_estimate(x, y, kind))  # noqa: E731
        own, other = jax.grad(total, argnums=(0, 1))(log_probs, reference)
        kept = difference != 0  # where |d| has a slope
        np.testing.assert_allclose(own[0][kept], slope[kept], rtol=1e-5, atol=1e-6)
        assert not np.any(other)
    far = kl_estimate(np.float32([[-100.0]]), np.float32([[0.0]]), "k3")
    assert far == pytest.approx(np.exp(20) - 21, rel=1e-5)


def test_k1_k2_and_k3_estimate_the_divergence():
    """k1 and k3 without bias; k2 of nearby laws. Sums over all of 12 tokens."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=12)
    own, other = (jax.nn.log_softmax(logits + x) for x in (0, 0.05 * rng.normal(size=12)))
    divergence = jnp.sum(jnp.exp(own) * (own - other))
    for kind, tolerance in (("k1", 1e-4), ("k3", 1e-4), ("k2", 0.05)):
        mean = jnp.sum(jnp.exp(own) * kl_estimate(own[None], other[None], kind)[0])
        assert mean == pytest.approx(float(divergence), rel=tolerance, abs=2e-7)


def test_importance_weights_are_ratios_up_to_a_cap():
    found = importance_weights(np.float32([[-1, -2, 0, 0]]), np.float32([[-1.5, -1, -3, -900]]))
    np.testing.assert_allclose(found, [[np.exp(0.5), np.exp(-1), 2, 2]], rtol=1e-6)
    found = importance_weights(np.zeros((1, 1)), np.full((1, 1), -3.0), cap=5.0)
    assert found == 5


def test_overlong_penalty_falls_from_nothing_to_minus_one_within_the_buffer():
    length = np.array([0, 1, 16384, 16384 + 1024, 16384 + 2048, 20480, 20481, 90000])
    expected = [0, 0, 0, -0.25, -0.5, -1, -1, -1]
    found = overlong_penalty(length, max_length=20480, buffer=4096)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    found = overlong_penalty(length, max_length=20480, buffer=4096, factor=0.5)
    np.testing.assert_allclose(found, np.array(expected) / 2, atol=1e-7)
    steps = np.diff(overlong_penalty(np.arange(40), max_length=30, buffer=10))
    np.testing.assert_allclose(
        steps, np.where((np.arange(39) >= 20) & (np.arange(39) < 30), -0.1, 0), atol=1e-6
    )


def test_online_dpo_is_the_mean_over_explicit_pairs(answers):
    log_probs, old, mask, _, _ = answers
    ids = np.array([0, 0, 1, 0, 1, 0, 1, 1, 0, 2, 2, 1])
    outcome = np.float32([1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1])
    group = group_statistics(outcome, ids)
    real = mask.any(axis=1)
    pairs = []
    for i in range(3):
        right = [b for b in range(BATCH) if ids[b] == i and outcome[b] and real[b]]
        wrong = [b for b in range(BATCH) if ids[b] == i and not outcome[b] and real[b]]
        pairs += list(zip(right, wrong, strict=False))
    assert pairs == [(0, 1), (8, 3), (4, 2), (6, 7)]  # the fifth has no tokens
    total = np.sum(np.where(mask, log_probs - old, 0), axis=1, dtype=np.float64)
    beta, slopes, losses = 0.5, np.zeros(BATCH), []
    for a, b in pairs:
        margin = beta * (total[a] - total[b])
        losses.append(np.log1p(np.exp(-margin)))
        push = -beta / (1 + np.exp(margin)) / len(pairs)
        slopes[a], slopes[b] = slopes[a] + push, slopes[b] - push
    loss = functools.partial(online_dpo_loss, beta=beta)
    arguments = (log_probs, old, mask, outcome, group)
    value, slope, metrics = jitted(loss, arguments)
    assert value == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose(slope, slopes[:, None] * mask, rtol=1e-5, atol=1e-7)
    assert metrics["pairs"] == pytest.approx(len(pairs) / BATCH)
    preferred = np.mean([total[a] > total[b] for a, b in pairs])
    assert metrics["preferred"] == pytest.approx(preferred)
    none, slope, metrics = jitted(loss, (log_probs, old, mask, np.ones_like(outcome), group))
    assert none == 0 and not np.any(slope) and metrics["pairs"] == 0


def test_mistakes_are_named(answers):
    log_probs, old, mask, _, group = answers
    for options, message in (
        ({"epsilon_low": 1.5}, "epsilon_low"),
        ({"epsilon_low": -0.1}, "epsilon_low"),
        ({"epsilon_high": -0.1}, "epsilon_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"ratio": "word"}, "ratio"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"constant": 5.0}, "constant"),
        ({"std": "mad"}, "std"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo_loss(*answers, **options)
    with pytest.raises(ValueError, match="advantage"):
        clipped_policy_loss(log_probs, old, mask, np.ones((BATCH, 1)))
    with pytest.raises(ValueError, match="beta"):
        online_dpo_loss(*answers, beta=0.0)
    with pytest.raises(ValueError, match="kind"):
        kl_estimate(log_probs, old, "k4")
    with pytest.raises(ValueError, match="cap"):
        importance_weights(log_probs, old, cap=0.0)
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(np.arange(3), max_length=10, buffer=buffer)
    with pytest.raises(ValueError, match="std"):
        group_advantage(group, std="none")
