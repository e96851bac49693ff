"""The Frechet distance against closed forms and scipy; statistics against numpy."""

import numpy as np
import pytest
import scipy.linalg

from genjax_lab.evaluation import FeatureStatistics, frechet_distance


def _random_gaussian(rng, dim, num_samples):
    """Mean and covariance of `num_samples` correlated samples."""
    samples = rng.normal(size=(num_samples, dim)) @ rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return samples.mean(axis=0) + rng.normal(size=dim), np.cov(samples, rowvar=False)


def test_one_dimensional_gaussians_have_the_closed_form():
    # ||m1 - m2||^2 + (s1 - s2)^2
    assert frechet_distance([1.0], [[4.0]], [3.5], [[0.25]]) == pytest.approx(
        2.5**2 + (2 - 0.5) ** 2, abs=1e-12
    )


def test_commuting_covariances_have_the_closed_form():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    first, second = rng.uniform(0.1, 3, size=(2, 7))
    mean = rng.normal(size=7)
    distance = frechet_distance(
        mean,
        rotation @ np.diag(first) @ rotation.T,
        np.zeros(7),
        rotation @ np.diag(second) @ rotation.T,
    )
    expected = np.sum(mean**2) + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert distance == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_agrees_with_the_matrix_square_root_of_scipy(dim):
    rng = np.random.default_rng(dim)
    mu1, sigma1 = _random_gaussian(rng, dim, 4 * dim)
    mu2, sigma2 = _random_gaussian(rng, dim, 4 * dim)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_samples", [300, 20])
def test_a_distribution_has_no_distance_to_itself(num_samples):
    # With 20 samples in 100 dimensions the covariance is singular: rounding noise in its 81 zero
    # eigenvalues would show as about 1e-6 if it entered through square roots of eigenvalues.
    mu, sigma = _random_gaussian(np.random.default_rng(1), 100, num_samples)
    assert frechet_distance(mu, sigma, mu, sigma) <= 1e-8


def test_singular_covariances_on_orthogonal_subspaces_have_the_closed_form():
    # Nothing is shared, so the cross term vanishes; a rotation makes the zeros inexact.
    rng = np.random.default_rng(2)
    rotation = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    first = rotation[:, :10] @ np.diag(rng.uniform(1, 2, 10)) @ rotation[:, :10].T
    second = rotation[:, 30:35] @ np.diag(rng.uniform(1, 2, 5)) @ rotation[:, 30:35].T
    distance = frechet_distance(np.zeros(60), first, np.zeros(60), second)
    assert distance == pytest.approx(np.trace(first) + np.trace(second), abs=1e-8)


def test_symmetric_in_its_arguments():
    rng = np.random.default_rng(3)
    one, other = _random_gaussian(rng, 12, 30), _random_gaussian(rng, 12, 9)
    assert frechet_distance(*one, *other) == pytest.approx(
        frechet_distance(*other, *one), rel=1e-12
    )


def test_zero_covariances_leave_the_distance_of_means():
    zero = np.zeros((2, 2))
    assert frechet_distance([0, 3], zero, [4, 0], zero) == pytest.approx(25)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros((3, 1)), np.eye(3), "mu2 has shape"),
        (np.zeros(3), np.eye(4), "sigma2 has shape"),
        (np.zeros(4), np.eye(4), "dimension 4"),
        (np.array([0, np.nan, 0]), np.eye(3), "NaN"),
        (np.zeros(3), np.diag([1, np.inf, 1]), "NaN or infinite"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "transpose"),
        (np.zeros(3), np.diag([1.0, -0.1, 1.0]), "eigenvalue"),
    ],
)
def test_statistics_of_no_distribution_are_refused(mu, sigma, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(3), np.eye(3), mu, sigma)


def _assert_statistics_close(actual, expected):
    assert actual.count == expected.count
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(actual.scatter, expected.scatter, rtol=1e-10)


def test_streamed_statistics_are_those_of_all_samples():
    # A mean 1e4 times the spread: accumulating squares instead of centred squares, or in float32,
    # would lose the covariance.
    features = 1e4 + np.random.default_rng(4).normal(size=(101, 5))
    statistics = FeatureStatistics.empty(5)
    for batch in np.split(features, [1, 1, 40, 77]):
        statistics = statistics.update(batch)
    mu, sigma = statistics.finalize()
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-8)


def test_merging_shards_does_not_depend_on_order_or_grouping():
    features = np.random.default_rng(5).normal(size=(60, 4)) * [1, 10, 100, 1000]
    a, b, c = (FeatureStatistics.empty(4).update(x) for x in np.split(features, [7, 31]))
    whole = FeatureStatistics.empty(4).update(features)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        _assert_statistics_close(merged, whole)


def test_empty_statistics_are_neutral_and_update_leaves_the_old_ones_alone():
    empty = FeatureStatistics.empty(3)
    statistics = empty.update(np.arange(12.0).reshape(4, 3))
    _assert_statistics_close(empty.merge(statistics), statistics)
    _assert_statistics_close(statistics.merge(empty), statistics)
    _assert_statistics_close(statistics.update(np.zeros((0, 3))), statistics)
    assert empty.count == 0 and not empty.mean.any()
    assert empty.merge(empty).count == 0


def test_bad_features_are_refused():
    statistics = FeatureStatistics.empty(3)
    with pytest.raises(ValueError, match="1 of 2 rows"):
        statistics.update([[1, 2, 3], [np.nan, 0, 0]])
    with pytest.raises(ValueError, match="dimension 2"):
        statistics.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="shape"):
        statistics.update(np.zeros(3))
    with pytest.raises(ValueError, match="dimension 2"):
        statistics.merge(FeatureStatistics.empty(2))
    with pytest.raises(ValueError, match="at least 2"):
        statistics.update(np.zeros((1, 3))).finalize()
    with pytest.raises(ValueError, match="dim is 0"):
        FeatureStatistics.empty(0)
