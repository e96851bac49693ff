"""pass@k against all subsets, votes with ties, and intervals that cover."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from genjax_lab.evaluation.answers import (
    answer_summary,
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    pass_at_k,
    std_at_n,
)


@pytest.mark.parametrize("n", range(1, 11))
def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            exact = Fraction(sum(map(any, subsets)), len(subsets))
            assert float(pass_at_k(n, c, k)) == pytest.approx(float(exact), rel=1e-13, abs=0)


def test_pass_at_k_grows_with_k_from_the_mean_to_one():
    correct = np.arange(0, 33)
    values = np.stack([pass_at_k(32, correct, k) for k in range(1, 33)])
    np.testing.assert_allclose(values[0], correct / 32, rtol=1e-14)
    assert np.all(np.diff(values, axis=0) >= 0)
    np.testing.assert_array_equal(values[-1], correct > 0)


def test_pass_at_k_keeps_its_digits_where_it_is_small_or_numbers_are_large():
    assert float(pass_at_k(10**12, 1, 1)) == pytest.approx(1e-12, rel=1e-13, abs=0)
    n, c, k = 10_000, 50, 300
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert float(pass_at_k(n, c, k)) == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_pass_at_k_takes_a_number_of_samples_for_each_question():
    found = pass_at_k(np.array([4, 8]), np.array([1, 7]), 2)
    np.testing.assert_allclose(found, [0.5, 1.0], rtol=1e-14)
    assert found.dtype == np.float64


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        (4, 5, 1),
        (4, -1, 1),
        (4, 2, 0),
        (4, 2, 5),
        (4, 2, 1.0),
        (4, 2, True),
        (4.0, 2, 1),
        (np.array([4, 2]), 1, 3),
        (np.array([], int), np.array([], int), 1),
        (4, math.nan, 1),
    ],
)
def test_pass_at_k_refuses_what_it_cannot_count(n, c, k):
    with pytest.raises(ValueError, match=r"counts|num_correct|k must"):
        pass_at_k(n, c, k)


def test_avg_at_k_is_the_mean_of_means():
    outcomes = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert avg_at_k(np.array(outcomes)) == pytest.approx(1 / 3)
    assert avg_at_k(np.array(outcomes, bool)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "outcomes", [[], [[]], [1, 0], [[0.5, 1]], [[math.nan, 1]], [[-1, 1]], [[[1]]]]
)
def test_outcomes_must_be_a_table_of_zeros_and_ones(outcomes):
    for function in (avg_at_k, std_at_n):
        with pytest.raises(ValueError, match="outcomes must"):
            function(np.array(outcomes, float))


@pytest.mark.parametrize(
    ("answers", "outcomes", "expected"),
    [
        ("aab", [1, 1, 0], 1.0),
        ("abb", [1, 0, 0], 0.0),
        ("ab", [1, 0], 0.5),
        ("abcabc", [1, 0, 0, 1, 0, 0], 1 / 3),
        ("aabbc", [0, 0, 1, 1, 1], 0.5),
        (["a", None, None], [1, 0, 0], 1.0),
        ([None, None], [0, 0], 0.0),
    ],
)
def test_the_majority_decides_and_ties_are_shared(answers, outcomes, expected):
    found = maj_at_k([list(answers)], np.array([outcomes]), len(answers))
    np.testing.assert_allclose(found, [expected])


def test_ties_do_not_depend_on_the_order_of_samples():
    outcomes = {"a": 1, "b": 0, "c": 0}
    for order in itertools.permutations("aabbc"):
        row = np.array([[outcomes[x] for x in order]])
        assert maj_at_k([order], row, 5)[0] == 0.5


def test_majority_of_fewer_votes_is_the_mean_over_groups_and_unbiased():
    generator = np.random.default_rng(0)
    law = np.array([0.4, 0.35, 0.25])
    draws = generator.choice(3, p=law, size=(4000, 7))  # two groups of three; one sample is over
    found = maj_at_k([["rst"[i] for i in row] for row in draws], draws == 0, 3)
    exact = 0.0
    for votes in itertools.product(range(3), repeat=3):
        counts = np.bincount(votes, minlength=3)
        winners = counts == counts.max()
        exact += np.prod(law[list(votes)]) * winners[0] / winners.sum()
    # Five standard errors: a false alarm in 2 million.
    assert abs(np.mean(found) - exact) < 5 * np.std(found) / math.sqrt(len(found))
    assert maj_at_k(["aabbba"], np.array([[1, 1, 0, 0, 0, 1]]), 3)[0] == 0.5
    np.testing.assert_array_equal(maj_at_k(["ab"], np.array([[1, 0]]), 1), [0.5])


def test_majority_needs_an_answer_for_each_outcome():
    outcomes = np.array([[1, 0], [0, 1]])
    for answers in (["ab"], ["ab", "a"], ["ab", "ab", "ab"]):
        with pytest.raises(ValueError, match="answers must have"):
            maj_at_k(answers, outcomes, 1)
    with pytest.raises(ValueError, match="k must"):
        maj_at_k(["ab", "ab"], outcomes, 3)


def test_std_at_n_is_the_spread_of_runs():
    outcomes = np.array([[1, 0, 1], [1, 0, 0]])
    assert std_at_n(outcomes) == pytest.approx(np.std([1, 0, 0.5], ddof=1))
    with pytest.raises(ValueError, match="at least 2"):
        std_at_n(outcomes[:, :1])


def test_the_bootstrap_has_the_width_of_the_normal_interval_and_repeats():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(values, level=0.9, num_resamples=20_000, seed=1)
    half = 1.6449 * np.std(values) / math.sqrt(400)
    # The quantile of 20,000 draws has a standard error of about 1 % of the half-width.
    assert high - np.mean(values) == pytest.approx(half, rel=0.08)
    assert np.mean(values) - low == pytest.approx(half, rel=0.08)
    assert (low, high) == bootstrap_interval(values, level=0.9, num_resamples=20_000, seed=1)
    assert (low, high) != bootstrap_interval(values, level=0.9, num_resamples=20_000, seed=2)
    assert bootstrap_interval(np.ones(3)) == (1.0, 1.0)


def test_all_resamples_are_drawn_where_not_all_fit_at_once(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(values, num_resamples=1001)
    monkeypatch.setattr("genjax_lab.evaluation.answers._CHUNK", 170)
    np.testing.assert_allclose(bootstrap_interval(values, num_resamples=1001), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ([], {}),
        ([[1.0]], {}),
        ([1.0, math.nan], {}),
        ([1.0], {"level": 1.0}),
        ([1.0], {"level": 0.0}),
        ([1.0], {"num_resamples": 0}),
    ],
)
def test_the_bootstrap_refuses_bad_arguments(values, arguments):
    with pytest.raises(ValueError, match=r"values must|level must"):
        bootstrap_interval(np.array(values), **arguments)


_OUTCOMES = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
_LENGTHS = np.array([[10, 20, 30, 40], [30, 50, 50, 50], [60, 60, 60, 60]])


def test_the_summary_holds_every_score_with_its_interval():
    summary = answer_summary(
        _OUTCOMES, _LENGTHS, _LENGTHS >= 60, (1, 2), answers=["aabc", "abbc", "aaaa"]
    )
    expected = {
        "avg_at_4": 0.25,
        "pass_at_1": 0.25,
        "pass_at_2": (5 / 6 + 1 / 2) / 3,
        "maj_at_1": 0.25,
        "maj_at_2": np.mean([(1 + 0) / 2, (0.5 + 0) / 2, 0]),
        "std_at_4": np.std([2 / 3, 1 / 3, 0, 0], ddof=1),
        "mean_length": np.mean(_LENGTHS),
        "mean_length_right": 20.0,
        "mean_length_wrong": np.mean([30, 40, 50, 50, 50, 60, 60, 60, 60]),
        "truncation_rate": 1 / 3,
        "num_questions": 3,
        "num_samples": 4,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    scores = ("avg_at_4", "pass_at_1", "pass_at_2", "maj_at_1", "maj_at_2")
    assert set(summary) == {*expected, *(f"{s}_{e}" for s in scores for e in ("low", "high"))}
    assert all(summary[f"{s}_low"] <= summary[s] <= summary[f"{s}_high"] for s in scores)


def test_the_summary_leaves_out_what_there_is_not():
    summary = answer_summary(np.ones((2, 1)), np.ones((2, 1)), np.zeros((2, 1)))
    assert "mean_length_wrong" not in summary
    assert "std_at_1" not in summary
    assert not any(name.startswith("maj") for name in summary)


@pytest.mark.parametrize(
    ("lengths", "truncated", "match"),
    [
        (_LENGTHS[:2], _OUTCOMES, "one shape"),
        (_LENGTHS, _OUTCOMES[:, :2], "one shape"),
        (-_LENGTHS, _OUTCOMES, "lengths must"),
        (_LENGTHS * math.nan, _OUTCOMES, "lengths must"),
        (_LENGTHS, _LENGTHS, "truncated must"),
    ],
)
def test_the_summary_refuses_tables_that_do_not_fit(lengths, truncated, match):
    with pytest.raises(ValueError, match=match):
        answer_summary(_OUTCOMES, lengths, truncated)


def test_a_question_that_is_asked_several_times_is_one_question():
    """Else more of the same would make intervals narrower."""
    values = np.array([0.0, 1.0, 0.5, 1.0])
    once = bootstrap_interval(values, num_resamples=2000)
    several = bootstrap_interval(np.tile(values, 9), names=[*range(4)] * 9, num_resamples=2000)
    np.testing.assert_allclose(several, once, atol=1e-12)
    assert np.subtract(*bootstrap_interval(np.tile(values, 9))[::-1]) < 0.5 * (once[1] - once[0])
    # Two draws of two names: one twice (1 or 0), or both, of which "b" counts twice.
    for level, expected in ((0.4, (1 / 3, 1 / 3)), (0.95, (0, 1))):
        found = bootstrap_interval(np.array([1.0, 0.0, 0.0]), names=["a", "b", "b"], level=level)
        np.testing.assert_allclose(found, expected)
    outcomes = np.tile([[0, 1], [1, 1]], (3, 1))
    summary = answer_summary(outcomes, outcomes + 1, outcomes * 0, names=["a", "b"] * 3)
    assert summary["num_questions"] == 2 and summary["avg_at_2"] == 0.75
    with pytest.raises(ValueError, match="names must be 4"):
        bootstrap_interval(values, names=["a"])


def test_no_chance_is_not_less_than_none():
    assert not np.signbit(pass_at_k(8, np.array([0, 1]), 4)).any()
