"""Class labels for sampling, exactly balanced and a function of the sample's seed alone.

EDM2 (arXiv:2312.02696) computes its Frechet distances over samples whose classes are balanced
exactly: sample i has class i mod num_classes. Because the label depends on nothing but the seed of
its own sample, any range of seeds can be drawn again later, on any number of machines, with the
same labels.
"""

import numpy as np
from jaxtyping import Int, Int32


def balanced_labels(
    seeds: "range | Int[np.ndarray, 'samples']", num_classes: int
) -> Int32[np.ndarray, "samples"]:
    """Gives every sample seed its class: `seed mod num_classes`.

    Args:
        seeds: The samples' seeds, non-negative integers: `range(start, start + num)` or an array
            `[samples]`.
        num_classes: Number of classes, at least 1.

    Returns:
        int32 labels `[samples]` in `[0, num_classes)`. Any `k * num_classes` consecutive seeds hold
        each class exactly k times.

    Raises:
        ValueError: If `seeds` are not non-negative integers in one dimension, or `num_classes < 1`.
    """
    if num_classes < 1:
        raise ValueError(
            f"num_classes must be at least 1, got {num_classes}. An unconditional model needs no "
            "balanced labels."
        )
    seeds = np.arange(seeds.start, seeds.stop, seeds.step) if isinstance(seeds, range) else seeds
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or not np.issubdtype(seeds.dtype, np.integer):
        raise ValueError(
            f"seeds must be a range or a one-dimensional integer array, got {seeds.dtype} with "
            f"shape {seeds.shape}."
        )
    if seeds.size and seeds.min() < 0:
        raise ValueError(f"seeds must not be negative, got {seeds.min()}.")
    return (seeds % num_classes).astype(np.int32)
