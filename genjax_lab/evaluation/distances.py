"""Distances between two sets of feature vectors, a tile at a time.

Metrics on sets of images compare every vector of one set with every vector of another. For 50 000
images the full distance matrix holds 2.5e9 numbers, so nothing here ever holds more than one
`tile` x `tile` block of it. Everything is float64 numpy on the host: the distances decide
inequalities between nearly equal numbers, and a metric must not depend on the accelerator.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import ArrayLike, Float


def as_vectors(values: ArrayLike, *, name: str) -> Float[np.ndarray, "num_vectors dim"]:
    """Return `values` as a float64 matrix of finite row vectors.

    Args:
        values: array [num_vectors, dim] of any real dtype.
        name: what to call the argument in an error.

    Raises:
        ValueError: if `values` is not a matrix with at least one column, or is not finite.
    """
    vectors = np.asarray(values)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {vectors.shape}; expected [num_vectors, dim], one vector a row"
        )
    vectors = vectors.astype(np.float64)
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"{name} has NaN or infinite entries in {(~np.isfinite(vectors)).any(axis=1).sum()} of "
            f"{len(vectors)} rows; expected finite vectors"
        )
    return vectors


def squared_distances(
    left: Float[np.ndarray, "num_left dim"], right: Float[np.ndarray, "num_right dim"]
) -> Float[np.ndarray, "num_left num_right"]:
    """Return ||l||^2 + ||r||^2 - 2 l.r, squared Euclidean distances, clipped at zero.

    The clip removes the rounding error of nearly equal vectors, about 1e-16 ||l||^2.
    """
    products = left @ right.T
    squares = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)[None, :]
    return np.maximum(squares - 2 * products, 0.0)


def tiles(count: int, tile: int) -> Iterator[slice]:
    """Yield the slices that cut `range(count)` into pieces of at most `tile`."""
    if tile < 1:
        raise ValueError(f"tile is {tile}; expected a positive number of rows")
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


def nearest_squared_distances(
    queries: Float[np.ndarray, "num_queries dim"],
    points: Float[np.ndarray, "num_points dim"] | None = None,
    *,
    k: int,
    tile: int = 2048,
) -> Float[np.ndarray, "num_queries k"]:
    """Return the `k` smallest squared distances from each query to the points, in rising order.

    Args:
        queries: vectors whose neighbours are sought.
        points: where to seek them; None seeks among the queries, none of which is its own
            neighbour.
        k: how many neighbours.
        tile: rows and columns of the largest block of distances held in memory.

    Raises:
        ValueError: if there are fewer than `k` neighbours to choose from.
    """
    among_queries = points is None
    points = queries if among_queries else points
    available = len(points) - int(among_queries)
    if not 1 <= k <= available:
        raise ValueError(
            f"k is {k}, but a vector has {available} neighbours here; expected 1 to {available}"
        )
    nearest = np.empty((len(queries), k))
    for rows in tiles(len(queries), tile):
        best = np.full((rows.stop - rows.start, k), np.inf)
        for columns in tiles(len(points), tile):
            block = squared_distances(queries[rows], points[columns])
            if among_queries and rows == columns:
                np.fill_diagonal(block, np.inf)
            best = np.partition(np.concatenate([best, block], axis=1), k - 1, axis=1)[:, :k]
        nearest[rows] = np.sort(best, axis=1)
    return nearest
