"""Sampling of next-scale autoregressive models (VAR, arXiv 2404.02905), one scale for each step.

A step predicts the logits of one whole token map, given the keys and values of the coarser ones,
draws all of its tokens at once, and adds their features to the sum f_hat that the next scale sees.
Scales have different sizes, so a step is one branch of a `lax.switch`, each compiled once.

Classifier-free guidance grows with the scale: at scale k of K, counted from 0,

    logits = (1 + t) logits_class - t logits_null,   t = cfg k / (K - 1),

so that cfg = 0 is the model itself. Everything that the model remembers, cache and f_hat, belongs
to an example and is part of its history.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, PyTree

from genjax_lab.samplers.base import ExampleState, Sampler, SamplerState, SharedState


class NextScaleHistory(NamedTuple):
    """What belongs to an example beside its tokens.

    Attributes:
      cache: the transformer's cache, [batch, rows, ...], of one row or, with guidance, two: with
        class and without.
      f_hat: features of the tokens so far, [batch, height, width, channels].
    """

    cache: PyTree
    f_hat: Float[Array, "batch height width channels"]


def next_scale(
    network: nn.Module,
    variables: Mapping[str, Any],
    quantizer: nn.Module,
    quantizer_variables: Mapping[str, Any],
    *,
    cfg: float | Float[Array, ""] = 0.0,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 0.0,
) -> Sampler:
    """The sampler of a next-scale model, K steps for K scales.

    Its samples are int32 tokens [batch, L]; `shape` is (batch, L), and `condition` integer labels
    [batch] or None for no class. `quantizer.tokens_to_features` and a decoder make images of them.
    An `initial` iterate has no effect, since every token is drawn anew. A prediction is the final
    logits [batch, p_K^2, V], those of smaller scales being filled up with zeros.

    Args:
      network: has the methods `init_cache` and `predict_scale` of `networks.VAR`.
      variables: its variables.
      quantizer: has the methods `add_scale` and `scale_inputs` of `networks.MultiScaleQuantizer`.
      quantizer_variables: its variables.
      cfg: guidance at the last scale, at least 0. At the number 0 the network is evaluated once for
        each scale, else twice.
      temperature: what the guided logits are divided by, above 0; 1 for the model itself.
      top_k: only the k most probable tokens are drawn, and those as probable as the last of them;
        all if 0.
      top_p: among the former, only the most probable tokens are drawn, as many as are needed for a
        probability of at least top_p; all if 0.

    Raises:
      ValueError: if an argument is out of range or network and quantizer do not fit together; in
        sampling, if the shape is another or the condition no vector of integers.
    """
    _check(network, quantizer, cfg, temperature, top_k, top_p)
    guided = not (isinstance(cfg, float | int) and cfg == 0)
    nucleus = not (isinstance(top_p, float | int) and top_p == 0)
    predict_scale = Partial(_predict_scale, network, variables)
    features = Partial(_add_tokens, quantizer, quantizer_variables)
    inputs = Partial(_scale_inputs, quantizer, quantizer_variables)
    settings = (
        jnp.asarray(cfg, jnp.float32) if guided else None,
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_p, jnp.float32) if nucleus else None,
    )
    return Sampler(
        init=Partial(_init, network, quantizer, guided),
        predict=Partial(_predict, network, predict_scale, inputs, settings, top_k),
        transition=Partial(_transition, network, features),
        num_steps=len(network.patch_nums),
    )


def guided_logits(
    conditional: Float[Array, "*batch V"],
    unconditional: Float[Array, "*batch V"],
    t: float | Float[Array, ""],
) -> Float[Array, "*batch V"]:
    """Classifier-free guidance of a token model: (1 + t) conditional - t unconditional."""
    return (1 + t) * conditional - t * unconditional


def keep_top_k(logits: Float[Array, "*batch V"], top_k: int) -> Float[Array, "*batch V"]:
    """Sets all logits below the k-th largest to -inf; ties with that one are kept.

    Raises:
      ValueError: if `top_k` is not in [1, V].
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k is {top_k}; it must be in [1, {logits.shape[-1]}]")
    smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "*batch V"], top_p: float | Float[Array, ""]
) -> Float[Array, "*batch V"]:
    """Sets to -inf all logits but the largest ones, whose probabilities first reach `top_p`.

    The largest is always kept. Of equal logits the later ones are taken first.
    """
    order = jnp.argsort(logits, axis=-1)  # ascending and stable
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    # Token and smaller ones together: without them there is still top_p left.
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = (tail <= 1 - top_p).at[..., -1].set(False)
    ranks = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(removed, ranks, axis=-1), -jnp.inf, logits)


def draw_tokens(
    keys: Key[Array, "batch"], logits: Float[Array, "batch tokens V"]
) -> Int[Array, "batch tokens"]:
    """Draws tokens from softmax(logits), one key per example.

    The largest of logits plus Gumbel noise, which is made of two words for each number: with one
    word its upper tail ends at 16, and tokens of small probability would be drawn too rarely.
    Where logits are NaN, as for a label that no class has, the token is V, which no code has.
    """

    def noise(key):
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32, mode="high")

    noisy = logits.astype(jnp.float32) + jax.vmap(noise)(keys)
    tokens = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(noisy), axis=-1), logits.shape[-1], tokens)


