"""Checkpoints: everything that continues a run exactly, or evaluates it from the path alone.

Orbax writes each step into a directory of its own, in the background, and renames it into place
when it is whole, so a run may be killed at any instant. Beside the train state a checkpoint holds
the position in the data, the resolved config, the last metrics, the library versions and checksums
of all values. A damaged or foreign checkpoint is an error; another step is used only when asked.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

import genjax_lab
from genjax_lab.training.checksum import tree_checksums
from genjax_lab.training.state import TrainState

FORMAT = "genjax_lab checkpoint 1"
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """Writes the checkpoints of one run; a context manager that waits for the last one.

    Args:
        directory: where the steps go; made if missing.
        config: the resolved config (`resolve_config`), stored with every checkpoint. Its fields
            `keep_checkpoints`, `keep_every` and `best_metric` say which checkpoints stay: the
            latest ones, every so manieth, and the one with the lowest metric.
    """

    def __init__(self, directory: str | os.PathLike, config: Mapping[str, Any]):
        self._config = dict(config)
        self._directory = Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        best = config["best_metric"]
        policies: list[Any] = [LatestN(config["keep_checkpoints"])]
        if config["keep_every"]:
            policies.append(EveryNSteps(config["keep_every"]))
        if best:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: rank_metric(metrics, best),
                    # Orbax keeps the last n of the order, and the lowest value shall be kept.
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=(lambda metrics: rank_metric(metrics, best)) if best else None,
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        iterator_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        log: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint; returns once the state's memory may be reused.

        Args:
            step: the optimiser steps taken.
            state: the train state; arrays that are not of all processes must be equal in each.
            iterator_state: this process's position in the data, as JSON values.
            metrics: the evaluation's metrics at this step, if there was one.
            log: the state of the log.

        Raises:
            ValueError: the iterator's state is not JSON, `best_metric` is not among the metrics,
                or there is a checkpoint of this step or a later one already.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        best = self._config["best_metric"]
        if metrics and best and best not in metrics:
            raise ValueError(
                f"config.best_metric={best!r} is not a metric of the evaluation, which gives "
                f"{sorted(metrics)}"
            )
        tree = _writable(to_tree(state))
        meta = {
            "format": FORMAT,
            "config": self._config,
            "iterators": _gather(iterator_state),
            "metrics": metrics,
            "log": dict(log or {}),
            "versions": library_versions(),
            "key_impl": str(jax.random.key_impl(state.key)),
            "checksums": tree_checksums(tree),
        }
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), meta=ocp.args.JsonSave(meta)),
            metrics=metrics if best and metrics else None,
        )
        if not saved:
            raise ValueError(
                f"step={step} was not written: {self._directory} already holds step "
                f"{self._manager.latest_step()}"
            )

    def wait(self) -> None:
        """Waits until all checkpoints are whole on disk; raises what went wrong in writing them."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()


def checkpoint_directory(directory: str | os.PathLike) -> Path:
    """The folder that holds the steps, given it or the directory of the run.

    Raises:
        ValueError: there is no such directory.
    """
    path = Path(directory).absolute()
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if not path.is_dir():
        raise ValueError(f"directory={str(directory)!r} is not a directory")
    return path


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints were completed, in increasing order."""
    return sorted(
        int(path.name)
        for path in Path(directory).iterdir()
        if path.is_dir() and path.name.isdecimal()
    )


def set_aside_later_steps(directory: str | os.PathLike, step: int) -> list[int]:
    """Moves checkpoints after `step` to `<directory>_set_aside`, so that a run can go on from it.

    Returns:
        The steps that were moved.
    """
    directory = Path(directory).absolute()
    later = [other for other in checkpoint_steps(directory) if other > step]
    if later and jax.process_index() == 0:
        aside = directory.with_name(directory.name + "_set_aside")
        aside.mkdir(exist_ok=True)
        for other in later:
            place, copy = aside / str(other), 0
            while place.exists():
                copy += 1
                place = aside / f"{other}.{copy}"
            (directory / str(other)).rename(place)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("genjax_lab set aside")
    return later


def library_versions() -> dict[str, str]:
    """Versions of Python, of this library and of those that decide its numbers."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "python": platform.python_version(),
        "genjax_lab": genjax_lab.__version__,
        **versions,
    }


def rank_metric(metrics: Mapping[str, float], name: str) -> float:
    """The value to be minimised; whatever is not a number is the worst."""
    value = float(metrics.get(name, math.inf))
    return math.inf if math.isnan(value) else value


def to_tree(state: TrainState) -> dict[str, PyTree]:
    """The state as a dict of plain arrays; of abstract ones if the state is abstract."""
    tree = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if isinstance(state.key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.key)
        tree["key"] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
    else:
        tree["key"] = jax.random.key_data(state.key)
    return tree


def _writable(tree: PyTree) -> PyTree:
    """The tree with arrays that each of several processes has for itself, all alike, as numpy."""

    def own(leaf):
        return isinstance(leaf, jax.Array) and leaf.is_fully_addressable

    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: np.asarray(leaf) if own(leaf) else leaf, tree)


def _gather(iterator_state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The iterator states of all processes, in order; every process gets the list."""
    try:
        text = json.dumps(dict(iterator_state)).encode()
    except TypeError as error:
        raise ValueError(
            f"iterator_state must be a dict of JSON values, got {iterator_state!r}"
        ) from error
    if jax.process_count() == 1:
        return [json.loads(text)]
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
