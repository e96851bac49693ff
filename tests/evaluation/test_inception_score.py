"""The Inception score at its closed forms."""

import numpy as np
import pytest

from genjax_lab.evaluation import inception_score


def test_certain_and_balanced_samples_score_the_number_of_classes():
    score = inception_score(np.tile(np.eye(7), (20, 1)), num_splits=10)
    assert score.mean == pytest.approx(7, rel=1e-12)
    assert score.std == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("row", [[0.25] * 4, [1, 0, 0, 0]])
def test_identical_predictions_score_one(row):
    assert inception_score([row] * 30, num_splits=3).mean == pytest.approx(1, abs=1e-12)


def test_the_score_is_the_exponential_of_mutual_information():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    marginal = [0.55, 0.45]
    divergence = np.mean(np.sum(probabilities * np.log(probabilities / marginal), axis=1))
    assert inception_score(probabilities, num_splits=1).mean == pytest.approx(np.exp(divergence))


def test_splits_are_scored_apart():
    # Each half has one class only: no half sees variety, the whole does.
    probabilities = np.repeat(np.eye(2), 10, axis=0)
    assert inception_score(probabilities, num_splits=2).mean == pytest.approx(1)
    assert inception_score(probabilities, num_splits=1).mean == pytest.approx(2)


def test_the_spread_over_splits_is_reported():
    probabilities = np.concatenate([np.tile([[1.0, 0.0]], (4, 1)), np.tile(np.eye(2), (2, 1))])
    assert inception_score(probabilities, num_splits=2) == pytest.approx((1.5, 0.5))


@pytest.mark.parametrize(
    ("probabilities", "num_splits", "message"),
    [
        (np.array([[3.0, -2.0], [0.5, 0.5]]), 1, "softmax"),
        (np.array([[2.0, 3.0], [0.5, 0.5]]), 1, "softmax"),
        (np.full((5, 2), 0.5), 6, "num_splits"),
        (np.full((5, 2), 0.5), 0, "num_splits"),
        (np.full((5, 2), np.nan), 1, "NaN"),
    ],
)
def test_bad_arguments_are_refused(probabilities, num_splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probabilities, num_splits=num_splits)
