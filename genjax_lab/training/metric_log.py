"""The log of a run: one JSON object per line, and the same numbers for TensorBoard.

Each row averages `log_every` optimiser steps. The unfinished row is part of the checkpoint, and
rows beyond the restored step are dropped on a restart, so that the log of an interrupted run reads
like that of an uninterrupted one. Only `seconds`, the time spent on the run so far, differs.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

# Counters are reported as they stand, not averaged; the run of skips is watched by the loop.
_LAST_VALUE = ("num_skipped",)
_UNLOGGED = ("consecutive_skips",)


class MetricLog:
    """Writes `metrics.jsonl` and TensorBoard events into the directory of a run.

    Args:
        directory: the directory of the run.
        log_every: optimiser steps per row.
        step: the step at which this process starts; later rows of the file are dropped.
        state: what `get_state` gave at that step.
        tensorboard: whether to write TensorBoard events.
        enabled: False writes nothing, in all processes but one.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        log_every: int,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
        enabled: bool = True,
    ):
        state = state or {"sums": {}, "seconds": 0.0}
        self._log_every = log_every
        self._sums: dict[str, list[float]] = {
            name: list(pair) for name, pair in state["sums"].items()
        }
        self._started = time.monotonic() - state["seconds"]
        self._file = self._events = None
        if enabled:
            path = Path(directory) / "metrics.jsonl"
            _drop_rows_after(path, step)
            self._file = path.open("a", encoding="utf-8")
        if enabled and tensorboard:
            # Imported late: it loads PyTorch where that is installed, which takes seconds.
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                str(Path(directory) / "tensorboard"), purge_step=step + 1
            )

    def add(
        self,
        last_step: int,
        metrics: Mapping[str, Float[np.ndarray, "steps"]],
        counters: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the metrics of consecutive optimiser steps, the last of them `last_step`.

        A row's value is the mean over those of its steps where it was finite; null if nowhere.
        Counters are logged as they stand after the last of the steps.
        """
        metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        num_steps = len(next(iter(metrics.values())))
        for index in range(num_steps):
            for name, values in metrics.items():
                value = float(values[index])
                if name in _UNLOGGED or not math.isfinite(value):
                    continue
                total, count = self._sums.get(name, (0.0, 0))
                keeps_last = name in _LAST_VALUE
                self._sums[name] = [value, 1] if keeps_last else [total + value, count + 1]
            step = last_step - num_steps + 1 + index
            if step % self._log_every == 0:
                self._write_window(step, set(metrics) - set(_UNLOGGED), counters or {})

    def _write_window(self, step: int, names: set[str], counters: Mapping[str, float]) -> None:
        row = {}
        for name in sorted(names | set(self._sums)):
            total, count = self._sums.get(name, (0.0, 0))
            row[name] = total / count if count else math.nan
        self._sums = {}
        self.write(step, row | dict(counters))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row at once; values that are not finite become null."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if self._file is not None:
            row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            row = {"step": step, "seconds": round(self._seconds(), 3), **row}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._events.add_scalar(name, value, step)

    def get_state(self) -> dict[str, Any]:
        """The unfinished row, as JSON values."""
        return {
            "sums": {name: list(pair) for name, pair in self._sums.items()},
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; an unfinished last line is left out."""
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # A process that was killed while writing leaves a line without its end.
    return [json.loads(line) for line in lines[:-1]]


def _drop_rows_after(path: Path, step: int) -> None:
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
