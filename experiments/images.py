"""Experiments on images: any Gaussian process, network and sampler of the library by name.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        name, split, image_shape, num_classes; flip; resolution (crops and resizes), and what
              else `make_loader` takes
  process     name in genjax_lab.processes and its arguments
  network     name in genjax_lab.networks and its arguments; neighborhood as a dict of the fields of
              a NeighborhoodSpec, or one or None for each block
  augmentation
              probability of each of EDM's transforms, which need a network with augment_dim=9;
              None for no augmentation
  optimizer   learning_rate, warmup_steps, schedule, and Adam's arguments
  sampler     name in genjax_lab.samplers and its arguments
  guidance    scale (1: none) and interval of times or None of classifier-free guidance; or of
              autoguidance, where guide is the path of a worse model's run (guide_step: which step)
  evaluation  num_samples, batch_size, ema, metrics, reference_split, features

Nothing is read or compiled before it is needed, so the experiments of data sets that are not at
hand can be built, too.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from experiments.building import construct, default_optimizer, make_optimizer, neighborhoods
from experiments.image_data import (
    ImageJudge,
    default_data,
    default_evaluation,
    labels_of_seeds,
    replicated,
    sampling_key,
    training_batches,
)
from genjax_lab import networks, processes, samplers
from genjax_lab.objectives import Objective, augmented, denoising, edm_augmentation
from genjax_lab.objectives.augmentation import NUM_AUGMENT_LABELS
from genjax_lab.training import Experiment, TrainState, restore


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "images",
            "data": default_data(),
            "process": {"name": "edm"},
            "network": {"name": "DiT"},
            "augmentation": placeholder(float),
            "optimizer": default_optimizer(),
            "sampler": {"name": "heun", "num_steps": 18},
            "guidance": {
                "scale": 1.0,
                "interval": placeholder(tuple),
                "guide": placeholder(str),
                "guide_step": placeholder(int),
            },
            "evaluation": default_evaluation(),
        }
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment of a config.

    Raises:
      ValueError: if a name is unknown or its arguments do not fit.
    """
    network = make_network(config)
    process = construct(processes, config.process, "process")
    judge = ImageJudge(config, _Draw(config, network, process))
    return Experiment(
        init=lambda key: _init(network, config, key),
        objective=make_objective(config, network, process),
        optimizer=make_optimizer(config),
        batches=lambda state: training_batches(config),
        evaluate=judge.evaluate,
        sample=judge.sample,
        write=judge.write,
        project=networks.normalize_weights if isinstance(network, networks.EDM2UNet) else None,
    )


def make_network(config: ml_collections.ConfigDict) -> Any:
    """The network of a config, told the number of classes of its data."""
    fields = {"num_classes": config.data.num_classes, **config.network}
    if "neighborhood" in fields:
        fields["neighborhood"] = neighborhoods(fields["neighborhood"])
    return construct(networks, fields, "network")


def make_objective(config: ml_collections.ConfigDict, network: Any, process: Any) -> Objective:
    """Denoising, with EDM2's uncertainty head where there is one, under `config.augmentation`."""
    log_variance = None
    if isinstance(network, networks.EDM2UNet):
        log_variance = functools.partial(network.apply, method="logvar")
    objective = denoising(network.apply, process, log_variance=log_variance)
    if not config.data.num_classes:
        objective = without_labels(objective)
    probability = config.get("augmentation")
    if probability is None:
        return objective
    if getattr(network, "augment_dim", 0) != NUM_AUGMENT_LABELS:
        raise ValueError(
            f"config.augmentation={probability} needs a network that is told of it: one "
            f"with augment_dim={NUM_AUGMENT_LABELS}, such as SongUNet; got {config.network.name} "
            f"with augment_dim={getattr(network, 'augment_dim', 'absent')}"
        )
    return augmented(objective, edm_augmentation(probability))


def without_labels(objective: Objective) -> Objective:
    """An unconditional network takes none, but every batch of the loader has them."""

    def unconditional(variables, batch, key):
        rest = {n: v for n, v in batch.items() if n not in ("label", "fake_label")}
        return objective(variables, rest, key)

    return unconditional


def _init(network: Any, config: ml_collections.ConfigDict, key: jax.Array) -> Any:
    shape = tuple(config.data.image_shape)
    labels = np.zeros((1,), np.int32) if config.data.num_classes else None
    return jax.jit(network.init)(
        key, np.zeros((1, *shape), np.float32), np.zeros((1,), np.float32), labels
    )


class _Draw:
    """Draws images, or latents, of a train state under the guidance of the config."""

    def __init__(self, config: ml_collections.ConfigDict, network: Any, process: Any):
        self._config, self._network, self._process = config, network, process

    def __call__(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        config, denoise = self._config, self._denoiser(state, mesh)
        return samplers.sample_batches(
            construct(samplers, config.sampler, "sampler", denoise),
            sampling_key(config),
            seeds=seeds,
            batch_size=batch_size,
            sample_shape=tuple(config.data.image_shape),
            condition_fn=labels_of_seeds(config),
            mesh=mesh,
            progress=progress,
        )

    def _denoiser(self, state: TrainState, mesh: jax.sharding.Mesh) -> samplers.Denoiser:
        guidance = self._config.guidance
        denoise = self._unguided(
            self._network, state.variables(self._config.evaluation.ema), self._process, mesh
        )
        if guidance.scale == 1:
            return denoise
        if guidance.get("guide"):
            return samplers.autoguidance(
                denoise,
                self._guide(mesh),
                guidance_scale=guidance.scale,
                interval=guidance.interval,
            )
        return samplers.classifier_free(
            denoise,
            guidance_scale=guidance.scale,
            null_condition=np.int32(self._config.data.num_classes),
            interval=guidance.interval,
        )

    @functools.lru_cache(1)  # noqa: B019 (lives as long as the experiment)
    def _guide(self, mesh: jax.sharding.Mesh) -> samplers.Denoiser:
        guidance = self._config.guidance
        restored = restore(guidance.guide, guidance.get("guide_step"))
        config = ml_collections.ConfigDict(restored.config)
        return self._unguided(
            make_network(config),
            restored.state.variables(config.evaluation.ema),
            construct(processes, config.process, "process"),
            mesh,
        )

    def _unguided(
        self, network: Any, variables: Any, process: Any, mesh: jax.sharding.Mesh
    ) -> samplers.Denoiser:
        return samplers.denoiser(network, replicated(variables, mesh), process)
