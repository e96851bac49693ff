"""Next-scale autoregressive models of images (VAR, arXiv 2404.02905) over a trained tokenizer.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        as for images
  tokenizer   name in genjax_lab.networks and its arguments; its weights come from run, the path of
              a run of `tokenizer.py`, or from weights, the path of a published checkpoint
  network     name in genjax_lab.networks and its arguments, beside those that the tokenizer decides
  label_dropout
              share of the examples that is trained without class, for guidance
  optimizer   as for images
  sampler     cfg (0: no guidance), temperature, top_k and top_p of `samplers.next_scale`
  evaluation  as for images

Images are encoded as they are read. The tokenizer's weights are the collection "tokenizer" of the
variables, so that a checkpoint is all that is needed to sample from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections.config_dict import placeholder

from experiments.building import construct, default_optimizer, make_optimizer
from experiments.image_data import (
    ImageJudge,
    default_data,
    default_evaluation,
    labels_of_seeds,
    replicated,
    sampling_key,
    training_batches,
)
from experiments.tokenizer import make_tokenizer
from genjax_lab import networks, pretrained, samplers
from genjax_lab.objectives import Objective, autoregressive
from genjax_lab.training import Experiment, TrainState, restore

_ORIGINS = ("run", "weights")


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "next_scale",
            "data": default_data(),
            "tokenizer": {
                "name": "digits_tokenizer",
                "run": placeholder(str),
                "weights": placeholder(str),
            },
            "network": {"name": "VAR"},
            "label_dropout": 0.1,
            "optimizer": default_optimizer(b2=0.95),
            "sampler": {"cfg": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 0.0},
            "evaluation": default_evaluation(),
        }
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment of a config.

    Raises:
      ValueError: if a name is unknown or its arguments do not fit.
    """
    codec = Codec(tokenizer_of(config))
    network = make_network(config, codec)
    judge = ImageJudge(config, DrawImages(config, network, codec))
    objective = autoregressive(
        apply_to_inputs(network),
        null_label=config.data.num_classes,
        label_dropout=config.label_dropout if config.data.num_classes else 0.0,
    )
    return Experiment(
        init=lambda key: init(network, tokenizer_variables(config, codec), key),
        objective=tokenized(objective, codec, with_labels=bool(config.data.num_classes)),
        optimizer=make_optimizer(config),
        batches=lambda state: training_batches(config),
        evaluate=judge.evaluate,
        sample=judge.sample,
        write=judge.write,
    )


def tokenizer_of(config: ml_collections.ConfigDict) -> networks.ImageTokenizer:
    """The tokenizer of a config, without its weights."""
    fields = {name: value for name, value in config.tokenizer.items() if name not in _ORIGINS}
    return make_tokenizer(ml_collections.ConfigDict(fields))


def make_network(config: ml_collections.ConfigDict, codec: "Codec") -> networks.VAR:
    """The network of a config, told the tokens and the number of classes.

    Raises:
      ValueError: if it is no next-scale network, or one for other tokens.
    """
    fields = {**codec.fields, "num_classes": config.data.num_classes, **config.network}
    network = construct(networks, fields, "network")
    if not isinstance(network, networks.VAR):
        raise ValueError(f"config.network.name is {config.network.name!r}, which is no VAR")
    if others := {n: v for n, v in codec.fields.items() if getattr(network, n) != v}:
        raise ValueError(f"config.network does not fit the tokenizer, which has {others}")
    return network


