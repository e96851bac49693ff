"""The split of data that come without one."""

import numpy as np
import pytest

from genjax_lab.data.stratified_split import stratified_split


def test_split_is_a_partition_with_a_fifth_of_every_class():
    labels = np.random.default_rng(0).integers(0, 4, 203)
    split = stratified_split(labels)
    both = np.concatenate([split["train"], split["test"]])
    np.testing.assert_array_equal(np.sort(both), np.arange(203))
    np.testing.assert_array_equal(np.bincount(labels[split["test"]]), np.bincount(labels) // 5)


def test_split_takes_every_fifth_of_a_class_in_stored_order():
    labels = np.array([0, 1] * 10)
    np.testing.assert_array_equal(stratified_split(labels)["test"], [8, 9, 18, 19])


def test_float_labels_are_refused():
    with pytest.raises(ValueError, match="integer"):
        stratified_split(np.zeros(3))
