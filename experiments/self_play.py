"""Rounds of DDO (arXiv 2503.01103) on the model of a finished run: better samples at no extra cost.

Beside the fields of the rounds (`genjax_lab.training.default_self_play_config`) a config has

  base        path of the run to start from, base_step the checkpoint in it (a number or "best"; the
              last if None); network, process, data, sampler and evaluation are those of that run
  loss        one of LOSSES, with num_draws draws of (t, noise) for each pair, antithetic or not
  process_from_round
              changes of the process's arguments from some round on: {"17": {"log_sigma_std": 3.0}}
  sampler, evaluation
              changes of the base run's fields of these names
  optimizer   as for images, anew in every round; decay_steps count within the round

The result is a run of images again: `evaluate.py` and `sample.py` take its directory.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from experiments import images
from experiments.building import construct, default_optimizer, make_optimizer
from experiments.image_data import make_batches
from genjax_lab import data, objectives, processes
from genjax_lab.networks import EDM2UNet, normalize_weights
from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.training import (
    SelfPlay,
    TrainState,
    default_self_play_config,
    restore,
    run_self_play,
)

# (delta_real, delta_fake, alpha, beta) -> (loss, metrics), on log-ratios of data and samples.
LOSSES = {
    "ddo": objectives.ddo_loss,
    "ddo_normalized": functools.partial(objectives.ddo_loss, normalize_by_alpha=True),
    # Pairs of data and samples at random; its one weight is beta.
    "spin": lambda real, fake, alpha, beta: objectives.spin_loss(real, fake, beta),
    "kto": objectives.kto_loss,
    **{
        name: functools.partial(objectives.f_divergence_loss, name)
        for name in objectives.F_DIVERGENCES
    },
}


def default_config() -> ml_collections.ConfigDict:
    """All fields with their defaults."""
    config = default_self_play_config()
    config.update(
        {
            "domain": "self_play",
            "base": placeholder(str),
            "base_step": placeholder(str),
            "loss": "ddo",
            "num_draws": 1,
            "antithetic": False,
            "process_from_round": {},
            "sampler": {},
            "evaluation": {},
            "optimizer": default_optimizer(learning_rate=3e-4, warmup_steps=60),
        }
    )
    return config


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Runs the rounds of a config, or goes on with them.

    Raises:
      ValueError: if `base` is missing or not a run of images, or as `run_self_play`.
    """
    if not config.base:
        raise ValueError(
            "config.base is missing: the directory of the run to start from, as in "
            "--config.base=runs/digits_edm"
        )
    self_play, model_config = build(config)
    run_self_play(self_play, workdir=workdir, config=config, model_config=model_config)


def build(config: ml_collections.ConfigDict) -> tuple[SelfPlay, dict[str, Any]]:
    """What the rounds need of the model in `config.base`, and that model's own config."""
    step = config.base_step
    restored = restore(config.base, int(step) if step and step.isdigit() else step)
    model = ml_collections.ConfigDict(restored.config)
    if model.get("domain") != "images":
        raise ValueError(f"config.base={config.base!r} is a run of {model.get('domain')!r}")
    for name in ("sampler", "evaluation"):
        model[name].update(config[name])
    model.mesh = config.mesh
    return for_images(config, model, restored.state), model.to_dict()


def for_images(
    config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, state: TrainState
) -> SelfPlay:
    """The rounds of an image model.

    Args:
      config: of the rounds.
      model: of the model's run.
      state: the model's state; its average `model.evaluation.ema` is the pretrained model.
    """
    experiment, network = images.build(model), images.make_network(model)
    # Log-ratios are of the network itself, so it is its samples that it learns from; models are
    # scored as they are used.
    unguided = model.copy_and_resolve_references()
    unguided.guidance.scale = 1.0
    source = images.build(unguided)
    average = model.evaluation.ema
    num_classes = model.data.num_classes

    def as_state(variables: Mapping[str, Any]) -> TrainState:
        return state.replace(params=variables["params"], ema={average: variables["params"]})

    def objective(alpha, beta, index):
        fields = dict(model.process)
        for start, changes in sorted(config.process_from_round.items(), key=lambda x: int(x[0])):
            if index >= int(start):
                fields |= dict(changes)
        if config.loss not in LOSSES:
            raise ValueError(f"config.loss is {config.loss!r}; it must be one of {sorted(LOSSES)}")
        if config.loss == "spin" and len(set(alpha)) > 1:
            raise ValueError(f"config.loss='spin' has no alpha; config.alpha={alpha} must be one")
        grid = objectives.ddo_denoising_grid(
            network.apply,
            construct(processes, fields, "process"),
            alpha=alpha,
            beta=beta,
            num_draws=config.num_draws,
            antithetic=config.antithetic,
            loss=LOSSES[config.loss],
        )
        return grid if num_classes else images.without_labels(grid)

    def batches(pool, seed):
        index, count = process_share(make_mesh(**config.mesh))
        shard = {"shard_index": index, "shard_count": count}
        real = make_batches(model, model.data.split, config.batch_size, seed=seed, **shard)
        fake = data.make_loader_from_arrays(
            pool,
            config.batch_size,
            seed + 1,
            num_classes=num_classes,
            max_value=real.info.max_value or 255,
            value_range=None,
            **shard,
        )
        return data.PairedLoader(real, fake)

    def score(variables, seeds):
        try:
            return experiment.evaluate(as_state(variables), seeds=seeds, metrics=(config.metric,))
        except data.NonFiniteImagesError:  # of a member that diverged
            return {config.metric: math.inf}

    project = None
    if isinstance(network, EDM2UNet):  # the uncertainty head is not trained by this loss
        project = functools.partial(normalize_weights, skip=("logvar_linear",))
    return SelfPlay(
        variables=state.variables(average),
        draw=lambda variables, seeds: source.sample(
            as_state(variables), seeds, progress=config.progress
        ),
        label=(lambda seeds: data.balanced_labels(seeds, num_classes)) if num_classes else None,
        provenance={name: model[name].to_dict() for name in ("sampler", "process", "data")}
        | {"seed": model.seed},
        objective=objective,
        optimizer=lambda: make_optimizer(config),
        batches=batches,
        score=score,
        project=project,
    )
