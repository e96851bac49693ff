"""The residual MLP against its equations in NumPy, and its contract."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks import ResidualMLP


def inputs(batch=3):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, 2, 3, 2)), jnp.float32)
    return x, jnp.linspace(-1.0, 1.0, batch), jnp.arange(batch) % 4


@pytest.fixture(scope="module")
def net():
    return ResidualMLP(num_classes=3, width=16, num_blocks=2)


@pytest.fixture(scope="module")
def variables(net, random_variables):
    return random_variables(net, *inputs())


@pytest.fixture(scope="module")
def apply(net, quick_jit):
    return quick_jit(net.apply)


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def in_numpy(variables, x, c_noise, one_hot):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def dense(params, x):
        return x @ params["kernel"] + params.get("bias", 0)

    angles = 2 * np.pi * np.outer(c_noise, variables["buffers"]["fourier"]["freqs"])
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    condition = dense(params["noise"], waves) + dense(params["label"], one_hot)
    condition = silu(dense(params["embed"], silu(condition)))
    h = dense(params["first"], np.asarray(x, np.float64).reshape(len(x), -1))
    for name in ("block0", "block1"):
        block = params[name]
        shift, scale, gate = np.split(dense(block["modulation"], condition), 3, axis=1)
        hidden = silu(dense(block["up"], layer_norm(h) * (1 + scale) + shift))
        h = h + gate * dense(block["down"], hidden)
    norm = params["LayerNorm_0"]
    return dense(params["last"], layer_norm(h) * norm["scale"] + norm["bias"]).reshape(x.shape)


def test_agrees_with_its_equations(apply, variables):
    x, c_noise, labels = inputs()
    one_hot = np.eye(4)[np.asarray(labels)][:, :3]
    expected = in_numpy(variables, np.asarray(x), np.asarray(c_noise), one_hot)
    assert expected.std() > 0.1
    np.testing.assert_allclose(apply(variables, x, c_noise, labels), expected, atol=1e-5)


def test_fresh_network_returns_zero_and_is_the_size_it_says(net, quick_jit):
    args = inputs()
    key = jax.random.key(0, impl="rbg")  # compiles faster
    out, variables = quick_jit(net.init_with_output)(key, *args)
    np.testing.assert_array_equal(out, 0.0)
    assert set(variables) == {"params", "buffers"}
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    width, pixels, hidden = 16, 12, 32
    conditioning = (32 + 1 + 3 + width + 1) * width
    block = (width + 1) * (3 * width + hidden) + (hidden + 1) * width
    assert count == conditioning + (pixels + 1) * width + 2 * block + 2 * width + 17 * pixels


def test_every_parameter_has_a_gradient(net, variables, quick_jit):
    def loss(params):
        return jnp.mean(jnp.sin(net.apply(variables | {"params": params}, *inputs())))

    grads = quick_jit(jax.grad(loss))(variables["params"])
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 0


def test_examples_do_not_see_each_other(net, apply, variables, quick_jit):
    each = quick_jit(jax.vmap(lambda *one: net.apply(variables, *[a[None] for a in one])[0]))
    np.testing.assert_allclose(each(*inputs()), apply(variables, *inputs()), atol=1e-5)


def test_bfloat16_computes_coarsely_and_returns_float32(net, apply, variables, quick_jit):
    out = apply(variables, *inputs())
    coarse = quick_jit(net.clone(dtype=jnp.bfloat16).apply)(variables, *inputs())
    assert coarse.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((coarse - out) ** 2) / jnp.mean(out**2)))
    assert 1e-5 < error < 0.05


def test_dropout_of_activations_and_labels_acts_in_training_only(net, apply, variables, quick_jit):
    x, c_noise, labels = inputs()
    out = apply(variables, x, c_noise, labels)

    def train(net, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return quick_jit(lambda: net.apply(variables, x, c_noise, labels, train=True, rngs=rngs))()

    dropped = train(net.clone(label_dropout=1.0), 0)
    np.testing.assert_allclose(dropped, apply(variables, x, c_noise, jnp.full(3, 3)), atol=1e-6)
    assert float(jnp.abs(dropped - out).max()) > 1e-2
    first, other = (train(net.clone(dropout=0.5), seed) for seed in (0, 1))
    assert float(jnp.abs(first - other).max()) > 1e-2
    np.testing.assert_allclose(train(net, 0), out, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": jnp.zeros((3, 4))}, "x must be"),
        ({"c_noise": jnp.zeros((3, 1))}, "c_noise"),
        ({"labels": jnp.zeros((3, 4))}, "label vectors"),
    ],
)
def test_wrong_inputs_are_refused(net, variables, change, match):
    x, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=match):
        net.apply(variables, **({"x": x, "c_noise": c_noise, "labels": labels} | change))
