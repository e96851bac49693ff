"""Reading checkpoints: verified, onto any mesh, or as numpy arrays from the path alone.

Everything read is compared with the checksums and the list of arrays that were stored beside it.
What is damaged, or was written by another program or for another network, is an error that says
which earlier steps are intact; none of them is used unasked.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from genjax_lab.training.checkpoint import (
    FORMAT,
    checkpoint_directory,
    checkpoint_steps,
    rank_metric,
    to_tree,
)
from genjax_lab.training.checksum import tree_checksums
from genjax_lab.training.state import TrainState


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: the optimiser steps taken.
        state: the train state. Read without a target its leaves are numpy arrays (the key a typed
            key) and `opt_state` is None.
        config: the resolved config of the run, as plain values.
        iterators: the data iterator's state of every process, in order.
        metrics: the metrics given to `save`; empty if there was no evaluation at this step.
        log: the state of the log given to `save`.
        versions: library versions that wrote it.
    """

    step: int
    state: TrainState
    config: dict[str, Any]
    iterators: list[dict[str, Any]]
    metrics: dict[str, float]
    log: dict[str, Any]
    versions: dict[str, str]


def restore(
    directory: str | os.PathLike,
    step: int | str | None = None,
    *,
    target: TrainState | None = None,
) -> Restored:
    """Reads a checkpoint and verifies it.

    Args:
        directory: the directory of the run or its `checkpoints` folder.
        step: which step; "best" for the lowest `best_metric` among those kept, None for the latest.
        target: a state (of arrays or `ShapeDtypeStruct`s with shardings) whose structure, shapes
            and placement the restored one takes, on any mesh. Without it the arrays come as numpy,
            for evaluation anywhere, and the optimiser's state is left out.

    Raises:
        ValueError: there is no such checkpoint; it does not fit the target; or it is damaged or
            foreign, in which case the message names the earlier intact steps.
    """
    directory, step = _find(directory, step)
    return _or_advice(lambda: _read(directory, step, target), directory, step)


def restore_config(directory: str | os.PathLike, step: int | str | None = None) -> dict[str, Any]:
    """Reads only the resolved config that a checkpoint holds; arguments and errors of `restore`."""
    directory, step = _find(directory, step)
    with _open(directory) as manager:
        return _or_advice(lambda: _read_meta(manager, step)["config"], directory, step)


class _DamagedError(Exception):
    """A checkpoint cannot be read or does not hold what was written."""


def _find(directory: str | os.PathLike, step: int | str | None) -> tuple[Path, int]:
    directory = checkpoint_directory(directory)
    steps = checkpoint_steps(directory)
    if not steps:
        raise ValueError(f"directory={str(directory)!r} holds no checkpoint")
    if step == "best":
        return directory, _best_step(directory, steps)
    if step is not None and step not in steps:
        raise ValueError(f"step={step!r} is not in {str(directory)!r}; there are {steps}")
    return directory, steps[-1] if step is None else step


def _open(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        },
    )


def _or_advice(read: Callable[[], Any], directory: Path, step: int) -> Any:
    try:
        return read()
    except _DamagedError as error:
        earlier = [other for other in checkpoint_steps(directory) if other < step]
        raise ValueError(
            f"checkpoint {str(directory / str(step))!r} cannot be used: {error}. "
            f"{_advice(directory, earlier)}"
        ) from error


def _read(directory: Path, step: int, target: TrainState | None) -> Restored:
    with _open(directory) as manager:
        meta = _read_meta(manager, step)
        stored = _damaged_if_raising(lambda: manager.item_metadata(step)["state"].tree)
        if set(_shapes(stored)) != set(meta["checksums"]):
            raise _DamagedError("its list of arrays is not the one that was written")
        if target is None:
            tree = {name: part for name, part in stored.items() if name != "opt_state"}
            arguments = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=_is_array
            )
        else:
            tree = to_tree(target)
            _check_structure(directory / str(step), _shapes(stored), _shapes(tree))
            arguments = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
        tree = _damaged_if_raising(
            lambda: manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        )
    sums = tree_checksums(tree)
    if broken := [path for path, checksum in sums.items() if checksum != meta["checksums"][path]]:
        raise _DamagedError(f"arrays hold other values than were written: {_some(broken)}")
    key = jax.random.wrap_key_data(tree.pop("key"), impl=meta["key_impl"])
    state = TrainState(key=key, opt_state=tree.pop("opt_state", None), **tree)
    fields = {name: meta[name] for name in Restored._fields if name in meta}
    return Restored(step=step, state=state, **fields)


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = _damaged_if_raising(lambda: manager.restore(step, args=args)["meta"])
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise _DamagedError(f"its metadata does not say {FORMAT!r}; another program wrote it")
    return meta


def _damaged_if_raising(read: Callable[[], Any]) -> Any:
    try:
        return read()
    # Orbax and TensorStore document no exception types for files that are missing, short or not
    # theirs; all of them mean the same here, and the cause is kept.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise _DamagedError(f"truncated, or not of this library ({reason[0][:200]})") from error


def _advice(directory: Path, earlier: list[int]) -> str:
    if not earlier:
        return "There is no earlier checkpoint"
    if jax.process_count() > 1:
        return f"Earlier steps, not verified: {earlier}; pass step=... (training: restore_step=...)"
    damaged = []
    for step in reversed(earlier):
        try:
            _read(directory, step, None)
        except _DamagedError:
            damaged.append(step)
            continue
        unread = [other for other in earlier if other < step]
        return (
            f"The latest earlier step that is intact is {step}: pass step={step} (training: "
            f"restore_step={step}) to use it. Earlier still: {unread}; damaged too: {damaged}"
        )
    return f"The earlier steps {earlier} are damaged too"


def _check_structure(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def parameters_first(names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (not name.startswith("params/"), name))

    lacking = parameters_first(set(wanted) - set(stored))
    surplus = parameters_first(set(stored) - set(wanted))
    other = [
        f"{name}: {stored[name]} stored, {wanted[name]} wanted"
        for name in parameters_first(set(stored) & set(wanted))
        if stored[name] != wanted[name]
    ]
    if lacking or surplus or other:
        raise ValueError(
            f"checkpoint {str(path)!r} holds another network, optimiser or set of averages than "
            f"the target. Lacking: {_some(lacking)}; not in the target: {_some(surplus)}; of "
            f"another shape or type: {_some(other)}. Use the config that is stored with it"
        )


def _best_step(directory: Path, steps: list[int]) -> int:
    values: dict[int, float] = {}
    with _open(directory) as manager:
        for step in steps:
            try:
                meta = _read_meta(manager, step)
            except _DamagedError as error:
                raise ValueError(
                    f"checkpoint {str(directory / str(step))!r} cannot be compared with the "
                    f"others: {error}; pass the step itself, one of {steps}"
                ) from error
            best = meta["config"]["best_metric"]
            if best in meta["metrics"]:
                values[step] = rank_metric(meta["metrics"], best)
    if not values:
        raise ValueError(
            f'step="best" needs a best_metric in the config of the run; {str(directory)!r} has no '
            f"step with one, pass one of {steps}"
        )
    # The later of two equals, as the keep policy has it.
    return min(values, key=lambda step: (values[step], -step))


def _shapes(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    }


def _is_array(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "-"
