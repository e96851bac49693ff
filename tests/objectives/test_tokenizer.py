"""The objective of a tokenizer: its value, its metrics, and that it learns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from genjax_lab.networks import digits_tokenizer
from genjax_lab.objectives.tokenizer import tokenizer_reconstruction


class Output(NamedTuple):
    reconstruction: jax.Array
    tokens: jax.Array
    quantizer_loss: jax.Array


def apply(variables, images):
    tokens = jnp.array([[3, 1, 3], [1, 0, 3]])
    return Output(images + variables["offset"], tokens, jnp.float32(0.5))


def test_loss_and_metrics_are_those_of_the_definition():
    batch = {"image": jnp.zeros((2, 4, 4, 1))}
    objective = tokenizer_reconstruction(apply, quantizer_weight=3.0)
    loss, metrics = objective({"offset": 0.2}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.04 + 1.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["reconstruction_loss"], 0.04, rtol=1e-6)
    assert metrics["quantizer_loss"] == 0.5
    assert metrics["distinct_tokens"] == 3


def test_a_few_steps_reconstruct_digits_better_than_their_mean():
    images = jnp.asarray(load_digits().images[:256, :, :, None] / 8 - 1, jnp.float32)
    net = digits_tokenizer(vocab_size=16, channels=4)
    objective = tokenizer_reconstruction(net.apply)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(key):
        variables = net.init(key, images[:1])

        def step(carry, _):
            variables, state = carry
            grad = jax.grad(objective, has_aux=True)
            grads, metrics = grad(variables, {"image": images}, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(variables, updates), state), metrics

        carry = (variables, optimizer.init(variables))
        return jax.lax.scan(step, carry, length=60)[1]

    metrics = train(jax.random.key(0))
    error = metrics["reconstruction_loss"]
    mean_image_error = float(jnp.mean(jnp.var(images, axis=0)))
    assert error[0] > 1.5 * mean_image_error
    assert error[-1] < 0.6 * mean_image_error
    assert metrics["distinct_tokens"][-1] >= 8


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="quantizer_weight is -1"):
        tokenizer_reconstruction(apply, quantizer_weight=-1.0)
    objective = tokenizer_reconstruction(apply)
    with pytest.raises(ValueError, match='the entry "image"'):
        objective({"offset": 0.0}, {"label": jnp.zeros(2)}, None)
    for images in (jnp.zeros((2, 4, 4)), jnp.zeros((2, 4, 4, 1), jnp.uint8)):
        with pytest.raises(ValueError, match=r"batch\['image'\] must be"):
            objective({"offset": 0.0}, {"image": images}, None)
