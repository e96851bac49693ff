"""One pass over samples gives every metric, the same as computing each apart."""

import numpy as np
import pytest

from genjax_lab.evaluation import (
    FeatureExtractor,
    FeatureStatistics,
    evaluate_samples,
    extract_features,
    frechet_distance,
    inception_score,
    precision_recall,
)

_PIXELS = 4
_ALL = ("frechet", "precision_recall", "inception_score")


def _flatten(images):
    images = np.asarray(images)
    return images.reshape(len(images), -1)


def _softmax(features):
    exponentials = np.exp(features)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(
        apply=_flatten,
        probabilities=_softmax,
        dim=_PIXELS,
        name="pixels",
        version="1",
        metadata={},
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    real = rng.uniform(-1, 1, size=(80, 2, 2, 1))
    return real, np.clip(rng.normal(size=(60, 2, 2, 1)), -1, 1)


def _quantize(images):
    return np.round(np.asarray(images) * 2) / 2


def test_all_metrics_are_those_of_the_quantised_samples(extractor, images):
    real, samples = images
    reference = extract_features([real[:50], real[50:]], extractor, quantize=_quantize)
    np.testing.assert_array_equal(reference, _flatten(_quantize(real)))
    results = evaluate_samples(
        np.split(samples, [7, 40]), reference, extractor, quantize=_quantize, metrics=_ALL
    )
    features = _flatten(_quantize(samples))
    score = inception_score(_softmax(features))
    expected = {
        "num_samples": 60,
        "frechet": frechet_distance(
            features.mean(axis=0),
            np.cov(features, rowvar=False),
            reference.mean(axis=0),
            np.cov(reference, rowvar=False),
        ),
        **precision_recall(reference, features)._asdict(),
        "inception_score": score.mean,
        "inception_score_std": score.std,
    }
    assert results == pytest.approx(expected)
    unquantised = evaluate_samples([samples], reference, extractor, quantize=None)
    assert unquantised["frechet"] != pytest.approx(expected["frechet"], rel=1e-3)


def test_statistics_alone_suffice_for_the_frechet_distance(extractor, images):
    real, samples = images
    statistics = FeatureStatistics.empty(_PIXELS).update(_flatten(real))
    by_statistics = evaluate_samples([samples], statistics, extractor, quantize=None)
    by_features = evaluate_samples([samples], _flatten(real), extractor, quantize=None)
    assert by_statistics == pytest.approx(by_features)
    assert set(by_statistics) == {"num_samples", "frechet"}


def test_real_images_have_no_distance_to_themselves(extractor, images):
    real, _ = images
    results = evaluate_samples(
        iter([real]),
        _flatten(real),
        extractor,
        quantize=None,
        metrics=("frechet", "precision_recall"),
    )
    assert results["frechet"] <= 1e-8
    assert results["precision"] == results["recall"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("frechet", "fid")}, r"unknown names \['fid'\]; known are .*precision_recall"),
        ({"metrics": "frechet"}, "sequence of names"),
        ({"metrics": ()}, "sequence of names"),
        ({"sample_batches": []}, "sample_batches is empty"),
        ({"reference": np.zeros((9, 5))}, "dimension 5"),
        ({"reference": np.zeros((1, 4))}, "at least 2"),
        ({"reference": FeatureStatistics.empty(4), "metrics": _ALL}, "real features"),
    ],
)
def test_bad_arguments_are_refused(extractor, images, changes, message):
    real, samples = images
    arguments = {
        "sample_batches": [samples],
        "reference": _flatten(real),
        "feature_extractor": extractor,
        "quantize": None,
    }
    with pytest.raises(ValueError, match=message):
        evaluate_samples(**(arguments | changes))


def test_no_real_images_are_refused(extractor):
    with pytest.raises(ValueError, match="image_batches is empty"):
        extract_features([], extractor, quantize=None)
