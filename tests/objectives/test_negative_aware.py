"""Negative-aware fine-tuning against formulas written by hand, one token at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import (
    aggregation_weights,
    correctness_rate,
    group_statistics,
    implicit_negative_ratio,
    likelihood_log_ratio,
    nft_loss,
    rft_loss,
    signed_likelihood_loss,
    straight_through_max,
)

LENGTH = 5
COUNT = 100
IDS = np.repeat(np.arange(3), 4)
OUTCOME = np.float32([1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1])
WEIGHTINGS = {
    "uniform": np.ones_like,
    "dr_grpo": lambda rate: 1 - rate,
    "grpo": lambda rate: np.sqrt((1 - rate) / rate),
}
EPSILONS = (0.01, 0.5, 1.0)


@pytest.fixture(scope="module")
def answers():
    """(log_probs, old_log_probs, mask, outcome, group); ratios from about 0.05 to 20."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH + 1, size=len(IDS))
    old = -rng.exponential(size=(len(IDS), LENGTH)).astype(np.float32)
    log_probs = old + rng.normal(size=old.shape).astype(np.float32)
    mask = np.arange(LENGTH) < lengths[:, None]
    return log_probs, old, mask, OUTCOME, group_statistics(OUTCOME, IDS)


def pairs(ratios, rate, *, epsilon=1.0, floor=0.0, weighting="uniform", largest=10.0):
    """Losses of a right and a wrong answer of one token at each R, and their slopes in log R."""
    log_ratios = jnp.asarray(np.resize(np.log(ratios), COUNT), jnp.float32)
    found = jitted_pairs(log_ratios, rate, epsilon, floor, weighting, largest)
    return tuple(np.asarray(x)[:, : len(ratios)] for x in found)


@functools.partial(jax.jit, static_argnames=("weighting", "largest"))
def jitted_pairs(log_ratios, rate, epsilon, floor, weighting, largest):
    group = group_statistics(jnp.ones(1), jnp.zeros(1, int), rate=rate[None])

    def loss(log_ratio, outcome):
        row = log_ratio[None, None]
        return nft_loss(
            row,
            jnp.zeros_like(row),
            jnp.ones_like(row),
            outcome[None],
            group,
            epsilon=epsilon,
            positive_floor=floor,
            weighting=weighting,
            max_log_ratio=largest,
            constant=1.0,
        )[0]

    each = jax.vmap(jax.vmap(jax.value_and_grad(loss), (0, None)), (None, 0))
    return each(log_ratios, jnp.array([1.0, 0.0]))


def by_hand(answers, *, epsilon, negative_weight, weighting, ratio, constant, floor=0.0):
    """Value and gradient of the loss in float64, entry by entry."""
    log_probs, old, mask, outcome, group = (np.asarray(x) for x in (*answers[:4], answers[4].rate))
    value, slope = 0.0, np.zeros(mask.shape)
    for b, rate in enumerate(np.float64(group)):
        omega = WEIGHTINGS[weighting](rate)
        log_ratio = np.float64(log_probs[b] - old[b])[mask[b]]
        terms = log_ratio if ratio == "token" else [log_ratio.sum()]
        if ratio == "sequence-mean":
            terms = [log_ratio.mean()]
        for t, term in enumerate(terms):
            above = np.exp(min(term, 10))
            negative = (1 - rate * above) / (1 - rate)
            bounded, below = max(above, floor), max(negative, epsilon)
            wrong = negative_weight * (1 - outcome[b])
            value -= omega * (outcome[b] * np.log(bounded) + wrong * np.log(below)) / constant
            own = outcome[b] * above / bounded - wrong * rate * above / (1 - rate) / below
            share = -omega * own * (term < 10) / constant
            if ratio == "token":
                slope[b, t] = share
            else:
                slope[b, mask[b]] = share / (mask[b].sum() if ratio == "sequence-mean" else 1)
    return value, slope


