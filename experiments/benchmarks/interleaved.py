"""Timing two programs against each other on a machine that others use too.

Repetitions alternate, so that a slow minute hits both.
"""

import statistics
import time
from collections.abc import Callable, Mapping

Program = Callable[[], None]


def interleaved_seconds(
    programs: Mapping[str, Program],
    *,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    summary: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of each program; every call must wait for its own result.

    Args:
        programs: what is timed.
        repeats: calls of each that count.
        warm_up: calls before.
        clock: wall-clock seconds by default; `time.process_time` for those of the processor.
        summary: of a program's seconds.
    """
    for program in programs.values():
        for _ in range(warm_up):
            program()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = clock()
            program()
            times[name].append(clock() - start)
    return {name: summary(values) for name, values in times.items()}
