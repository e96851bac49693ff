"""Launch, evaluate and sample: one program each, for every experiment; one builder per domain."""

import importlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from genjax_lab.training import Experiment, Restored, restore

DOMAINS = ("images",)


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


def from_checkpoint(directory: str, step: int | str | None = None) -> tuple[Experiment, Restored]:
    """The experiment and the state of a checkpoint, from its path alone.

    Args:
      directory: directory of a run.
      step: a step, its digits, or "best"; the last one if None.
    """
    step = int(step) if isinstance(step, str) and step.isdigit() else step
    restored = restore(directory, step)
    mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # of these devices, whatever the run's were
    return build(restored.config | {"mesh": mesh}), restored
