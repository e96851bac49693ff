"""Label draws for sampling."""

import numpy as np
import pytest

from genjax_lab.data import balanced_labels


def test_consecutive_seeds_hold_every_class_equally_often():
    labels = balanced_labels(range(7, 7 + 50), 10)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 5))


def test_a_label_depends_on_its_own_seed_only():
    whole = balanced_labels(range(1000), 7)
    np.testing.assert_array_equal(balanced_labels(range(300, 400), 7), whole[300:400])
    seeds = np.array([999, 0, 6, 7])
    np.testing.assert_array_equal(balanced_labels(seeds, 7), whole[seeds])


@pytest.mark.parametrize(
    ("seeds", "num_classes", "message"),
    [
        (range(3), 0, "num_classes"),
        (np.array([0.5]), 3, "integer"),
        (np.array([[1]]), 3, "one-dimensional"),
        (np.array([2, -1]), 3, "negative"),
    ],
)
def test_bad_arguments_are_named(seeds, num_classes, message):
    with pytest.raises(ValueError, match=message):
        balanced_labels(seeds, num_classes)
