"""A round that two processes play together is the round of one."""

import json
import socket
from pathlib import Path

import numpy as np
import tiny_self_play
from started_programs import Program

from genjax_lab.training import read_metrics, restore, run_self_play

PROGRAM = Path(__file__).with_name("play_in_processes.py")


def play_together(count, workdir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [Program(PROGRAM, *map(str, (index, count, port, workdir))) for index in range(count)]
    try:
        for member in members:
            member.end()
    finally:
        for member in members:
            member.kill()
    return [json.loads((workdir / f"report_{index}.json").read_text()) for index in range(count)]


def test_two_processes_play_the_round_of_one(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    variables = run_self_play(
        tiny_self_play.gaussian(),
        workdir=alone,
        config=tiny_self_play.several_parts(),
        model_config=tiny_self_play.MODEL_CONFIG,
    )
    reports = play_together(2, together)

    # Every part of the one pool, of the probe and of the grid, is drawn once and written once.
    parts = [2**31, 2**31 + 4096]
    assert reports[0]["written"] == [f"samples_{start}.npz" for start in parts]
    assert reports[1]["written"] == []
    assert [[start for start, _ in report["drawn"]] for report in reports] == [parts, parts]
    pools = [workdir / "round_1/pool" for workdir in (alone, together)]
    names = [sorted(path.name for path in pool.iterdir()) for pool in pools]
    assert names[0] == names[1]
    assert len({(pool / "manifest.json").read_text() for pool in pools}) == 1

    results = [
        json.loads((workdir / "round_1/result.json").read_text()) for workdir in (alone, together)
    ]
    assert results[0]["step"] == results[1]["step"]
    for name in ("alpha", "beta", "selection", "fresh"):
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=1e-5, err_msg=name)
    tables = [[row["error"] for row in result["table"]] for result in results]
    np.testing.assert_allclose(tables[1], tables[0], rtol=0, atol=1e-5)

    # The beta that one process would find in the same log, bit for bit.
    row = read_metrics(together / "round_1/probe")[-1]
    assert results[1]["beta"] == 1 / tiny_self_play.deviation(row)
    mean = np.ravel(variables["params"]["mean"])
    stored = np.ravel(restore(together).state.params["mean"])
    for other in (*(report["mean"] for report in reports), stored):
        np.testing.assert_allclose(other, mean, rtol=0, atol=1e-5)
