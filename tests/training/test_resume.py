"""Runs that are killed and restarted, each in a process of its own; two processes as one."""

import json
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_experiment
from started_programs import Program

from genjax_lab.training import read_metrics, restore, train

SCRIPT = Path(__file__).with_name("run_tiny_experiment.py")


def launch(*arguments):
    return Program(SCRIPT, *map(str, arguments))


def rows_without_time(directory):
    rows = read_metrics(directory)
    for row in rows:
        row.pop("seconds")
    return rows


def test_killed_and_restarted_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    whole = launch(tmp_path / "whole")
    broken = tmp_path / "broken"
    steps = broken / "checkpoints"

    launch(broken, "--die=step:13").end(-signal.SIGKILL)
    assert {path.name for path in steps.iterdir()} == {"8"}
    launch(broken, "--die=save:16").end(-signal.SIGKILL)
    # The save was cut off: what there is of it does not pass for a checkpoint.
    assert any(path.name.startswith("16.orbax") for path in steps.iterdir())
    assert not (steps / "16").exists()
    launch(broken, "--die=evaluation:24").end(-signal.SIGKILL)
    assert (steps / "16").exists() and not (steps / "24").exists()
    # SIGTERM arrives while a step runs after which an evaluation is due.
    errors = launch(broken, "--die=sigterm:31").end(128 + signal.SIGTERM).stderr
    assert "step 32 of 40" in errors and "run_tiny_experiment.py" in errors
    assert (steps / "32").exists()
    launch(broken).end()

    whole.end()
    with np.load(tmp_path / "whole/final.npz") as a, np.load(broken / "final.npz") as b:
        assert a.files == b.files and len(a.files) > 10
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])
    # The log averages the steps' losses, so equal rows also mean equal batches at every step.
    rows = rows_without_time(broken)
    assert rows == rows_without_time(tmp_path / "whole")
    assert [row["step"] for row in rows if "loss" in row] == list(range(3, 40, 3))
    assert [row["step"] for row in rows if "eval/error" in row] == [8, 16, 24, 32, 40]
    assert len((broken / "command.txt").read_text().splitlines()) == 5
    assert json.loads((broken / "config.json").read_text())["num_steps"] == 40


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process with one device, every step logged."""
    workdir = tmp_path_factory.mktemp("reference")
    config = tiny_experiment.config(num_steps=40, log_every=1)
    state = train(
        tiny_experiment.experiment(config),
        workdir=workdir,
        config=config,
    )
    return state, read_metrics(workdir)


def test_two_processes_give_the_losses_of_one_and_stop_together(tmp_path, reference):
    state, expected = reference

    def launch_both(mesh, *, die=("never:0", "never:0")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = ("--log_every=1", "--processes=2", f"--port={port}", f"--mesh={mesh}")
        return [
            launch(tmp_path, *shared, f"--process={index}", f"--die={die[index]}")
            for index in range(2)
        ]

    # Only one of them hears SIGTERM, but both stop at the same step, after saving it together.
    both = launch_both("fsdp=2", die=("never:0", "sigterm:21"))
    for process in both:
        process.end(128 + signal.SIGTERM)
    stopped = restore(tmp_path)
    assert 22 <= stopped.step < 40 and len(stopped.iterators) == 2

    for process in launch_both("data=2"):
        process.end()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "worst", "grad_norm", "eval/error"):
        np.testing.assert_allclose(
            [row[name] for row in rows if name in row],
            [row[name] for row in expected if name in row],
            atol=1e-5,
            err_msg=name,
        )
    final = restore(tmp_path).state
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), final.params, state.params
    )