@functools.partial(jax.jit, static_argnames=("weighting", "ratio", "constant"))
def jitted_loss(log_probs, old, mask, outcome, group, **options):
    loss = lambda x: nft_loss(x, old, mask, outcome, group, **options)  # noqa: E731
    (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(log_probs)
    return value, slope, metrics


def test_floor_has_the_value_of_the_maximum_and_the_gradient_of_its_argument():
    def loss(ratio, maximum):
        return -jnp.log(maximum(implicit_negative_ratio(jnp.log(ratio), 0.5), 1.0))

    straight = jax.value_and_grad(lambda ratio: loss(ratio, straight_through_max))
    value, slope = straight(1.5)
    assert implicit_negative_ratio(jnp.log(1.5), 0.5) == pytest.approx(0.5)
    assert (value, slope) == (0.0, pytest.approx(1.0))
    value, slope = straight(0.5)
    assert (value, slope) == (pytest.approx(-np.log(1.5)), pytest.approx(1 / 1.5))
    assert jax.grad(lambda ratio: loss(ratio, jnp.maximum))(1.5) == 0


@pytest.mark.parametrize("floor", [1.0, 0.01, 1e-6])
def test_floor_is_exact_however_far_the_argument_is_below_it(floor):
    x = -np.float32([0.3, 20.0, 2e4])
    np.testing.assert_array_equal(straight_through_max(x, floor), np.full(3, np.float32(floor)))
    # A wrong answer at r_q R = 1 + 20 (1 - r_q): its gradient is r_q R / (1 - r_q) / floor.
    ratio = (1 + 20 * 0.5) / 0.5
    _, slope = pairs([ratio], 0.5, epsilon=floor)
    assert slope[1, 0] == pytest.approx(ratio / floor, rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradient_factors_follow_their_closed_forms(weighting):
    ratios, rate = np.geomspace(0.02, 20, COUNT), 0.3
    omega = WEIGHTINGS[weighting](rate)
    for epsilon in EPSILONS:
        _, slope = pairs(ratios, rate, epsilon=epsilon, weighting=weighting)
        below = np.maximum((1 - rate * ratios) / (1 - rate), epsilon)
        positive, negative = omega, -omega * rate / (1 - rate)
        np.testing.assert_allclose(slope[0] / ratios, -positive / ratios, rtol=1e-5)
        # Near its zero at R = 1 / r_q what is left of 1 - r_q R has lost digits.
        np.testing.assert_allclose(slope[1] / ratios, -negative / below, rtol=3e-5)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_the_formula_for_all_its_switches(answers, weighting, ratio):
    """36 combinations; of tokens the sum is divided by 1000, of sequences by nothing."""
    constant = 1000.0 if ratio == "token" else 1.0
    for weight, epsilon in itertools.product((0.0, 0.5, 1.0), (0.01, 1.0)):
        switches = {"epsilon": epsilon, "negative_weight": weight}
        names = {"weighting": weighting, "ratio": ratio, "constant": constant}
        value, slope, _ = jitted_loss(*answers, **names, **switches)
        expected, expected_slope = by_hand(answers, **names, **switches)
        assert value == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(slope, expected_slope, rtol=2e-4, atol=1e-9 / constant)
    if ratio == "token":
        default, _ = nft_loss(*answers, weighting=weighting)
        assert default == pytest.approx(float(value), rel=1e-6)


def test_sequences_have_one_term_each_at_whichever_tokens(answers):
    log_probs, old, _, outcome, group = answers
    mask = np.random.default_rng(1).random(old.shape) < 0.6
    mask[3] = False
    switches = {"epsilon": 0.5, "negative_weight": 1.0, "weighting": "dr_grpo", "constant": 1.0}
    for ratio in ("sequence", "sequence-mean"):
        kept = np.arange(len(IDS)) != 3
        value, slope, _ = jitted_loss(log_probs, old, mask, outcome, group, ratio=ratio, **switches)
        part = (log_probs[kept], old[kept], mask[kept], outcome[kept])
        part += (jax.tree.map(lambda x, kept=kept: np.asarray(x)[kept], group),)
        expected, expected_slope = by_hand(part, ratio=ratio, **switches)
        assert value == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(slope[kept], expected_slope, rtol=1e-4, atol=1e-7)
        assert not np.any(slope[3])
        log_ratio = likelihood_log_ratio(log_probs, old, mask, ratio=ratio)
        total = np.sum(np.where(mask, log_probs - old, 0), axis=1)
        if ratio == "sequence-mean":
            total /= np.maximum(mask.sum(axis=1), 1)
        np.testing.assert_allclose(log_ratio, np.where(mask, total[:, None], 0), atol=1e-6)


def test_without_wrong_answers_gradients_are_those_of_the_likelihood_of_right_ones(answers):
    log_probs, old, mask, outcome, group = answers
    for weighting, omega in WEIGHTINGS.items():
        weights = outcome * omega(np.asarray(group.rate))
        for policy in (old, log_probs):
            names = {"weighting": weighting, "ratio": "token", "constant": 1000.0}
            switches = {"epsilon": 1.0, "negative_weight": 0.0}
            part = (old, mask, outcome, group)
            value, slope, _ = jitted_loss(policy, *part, **names, **switches)
            # That of -sum omega(q) r log pi.
            np.testing.assert_allclose(slope, -weights[:, None] * mask / 1000, rtol=1e-6)
            rft, _ = rft_loss(policy, *part, weighting=weighting)
            assert rft == pytest.approx(float(value), rel=1e-6)
    assert rft_loss(*answers)[0] == nft_loss(*answers, negative_weight=0.0, weighting="uniform")[0]


def test_forgotten_wrong_answers_gain_little_and_forgotten_right_ones_cost_without_end():
    for rate in (0.1, 0.5, 0.9):
        value, slope = pairs(np.exp([-5.0, -20.0, -80.0, -700.0]), rate)
        np.testing.assert_allclose(value[0], [5, 20, 80, 700], rtol=1e-6)
        np.testing.assert_allclose(value[1, 1:], np.log(1 - rate), rtol=1e-6)
        np.testing.assert_allclose(slope[0], -1)
        np.testing.assert_allclose(slope[1, 1:], 0, atol=1e-7)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_pushes_on_wrong_tokens_are_bounded(epsilon):
    ratios, rate = np.geomspace(0.01, 1000, COUNT), 0.4
    for weighting, omega in WEIGHTINGS.items():
        _, slope = pairs(ratios, rate, epsilon=epsilon, weighting=weighting)
        bound = omega(rate) * rate / ((1 - rate) * epsilon) * ratios
        floored = (1 - rate * ratios) / (1 - rate) < epsilon
        assert floored.any() and not floored.all() and np.all(slope[1] > 0)
        assert np.all(slope[1] <= bound * (1 + 1e-5))
        np.testing.assert_allclose(slope[1][floored], bound[floored], rtol=1e-5)


def test_soft_outcomes_are_linear(answers):
    log_probs, old, mask, _, group = answers
    soft = np.random.default_rng(2).random(len(IDS)).astype(np.float32)
    of = jax.jit(lambda outcome: nft_loss(log_probs, old, mask, outcome, group, epsilon=0.3)[0])
    wrong = of(np.zeros_like(soft))
    each = np.array([of(row) - wrong for row in np.eye(len(IDS), dtype=np.float32)])
    assert of(soft) == pytest.approx(float(wrong + soft @ each), rel=1e-5)
    middle = 0.3 * of(np.ones_like(soft)) + 0.7 * wrong
    assert of(np.full_like(soft, 0.3)) == pytest.approx(float(middle), rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_questions_that_all_or_none_answer_right_count_nothing(answers, weighting):
    log_probs, old, mask, outcome, _ = answers
    outcome = np.concatenate([[1, 1, 1, 1], [0, 0, 0, 0], outcome[8:]]).astype(np.float32)
    group = group_statistics(outcome, IDS)
    names = {"weighting": weighting, "ratio": "token", "constant": 1.0}
    switches = {"epsilon": 0.5, "negative_weight": 1.0}
    value, slope, metrics = jitted_loss(log_probs, old, mask, outcome, group, **names, **switches)
    assert not np.any(slope[:8]) and np.all(np.isfinite(slope))
    assert all(np.isfinite(x) for x in metrics.values())
    rest = (log_probs[8:], old[8:], mask[8:], outcome[8:], group_statistics(outcome[8:], IDS[:4]))
    expected, expected_slope = by_hand(rest, **names, **switches)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(slope[8:], expected_slope, rtol=1e-4)


def test_questions_whose_rate_is_not_known_count_nothing(answers):
    log_probs, old, mask, outcome, group = answers
    alone = IDS.copy()
    alone[0] = 3
    group = group_statistics(outcome, alone, estimate="leave_one_out")
    assert np.isnan(group.rate[0]) and not np.isnan(group.rate[1:]).any()
    names = {"weighting": "dr_grpo", "ratio": "token", "constant": 1.0}
    switches = {"epsilon": 0.5, "negative_weight": 1.0}
    value, slope, metrics = jitted_loss(log_probs, old, mask, outcome, group, **names, **switches)
    known = group._replace(rate=group.rate.at[0].set(1.0))
    expected, expected_slope, _ = jitted_loss(
        log_probs, old, mask, outcome, known, **names, **switches
    )
    assert np.isfinite(value) and value == expected
    np.testing.assert_array_equal(slope, expected_slope)
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence-mean"])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_harms_neither_value_nor_gradient(answers, ratio, junk):
    log_probs, old, mask, outcome, group = answers
    importance = np.random.default_rng(3).random(old.shape).astype(np.float32)
    dirty = [np.where(mask, x, junk).astype(np.float32) for x in (log_probs, old, importance)]
    names = {"weighting": "grpo", "ratio": ratio, "constant": 1.0}
    clean = jitted_loss(*answers, importance=importance, **names)
    found = jitted_loss(dirty[0], dirty[1], mask, outcome, group, importance=dirty[2], **names)
    assert np.isfinite(found[0]) and found[0] != 0
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(found[1][~mask])


def test_beyond_the_largest_log_ratio_there_is_no_gradient():
    value, slope = pairs(np.exp([1.9, 2.1, 9.9, 50.0]), 0.3, epsilon=0.5, largest=2.0)
    np.testing.assert_allclose(value[0], [-1.9, -2, -2, -2], rtol=1e-6)
    assert np.all(slope[:, 0] != 0) and not np.any(slope[:, 1:])
    _, slope = pairs(np.exp([9.9, 10.1, 700.0]), 0.3, epsilon=0.5)
    assert np.all(slope[:, 0] != 0) and not np.any(slope[:, 1:])


def test_weighting_may_be_a_function_of_rates_one_for_each_answer(answers):
    squared = nft_loss(*answers, weighting=lambda rate: (1 - rate) ** 2)[0]
    group = answers[4]
    each = 1 + np.arange(len(IDS), dtype=np.float32)
    one_by_one = [
        nft_loss(*answers, weighting="uniform", weights=row)[0]
        for row in np.diag(len(IDS) / 1000 * (1 - np.asarray(group.rate)) ** 2)
    ]
    assert squared == pytest.approx(float(sum(one_by_one)), rel=1e-5)

    def own(rate):
        assert rate.shape == (len(IDS),)
        return rate * 0 + each

    expected = nft_loss(*answers, weighting="uniform", weights=len(IDS) / 1000 * each)[0]
    assert nft_loss(*answers, weighting=own)[0] == pytest.approx(float(expected), rel=1e-5)


def test_positive_floor_bounds_what_a_forgotten_right_answer_costs(answers):
    switches = {"epsilon": 1.0, "negative_weight": 1.0, "weighting": "uniform"}
    switches |= {"ratio": "token", "constant": 1.0}
    value, slope, _ = jitted_loss(*answers, positive_floor=0.6, **switches)
    expected, expected_slope = by_hand(answers, floor=0.6, **switches)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=2e-4)
    value, slope = pairs([0.05, 0.5], 0.5, floor=0.2)
    np.testing.assert_allclose(value[0], [-np.log(0.2), -np.log(0.5)], rtol=1e-6)
    np.testing.assert_allclose(slope[0], [-0.25, -1], rtol=1e-6)


def test_weights_of_tokens_multiply_their_losses_and_have_no_gradient(answers):
    log_probs, old, mask, outcome, group = answers
    importance = np.random.default_rng(3).random(old.shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def slopes(x, importance):
        return nft_loss(x, old, mask, outcome, group, importance=importance, constant=1.0)[0]

    slope, own = slopes(log_probs, importance)
    plain, _ = slopes(log_probs, np.ones_like(importance))
    np.testing.assert_allclose(slope, importance * plain, rtol=1e-5, atol=1e-7)
    assert np.any(plain) and not np.any(own)


def test_weights_of_the_whole_batch_make_its_parts_add_up(answers):
    mask = answers[2]
    for aggregation in ("token-sum-const", "token-mean", "seq-mean-token-mean"):
        weights = np.asarray(aggregation_weights(mask, aggregation))
        whole = nft_loss(*answers, aggregation=aggregation)[0]
        parts = [
            nft_loss(
                *(x[rows] for x in answers[:4]),
                jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], answers[4]),
                weights=weights[rows],
            )[0]
            for rows in (np.arange(0, 12, 2), np.arange(1, 12, 2))
        ]
        assert np.mean(parts) == pytest.approx(float(whole), rel=1e-5)


def test_rates_are_estimated_in_three_ways():
    outcome, ids = np.float32([1, 0, 0.5, 1, 0]), np.array([0, 2, 0, 0, 2])
    expected = {
        "mean": [2.5 / 3, 0, 2.5 / 3, 2.5 / 3, 0],
        "leave_one_out": [1.5 / 2, 0, 1 - 0.5 / 3, 1.5 / 2, 0],
        "beta": [3.5 / 5, 1 / 4, 3.5 / 5, 3.5 / 5, 1 / 4],
    }
    for estimate, rates in expected.items():
        found = correctness_rate(outcome, ids, estimate=estimate)
        np.testing.assert_allclose(found, rates, rtol=1e-6)
        group = group_statistics(outcome, ids, estimate=estimate, num_groups=3)
        np.testing.assert_array_equal(group.rate, found)
    found = correctness_rate(outcome, ids, estimate="beta", prior=(0.5, 2.0))
    np.testing.assert_allclose(found, [3 / 5.5, 0.5 / 4.5, 3 / 5.5, 3 / 5.5, 0.5 / 4.5], rtol=1e-6)
    assert np.isnan(correctness_rate(outcome[:1], ids[:1], estimate="leave_one_out"))
    given = np.linspace(0.1, 0.5, 5)
    np.testing.assert_allclose(group_statistics(outcome, ids, rate=given).rate, given, rtol=1e-6)


def test_float64_stays_float64_and_exact(answers):
    switches = {"epsilon": 0.5, "negative_weight": 1.0, "weighting": "grpo", "ratio": "token"}
    with jax.enable_x64(True):
        wide = [np.float64(x) if x.dtype == np.float32 else x for x in answers[:4]]
        group = group_statistics(wide[3], IDS)
        assert {x.dtype for x in group[1:]} == {np.dtype(np.float64)}
        value, slope, _ = jitted_loss(*wide, group, constant=1000.0, **switches)
        assert value.dtype == slope.dtype == np.float64
        expected, expected_slope = by_hand((*wide, group), constant=1000.0, **switches)
    assert float(value) == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-11)


