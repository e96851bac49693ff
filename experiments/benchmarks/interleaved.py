"""Timing two programs against each other on a machine that others use too.

Repetitions alternate, so that a slow minute hits both, and medians are compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping

Program = Callable[[], None]


def interleaved_seconds(
    programs: Mapping[str, Program], *, repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Median wall-clock seconds of each program; every call must wait for its own result."""
    for program in programs.values():
        for _ in range(warm_up):
            program()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
