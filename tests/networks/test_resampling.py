"""Resampling against the defining sums, and its two halves against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.resampling import downsample, upsample

FILTERS = [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4)]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("taps", FILTERS)
def test_downsampling_is_the_strided_sum(taps):
    x = normal(0, 1, 4, 6, 2)
    pad = (len(taps) - 1) // 2
    padded = np.pad(np.asarray(x, np.float64), [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    kernel = np.outer(taps, taps) / np.sum(taps) ** 2
    expected = np.zeros((1, 2, 3, 2))
    for i in range(2):
        for j in range(3):
            patch = padded[:, 2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)]
            expected[:, i, j] = np.einsum("bhwc,hw->bc", patch, kernel)
    np.testing.assert_allclose(downsample(x, taps), expected, atol=1e-6)


@pytest.mark.parametrize("taps", FILTERS)
def test_upsampling_is_four_times_the_transpose_of_downsampling(taps):
    x, y = normal(0, 1, 4, 6, 2), normal(1, 1, 2, 3, 2)
    left = 4 * jnp.vdot(downsample(x, taps), y)
    np.testing.assert_allclose(left, jnp.vdot(x, upsample(y, taps)), rtol=1e-5)


def test_the_box_filter_averages_and_repeats():
    x = normal(0, 1, 2, 4, 3)
    np.testing.assert_array_equal(upsample(x, (1, 1)), x.repeat(2, axis=1).repeat(2, axis=2))
    means = x.reshape(1, 1, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(downsample(x, (1, 1)), means, atol=1e-6)


@pytest.mark.parametrize("taps", [(), (1, 2, 1), (1, -1)])
def test_filters_without_a_centre_or_gain_are_refused(taps):
    for resample in (downsample, upsample):
        with pytest.raises(ValueError, match="resample_filter"):
            resample(jnp.zeros((1, 4, 4, 1)), taps)


def test_odd_sides_are_refused():
    with pytest.raises(ValueError, match="even"):
        downsample(jnp.zeros((1, 4, 5, 1)), (1, 1))