def test_half_precision_is_computed_in_float32(answers):
    log_probs, old, mask, outcome, group = answers
    half = [x.astype(jnp.bfloat16) for x in (log_probs, old)]
    value, metrics = nft_loss(*half, mask, outcome, group)
    assert value.dtype == jnp.float32 == metrics["ratio"].dtype
    again, _ = nft_loss(*(x.astype(np.float32) for x in half), mask, outcome, group)
    assert value == again


def test_metrics_are_means_over_tokens(answers):
    log_probs, old, mask, outcome, group = answers
    _, metrics = nft_loss(*answers, epsilon=0.5)
    ratio, rate = np.exp(log_probs - old), np.asarray(group.rate)[:, None]
    wrong = mask & (outcome == 0)[:, None]
    negative = (1 - rate * ratio) / (1 - rate)
    expected = {
        "ratio": ratio[mask].mean(),
        "max_ratio": ratio[mask].max(),
        "old_kl": (ratio - 1 - np.log(ratio))[mask].mean(),
        "share_improbable": (rate * ratio > 1)[mask].mean(),
        "share_floored": (negative < 0.5)[wrong].mean(),
    }
    assert metrics == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    assert 0 < expected["share_improbable"] < expected["share_floored"] < 1


def test_loss_is_zero_at_the_policy_that_answered(answers):
    _, old, mask, outcome, group = answers
    for weighting, ratio in itertools.product(WEIGHTINGS, ("token", "sequence")):
        names = {"weighting": weighting, "ratio": ratio}
        value, metrics = nft_loss(old, old, mask, outcome, group, **names)
        assert value == 0 and metrics["ratio"] == metrics["max_ratio"] == 1
        assert metrics["share_improbable"] == metrics["share_floored"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "word"}, "ratio"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"weighting": "hard"}, "weighting"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"constant": 0.0}, "constant"),
        ({"aggregation": "token-mean", "constant": 10.0}, "constant"),
    ],
)
def test_mistakes_are_named(answers, options, message):
    with pytest.raises(ValueError, match=message):
        nft_loss(*answers, **options)


