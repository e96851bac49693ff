"""Evaluate generated images batch by batch: one pass, all metrics.

Samples may come from any iterator, so fifty thousand of them are never held as images; only
features are kept, and only where a metric needs them one by one. What is real is given either as
features (all metrics) or as their statistics alone (the Frechet distance), so that published
statistics can be used.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Array, ArrayLike, Float
from tqdm import tqdm

from genjax_lab.evaluation.distances import as_vectors
from genjax_lab.evaluation.features import FeatureExtractor
from genjax_lab.evaluation.frechet import FeatureStatistics, frechet_distance
from genjax_lab.evaluation.inception_score import inception_score
from genjax_lab.evaluation.precision_recall import precision_recall

METRICS = ("frechet", "precision_recall", "inception_score")

Quantize = Callable[[Array], Array]


def extract_features(
    image_batches: Iterable[Float[ArrayLike, "batch height width channels"]],
    feature_extractor: FeatureExtractor,
    *,
    quantize: Quantize | None,
    progress: bool = False,
) -> Float[np.ndarray, "num_images dim"]:
    """Return the features of all images of an iterable.

    Args:
        image_batches: batches of images in [-1, 1]; sizes may vary.
        feature_extractor: what to extract.
        quantize: rounds images to the data set's levels; None if they lie on them already.
        progress: show a progress bar.

    Raises:
        ValueError: if there are no images, or the extractor refuses a batch.
    """
    features = list(_feature_batches(image_batches, feature_extractor, quantize, progress))
    if not features:
        raise ValueError("image_batches is empty; expected at least one batch of images")
    return np.concatenate(features)


def evaluate_samples(
    sample_batches: Iterable[Float[ArrayLike, "batch height width channels"]],
    reference: FeatureStatistics | Float[ArrayLike, "num_real dim"],
    feature_extractor: FeatureExtractor,
    *,
    quantize: Quantize | None,
    metrics: Sequence[str] = ("frechet",),
    progress: bool = False,
) -> dict[str, float]:
    """Return metrics of generated images against real ones.

    Args:
        sample_batches: batches of generated images; sizes may vary. They are read once.
        reference: features of the real images (from `extract_features` with this extractor), or
            their `FeatureStatistics`, which suffice for "frechet" and "inception_score".
        feature_extractor: maps quantised images to features.
        quantize: rounds samples exactly as the data set is quantised; without it a model is judged
            on invisible digits of its pixels. None only if the samples are already rounded.
        metrics: names out of "frechet", "precision_recall", "inception_score".
        progress: show a progress bar.

    Returns:
        `num_samples`, and for "frechet": `frechet`; for "precision_recall": `precision`, `recall`,
        `density`, `coverage`; for "inception_score": `inception_score` and `inception_score_std`
        over ten parts.

    Raises:
        ValueError: if a metric is unknown or needs more than `reference` offers, dimensions
            disagree, there are fewer samples than a metric needs, or a batch is refused.
    """
    _check_metrics(metrics)
    real_features, real_statistics = _checked_reference(reference, feature_extractor, metrics)

    statistics = FeatureStatistics.empty(feature_extractor.dim)
    keep = "precision_recall" in metrics or "inception_score" in metrics
    kept = []
    for features in _feature_batches(sample_batches, feature_extractor, quantize, progress):
        statistics = statistics.update(features)
        if keep:
            kept.append(features)
    if statistics.count == 0:
        raise ValueError("sample_batches is empty; expected at least one batch of images")

    results = {"num_samples": statistics.count}
    if "frechet" in metrics:
        results["frechet"] = frechet_distance(*statistics.finalize(), *real_statistics.finalize())
    if "precision_recall" in metrics:
        results |= precision_recall(real_features, np.concatenate(kept))._asdict()
    if "inception_score" in metrics:
        score = inception_score(feature_extractor.probabilities(np.concatenate(kept)))
        results |= {"inception_score": score.mean, "inception_score_std": score.std}
    return results


def _feature_batches(
    image_batches: Iterable[ArrayLike],
    feature_extractor: FeatureExtractor,
    quantize: Quantize | None,
    progress: bool,
) -> Iterable[np.ndarray]:
    """Yield the features of each batch."""
    with tqdm(unit="image", desc=feature_extractor.name, disable=not progress) as bar:
        for images in image_batches:
            features = feature_extractor.apply(images if quantize is None else quantize(images))
            bar.update(len(features))
            yield features


def _check_metrics(metrics: Sequence[str]) -> None:
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics is {metrics!r}; expected a sequence of names out of {METRICS}")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics has the unknown names {unknown}; known are {METRICS}")


def _checked_reference(
    reference: FeatureStatistics | ArrayLike,
    feature_extractor: FeatureExtractor,
    metrics: Sequence[str],
) -> tuple[np.ndarray | None, FeatureStatistics]:
    """Return real features, if they were given, and their statistics."""
    if isinstance(reference, FeatureStatistics):
        features, statistics = None, reference
    else:
        features = as_vectors(reference, name="reference")
        statistics = FeatureStatistics.empty(features.shape[1]).update(features)
    if len(statistics.mean) != feature_extractor.dim:
        raise ValueError(
            f"reference has dimension {len(statistics.mean)} and the extractor "
            f"{feature_extractor.name!r} {feature_extractor.dim}; extract both with one extractor"
        )
    if features is None and "precision_recall" in metrics:
        raise ValueError(
            "reference holds statistics only, but precision_recall compares single images; pass "
            "the real features"
        )
    return features, statistics
