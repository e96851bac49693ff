"""Rounds of DDO on next-scale models of images.

Fields of the config of the rounds that are read here:

  fake_online draw a batch's samples in its training step, in place of a pool; 10 steps for VAR
  fake_roundtrip
              decode samples to the data's pixels and encode these, as the data are: then data and
              samples are both encoded pixels, which the authors found better, but samples are no
              longer distributed as the reference
  fake_temperature
              of the samples. 1 is the reference; above, samples are worse than those of the model,
              which the paper does not do, and which gives alpha a direction where the model is at
              the optimum of its likelihood
  label_dropout
              share of rows without label, for guidance, and what is done with them, uncond_mode:
              see `objectives.LabelDropout`

Samples are drawn without guidance, top_k and top_p, whatever the model's sampler is.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import next_scale
from experiments.fine_tuning import FineTuning
from experiments.image_data import ImageJudge
from genjax_lab import data, objectives, samplers
from genjax_lab.training import TrainState

DEFAULTS = {
    "fake_online": False,
    "fake_roundtrip": True,
    "fake_temperature": 1.0,
    "label_dropout": 0.1,
    "uncond_mode": "alpha0",
}
# Entries of the objective's batch by those of a batch with a recorded reference.
_RECORDED = {"tokens": "recorded_tokens", "reference_terms": "reference_terms"}
_LOSSES = {"ddo": False, "ddo_normalized": True}


def build(config: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> FineTuning:
    """What the rounds need.

    Args:
      config: of the rounds.
      model: of the model's run.
    """
    source = model.copy_and_resolve_references()
    source.sampler = {
        "cfg": 0.0,
        "temperature": config.fake_temperature,
        "top_k": 0,
        "top_p": 0.0,
    }
    codec = next_scale.Codec(next_scale.tokenizer_of(model))
    network = next_scale.make_network(model, codec)
    log_likelihood = objectives.autoregressive_log_likelihood(next_scale.apply_to_inputs(network))
    num_classes = model.data.num_classes
    if config.recorded_draws > (0 if config.fake_online else 1):
        raise ValueError(
            f"config.recorded_draws={config.recorded_draws} must be 0 or 1, since the likelihood "
            "of tokens is exact, and 0 with config.fake_online, which draws new samples"
        )
    dropout = objectives.LabelDropout(
        num_classes, config.label_dropout if num_classes else 0.0, config.uncond_mode
    )

    def record(variables, batch, seeds, index):
        """Tokens, and terms [batch, 1]; [batch, 2], without label too, where labels are dropped."""
        del seeds, index
        tokenizer = variables["tokenizer"]
        if "tokens" in batch and not config.fake_roundtrip:
            tokens = batch["tokens"]
        else:
            tokens = codec.encode(tokenizer, batch["image"])
        inputs = codec.inputs(tokenizer, tokens)
        labels = [batch["label"] if num_classes else None]
        if dropout.rate:
            labels.append(jnp.full_like(batch["label"], num_classes))
        parameters = {"params": variables["params"]}
        terms = [log_likelihood(parameters, tokens, (label, inputs)) for label in labels]
        return {"reference_terms": jnp.stack(terms, axis=1), "recorded_tokens": tokens}

    def objective(alpha, beta, index):
        del index
        if config.loss not in _LOSSES:
            raise ValueError(f"config.loss is {config.loss!r}; tokens have {sorted(_LOSSES)}")
        grid = objectives.ddo_tokens_grid(
            log_likelihood,
            alpha=alpha,
            beta=beta,
            label_dropout=dropout,
            normalize_by_alpha=_LOSSES[config.loss],
        )
        fakes = functools.partial(fake_tokens, config, source, network, codec)

        def of_images(variables, batch, key):
            key, drawing = jax.random.split(key)
            tokenizer = variables["tokenizer"]
            if config.recorded_draws:
                rows = {
                    f"{kind}{name}": batch[f"{kind}{recorded}"]
                    for kind in ("", "fake_")
                    for name, recorded in _RECORDED.items()
                }
            else:
                rows = {
                    "tokens": codec.encode(tokenizer, batch["image"]),
                    "fake_tokens": fakes(variables["reference"], batch, drawing),
                }
            rows |= {
                name: codec.inputs(tokenizer, rows[tokens])
                for name, tokens in (("inputs", "tokens"), ("fake_inputs", "fake_tokens"))
            }
            if num_classes:  # samples that are drawn online have the labels of the batch
                rows["label"] = batch["label"]
                rows["fake_label"] = batch.get("fake_label", batch["label"])
            networks = {
                "params": variables["params"],
                "reference": {"params": variables["reference"]["params"]},
            }
            return grid(networks, rows, key)

        return of_images

    return FineTuning(
        objective=objective,
        draw=None if config.fake_online else _pool_of(config, source, network, codec),
        origin={name: _plain(source[name]) for name in ("sampler", "tokenizer")}
        | {name: config[name] for name in DEFAULTS},
        record=record,
    )


def max_value_of(model: ml_collections.ConfigDict) -> int:
    """The largest pixel value of a model's data."""
    return data.dataset_info(model.data.name, model.data.get("data_dir")).max_value


def to_levels(images: Float[Array, "..."], max_value: int) -> Float[Array, "..."]:
    """Images with the data's levels, floats again: `data.quantize` and `dequantize` as one."""
    half = np.float32(max_value / 2)
    levels = jnp.clip(jnp.floor(images * half + (half + np.float32(0.5))), 0, max_value)
    return levels / half - 1


def fake_tokens(config, source, network, codec, reference, batch, key) -> Int[Array, "batch L"]:
    """Tokens of a batch's samples: of the pool, or drawn from the reference."""
    tokenizer = reference["tokenizer"]
    if not config.fake_online:
        if config.fake_roundtrip:
            return codec.encode(tokenizer, batch["fake_image"])
        return batch["fake_tokens"]
    label = batch["label"] if source.data.num_classes else None
    tokens = samplers.sample(
        next_scale.sampler_of(source, network, codec, reference),
        key,
        shape=(len(batch["image"]), network.num_tokens),
        condition=label,
    )[0]
    if config.fake_roundtrip:
        # A reference that is finite draws codes only.
        images = codec.decode(tokenizer, tokens)
        images = to_levels(images, max_value_of(source))
        tokens = codec.encode(tokenizer, images)
    return jax.lax.stop_gradient(tokens)


def _pool_of(config, source, network, codec):
    """What draws a pool: images as the data are stored, and the tokens that they were made of."""
    draw = next_scale.DrawImages(source, network, codec)

    def draw_pool(state: TrainState, seeds: range) -> Iterator[tuple[np.ndarray, Any]]:
        tokens = {}

        def images(*arguments, **options):
            for part, drawn, decoded in draw.with_tokens(*arguments, **options):
                tokens[part[0]] = drawn
                yield part, decoded

        for part, levels in ImageJudge(source, images).sample(
            state, seeds, progress=config.progress
        ):
            yield part, {"image": levels, "tokens": tokens.pop(part[0]).astype(np.int32)}

    return draw_pool


def _plain(section: ml_collections.ConfigDict) -> dict[str, Any]:
    """Without the places of the weights, which the digest of the model stands for."""
    return {name: value for name, value in section.items() if name not in ("run", "weights")}
