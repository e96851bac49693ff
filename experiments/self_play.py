"""Rounds of DDO (arXiv 2503.01103) on the model of a finished run: better samples at no extra cost.

Beside the fields of the rounds (`genjax_lab.training.default_self_play_config`) a config has

  base        path of the run to start from, base_step the checkpoint in it (a number or "best"; the
              last if None); network, process, data, sampler and evaluation are those of that run
  loss        one of `experiments.fine_tuning.LOSSES`; "ddo" or "ddo_normalized" for tokens
  recorded_draws
              0 evaluates the reference in every step; K > 0 beforehand, on every image and sample:
              with K sets of draws of (t, noise), of which a step takes one at random, or exactly,
              for tokens, where K is 1; see `recorded_reference`
  sampler, evaluation
              changes of the base run's fields of these names
  optimizer   as for images, anew in every round; decay_steps count within the round

and those of `denoising_rounds`, for base runs of images, and `token_rounds`, of next_scale. The
result is a run of the base run's domain again: `evaluate.py` and `sample.py` take its directory.
"""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

import experiments
from experiments import denoising_rounds, token_rounds
from experiments.building import default_optimizer, make_optimizer
from experiments.image_data import labels_of_seeds, make_batches
from experiments.recorded_reference import with_recorded
from genjax_lab import data
from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.training import (
    SelfPlay,
    TrainState,
    default_self_play_config,
    restore,
    run_self_play,
)

# By the base run's domain.
_KINDS = {"images": denoising_rounds, "next_scale": token_rounds}


def default_config() -> ml_collections.ConfigDict:
    """All fields with their defaults."""
    config = default_self_play_config()
    config.update(
        {
            "domain": "self_play",
            "base": placeholder(str),
            "base_step": placeholder(str),
            "loss": "ddo",
            "recorded_draws": 0,
            "sampler": {},
            "evaluation": {},
            "optimizer": default_optimizer(learning_rate=3e-4, warmup_steps=60),
        }
    )
    for kind in _KINDS.values():
        config.update(kind.DEFAULTS)
    return config


def run(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Runs the rounds of a config, or goes on with them.

    Raises:
      ValueError: if `base` is missing or not a run of these domains, or as `run_self_play`.
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
    if model.get("domain") not in _KINDS:
        raise ValueError(
            f"config.base={config.base!r} is a run of {model.get('domain')!r}; rounds are played "
            f"with models of {sorted(_KINDS)}"
        )
    for name in ("sampler", "evaluation"):
        model[name].update(config[name])
    model.mesh = config.mesh
    return of_model(config, model, restored.state), model.to_dict()


def of_model(
    config: ml_collections.ConfigDict, model: ml_collections.ConfigDict, state: TrainState
) -> SelfPlay:
    """The rounds of a model.

    Args:
      config: of the rounds.
      model: of the model's run.
      state: the model's state; its average `model.evaluation.ema` is the pretrained model.
    """
    fields = config.to_dict()
    for domain, kind in _KINDS.items():
        changed = [name for name, value in kind.DEFAULTS.items() if fields[name] != value]
        if domain != model.domain and changed:
            raise ValueError(f"config has {changed}, which are for models of {domain!r} only")
    if config.recorded_draws < 0:
        raise ValueError(f"config.recorded_draws={config.recorded_draws} must not be negative")
    if config.recorded_draws and model.data.get("flip"):
        raise ValueError(
            "config.recorded_draws is for images as they are; the base run has data.flip"
        )
    tuning = _KINDS[model.domain].build(config, model)
    experiment = experiments.build(model)
    average, num_classes = model.evaluation.ema, model.data.num_classes

    def as_state(variables: Mapping[str, Any]) -> TrainState:
        return state.replace(params=variables["params"], ema={average: variables["params"]})

    def loaders(pool, seed, **options):
        """Of the data and of the pool, if there is one."""
        real = make_batches(model, model.data.split, config.batch_size, seed=seed, **options)
        if pool is None:
            return [real]
        fake = data.make_loader_from_arrays(
            pool,
            config.batch_size,
            seed + 1,
            num_classes=num_classes,
            max_value=real.info.max_value or 255,
            value_range=None,
            **options,
        )
        return [real, fake]

    def batches(pool, seed, reference, index):
        mesh = make_mesh(**config.mesh)
        shard, count = process_share(mesh)
        parts = loaders(pool, seed, shard_index=shard, shard_count=count)
        if config.recorded_draws:
            once = {"num_epochs": 1, "shuffle": False, "drop_remainder": False}
            once |= {"shard_index": 0, "shard_count": 1}
            for kind, epoch in enumerate(loaders(pool, seed, **once)):
                draws = np.random.default_rng([seed, kind]).integers(
                    2**31, size=(epoch.num_examples, config.recorded_draws), dtype=np.int32
                )
                parts[kind] = with_recorded(
                    *(parts[kind], epoch, tuning.record, reference, draws, index),
                    mesh=mesh,
                    compute_dtype=config.compute_dtype,
                )
        return parts[0] if pool is None else data.PairedLoader(*parts, labels=bool(num_classes))

    def score(variables, seeds):
        try:
            return experiment.evaluate(as_state(variables), seeds=seeds, metrics=(config.metric,))
        except data.NonFiniteImagesError:  # of a member that diverged
            return {config.metric: math.inf}

    draw = tuning.draw and (lambda variables, seeds: tuning.draw(as_state(variables), seeds))
    return SelfPlay(
        variables=state.variables(average),
        draw=draw,
        label=labels_of_seeds(model),
        provenance={**tuning.origin, "data": model.data.to_dict(), "seed": model.seed},
        objective=tuning.objective,
        optimizer=lambda: make_optimizer(config),
        batches=batches,
        score=score,
        project=tuning.project,
    )
