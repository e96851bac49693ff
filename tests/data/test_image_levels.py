"""Pixels to [-1, 1] and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.data import DatasetInfo, dequantize, quantize


def info_with(max_value):
    return DatasetInfo("test", (1, 1, 1), 10, max_value, {"train": 1})


@pytest.mark.parametrize("max_value", [1, 16, 100, 255])
def test_quantize_undoes_dequantize_on_every_level(max_value):
    info = info_with(max_value)
    levels = np.arange(max_value + 1, dtype=np.uint8)
    images = dequantize(levels, info)
    assert images.dtype == np.float32
    assert images[0] == -1 and images[-1] == 1
    np.testing.assert_array_equal(quantize(images, info), levels)
    assert info.num_levels == max_value + 1


def test_eight_bit_levels_are_edms():
    # The two formulas as EDM writes them, on values that are no levels.
    images = np.random.default_rng(0).uniform(-1.3, 1.3, 4096).astype(np.float32)
    expected = np.clip(images * np.float32(127.5) + np.float32(128), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(quantize(images, info_with(255)), expected)
    levels = np.arange(256, dtype=np.uint8)
    expected = levels.astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(dequantize(levels, info_with(255)), expected)


def test_quantize_takes_the_nearest_of_seventeen_levels():
    images = np.random.default_rng(1).uniform(-1, 1, 1000).astype(np.float32)
    grid = dequantize(np.arange(17, dtype=np.uint8), info_with(16))
    nearest = np.abs(images[:, None] - grid).argmin(axis=1)
    np.testing.assert_array_equal(quantize(images, info_with(16)), nearest)


def test_values_outside_the_range_go_to_the_ends():
    outside = np.array([-5.0, 5.0], np.float32)
    np.testing.assert_array_equal(quantize(outside, info_with(16)), [0, 16])


def test_jax_arrays_of_any_precision_are_quantized():
    images = jnp.linspace(-1, 1, 5)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(quantize(images.astype(dtype), info_with(4)), [0, 1, 2, 3, 4])


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"index \(1, 0\)"):
        quantize(np.array([[0.0], [np.nan]]), info_with(16))
    with pytest.raises(ValueError, match="floating point"):
        quantize(np.zeros(3, np.uint8), info_with(16))
    with pytest.raises(ValueError, match="max_value"):
        quantize(np.zeros(3), info_with(None))
    with pytest.raises(ValueError, match="exceed"):
        dequantize(np.array([17], np.uint8), info_with(16))
    with pytest.raises(ValueError, match="uint8"):
        dequantize(np.array([1.0]), info_with(16))
