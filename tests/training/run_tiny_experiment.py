"""Trains the tiny experiment in a process of its own, and dies where it is told to.

Usage: run_tiny_experiment.py WORKDIR [--die step:13 | save:16 | evaluation:24 | sigterm:31]
       [--mesh fsdp=2] [--log_every N] [--processes COUNT --process INDEX --port PORT]
"""

import argparse
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import tiny_experiment

from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.training import train


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(pattern, directory):
    while not any(directory.glob(pattern)):
        time.sleep(0.0002)


class DyingRows(tiny_experiment.Rows):
    """Rows that send this process a signal before they yield a given batch, and are slow then."""

    def __init__(self, *arguments, at, action, delay, **keywords):
        super().__init__(*arguments, **keywords)
        self._at, self._action, self._delay = at, action, delay

    def __next__(self):
        if self.position == self._at:
            self._action()
        if self.position >= self._at and self._delay:
            # JAX looks once a second whether a signal came; the run must not end before.
            time.sleep(self._delay)
        return super().__next__()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--die", default="never:0")
    parser.add_argument("--mesh", default="data=-1")
    parser.add_argument("--log_every", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.process)

    axis, size = options.mesh.split("=")
    config = tiny_experiment.config(num_steps=40, log_every=options.log_every)
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1} | {axis: int(size)})
    index, count = process_share(make_mesh(**config.mesh))
    checkpoints = options.workdir / "checkpoints"
    kind, at = options.die.split(":")
    at = int(at)
    evaluate = jax.jit(tiny_experiment.evaluate)

    def kill_in_step():
        wait_for("8", checkpoints)
        kill()

    def kill_in_save():
        wait_for(f"{at}.orbax*", checkpoints)
        kill()

    def evaluate_or_die(state):
        if kind == "evaluation" and int(state.step) == at:
            wait_for(f"{at - 8}", checkpoints)
            kill()
        return evaluate(state)

    def batches(state):
        actions = {"step": kill_in_step, "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM)}
        return DyingRows(
            config.batch_size,
            index=index,
            count=count,
            at=at if kind in actions else -1,
            action=actions.get(kind),
            delay=0.4 if kind == "sigterm" and options.processes > 1 else 0.0,
        )

    if kind == "save":
        threading.Thread(target=kill_in_save, daemon=True).start()
    experiment = tiny_experiment.experiment(config, batches=batches, evaluate=evaluate_or_die)
    state = train(experiment, workdir=options.workdir, config=config)
    if options.processes == 1:
        leaves = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
        np.savez(options.workdir / "final.npz", *map(np.asarray, leaves))


if __name__ == "__main__":
    main()