def _check(network, quantizer, cfg, temperature, top_k, top_p) -> None:
    """Raises a ValueError unless numbers are in range and the two modules fit together."""
    numbers = {
        "cfg": (cfg, lambda x: 0 <= x < float("inf"), "at least 0"),
        "temperature": (temperature, lambda x: 0 < x < float("inf"), "above 0"),
        "top_p": (top_p, lambda x: 0 <= x <= 1, "in [0, 1]"),
        "top_k": (top_k, lambda x: 0 <= x <= network.vocab_size, f"in [0, {network.vocab_size}]"),
    }
    for name, (value, valid, domain) in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name} is {value}; it must be {domain}")
    shared = {
        "patch_nums": (tuple(network.patch_nums), tuple(quantizer.patch_nums)),
        "vocab_size": (network.vocab_size, quantizer.vocab_size),
        "channels": (network.codebook_channels, quantizer.channels),
    }
    for name, (ours, others) in shared.items():
        if ours != others:
            raise ValueError(f"{name} of the network is {ours}, but {others} of the quantizer")


def _bounds(patch_nums: tuple[int, ...], scale: int) -> tuple[int, int]:
    start = sum(side**2 for side in patch_nums[:scale])
    return start, start + patch_nums[scale] ** 2


def _init(network, quantizer, guided, keys, shape, condition):
    del keys
    length = sum(side**2 for side in network.patch_nums)
    if tuple(shape[1:]) != (length,):
        raise ValueError(f"shape is {tuple(shape)}; it must be (batch, {length}), all tokens")
    batch, rows, size = shape[0], 1 + guided, network.patch_nums[-1]
    if condition is not None and (
        jnp.shape(condition) != (batch,) or not jnp.issubdtype(condition.dtype, jnp.integer)
    ):
        raise ValueError(
            f"condition must be integer labels of shape ({batch},) or None, got "
            f"{jax.tree.map(jnp.shape, condition)}"
        )
    cache = jax.tree.map(
        lambda leaf: leaf.reshape(batch, rows, *leaf.shape[1:]), network.init_cache(batch * rows)
    )
    f_hat = jnp.zeros((batch, size, size, quantizer.channels), jnp.float32)
    sample = jnp.zeros(shape, jnp.int32)
    return SamplerState(
        ExampleState(sample, condition, NextScaleHistory(cache, f_hat)),
        SharedState(jnp.int32(0), (), jnp.int32(0)),
    )


def _predict(network, predict_scale, inputs, settings, top_k, state: SamplerState):
    cfg, temperature, top_p = settings
    history, condition = state.example.history, state.example.condition
    patch_nums = network.patch_nums
    batch, rows = state.sample.shape[0], 1 if cfg is None else 2
    labels = _labels(condition, batch, rows, network.num_classes)

    def branch(scale):
        start, end = _bounds(patch_nums, scale)

        def run(history):
            seen = inputs(history.f_hat, scale) if scale else None
            # Rows 2i and 2i+1 are example i, so that a sharded batch stays where it is.
            cache = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), history.cache)
            seen = None if seen is None else jnp.repeat(seen, rows, axis=0)
            logits, cache = predict_scale(seen, labels, cache, scale)
            cache = jax.tree.map(lambda leaf: leaf.reshape(batch, rows, *leaf.shape[1:]), cache)
            logits = logits.astype(jnp.float32).reshape(batch, rows, end - start, -1)
            if cfg is not None:
                ramp = cfg * (scale / max(len(patch_nums) - 1, 1))
                logits = guided_logits(logits[:, 0], logits[:, 1], ramp)
            else:
                logits = logits[:, 0]
            logits = logits / temperature
            if top_k:
                logits = keep_top_k(logits, top_k)
            if top_p is not None:
                logits = keep_top_p(logits, top_p)
            padding = patch_nums[-1] ** 2 - (end - start)
            return jnp.pad(logits, ((0, 0), (0, padding), (0, 0))), history._replace(cache=cache)

        return run

    branches = [branch(scale) for scale in range(len(patch_nums))]
    logits, history = jax.lax.switch(state.step, branches, history)
    evaluations = state.shared.evaluations + rows
    return logits, state._replace(
        example=state.example._replace(history=history),
        shared=state.shared._replace(evaluations=evaluations),
    )


def _transition(network, add_tokens, keys, state: SamplerState, logits):
    patch_nums = network.patch_nums

    def branch(scale):
        start, end = _bounds(patch_nums, scale)

        def run(sample, f_hat):
            tokens = draw_tokens(keys, logits[:, : end - start])
            return sample.at[:, start:end].set(tokens), add_tokens(f_hat, tokens, scale)

        return run

    branches = [branch(scale) for scale in range(len(patch_nums))]
    example = state.example
    sample, f_hat = jax.lax.switch(state.step, branches, state.sample, example.history.f_hat)
    history = example.history._replace(f_hat=f_hat)
    return state._replace(example=example._replace(sample=sample, history=history))


def _labels(condition, batch: int, rows: int, num_classes: int) -> Array:
    """Labels of the network's rows; the second row of an example has no class."""
    null = jnp.full(batch, num_classes, jnp.int32)
    labels = null if condition is None else jnp.asarray(condition, jnp.int32)
    return jnp.stack([labels, null][:rows], axis=1).reshape(-1)


def _predict_scale(network, variables, inputs, labels, cache, scale):
    return network.apply(variables, inputs, labels, cache, scale, method="predict_scale")


def _scale_inputs(quantizer, variables, f_hat, scale):
    return quantizer.apply(variables, f_hat, scale, method="scale_inputs")


def _add_tokens(quantizer, variables, f_hat, tokens, scale):
    return quantizer.apply(variables, f_hat, tokens, scale, method="add_scale")
