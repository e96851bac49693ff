"""Data and samples side by side."""

import numpy as np
import pytest

from genjax_lab.data import PairedLoader, make_loader_from_arrays


def loader(value, num, batch_size=4, seed=0):
    images = np.full((num, 2, 2, 1), value, np.uint8)
    return make_loader_from_arrays(
        {"image": images, "label": np.arange(num, dtype=np.int32)}, batch_size, seed
    )


def test_batches_hold_as_many_samples_as_data_with_their_own_labels():
    batch = next(PairedLoader(loader(255, 10), loader(0, 7, seed=1)))
    assert set(batch) == {"image", "label", "fake_image", "fake_label"}
    assert np.all(batch["image"] == 1)
    assert np.all(batch["fake_image"] == -1)
    assert len(batch["label"]) == len(batch["fake_label"]) == 4
    assert not np.array_equal(batch["label"], batch["fake_label"])


def test_both_go_on_from_batch_to_batch():
    pair = PairedLoader(loader(255, 10), loader(0, 7, seed=1))
    for step in range(3):
        batch = next(pair)
        np.testing.assert_array_equal(batch["label"], loader(255, 10)[step]["label"])
        np.testing.assert_array_equal(batch["fake_label"], loader(0, 7, seed=1)[step]["label"])


def test_its_place_can_be_restored():
    one, two = (PairedLoader(loader(255, 10), loader(0, 7, seed=1)) for _ in range(2))
    for _ in range(5):
        next(one)
    two.set_state(one.get_state())
    for _ in range(3):
        a, b = next(one), next(two)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def unlabelled(num, batch_size=4):
    images = np.zeros((num, 2, 2, 1), np.uint8)
    return make_loader_from_arrays({"image": images}, batch_size, 0, num_classes=0)


def test_labels_are_of_both_or_are_missed_where_they_are_not():
    """The label 0 that a loader without classes gives to all is no class of the other's."""
    assert set(next(PairedLoader(unlabelled(9), unlabelled(7)))) == {"image", "fake_image"}
    plain = PairedLoader(loader(255, 10), loader(0, 7), labels=False)
    assert set(next(plain)) == {"image", "fake_image"}
    missing = PairedLoader(loader(255, 10), unlabelled(7))
    assert set(next(missing)) == {"image", "label", "fake_image"}
    assert set(next(PairedLoader(loader(255, 10), unlabelled(7), labels=False))) == set(next(plain))
    for real, fake, lacking in (
        (loader(255, 10), unlabelled(7), "fake"),
        (unlabelled(10), loader(0, 7), "real"),
    ):
        with pytest.raises(ValueError, match=f"{lacking} has no labels"):
            PairedLoader(real, fake, labels=True)
    with pytest.raises(ValueError, match="real has no labels"):
        PairedLoader(unlabelled(10), loader(0, 7))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="one size, got 4 and 5"):
        PairedLoader(loader(255, 10), loader(0, 7, batch_size=5))
    pair = PairedLoader(loader(255, 10), loader(0, 7))
    with pytest.raises(ValueError, match="entries real and fake"):
        pair.set_state({"step": 3})
    with pytest.raises(ValueError, match="other batches"):
        pair.set_state(PairedLoader(loader(255, 9), loader(0, 7)).get_state())
