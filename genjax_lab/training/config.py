"""The settings that the training loop reads, with defaults; and when two runs are the same run.

A config is one flat `ConfigDict` (or nested dict): the loop reads the fields of `default_config`,
whatever else it holds belongs to the experiment. All of it is stored with every checkpoint, as
plain JSON.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

# Fields that say how long, how fast or how closely watched a run is, but not what it computes.
FREE_FIELDS = (
    "num_steps",
    "steps_per_call",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "best_metric",
    "max_consecutive_skips",
    "progress",
    "tensorboard",
    "mesh.*",
)


def default_config() -> ml_collections.ConfigDict:
    """All fields that `train` reads, with their defaults.

    seed: of the initial parameters and of all randomness in the steps.
    batch_size: examples in one optimiser step, over all processes.
    num_steps: optimiser steps in the whole run.
    steps_per_call: optimiser steps in one dispatch; the other counts must be multiples of it
        (`log_every` need not be).
    accumulation_steps: microbatches in one optimiser step.
    log_every: optimiser steps that one row of the log averages.
    eval_every: optimiser steps between evaluations; 0 for none. The end is always evaluated.
    checkpoint_every: optimiser steps between checkpoints; the end is always stored.
    keep_checkpoints: how many of the latest checkpoints are kept.
    keep_every: checkpoints at multiples of this many steps are kept for ever; None for none.
    best_metric: name of the evaluation's metric whose lowest value is kept; None for none.
    max_grad_norm: global norm to which gradients are clipped; None for no clipping.
    max_consecutive_skips: the run stops after this many steps in a row that were not finite.
    compute_dtype: type in which the objective sees the parameters, "bfloat16" say; None: float32.
    mesh: sizes of the axes `data`, `fsdp`, `tensor`; -1 takes the remaining devices.
    ema: averages by name, settings as in `genjax_lab.training.ema.ema_from_config`.
    progress: show a progress bar.
    tensorboard: write TensorBoard event files beside metrics.jsonl.
    """
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "batch_size": 256,
            "num_steps": 10_000,
            "steps_per_call": 1,
            "accumulation_steps": 1,
            "log_every": 100,
            "eval_every": 0,
            "checkpoint_every": 1_000,
            "keep_checkpoints": 2,
            "keep_every": placeholder(int),
            "best_metric": placeholder(str),
            "max_grad_norm": placeholder(float),
            "max_consecutive_skips": 10,
            "compute_dtype": placeholder(str),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "ema": {"ema": {"half_life_images": 500_000.0, "rampup_ratio": 0.05}},
            "progress": False,
            "tensorboard": True,
        }
    )


def resolve_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """Turns a config into the plain JSON values that are stored, and checks the loop's fields.

    Raises:
        ValueError: a field of `default_config` is missing or out of range, or a value is not JSON.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    resolved = _plain(config, "")
    if missing := sorted(set(default_config()) - set(resolved)):
        raise ValueError(f"config lacks {missing}; start from genjax_lab.training.default_config()")
    _check_counts(resolved)
    return resolved


def _check_counts(config: Mapping[str, Any]) -> None:
    counts = ("batch_size", "num_steps", "steps_per_call", "accumulation_steps", "log_every")
    counts += ("checkpoint_every", "keep_checkpoints", "max_consecutive_skips")
    for name in counts:
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"config.{name} must be a positive integer, got {config[name]!r}")
    if type(config["eval_every"]) is not int or config["eval_every"] < 0:
        raise ValueError(
            f"config.eval_every must be an integer, 0 for none; got {config['eval_every']!r}"
        )
    for name in ("num_steps", "checkpoint_every", "eval_every", "keep_every"):
        if (config[name] or 0) % config["steps_per_call"]:
            raise ValueError(
                f"config.{name}={config[name]} must be a multiple of "
                f"config.steps_per_call={config['steps_per_call']}"
            )
    if (config["keep_every"] or 0) % config["checkpoint_every"]:
        raise ValueError(
            f"config.keep_every={config['keep_every']} must be a multiple of "
            f"config.checkpoint_every={config['checkpoint_every']}"
        )
    if config["best_metric"] and (
        not config["eval_every"] or config["checkpoint_every"] % config["eval_every"]
    ):
        raise ValueError(
            f"config.best_metric={config['best_metric']!r} needs an evaluation at every "
            f"checkpoint: config.checkpoint_every={config['checkpoint_every']} must be a multiple "
            f"of config.eval_every={config['eval_every']}"
        )
    if set(config["mesh"]) != {"data", "fsdp", "tensor"}:
        raise ValueError(
            f"config.mesh must have the fields data, fsdp, tensor; got {sorted(config['mesh'])}"
        )


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"config{path} has keys that are not strings: {bad}")
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    if value is None or (type(value) in (bool, int, float, str) and finite):
        return value
    raise ValueError(
        f"config{path} is {value!r}, a {type(value).__name__}; a config holds only finite numbers, "
        "strings, booleans, None, lists and dicts of them, so that it can be stored"
    )


def config_differences(
    stored: Mapping[str, Any], given: Mapping[str, Any], *, free: Sequence[str] = FREE_FIELDS
) -> list[str]:
    """Lists the fields in which two resolved configs differ, as "name: stored -> given".

    Args:
        stored: the config of a checkpoint.
        given: the config of this launch.
        free: names that may differ: dotted paths, with `*` for anything.
    """
    old, new = _flatten(stored), _flatten(given)
    missing = "(absent)"
    return [
        f"{name}: {old.get(name, missing)!r} -> {new.get(name, missing)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in free)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
