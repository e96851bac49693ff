"""Rounds of DDO on diffusion models of images.

Fields of the config of the rounds that are read here:

  num_draws   draws of (t, noise) for each pair of image and sample, antithetic or not
  process_from_round
              changes of the process's arguments from some round on: {"17": {"log_sigma_std": 3.0}}
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments import images
from experiments.building import construct
from experiments.fine_tuning import LOSSES, FineTuning
from experiments.recorded_reference import on_recorded_draws
from genjax_lab import objectives, processes
from genjax_lab.networks import EDM2UNet, normalize_weights

DEFAULTS = {"num_draws": 1, "antithetic": False, "process_from_round": {}}


def build(config: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> FineTuning:
    """What the rounds need.

    Args:
      config: of the rounds.
      model: of the model's run.
    """
    network = images.make_network(model)
    # Log-ratios are of the network itself, so it is its samples that it learns from; models are
    # scored as they are used.
    unguided = model.copy_and_resolve_references()
    unguided.guidance.scale = 1.0
    source = images.build(unguided)

    def process_of(index):
        fields: dict[str, Any] = dict(model.process)
        for start, changes in sorted(config.process_from_round.items(), key=lambda x: int(x[0])):
            if index >= int(start):
                fields |= dict(changes)
        return construct(processes, fields, "process")

    draws = {"num_draws": config.num_draws, "antithetic": config.antithetic}

    def record(variables, batch, seeds, index):
        label = batch["label"] if model.data.num_classes else None
        of_seeds = functools.partial(
            objectives.seeded_log_likelihoods,
            *(network.apply, process_of(index), variables, batch["image"], label),
            **draws,
        )
        terms = jax.lax.map(of_seeds, seeds.T)
        return {"seeds": seeds, "reference_terms": jnp.moveaxis(terms, 0, 1)}

    def objective(alpha, beta, index):
        if config.loss not in LOSSES:
            raise ValueError(f"config.loss is {config.loss!r}; it must be one of {sorted(LOSSES)}")
        if config.loss == "spin" and len(set(alpha)) > 1:
            raise ValueError(f"config.loss='spin' has no alpha; config.alpha={alpha} must be one")
        grid = objectives.ddo_denoising_grid(
            network.apply,
            process_of(index),
            alpha=alpha,
            beta=beta,
            loss=LOSSES[config.loss],
            **draws,
        )
        if config.recorded_draws:
            grid = on_recorded_draws(grid)
        return grid if model.data.num_classes else images.without_labels(grid)

    project = None
    if isinstance(network, EDM2UNet):  # the uncertainty head is not trained by this loss
        project = functools.partial(normalize_weights, skip=("logvar_linear",))
    return FineTuning(
        objective=objective,
        draw=functools.partial(source.sample, progress=config.progress),
        origin={name: model[name].to_dict() for name in ("sampler", "process")},
        record=record,
        project=project,
    )
