"""Classifier features: they separate classes, repeat exactly, and their cache is trustworthy."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from genjax_lab.evaluation import ClassifierRecipe, classifier_features
from genjax_lab.evaluation.classifier_training import augment

_QUICK = ClassifierRecipe(hidden=(), feature_dim=8, num_steps=30, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = (data.images[..., None] / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], data.target[order]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    images, labels = digits
    cache = tmp_path_factory.mktemp("classifier")
    extractor = classifier_features(
        images[360:], labels[360:], cache_dir=cache, held_out=(images[:360], labels[:360])
    )
    return extractor, cache


@pytest.fixture
def quick(digits, tmp_path):
    images, labels = digits[0][:64], digits[1][:64]

    def make(**changes):
        arguments = {"images": images, "labels": labels, "cache_dir": tmp_path, "recipe": _QUICK}
        return classifier_features(**(arguments | changes))

    return make


def test_digits_are_recognised_when_held_out(trained):
    extractor, _ = trained
    assert extractor.metadata["held_out_accuracy"] > 0.96
    assert extractor.metadata["train_accuracy"] > 0.96


def test_features_are_the_last_hidden_layer(trained, digits):
    extractor, _ = trained
    images, labels = digits
    features = extractor.apply(images)
    assert features.shape == (len(images), extractor.dim) == (1797, 32)
    assert features.dtype == np.float32
    probabilities = extractor.probabilities(features)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == labels) > 0.96


def test_an_image_has_the_same_features_in_any_batch(trained, digits):
    extractor, _ = trained
    images = digits[0][:700]
    together = extractor.apply(images)
    np.testing.assert_allclose(extractor.apply(images[650:]), together[650:], atol=1e-5)
    np.testing.assert_allclose(extractor.apply(images[3:4]), together[3:4], atol=1e-5)


def test_cached_weights_are_read_and_not_trained_again(trained, digits, monkeypatch):
    extractor, cache = trained
    images, labels = digits
    monkeypatch.setattr(
        "genjax_lab.evaluation.classifier_training.train", lambda *_, **__: pytest.fail("trained")
    )
    again = classifier_features(
        images[360:], labels[360:], cache_dir=cache, held_out=(images[:360], labels[:360])
    )
    assert again.version == extractor.version
    assert again.metadata == extractor.metadata
    np.testing.assert_array_equal(again.apply(images[:5]), extractor.apply(images[:5]))


def test_training_repeats_exactly(quick, digits):
    first, second = quick(cache_dir=None), quick(cache_dir=None)
    images = digits[0][:9]
    np.testing.assert_array_equal(first.apply(images), second.apply(images))
    assert first.metadata["file"] is None


def test_everything_that_decides_the_weights_is_in_the_file_name(
    quick, digits, tmp_path, monkeypatch
):
    def untrained(_key, _images, _labels, **_):
        return {"params": {"head": {"bias": np.zeros(10, np.float32)}}}, 0.5

    monkeypatch.setattr("genjax_lab.evaluation.classifier_training.train", untrained)
    versions = {
        quick().version,
        quick(seed=1).version,
        quick(images=digits[0][64:128]).version,
        quick(labels=digits[1][64:128]).version,
        quick(recipe=ClassifierRecipe(hidden=(), feature_dim=8, num_steps=31)).version,
    }
    assert len(versions) == 5
    assert {file.name for file in tmp_path.iterdir()} == {
        f"classifier-{version}.safetensors" for version in versions
    }


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def _empty(file):
    file.write_bytes(b"")


def _flip_a_bit_of_a_weight(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip_a_bit_of_a_weight])
def test_a_damaged_cache_names_the_file_to_delete(quick, tmp_path, damage):
    quick()
    (file,) = tmp_path.iterdir()
    damage(file)
    with pytest.raises(ValueError, match=f"delete {file}"):
        quick()
    file.unlink()
    quick()


def test_a_cache_made_from_something_else_is_refused(quick, tmp_path):
    quick()
    (file,) = tmp_path.iterdir()
    other = quick(seed=1)
    file.replace(other.metadata["file"])
    with pytest.raises(ValueError, match="not made from these images"):
        quick(seed=1)


def test_an_interrupted_write_leaves_no_file(quick, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick()
    assert list(tmp_path.iterdir()) == []


def test_augmentation_shifts_whole_images_and_adds_noise():
    image = np.zeros((1, 6, 6, 1), np.float32)
    image[0, 2, 3] = 1
    batch = np.repeat(image, 64, axis=0)
    compiled = jax.jit(augment, static_argnames="max_shift")
    shifted = np.asarray(compiled(jax.random.key(0), batch, max_shift=1, max_noise=0.0))
    positions = {tuple(np.argwhere(one[..., 0])[0]) for one in shifted}
    assert positions == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4)}
    assert (shifted.sum(axis=(1, 2, 3)) == 1).all()
    noisy = np.asarray(compiled(jax.random.key(0), 0 * batch, max_shift=1, max_noise=0.5))
    strengths = noisy.std(axis=(1, 2, 3))
    assert strengths.min() < 0.1 and 0.4 < strengths.max() < 0.65


def test_bad_images_and_labels_are_refused(quick, digits):
    images, labels = digits[0][:64], digits[1][:64]
    with pytest.raises(ValueError, match="labels has shape"):
        quick(labels=labels[:5])
    with pytest.raises(ValueError, match="integers"):
        quick(labels=labels.astype(float))
    with pytest.raises(ValueError, match="class -1"):
        quick(labels=labels - 1 - labels.min())
    with pytest.raises(ValueError, match="images has shape"):
        quick(images=images[..., 0])
    with pytest.raises(ValueError, match="at least one image"):
        quick(images=images[:0], labels=labels[:0])
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        quick(images=images * 8 + 8)
    with pytest.raises(ValueError, match="NaN"):
        quick(images=np.where(images > 0, np.nan, images))
    extractor = quick()
    with pytest.raises(ValueError, match="these features are of images of shape"):
        extractor.apply(np.zeros((2, 9, 8, 1)))
    with pytest.raises(ValueError, match="NaN"):
        extractor.apply(np.full((2, 8, 8, 1), np.nan))
