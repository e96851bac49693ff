"""The Frechet distance between two sets of features, each summarised as a Gaussian.

Heusel et al. (arXiv 1706.08500, eq. 6): with feature means m_i and covariances S_i,

    d^2 = ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2}).

Features arrive in batches and on several processes, so their statistics are accumulated in float64
and merged by the parallel update of Chan, Golub and LeVeque (1979). Which features to use is not
decided here: see `genjax_lab.evaluation.features`. No square root of a non-symmetric matrix is
taken, so no imaginary part appears that would have to be dropped.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from genjax_lab.evaluation.distances import as_vectors


class FeatureStatistics(NamedTuple):
    """Count, mean and scatter of feature vectors seen so far, in float64. Immutable.

    Attributes:
        count: number of vectors.
        mean: [dim], zero while count is 0.
        scatter: [dim, dim], the sum over vectors of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Float[np.ndarray, " dim"]
    scatter: Float[np.ndarray, "dim dim"]

    @classmethod
    def empty(cls, dim: int) -> "FeatureStatistics":
        """Return the statistics of no vectors of dimension `dim`, the neutral element of `merge`.

        Raises:
            ValueError: if `dim` is not positive.
        """
        if dim < 1:
            raise ValueError(f"dim is {dim}; expected the positive dimension of the features")
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def update(self, features: Float[ArrayLike, "batch dim"]) -> "FeatureStatistics":
        """Return the statistics with a batch of vectors added; an empty batch changes nothing.

        Raises:
            ValueError: if `features` is not finite or not [batch, dim] with this dim.
        """
        vectors = as_vectors(features, name="features")
        if vectors.shape[1] != len(self.mean):
            raise ValueError(
                f"features have dimension {vectors.shape[1]}; these statistics are of dimension "
                f"{len(self.mean)}"
            )
        if len(vectors) == 0:
            return self
        mean = vectors.mean(axis=0)
        centered = vectors - mean
        return self.merge(FeatureStatistics(len(vectors), mean, centered.T @ centered))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of both sets together.

        Associative and commutative up to rounding, so that batches, shards and processes may be
        merged in any order.

        Raises:
            ValueError: if the dimensions differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other has dimension {len(other.mean)}; these statistics are of dimension "
                f"{len(self.mean)}"
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    def finalize(self) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
        """Return the mean and the unbiased covariance, scatter / (count - 1).

        Raises:
            ValueError: if fewer than 2 vectors were seen.
        """
        if self.count < 2:
            raise ValueError(
                f"these statistics are of {self.count} samples; a covariance needs at least 2"
            )
        return self.mean, self.scatter / (self.count - 1)


def frechet_distance(
    mu1: Float[ArrayLike, " dim"],
    sigma1: Float[ArrayLike, "dim dim"],
    mu2: Float[ArrayLike, " dim"],
    sigma2: Float[ArrayLike, "dim dim"],
) -> float:
    """Return the squared 2-Wasserstein distance between N(mu1, sigma1) and N(mu2, sigma2).

    This is what is reported as "FID" when the vectors are Inception features. Computed in float64;
    covariances may be singular, as they are with fewer samples than dimensions.

    Args:
        mu1: mean of the first set.
        sigma1: its covariance, symmetric and positive semi-definite.
        mu2: mean of the second set.
        sigma2: its covariance.

    Returns:
        The distance, at least 0 (rounding below zero is clipped).

    Raises:
        ValueError: if shapes disagree, entries are not finite, or a covariance is not symmetric or
            has an eigenvalue below zero by more than rounding.

    References:
        Heusel et al., arXiv 1706.08500, eq. 6. Dowson and Landau (1982).
    """
    mu1, sigma1 = _checked_gaussian(mu1, sigma1, suffix="1")
    mu2, sigma2 = _checked_gaussian(mu2, sigma2, suffix="2")
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"mu2 has dimension {len(mu2)} and mu1 {len(mu1)}; expected features of one extractor"
        )
    # With S_i = F_i F_i^T, tr (S_1^{1/2} S_2 S_1^{1/2})^{1/2} is the nuclear norm of F_1^T F_2.
    # Its singular values are found to eps * largest; square roots of the eigenvalues of the
    # product would only be good to sqrt(eps) * largest, which singular covariances expose.
    cross = _factor(sigma1, name="sigma1").T @ _factor(sigma2, name="sigma2")
    trace_of_root = np.linalg.svd(cross, compute_uv=False).sum() if cross.size else 0.0
    squared_mean_distance = np.sum((mu1 - mu2) ** 2)
    distance = squared_mean_distance + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _factor(covariance: np.ndarray, *, name: str) -> np.ndarray:
    """Return F [dim, rank] with F F^T = covariance, without its numerically zero directions."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    largest = max(eigenvalues[-1], 0.0)
    if eigenvalues[0] < -1e-6 * max(largest, np.finfo(np.float64).tiny):
        raise ValueError(
            f"{name} has the eigenvalue {eigenvalues[0]:.3g}; expected a covariance, whose "
            "eigenvalues are not negative"
        )
    # The usual numerical rank. An eigenvalue of rounding noise, 1e-16, would enter the distance
    # through its square root, 1e-8.
    kept = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * largest
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])


def _checked_gaussian(
    mu: ArrayLike, sigma: ArrayLike, *, suffix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and covariance as float64 after checking shapes, finiteness and symmetry."""
    mu = np.asarray(mu).astype(np.float64)
    sigma = np.asarray(sigma).astype(np.float64)
    if mu.ndim != 1 or mu.size == 0:
        raise ValueError(f"mu{suffix} has shape {mu.shape}; expected a vector [dim]")
    if sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"sigma{suffix} has shape {sigma.shape} and mu{suffix} {mu.shape}; "
            f"expected a covariance of shape {(len(mu), len(mu))}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(
            f"mu{suffix} or sigma{suffix} has NaN or infinite entries; expected finite statistics "
            "of at least 2 samples"
        )
    asymmetry = np.abs(sigma - sigma.T).max()
    if asymmetry > 1e-6 * np.abs(sigma).max():
        raise ValueError(
            f"sigma{suffix} differs from its transpose by {asymmetry:.3g}; expected a symmetric "
            "covariance"
        )
    return mu, (sigma + sigma.T) / 2
