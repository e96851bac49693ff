"""Resizing and scaling as in the published FID graph, against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.inception import FEATURE_DIM, NUM_CLASSES, InceptionV3, preprocess


def _levels(values):
    """Images in [-1, 1] of pixel values in [0, 255]."""
    return np.asarray(values, np.float32) / 127.5 - 1


def test_output_pixel_i_reads_input_position_i_times_the_ratio_of_sizes():
    row = np.array([0.0, 100.0, 255.0])
    image = np.tile(_levels(row)[None, None, :, None], (1, 3, 1, 3))
    resized = preprocess(image, size=6)
    # Positions 0, 0.5, ..., 2.5; the last one lies beyond the last pixel and repeats it.
    expected = (np.array([0, 50, 100, 177.5, 255, 255]) - 128) / 128
    assert resized.shape == (1, 6, 6, 3)
    np.testing.assert_allclose(resized[0, :, :, 1], np.tile(expected, (6, 1)), atol=1e-5)
    transposed = preprocess(image.transpose(0, 2, 1, 3), size=6)
    np.testing.assert_allclose(transposed[0, :, :, 1], np.tile(expected, (6, 1)).T, atol=1e-5)


def test_shrinking_drops_pixels_without_smoothing():
    pixels = np.random.default_rng(0).integers(0, 256, size=(1, 8, 8, 3))
    resized = preprocess(_levels(pixels), size=4)
    np.testing.assert_allclose(resized, (pixels[:, ::2, ::2] - 128) / 128, atol=1e-5)


def test_images_of_the_network_size_are_only_scaled():
    pixels = np.random.default_rng(1).integers(0, 256, size=(1, 299, 299, 3))
    np.testing.assert_allclose(preprocess(_levels(pixels)), (pixels - 128) / 128, atol=1e-5)


def test_grey_images_become_three_equal_channels():
    grey = _levels(np.random.default_rng(2).integers(0, 256, size=(2, 5, 5, 1)))
    resized = preprocess(grey, size=7)
    assert resized.shape == (2, 7, 7, 3)
    for channel in range(3):
        np.testing.assert_array_equal(resized[..., channel], resized[..., 0])


def test_the_network_has_the_published_number_of_parameters():
    variables = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    # torchvision's Inception v3 has 27 161 264, of which 3 326 696 in the auxiliary head, with 1000
    # classes; the graph of 2015 has 1008. Folding leaves one bias for each of the 17 216
    # convolution outputs where there were a scale and an offset.
    assert count == 27_161_264 - 3_326_696 + 8 * (FEATURE_DIM + 1) - 17_216
    assert variables["params"]["fc"]["kernel"].shape == (FEATURE_DIM, NUM_CLASSES)


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="at least 75"):
        InceptionV3().init(jax.random.key(0), jnp.zeros((1, 74, 75, 3)))
    with pytest.raises(ValueError, match="1 or 3"):
        preprocess(jnp.zeros((1, 8, 8, 2)))
