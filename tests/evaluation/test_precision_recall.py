"""Precision, recall, density and coverage against their definitions by brute force."""

import numpy as np
import pytest

from genjax_lab.evaluation import precision_recall


def _brute_force(real, generated, k):
    """The definitions of arXiv 1904.06991 and 2002.09797 with full distance matrices."""

    def distances(left, right):
        return np.linalg.norm(left[:, None] - right[None], axis=-1)

    def radii(points):
        return np.sort(distances(points, points), axis=1)[:, k]  # column 0 is the point itself

    to_real = distances(generated, real)
    in_real = radii(real) >= to_real
    in_generated = radii(generated) >= to_real.T
    return (
        in_real.any(axis=1).mean(),
        in_generated.any(axis=1).mean(),
        in_real.sum() / (k * len(generated)),
        in_real.any(axis=0).mean(),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tile", [5, 17, 1000])
def test_tiles_of_any_size_give_the_brute_force_result(k, tile):
    rng = np.random.default_rng(k)
    real = rng.normal(size=(53, 4))
    generated = rng.normal(size=(38, 4)) * 1.3 + 0.5
    expected = _brute_force(real, generated, k)
    assert all(0.05 < value < 1.5 for value in expected)
    np.testing.assert_allclose(
        precision_recall(real, generated, k=k, tile=tile), expected, atol=1e-12
    )


def test_collapse_keeps_precision_and_loses_recall():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 3))
    collapsed = real[0] + 1e-3 * rng.normal(size=(200, 3))
    result = precision_recall(real, collapsed)
    assert result.precision == 1
    assert result.recall <= 0.01
    assert result.coverage < 0.2


def test_noise_around_everything_keeps_recall_and_loses_precision():
    rng = np.random.default_rng(1)
    result = precision_recall(rng.normal(size=(200, 3)), 30 * rng.normal(size=(200, 3)))
    assert result.precision < 0.1
    assert result.recall == 1


def test_a_set_recalls_itself():
    points = np.random.default_rng(2).normal(size=(50, 6))
    result = precision_recall(points, points)
    assert result.precision == result.recall == result.coverage == 1


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (np.zeros((10, 2)), np.zeros((10, 3)), {}, "dimension"),
        (np.zeros((3, 2)), np.zeros((10, 2)), {}, "more than k"),
        (np.zeros((10, 2)), np.zeros((10, 2)), {"k": 0}, "k is 0"),
        (np.zeros((10, 2)), np.zeros((10, 2)), {"tile": 0}, "tile is 0"),
        (np.full((10, 2), np.nan), np.zeros((10, 2)), {}, "real has NaN"),
        (np.zeros((10, 2)), np.zeros((2, 5, 2)), {}, "generated has shape"),
    ],
)
def test_bad_arguments_are_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, **options)