def init(network: networks.VAR, tokenizer: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Initial variables of a network beside those of its tokenizer."""
    rest = network.num_tokens - network.patch_nums[0] ** 2
    inputs = np.zeros((1, rest, network.codebook_channels), np.float32)
    params = jax.jit(network.init)(key, inputs)["params"]
    return {"params": params, "tokenizer": tokenizer}


def tokenizer_variables(config: ml_collections.ConfigDict, codec: "Codec") -> dict[str, Any]:
    """The tokenizer's weights from where the config says.

    Raises:
      ValueError: if it says nothing, or they are of another tokenizer.
    """
    run, weights = config.tokenizer.get("run"), config.tokenizer.get("weights")
    if (run is None) == (weights is None):
        raise ValueError(
            "config.tokenizer must have run, the path of a tokenizer's run, or weights, that of a "
            f"published checkpoint; got run={run!r} and weights={weights!r}"
        )
    if weights is not None:
        state = pretrained.var.read_state_dict(weights)
        variables = pretrained.var.from_state_dict(state, {"model_type": "VQVAE"})[1]
    else:
        restored = restore(run)
        variables = restored.state.variables(restored.config["evaluation"]["ema"])
    shape = (1, *config.data.image_shape)
    template = jax.eval_shape(codec.tokenizer.init, jax.random.key(0), jnp.zeros(shape))
    shapes = [jax.tree.map(jnp.shape, dict(tree)) for tree in (variables, template)]
    shapes = [tree.get("params") for tree in shapes]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{weights or run!r} has weights of another tokenizer than config.tokenizer describes"
        )
    return dict(variables)


def apply_to_inputs(network: networks.VAR) -> Callable[..., Float[Array, "batch L V"]]:
    """The network as objectives call it, with a condition (label or None, inputs)."""

    def apply(variables, tokens, condition, *, train):
        del tokens  # of which the network sees the inputs
        label, inputs = condition
        return network.apply(variables, inputs, label, train=train)

    return apply


class Codec:
    """A tokenizer as pure functions of its variables; images are floats in [-1, 1]."""

    def __init__(self, tokenizer: networks.ImageTokenizer):
        self.tokenizer = tokenizer

    @property
    def fields(self) -> dict[str, Any]:
        """What a network of its tokens must have."""
        quantizer = self.tokenizer.quantizer
        return {
            "patch_nums": tuple(quantizer.patch_nums),
            "vocab_size": quantizer.vocab_size,
            "codebook_channels": quantizer.channels,
        }

    def encode(self, variables: Any, images: Float[Array, "batch h w c"]) -> Int[Array, "batch L"]:
        """Images to tokens, without gradient."""
        tokens = self.tokenizer.apply(variables, images, method="images_to_tokens")
        return jax.lax.stop_gradient(tokens)

    def inputs(self, variables: Any, tokens: Int[Array, "batch L"]) -> Float[Array, "batch rest c"]:
        """What a network sees of tokens."""
        inputs = self.tokenizer.apply(variables, tokens, method="tokens_to_inputs")
        return jax.lax.stop_gradient(inputs)

    def decode(self, variables: Any, tokens: Int[Array, "batch L"]) -> Float[Array, "batch h w c"]:
        """Tokens to images; those of a network that has diverged, which are no codes, to NaN."""
        images = self.tokenizer.apply(variables, tokens, method="tokens_to_images")
        valid = jnp.all(tokens < self.tokenizer.quantizer.vocab_size, axis=1)
        return jnp.where(valid[:, None, None, None], images, jnp.nan)


def tokenized(objective: Objective, codec: Codec, *, with_labels: bool) -> Objective:
    """An objective of tokens as one of batches of images."""

    def of_images(variables, batch, key):
        tokenizer = variables["tokenizer"]
        tokens = codec.encode(tokenizer, batch["image"])
        rows = {"tokens": tokens, "inputs": codec.inputs(tokenizer, tokens)}
        if with_labels:
            rows["label"] = batch["label"]
        return objective({"params": variables["params"]}, rows, key)

    return of_images


class DrawImages:
    """Draws images of a train state: tokens, decoded."""

    def __init__(self, config: ml_collections.ConfigDict, network: networks.VAR, codec: Codec):
        self._config, self._network, self._codec = config, network, codec
        self._decode = jax.jit(codec.decode)

    def __call__(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (seeds, images), as an `ImageJudge` draws."""
        for part, _, images in self.with_tokens(
            state, seeds, batch_size=batch_size, mesh=mesh, progress=progress
        ):
            yield part, images

    def with_tokens(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        batch_size: int,
        mesh: jax.sharding.Mesh,
        progress: bool,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (seeds, tokens [part, L], images)."""
        variables = replicated(state.variables(self._config.evaluation.ema), mesh)
        drawn = samplers.sample_batches(
            sampler_of(self._config, self._network, self._codec, variables),
            sampling_key(self._config),
            seeds=seeds,
            batch_size=batch_size,
            sample_shape=(self._network.num_tokens,),
            condition_fn=labels_of_seeds(self._config),
            mesh=mesh,
            progress=progress,
        )
        for part, tokens in drawn:
            filled = np.resize(tokens, (batch_size, tokens.shape[1]))  # one compilation for all
            images = np.asarray(self._decode(variables["tokenizer"], filled))[: len(part)]
            yield part, tokens, images


def sampler_of(
    config: ml_collections.ConfigDict, network: networks.VAR, codec: Codec, variables: Any
) -> samplers.Sampler:
    """The sampler of `config.sampler`."""
    quantizer, quantizer_variables = networks.quantizer_of(codec.tokenizer, variables["tokenizer"])
    try:
        return samplers.next_scale(
            network,
            {"params": variables["params"]},
            quantizer,
            quantizer_variables,
            **config.sampler,
        )
    except TypeError as error:
        raise ValueError(f"config.sampler does not fit next_scale: {error}") from error
