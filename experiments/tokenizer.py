"""Image tokenizers: an encoder, a quantiser over scales and a decoder, the first stage of VAR.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        as for images
  network     name in genjax_lab.networks of a tokenizer and its arguments
  quantizer_weight
              factor of the quantiser's losses
  optimizer   as for images
  evaluation  as for images; evaluated are reconstructions: "sample" i is that of image i of the
              reference split, in order and over again

Beside the metrics of the reconstructions, an evaluation has their mean squared error and the share
of codes that each scale uses, all of the reference split.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.building import construct, default_optimizer, make_optimizer
from experiments.image_data import (
    ImageJudge,
    default_data,
    default_evaluation,
    make_batches,
    replicated,
    training_batches,
)
from genjax_lab import networks
from genjax_lab.networks import token_counts, update_usage, used_fraction
from genjax_lab.objectives import tokenizer_reconstruction
from genjax_lab.training import Experiment, TrainState


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "tokenizer",
            "data": default_data(),
            "network": {"name": "digits_tokenizer"},
            "quantizer_weight": 1.0,
            "optimizer": default_optimizer(),
            "evaluation": default_evaluation(),
        }
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment of a config.

    Raises:
      ValueError: if a name is unknown or its arguments do not fit.
    """
    network = make_tokenizer(config.network)
    judge = ImageJudge(config, _Reconstruct(config, network))
    shape = tuple(config.data.image_shape)

    def evaluate(state: TrainState, **options: Any) -> dict[str, float]:
        measured = judge.evaluate(state, **options)
        return {**measured, **_usage_and_error(config, network, state)}

    return Experiment(
        init=lambda key: jax.jit(network.init)(key, np.zeros((1, *shape), np.float32)),
        objective=tokenizer_reconstruction(network.apply, quantizer_weight=config.quantizer_weight),
        optimizer=make_optimizer(config),
        batches=lambda state: training_batches(config),
        evaluate=evaluate,
        sample=judge.sample,
        write=judge.write,
    )


def make_tokenizer(fields: ml_collections.ConfigDict) -> networks.ImageTokenizer:
    """The tokenizer that a config's fields {"name": ..., arguments} describe.

    Raises:
      ValueError: if the name is unknown or not a tokenizer's, or an argument does not fit.
    """
    network = construct(networks, fields, "network")
    if not isinstance(network, networks.ImageTokenizer):
        raise ValueError(f"config.network.name is {fields.name!r}, which is no ImageTokenizer")
    return network


class _Reconstruct:
    """Draws the reconstructions of the reference split's images."""

    def __init__(self, config: ml_collections.ConfigDict, network: networks.ImageTokenizer):
        self._config = config
        self._apply = jax.jit(lambda variables, x: jnp.clip(network.apply(variables, x)[0], -1, 1))

    def __call__(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        del progress  # quick beside any sampling
        variables = replicated(state.variables(self._config.evaluation.ema), mesh)
        wanted = np.asarray(seeds)
        # Seeds count the images over and over: place p of the stream is image p of its epoch.
        first = 0
        for images in _forever(self._config, batch_size):
            places = wanted[(wanted >= first) & (wanted < first + len(images))]
            if len(places):
                filled = np.resize(images, (batch_size, *images.shape[1:]))
                yield places, np.asarray(self._apply(variables, filled))[places - first]
            first += len(images)
            if first > wanted.max():
                return


def _forever(config: ml_collections.ConfigDict, batch_size: int) -> Iterator[np.ndarray]:
    while True:
        yield from _in_order(config, batch_size)


def _in_order(config: ml_collections.ConfigDict, batch_size: int) -> Iterator[np.ndarray]:
    """The images of the reference split, once."""
    for batch in make_batches(
        config,
        config.evaluation.reference_split,
        batch_size,
        num_epochs=1,
        shuffle=False,
        drop_remainder=False,
        transforms=(),
        shard_index=0,
        shard_count=1,
    ):
        yield batch["image"]


def _usage_and_error(
    config: ml_collections.ConfigDict, network: networks.ImageTokenizer, state: TrainState
) -> dict[str, float]:
    quantizer = network.quantizer

    @jax.jit
    def of_batch(variables, images):
        output = network.apply(variables, images)
        counts = token_counts(output.tokens, quantizer.patch_nums, quantizer.vocab_size)
        return jnp.sum((output.reconstruction - images) ** 2), counts

    variables = state.variables(config.evaluation.ema)
    usage = np.zeros((len(quantizer.patch_nums), quantizer.vocab_size), np.float32)
    total, num_values = 0.0, 0
    batch_size = config.batch_size
    for step, images in enumerate(_in_order(config, batch_size)):
        error, counts = of_batch(variables, images)
        total, num_values = total + float(error), num_values + images.size
        usage = update_usage(usage, counts * (batch_size / len(images)), step)
    shares = used_fraction(usage, batch=batch_size, patch_nums=quantizer.patch_nums)
    return {"reconstruction_error": total / num_values} | {
        f"used_codes/scale_{side}": float(share)
        for side, share in zip(quantizer.patch_nums, shares, strict=True)
    }
