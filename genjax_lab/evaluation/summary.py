"""One number per model from several evaluations, without mixing two kinds of number.

Papers report the minimum of a metric over (usually three) seed ranges, and checkpoints are often
chosen on those very seeds. Such a minimum is optimistic: the honest value comes from seeds that
chose nothing. Both are given here under names that keep them apart.
"""

import math
from collections.abc import Mapping

import numpy as np


def seed_range_summary(
    values_by_seed_range: Mapping[range, float],
    fresh_values: Mapping[range, float],
    *,
    metric: str = "frechet",
) -> dict[str, float]:
    """Summarise a metric (lower is better) over reported and over fresh seed ranges.

    Args:
        values_by_seed_range: metric value by the seeds that drew its samples, for the ranges whose
            minimum is reported or on which the checkpoint was chosen; at least 2.
        fresh_values: the same for seeds that no choice depended on; at least 1.
        metric: prefix of the names in the result.

    Returns:
        `{metric}_min_of_{n}` as papers report it, `{metric}_mean`, `{metric}_std` and
        `{metric}_max` over the n reported ranges; `{metric}_fresh` (mean) and
        `{metric}_num_fresh` over the fresh ones, with `{metric}_fresh_std` if there are at least 2.
        Standard deviations divide by n - 1.

    Raises:
        ValueError: if there are too few ranges, a range is empty, two ranges share a seed, or a
            value is not finite.
    """
    for name, values, least in (
        ("values_by_seed_range", values_by_seed_range, 2),
        ("fresh_values", fresh_values, 1),
    ):
        if len(values) < least:
            raise ValueError(f"{name} has {len(values)} seed ranges; expected at least {least}")
        for seeds, value in values.items():
            if not isinstance(seeds, range) or len(seeds) == 0:
                raise ValueError(f"{name} has the key {seeds!r}; expected a non-empty range")
            if not math.isfinite(value):
                raise ValueError(f"{name} has the value {value} for {seeds}; expected finite")
    _check_disjoint([*values_by_seed_range, *fresh_values])

    reported = np.asarray(list(values_by_seed_range.values()), dtype=np.float64)
    fresh = np.asarray(list(fresh_values.values()), dtype=np.float64)
    summary = {
        f"{metric}_min_of_{len(reported)}": float(reported.min()),
        f"{metric}_mean": float(reported.mean()),
        f"{metric}_std": float(reported.std(ddof=1)),
        f"{metric}_max": float(reported.max()),
        f"{metric}_fresh": float(fresh.mean()),
        f"{metric}_num_fresh": len(fresh),
    }
    if len(fresh) > 1:
        summary[f"{metric}_fresh_std"] = float(fresh.std(ddof=1))
    return summary


def _check_disjoint(ranges: list[range]) -> None:
    """Raise a ValueError if two ranges share a seed, which would count a sample twice."""
    for position, first in enumerate(ranges):
        for second in ranges[position + 1 :]:
            smaller, larger = sorted((first, second), key=len)
            if any(seed in larger for seed in smaller):
                raise ValueError(
                    f"values_by_seed_range and fresh_values have {first} and {second}, which share "
                    "seeds; expected disjoint ranges"
                )
