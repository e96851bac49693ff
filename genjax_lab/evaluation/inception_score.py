"""The Inception score: are single samples recognisable, and all of them together varied?

Salimans et al. (arXiv 1606.03498, section 4): exp(E_x KL(p(y|x) || p(y))), where p(y|x) are a
classifier's probabilities for a sample and p(y) their mean over the samples. It knows nothing of
the real data, so it rewards neither coverage within a class nor a faithful class balance.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.special import rel_entr

from genjax_lab.evaluation.distances import as_vectors


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over the splits; 1 <= mean <= number of classes."""

    mean: float
    std: float


def inception_score(
    probabilities: Float[ArrayLike, "num_samples num_classes"], *, num_splits: int = 10
) -> InceptionScore:
    """Return the Inception score of samples from their class probabilities.

    Args:
        probabilities: a classifier's p(y|x), one sample a row; each row is a distribution.
        num_splits: how many contiguous, nearly equal parts are scored apart and averaged; the
            papers' 50 000 samples are cut into 10. The score of a small part is biased downwards.

    Raises:
        ValueError: if rows are not distributions (to 1e-3), or there are fewer samples than splits.

    References:
        arXiv 1606.03498, section 4.
    """
    rows = as_vectors(probabilities, name="probabilities")
    if (rows < 0).any() or (np.abs(rows.sum(axis=1) - 1) > 1e-3).any():
        raise ValueError(
            "probabilities has rows that are negative or do not sum to 1; pass a classifier's "
            "softmax outputs, not its logits"
        )
    if not 1 <= num_splits <= len(rows):
        raise ValueError(
            f"num_splits is {num_splits} for {len(rows)} samples; expected 1 to the number of "
            "samples"
        )
    scores = []
    for part in np.array_split(rows, num_splits):
        # rel_entr(p, q) = p log(p / q), and 0 where p is 0.
        divergences = rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return InceptionScore(mean=float(np.mean(scores)), std=float(np.std(scores)))
