"""Image transforms."""

import numpy as np
import pytest

from genjax_lab.data import center_crop, horizontal_flip


def test_flip_mirrors_the_images_whose_bit_is_set():
    images = np.random.default_rng(0).normal(size=(4, 3, 5, 2)).astype(np.float32)
    batch = {"image": images, "label": np.arange(4)}
    flipped = horizontal_flip(batch, np.array([0, 1, 2, 3], np.uint64))
    for row, mirrored in enumerate([False, True, False, True]):
        expected = images[row, :, ::-1] if mirrored else images[row]
        np.testing.assert_array_equal(flipped["image"][row], expected)
    assert flipped["label"] is batch["label"] and batch["image"] is images


def test_crop_of_twice_the_size_is_a_mean_of_two_by_two_pixels():
    # Multiples of four have whole means, so that rounding cannot differ.
    image = (np.random.default_rng(0).integers(0, 64, (12, 12, 3)) * 4).astype(np.uint8)
    expected = image.reshape(6, 2, 6, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(center_crop(image, resolution=6), expected)


def test_crop_of_an_oblong_image_is_its_centre():
    image = np.random.default_rng(0).integers(0, 256, (9, 5, 1)).astype(np.uint8)
    np.testing.assert_array_equal(center_crop(image, resolution=5), image[2:7])
    tall = image.transpose(1, 0, 2)
    np.testing.assert_array_equal(center_crop(tall, resolution=5), tall[:, 2:7])


@pytest.mark.parametrize("shape", [(7, 31, 3), (100, 53, 3), (8, 8, 1), (3, 5, 3)])
def test_crop_has_the_resolution_and_keeps_a_constant(shape):
    cropped = center_crop(np.full(shape, 77, np.uint8), resolution=8)
    assert cropped.shape == (8, 8, shape[-1])
    assert (cropped == 77).all()


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        center_crop(np.zeros((8, 8, 3), np.float32), resolution=4)
    with pytest.raises(ValueError, match="resolution"):
        center_crop(np.zeros((8, 8, 3), np.uint8), resolution=0)
