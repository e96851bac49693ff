"""Does a generator repeat its training images?

A sample that only generalises is as near to training images as to held-out ones. This report
compares nearest-neighbour distances in whatever space it is given (pixels or features), in three
ways: distance to the training set over distance to an equally large held-out set; the data-copying
test of Meehan et al. (arXiv 2004.05675, section 3.1); and the share of near copies by the rule used
by Gu et al. (arXiv 2310.02664, section 2). None of them says anything about a sample's quality.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.stats import mannwhitneyu

from genjax_lab.evaluation.distances import as_vectors, nearest_squared_distances

_COPY_RATIO = 1 / 3


class MemorizationReport(NamedTuple):
    """How much nearer generated vectors lie to the training set than chance explains.

    Attributes:
        distance_ratio: median over generated vectors of (distance to the nearest training vector) /
            (distance to the nearest held-out vector), from equally many of each; about 1 without
            memorization, towards 0 with it.
        closer_to_train: fraction nearer to the training set in that comparison, ties counted half;
            about 0.5 without memorization.
        copying_z: z-score of the Mann-Whitney test that generated vectors are as far from the
            training set as held-out ones; below -3 means copying, above 3 under-fitting.
        copied_fraction: fraction whose nearest training vector is less than a third as far away as
            the second nearest.
        num_compared: how many training and held-out vectors the first two fields used.
    """

    distance_ratio: float
    closer_to_train: float
    copying_z: float
    copied_fraction: float
    num_compared: int


def memorization_report(
    generated: Float[ArrayLike, "num_generated dim"],
    train: Float[ArrayLike, "num_train dim"],
    held_out: Float[ArrayLike, "num_held_out dim"],
    *,
    seed: int = 0,
    tile: int = 2048,
) -> MemorizationReport:
    """Compare nearest-neighbour distances of generated vectors to training and held-out data.

    Args:
        generated: generated images as vectors, flattened pixels or features.
        train: the images that the generator was trained on, in the same space.
        held_out: images of the same source that it never saw.
        seed: chooses the subset of the larger set when sizes differ, as the nearest of more vectors
            is nearer by chance alone.
        tile: rows and columns of the largest block of distances held in memory.

    Raises:
        ValueError: if a set is not a finite matrix, dimensions differ, there are no generated or
            held-out vectors, or fewer than 2 training vectors.

    References:
        arXiv 2004.05675, section 3.1; arXiv 2310.02664, section 2.
    """
    generated = as_vectors(generated, name="generated")
    train = as_vectors(train, name="train")
    held_out = as_vectors(held_out, name="held_out")
    for name, vectors in (("generated", generated), ("held_out", held_out)):
        if vectors.shape[1] != train.shape[1]:
            raise ValueError(
                f"{name} has dimension {vectors.shape[1]} and train {train.shape[1]}; expected one "
                "space for all three sets"
            )
        if len(vectors) == 0:
            raise ValueError(f"{name} is empty; expected at least one vector")
    if len(train) < 2:
        raise ValueError(f"train has {len(train)} vectors; expected at least 2")

    num_compared = min(len(train), len(held_out))
    rng = np.random.default_rng(seed)
    train_subset = _subset(rng, train, num_compared)
    held_out_subset = _subset(rng, held_out, num_compared)
    to_train = nearest_squared_distances(generated, train_subset, k=1, tile=tile)[:, 0]
    to_held_out = nearest_squared_distances(generated, held_out_subset, k=1, tile=tile)[:, 0]
    # Two distances of zero are a tie: ratio 1.
    ratios = np.sqrt(
        np.divide(to_train, to_held_out, out=np.full_like(to_train, np.inf), where=to_held_out > 0)
    )
    ratios[(to_train == 0) & (to_held_out == 0)] = 1.0
    closer = np.mean(to_train < to_held_out) + np.mean(to_train == to_held_out) / 2

    two_nearest = nearest_squared_distances(generated, train, k=2, tile=tile)
    of_held_out = nearest_squared_distances(held_out, train, k=1, tile=tile)[:, 0]
    return MemorizationReport(
        distance_ratio=float(np.median(ratios)),
        closer_to_train=float(closer),
        copying_z=_mann_whitney_z(two_nearest[:, 0], of_held_out),
        copied_fraction=float(np.mean(two_nearest[:, 0] < _COPY_RATIO**2 * two_nearest[:, 1])),
        num_compared=num_compared,
    )


def _subset(rng: np.random.Generator, vectors: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows without replacement."""
    if count == len(vectors):
        return vectors
    return vectors[rng.permutation(len(vectors))[:count]]


def _mann_whitney_z(first: np.ndarray, second: np.ndarray) -> float:
    """Return the normal approximation's z-score, negative where `first` tends to be smaller."""
    statistic = mannwhitneyu(first, second, method="asymptotic").statistic
    product = len(first) * len(second)
    variance = product * (len(first) + len(second) + 1) / 12
    return float((statistic - product / 2) / np.sqrt(variance))
