"""What builders of all domains share: objects by their names in a config, and optimisers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import optax
from ml_collections.config_dict import placeholder

from genjax_lab.attention import NeighborhoodSpec


def construct(module: Any, fields: Mapping[str, Any], what: str, *arguments: Any) -> Any:
    """Calls `module.<name>(*arguments, **rest)` for fields {"name": name, **rest}."""
    rest = {key: _hashable(value) for key, value in fields.items()}
    name = rest.pop("name")
    constructor = getattr(module, name, None)
    if name not in module.__all__ or not callable(constructor):
        raise ValueError(f"config.{what}.name is {name!r}; {module.__name__} has {module.__all__}")
    try:
        return constructor(*arguments, **rest)
    except TypeError as error:
        raise ValueError(f"config.{what} does not fit {name}: {error}") from error


def neighborhoods(value: Any) -> Any:
    """The neighborhood of a network from plain values of a config.

    Fields of a `NeighborhoodSpec`, such as {"window": 4, "stride": 2}; None; or several of these,
    one for each block.
    """
    if isinstance(value, list | tuple):
        return tuple(neighborhoods(item) for item in value)
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        return value
    try:
        return NeighborhoodSpec(**{key: _hashable(item) for key, item in value.items()})
    except TypeError as error:
        raise ValueError(f"config.network.neighborhood does not fit: {error}") from error


def default_optimizer(**changes: Any) -> dict[str, Any]:
    """The fields of `make_optimizer` with their defaults."""
    return {
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "constant",
        "decay_steps": placeholder(int),
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.0,
    } | changes


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, or AdamW where there is weight decay, under the schedule of `config.optimizer`.

    Schedules: "constant", "cosine" (to 0 at decay_steps), or "inverse_sqrt" (arXiv 2312.02696,
    Eq. 67: rate / sqrt(max(step / decay_steps, 1))); all with linear warm-up.
    """
    fields = dict(config.optimizer)
    rate, warmup = fields.pop("learning_rate"), fields.pop("warmup_steps")
    schedule, decay_steps = fields.pop("schedule"), fields.pop("decay_steps", None)
    if schedule != "constant" and decay_steps is None:
        raise ValueError(f"config.optimizer.schedule={schedule!r} needs decay_steps")
    if schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(decay_steps - warmup, 1))
    elif schedule == "constant":
        main = optax.constant_schedule(rate)
    elif schedule == "inverse_sqrt":

        def main(step):
            return rate / jnp.sqrt(jnp.maximum((step + warmup) / decay_steps, 1.0))

    else:
        raise ValueError(
            f"config.optimizer.schedule is {schedule!r}; it must be constant, cosine or "
            "inverse_sqrt"
        )
    ramp = optax.linear_schedule(0.0, rate, warmup) if warmup else None
    joined = optax.join_schedules([ramp, main], [warmup]) if warmup else main
    if not fields.get("weight_decay"):
        fields.pop("weight_decay", None)
        return optax.adam(joined, **fields)
    return optax.adamw(joined, **fields)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