def test_shapes_that_do_not_fit_are_refused(answers):
    log_probs, old, mask, outcome, group = answers
    for wrong in (
        (log_probs[0], old[0], mask[0], outcome, group),
        (log_probs, old[:-1], mask, outcome, group),
        (log_probs, old, mask[:, 1:], outcome, group),
    ):
        for loss in (nft_loss, signed_likelihood_loss):
            with pytest.raises(ValueError, match="log_probs"):
                loss(*wrong)
    with pytest.raises(ValueError, match="outcome"):
        nft_loss(log_probs, old, mask, outcome[1:], group)
    with pytest.raises(ValueError, match="group"):
        nft_loss(log_probs, old, mask, outcome, group._replace(rate=group.rate[:, None]))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.0, 1.0], [0, 0, 0]), {}, "shapes"),
        (([[0.0, 1.0]], [[0, 0]]), {}, "shapes"),
        (([], []), {}, "shapes"),
        (([0.0, 1.0], [0, 0]), {"reward": [1.0]}, "shapes"),
        (([0.0, 1.0], [0.0, 0.0]), {}, "integers"),
        (([-1.0, 1.0], [0, 0]), {}, "outcome"),
        (([np.nan, 1.0], [0, 0]), {}, "outcome"),
        (([0.0, 1.0], [0, 0]), {"reward": [np.inf, 1.0]}, "reward"),
        (([0.0, 1.0], [0, 2]), {}, "ids"),
        (([0.0, 1.0], [-1, 0]), {}, "ids"),
        (([0.0, 1.0], [0, 1]), {"num_groups": 1}, "ids"),
        (([0.0, 1.0], [0, 0]), {"estimate": "median"}, "estimate"),
        (([0.0, 1.0], [0, 0]), {"estimate": "beta", "prior": (0.0, 1.0)}, "prior"),
    ],
)
def test_groups_that_make_no_sense_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        group_statistics(
            *map(np.asarray, arguments),
            **{
                name: np.asarray(value) if name == "reward" else value
                for name, value in options.items()
            },
        )
