"""A train/test split that keeps every class's share and never changes.

Data that comes without an official split is cut by counting, not by a random generator: within each
class, in the order of the source, every fifth example goes to the test split. No library's random
stream is involved, so the split is the same on every machine and with every version of NumPy.
"""

import numpy as np
from jaxtyping import Int

TEST_EVERY = 5


def stratified_split(
    labels: Int[np.ndarray, "examples"],
) -> dict[str, Int[np.ndarray, "_"]]:
    """Splits examples into train and test, class by class.

    Args:
        labels: Integer class of every example, `[examples]`.

    Returns:
        `{"train": indices, "test": indices}`, ascending, disjoint and together complete. A class of
        n examples gives `n // 5` of them to the test split.

    Raises:
        ValueError: If `labels` is not a one-dimensional integer array.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be a one-dimensional integer array, got {labels.dtype} {labels.shape}."
        )
    is_test = np.zeros(labels.shape, dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
