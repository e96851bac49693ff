import json

import numpy as np

from genjax_lab.training.metric_log import MetricLog, read_metrics


def log_steps(log, first, last, size=2):
    for step in range(first, last + 1, size):
        values = np.arange(step, step + size, dtype=np.float32)
        log.add(step + size - 1, {"loss": 1 / values, "num_skipped": values})


def rows(directory):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(directory)]


def test_rows_average_their_steps_wherever_the_calls_were_cut(tmp_path):
    with MetricLog(tmp_path, log_every=3, tensorboard=False) as log:
        log_steps(log, 1, 8)
        log.write(8, {"eval/error": 0.5})
    inverse = (1 / np.arange(1, 9, dtype=np.float32)).astype(np.float64)
    assert rows(tmp_path) == [
        {"step": 3, "loss": sum(inverse[:3]) / 3, "num_skipped": 3.0},
        {"step": 6, "loss": sum(inverse[3:6]) / 3, "num_skipped": 6.0},
        {"step": 8, "eval/error": 0.5},
    ]


def test_restarted_log_reads_like_an_uninterrupted_one(tmp_path):
    with MetricLog(tmp_path / ".", log_every=3, tensorboard=False) as log:
        log_steps(log, 1, 4)
        state = json.loads(json.dumps(log.get_state()))
        log_steps(log, 5, 8)
        log.write(8, {"eval/error": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    with MetricLog(tmp_path, log_every=3, step=4, state=state, tensorboard=False) as log:
        assert [row["step"] for row in read_metrics(tmp_path)] == [3]
        log_steps(log, 5, 12)
    (tmp_path / "whole").mkdir()
    with MetricLog(tmp_path / "whole", log_every=3, tensorboard=False) as log:
        log_steps(log, 1, 12)
    assert rows(tmp_path) == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12]
    seconds = [row["seconds"] for row in read_metrics(tmp_path)]
    assert seconds == sorted(seconds)


def test_values_that_are_not_finite_are_left_out_of_means_and_null_alone(tmp_path):
    with MetricLog(tmp_path, log_every=2, tensorboard=False) as log:
        log.add(2, {"loss": np.array([np.nan, 3.0]), "consecutive_skips": np.array([1.0, 0.0])})
        log.add(4, {"loss": np.array([np.nan, np.inf]), "consecutive_skips": np.array([1.0, 2.0])})
    assert rows(tmp_path) == [{"step": 2, "loss": 3.0}, {"step": 4, "loss": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_only_an_enabled_log_writes(tmp_path):
    with MetricLog(tmp_path, log_every=1, enabled=False) as log:
        log_steps(log, 1, 4)
        log.write(4, {"eval/error": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_written(tmp_path):
    with MetricLog(tmp_path, log_every=1) as log:
        log_steps(log, 1, 2)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
