"""Precision, recall, density and coverage of a generated set against a real one.

The manifold of a set is approximated by balls around its vectors, each reaching to the k-th nearest
other vector of the same set. Kynkaanniemi et al. (arXiv 1904.06991, eq. 1 and 2) ask how many
generated vectors lie in the real manifold (precision) and how many real ones in the generated
manifold (recall); Naeem et al. (arXiv 2002.09797, eq. 2 and 3) count balls instead of asking for
one (density) and ask how many real balls are reached (coverage), which outliers move less. All four
come from one pass over the distances, a tile at a time; cost is
O(dim (num_real + num_generated)^2), so use the 10 000 to 50 000 vectors of the papers.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from genjax_lab.evaluation.distances import (
    as_vectors,
    nearest_squared_distances,
    squared_distances,
    tiles,
)


class PrecisionRecall(NamedTuple):
    """Fidelity and diversity of a generated set.

    Attributes:
        precision: fraction of generated vectors in some real ball, in [0, 1].
        recall: fraction of real vectors in some generated ball, in [0, 1].
        density: mean number of real balls around a generated vector, divided by k; may exceed 1.
        coverage: fraction of real balls that hold a generated vector, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(
    real: Float[ArrayLike, "num_real dim"],
    generated: Float[ArrayLike, "num_generated dim"],
    *,
    k: int = 3,
    tile: int = 2048,
) -> PrecisionRecall:
    """Return precision, recall, density and coverage of `generated` against `real`.

    Recall and precision depend on the numbers of vectors; compare only runs with equal numbers.

    Args:
        real: features of real images.
        generated: features of generated images, from the same extractor.
        k: which nearest neighbour sets a ball's radius; 3 in the papers' image experiments.
        tile: rows and columns of the largest block of distances held in memory.

    Raises:
        ValueError: if a set is not finite or not a matrix, dimensions differ, or a set has k or
            fewer vectors.

    References:
        arXiv 1904.06991, eq. 1 and 2; arXiv 2002.09797, eq. 2 and 3.
    """
    real = as_vectors(real, name="real")
    generated = as_vectors(generated, name="generated")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"generated has dimension {generated.shape[1]} and real {real.shape[1]}; expected "
            "features of one extractor"
        )
    if k < 1 or min(len(real), len(generated)) <= k:
        raise ValueError(
            f"k is {k} with {len(real)} real and {len(generated)} generated vectors; expected "
            "k >= 1 and more than k vectors in each set"
        )
    real_radii = nearest_squared_distances(real, k=k, tile=tile)[:, -1]
    generated_radii = nearest_squared_distances(generated, k=k, tile=tile)[:, -1]

    real_balls_around = np.zeros(len(generated), dtype=np.int64)
    in_generated_ball = np.zeros(len(real), dtype=bool)
    ball_reached = np.zeros(len(real), dtype=bool)
    for rows in tiles(len(generated), tile):
        for columns in tiles(len(real), tile):
            block = squared_distances(generated[rows], real[columns])
            in_real_ball = block <= real_radii[None, columns]
            real_balls_around[rows] += in_real_ball.sum(axis=1)
            ball_reached[columns] |= in_real_ball.any(axis=0)
            in_generated_ball[columns] |= (block <= generated_radii[rows, None]).any(axis=0)
    return PrecisionRecall(
        precision=float((real_balls_around > 0).mean()),
        recall=float(in_generated_ball.mean()),
        density=float(real_balls_around.mean() / k),
        coverage=float(ball_reached.mean()),
    )
