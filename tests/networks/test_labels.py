"""The one form in which networks read class labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.labels import class_vectors, drop_labels


def test_integers_become_one_hot_and_the_number_of_classes_means_none():
    out = class_vectors(jnp.array([2, 0, 3]), num_classes=3, batch=3)
    np.testing.assert_array_equal(out, [[0, 0, 1], [1, 0, 0], [0, 0, 0]])


def test_vectors_are_kept_in_float32():
    vectors = jnp.array([[0.25, 0.75]], jnp.bfloat16)
    out = class_vectors(vectors, num_classes=2, batch=1)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, [[0.25, 0.75]])


def test_without_labels_nobody_has_a_class():
    np.testing.assert_array_equal(class_vectors(None, num_classes=2, batch=3), np.zeros((3, 2)))
    assert class_vectors(None, num_classes=0, batch=3) is None


@pytest.mark.parametrize(
    ("labels", "num_classes", "match"),
    [
        (jnp.zeros(2, jnp.int32), 0, "unconditional"),
        (jnp.zeros((2, 1), jnp.int32), 3, r"shape \(2,\)"),
        (jnp.zeros((2, 2)), 3, r"shape \(2, 3\)"),
        (jnp.zeros(2, bool), 3, "integers or floats"),
        (None, -1, "num_classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, num_classes, match):
    with pytest.raises(ValueError, match=match):
        class_vectors(labels, num_classes=num_classes, batch=2)


def test_dropping_labels_clears_whole_rows_at_the_given_rate():
    vectors = jnp.full((4000, 3), 0.5)
    out = drop_labels(jax.random.key(0), vectors, 0.25)
    kept = np.asarray((out == vectors).all(axis=1))
    np.testing.assert_array_equal(out[~kept], 0.0)
    # Four standard deviations of a binomial share: a false alarm once in 15 000 keys.
    assert abs((~kept).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
