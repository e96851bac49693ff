"""Frequencies and order of the noise-level embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.embeddings import FourierEmbedding, positional_embedding


def test_cosines_come_before_sines():
    embedding = positional_embedding(jnp.zeros(2), 8)
    np.testing.assert_array_equal(embedding, [[1, 1, 1, 1, 0, 0, 0, 0]] * 2)


@pytest.mark.parametrize(("endpoint", "lowest"), [(True, 1e-4), (False, 1e-3)])
def test_endpoint_decides_the_lowest_frequency(endpoint, lowest):
    # At t = 0.1 the sine of the lowest frequency is its angle to 1e-9.
    embedding = positional_embedding(jnp.array([0.1]), 8, endpoint)
    np.testing.assert_allclose(embedding[0, -1], 0.1 * lowest, rtol=1e-5)
    np.testing.assert_allclose(embedding[0, 4], np.sin(0.1), rtol=1e-6)


def test_fourier_frequencies_are_fixed_buffers_of_the_given_deviation():
    module = FourierEmbedding(8192, scale=16.0)
    t = jnp.array([0.25, -1.0])
    variables = module.init(jax.random.key(0), t)
    assert list(variables) == ["buffers"]
    freqs = variables["buffers"]["freqs"]
    # The deviation of 4096 normals has a relative standard error of 1.1 %: 5 of them.
    np.testing.assert_allclose(freqs.std(), 16.0, rtol=0.055)
    angles = 2 * np.pi * np.asarray(t, np.float64)[:, None] * np.asarray(freqs, np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # Angles reach 2 pi * 60; float32 rounds them to 2e-5.
    np.testing.assert_allclose(module.apply(variables, t), expected, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 7])
def test_impossible_channel_counts_are_refused(channels):
    with pytest.raises(ValueError, match="num_channels"):
        positional_embedding(jnp.zeros(1), channels, endpoint=True)


def test_one_scalar_per_example_is_demanded():
    with pytest.raises(ValueError, match="t must have shape"):
        positional_embedding(jnp.zeros((2, 1)), 8)
    with pytest.raises(ValueError, match="t must have shape"):
        FourierEmbedding(8).init(jax.random.key(0), jnp.zeros((2, 1)))
