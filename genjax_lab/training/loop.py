"""The one training loop: restore or start, step, log, evaluate, store, stop when told.

The directory of a run holds

    config.json       the resolved config of the latest launch
    versions.json     the library versions of the latest launch
    command.txt       the command of every launch, one per line
    metrics.jsonl     one row per `log_every` steps, and one per evaluation ("eval/..." names)
    tensorboard/      the same numbers as TensorBoard events
    checkpoints/      one folder per stored step

Killed at any instant and started again with the same command, a run continues from its latest
checkpoint to the same bits: the same parameters, the same batches, the same log. (On a GPU this
needs deterministic kernels: XLA_FLAGS=--xla_gpu_deterministic_ops=true.) Under `jax.distributed`
every process calls `train` with the same arguments and a directory that all of them see.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from genjax_lab.parallel.mesh import global_batch, make_mesh
from genjax_lab.training.checkpoint import (
    Checkpoints,
    checkpoint_steps,
    library_versions,
    set_aside_later_steps,
)
from genjax_lab.training.config import FREE_FIELDS, config_differences, resolve_config
from genjax_lab.training.ema import ema_from_config
from genjax_lab.training.experiment import BatchIterator, Experiment
from genjax_lab.training.metric_log import MetricLog
from genjax_lab.training.preemption import preemption_notice
from genjax_lab.training.restoration import Restored, restore, restore_config
from genjax_lab.training.state import TrainState
from genjax_lab.training.step import TrainStep, make_train_step

# What the shell reports for a process that SIGTERM ended: schedulers do not take it for finished.
PREEMPTED_STATUS = 128 + signal.SIGTERM


def train(
    experiment: Experiment,
    *,
    workdir: str | os.PathLike,
    config: Mapping[str, Any] | ml_collections.ConfigDict,
    restore_step: int | None = None,
    allow_changes: Sequence[str] = (),
) -> TrainState:
    """Trains an experiment to the end, or on from where its directory stands.

    Args:
        experiment: the learning problem.
        workdir: the directory of the run; made if missing.
        config: all fields of `default_config()`, and any others: all are stored.
        restore_step: continue from this checkpoint instead of the latest. Later ones are moved to
            `checkpoints_set_aside`.
        allow_changes: names of config fields that may differ from the checkpoint's, `*` for any
            (`["optimizer.*"]`). Those of `FREE_FIELDS` always may.

    Returns:
        The state after `config.num_steps` optimiser steps.

    Raises:
        ValueError: bad settings; a config that differs from the checkpoint's; a checkpoint that is
            damaged, foreign or beyond `num_steps`; data that end too early.
        FloatingPointError: too many steps in a row were not finite.
        SystemExit: after SIGTERM, with status 143, once a checkpoint is on disk.
    """
    config = resolve_config(config)
    if "://" in str(workdir):
        raise ValueError(f"workdir={str(workdir)!r} is not a path of a mounted file system")
    workdir = Path(workdir).absolute()
    mesh = make_mesh(**config["mesh"])
    train_step = _make_step(experiment, config, mesh)
    state, position = _start(
        experiment, train_step, workdir / "checkpoints", config, restore_step, allow_changes
    )
    step = 0 if position is None else position.step
    batches = experiment.batches(state)
    if position is not None:
        batches.set_state(_iterator_state(position))

    follow = getattr(batches, "follow", None)
    counters = getattr(batches, "counters", dict)
    is_writer = jax.process_index() == 0
    if is_writer:
        _describe_launch(workdir, config)
    num_steps, steps_per_call = config["num_steps"], config["steps_per_call"]
    with (
        Checkpoints(workdir / "checkpoints", config) as checkpoints,
        MetricLog(
            workdir,
            log_every=config["log_every"],
            step=step,
            state=position and position.log,
            tensorboard=config["tensorboard"],
            enabled=is_writer,
        ) as log,
        preemption_notice() as preempted,
        tqdm.tqdm(
            total=num_steps, initial=step, disable=not (config["progress"] and is_writer)
        ) as bar,
    ):
        in_flight: list[tuple[int, dict[str, jax.Array], dict[str, float]]] = []

        def fetch_metrics(leave: int) -> None:
            while len(in_flight) > leave:
                last_step, metrics, counted = in_flight.pop(0)
                metrics = jax.device_get(metrics)
                log.add(last_step, metrics, counted)
                bar.update(steps_per_call)
                bar.set_postfix(loss=f"{metrics['loss'][-1]:.4g}", refresh=False)
                train_step.check(metrics, last_step)

        def evaluate() -> dict[str, float]:
            metrics = {name: float(value) for name, value in experiment.evaluate(state).items()}
            log.write(step, {f"eval/{name}": value for name, value in metrics.items()})
            return metrics

        if position is not None and position.log["evaluation_due"]:
            evaluate()
        while step < num_steps:
            if follow is not None:
                follow(state.variables())
            batch = global_batch(_next_batches(batches, steps_per_call), mesh, batch_axis=1)
            state, metrics = train_step.step(state, batch)
            step += steps_per_call
            in_flight.append((step, metrics, counters()))
            # Waits for the call before this one, so that the device always has one to work on.
            fetch_metrics(leave=1)

            last = step == num_steps
            stop = preempted(step // steps_per_call) and not last
            evaluation_due = _is_due(step, config["eval_every"], last)
            saving = _is_due(step, config["checkpoint_every"], last) or stop
            if evaluation_due or saving:
                fetch_metrics(leave=0)
            # The time between SIGTERM and the end is short: the next launch evaluates then, unless
            # checkpoints are compared by the result, which must be stored with them.
            postponed = evaluation_due and stop and not config["best_metric"]
            evaluation = evaluate() if evaluation_due and not postponed else {}
            if saving:
                checkpoints.save(
                    step,
                    state,
                    iterator_state=batches.get_state(),
                    metrics=evaluation,
                    log={**log.get_state(), "evaluation_due": postponed},
                )
            if stop:
                checkpoints.wait()
                bar.close()
                raise _preempted_exit(workdir, step, num_steps)
    return state


def _make_step(experiment: Experiment, config: Mapping[str, Any], mesh: Mesh) -> TrainStep:
    return make_train_step(
        experiment.objective,
        experiment.optimizer,
        batch_size=config["batch_size"],
        mesh=mesh,
        ema=ema_from_config(config["ema"]),
        accumulation_steps=config["accumulation_steps"],
        steps_per_call=config["steps_per_call"],
        max_grad_norm=config["max_grad_norm"],
        max_consecutive_skips=config["max_consecutive_skips"],
        project=experiment.project,
        compute_dtype=config["compute_dtype"] and jnp.dtype(config["compute_dtype"]),
    )


def _start(
    experiment: Experiment,
    train_step: TrainStep,
    directory: Path,
    config: Mapping[str, Any],
    step: int | None,
    allow_changes: Sequence[str],
) -> tuple[TrainState, Restored | None]:
    """The state to begin with, and what else its checkpoint holds if it comes from one."""
    resuming = directory.is_dir() and bool(checkpoint_steps(directory))
    if resuming:
        _check_same_run(directory, config, step, allow_changes)
    elif step is not None:
        raise ValueError(f"restore_step={step}, but {str(directory)!r} holds no checkpoint")
    init_key, state_key = jax.random.split(jax.random.key(config["seed"]))
    state = train_step.init(experiment.init(init_key), state_key)
    if not resuming:
        return state, None

    # Only its layout is needed; its memory is for the state that is read.
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    del state
    restored = restore(directory, step, target=target)
    if restored.step > config["num_steps"] or restored.step % config["steps_per_call"]:
        raise ValueError(
            f"the run in {str(directory.parent)!r} stands at step {restored.step}, from which "
            f"config.num_steps={config['num_steps']} cannot be reached in calls of "
            f"config.steps_per_call={config['steps_per_call']} steps"
        )
    if step is not None:
        set_aside_later_steps(directory, step)
    return restored.state, restored._replace(state=None)


def _check_same_run(
    directory: Path, config: Mapping[str, Any], step: int | None, allow_changes: Sequence[str]
) -> None:
    stored = restore_config(directory, step)
    free = (*FREE_FIELDS, *allow_changes)
    if differences := config_differences(stored, config, free=free):
        raise ValueError(
            f"config differs from that of the run in {str(directory.parent)!r}:\n  "
            + "\n  ".join(differences)
            + "\nUse another workdir, or name these fields in allow_changes"
        )


def _iterator_state(restored: Restored) -> dict[str, Any]:
    states = restored.iterators
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if any(state != states[0] for state in states):
        raise ValueError(
            f"the checkpoint holds a position in the data for each of {len(states)} processes; it "
            f"cannot be continued exactly with {jax.process_count()}"
        )
    return states[0]


def _next_batches(batches: BatchIterator, count: int) -> dict[str, np.ndarray]:
    try:
        rows = [next(batches) for _ in range(count)]
    except StopIteration:
        raise ValueError("batches ended; the iterator must repeat the data for ever") from None
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _is_due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _describe_launch(workdir: Path, config: Mapping[str, Any]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("versions.json", library_versions())):
        (workdir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with (workdir / "command.txt").open("a", encoding="utf-8") as file:
        file.write(_command() + "\n")


def _command() -> str:
    # sys.orig_argv has what sys.argv loses: the interpreter's options and "-m package.module".
    return shlex.join(sys.orig_argv)


def _preempted_exit(workdir: Path, step: int, num_steps: int) -> SystemExit:
    if jax.process_index() == 0:
        print(
            f"Stopped by SIGTERM after step {step} of {num_steps}, which is stored in {workdir}. "
            f"The same command continues from there:\n  {_command()}",
            file=sys.stderr,
            flush=True,
        )
    return SystemExit(PREEMPTED_STATUS)
