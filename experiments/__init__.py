"""Launch, evaluate and sample: one program each, for every experiment; one builder per domain."""

import ast
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from genjax_lab.training import (
    Experiment,
    Restored,
    TrainState,
    restore,
    restore_posthoc,
    train,
)

DOMAINS = ("images", "next_scale", "reasoning", "text", "tokenizer")
ROUNDS = ("self_play",)


def build(config: Mapping[str, Any]) -> Experiment:
    """Builds the experiment that `config.domain` names; see the builder's module for its fields.

    Args:
      config: a ConfigDict, or the plain dict that a checkpoint holds.

    Raises:
      ValueError: if there is no such domain.
    """
    config = ml_collections.ConfigDict(config)
    domain = config.get("domain")
    if domain not in DOMAINS:
        raise ValueError(f"config.domain is {domain!r}; it must be one of {DOMAINS}")
    return importlib.import_module(f"experiments.{domain}").build(config)


def run(config: ml_collections.ConfigDict, workdir: str, **options: Any) -> None:
    """Does what a config says: trains an experiment, or plays rounds with a trained one.

    Args:
      config: of a domain or of rounds.
      workdir: the directory of the run.
      **options: `restore_step` and `allow_changes` of `genjax_lab.training.train`.

    Raises:
      ValueError: if there is no such domain, or rounds are asked to go back.
    """
    if config.get("domain") not in ROUNDS:
        train(build(config), workdir=workdir, config=config, **options)
        return
    if given := {name: value for name, value in options.items() if value}:
        raise ValueError(f"rounds of self-play take no {sorted(given)}; use another workdir")
    importlib.import_module(f"experiments.{config.domain}").run(config, workdir)


def from_checkpoint(
    directory: str,
    step: int | str | None = None,
    *,
    sigma_rel: float | None = None,
    changes: Sequence[str] = (),
) -> tuple[Experiment, Restored]:
    """The experiment and the state of a checkpoint, from its path alone.

    Args:
      directory: directory of a run.
      step: a step, its digits, or "best"; the last one if None.
      sigma_rel: evaluate and sample with a power-function average of this relative width, made of
        those that the run stored (arXiv 2312.02696, section 3.2), in place of the config's.
      changes: fields of the config that are to be others than the run's, as "field.of=value".

    Raises:
      ValueError: if there is no such field, or as `restore` and `build`.
    """
    step = int(step) if isinstance(step, str) and step.isdigit() else step
    restored = restore(directory, step)
    mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # of these devices, whatever the run's were
    config = ml_collections.ConfigDict(restored.config | {"mesh": mesh})
    for change in changes:
        _change(config, change)
    if sigma_rel is not None:
        average = restore_posthoc(directory, sigma_rel, step=restored.step)["params"]
        state = restored.state.replace(ema={**restored.state.ema, "posthoc": average})
        restored = restored._replace(state=state)
        config.evaluation.ema = "posthoc"
    return build(config), restored._replace(config=config.to_dict())


def before_training(config: Mapping[str, Any]) -> tuple[Experiment, Restored]:
    """The experiment of a config, and the state from which its training would begin, on its mesh.

    Args:
      config: of a domain.

    Raises:
      ValueError: as `build`, or if the variables cannot be made.
    """
    config = ml_collections.ConfigDict(config)
    experiment = build(config)
    init_key, state_key = jax.random.split(jax.random.key(config.seed))
    variables = dict(experiment.init(init_key))
    params = variables.pop("params")
    if experiment.project is not None:
        params = experiment.project(params)
    none = np.int32(0)
    averages = {name: params for name in config.ema}
    state = TrainState(none, params, variables, None, averages, state_key, none, none)
    return experiment, Restored(0, state, config.to_dict(), [], {}, {}, {})


def _change(config: ml_collections.ConfigDict, change: str) -> None:
    name, equals, text = change.partition("=")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a word or a path
    try:
        if not equals:
            raise KeyError(name)
        *path, leaf = name.split(".")
        parent = functools.reduce(lambda fields, part: fields[part], path, config)
        # What is made by its name takes arguments that a config need not have listed.
        if leaf not in parent and "name" not in parent:
            raise KeyError(f"there is no {name}, but {sorted(parent)}")
        config.update_from_flattened_dict({name: value})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{change!r} does not change the run's config, it must be field.of=value: {error}"
        ) from error
