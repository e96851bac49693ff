"""Log-ratios of two networks: exactly 0 at the start, in the very program that trains."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab import processes
from genjax_lab.networks.dit import DiT
from genjax_lab.networks.residual_mlp import ResidualMLP
from genjax_lab.objectives import (
    ddo_loss,
    diffusion_log_likelihood,
    draw_times_and_noise,
    log_ratio,
    member_log_likelihoods,
    paired_log_likelihoods,
)

ROWS, SHAPE = 32, (8, 8, 1)
NETWORKS = {
    "residual_mlp": ResidualMLP(num_classes=10, width=64, num_blocks=2),
    "dit": DiT(num_classes=10, width=48, depth=2, num_heads=3, noise_scale=300.0),
    "dit_scanned_bfloat16": DiT(
        num_classes=10, width=48, depth=2, num_heads=3, scan=True, dtype=jnp.bfloat16
    ),
}

# As users compile, which the other tests do not: what is fused decides what is rounded.
OPTIMIZED = {"xla_backend_optimization_level": 3}


def inputs(process=None):
    images = np.random.default_rng(0).uniform(-1, 1, (ROWS, *SHAPE)).astype(np.float32)
    process = process or processes.edm()
    return (
        images,
        np.arange(ROWS) % 10,
        *draw_times_and_noise(process, jax.random.key(1), images.shape),
    )


def random_weights(network, seed=0):
    """Weights none of which is zero, as after training."""
    images, labels, t, _ = inputs()
    shapes = jax.eval_shape(network.init, jax.random.key(0), images, t, labels)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_weights_have_a_ratio_of_exactly_zero_in_the_compiled_gradient(name):
    network = NETWORKS[name]
    log_likelihood = diffusion_log_likelihood(network.apply, processes.edm())
    weights = random_weights(network)

    def loss(weights, reference, *args):
        ratio = log_ratio(log_likelihood, weights, reference, *args)
        return ddo_loss(ratio[::2], ratio[1::2], 2.0, 0.5)[0], ratio

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=OPTIMIZED)
    reference = jax.tree.map(np.copy, weights)
    (value, ratio), slope = gradient(weights, reference, *inputs())
    assert np.all(np.asarray(ratio) == 0)
    np.testing.assert_allclose(value, 3 * np.log(2), atol=1e-6)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slope["params"]))


def test_a_ratio_stays_exactly_zero_inside_a_scan_of_training_steps():
    # Steps of size 0 through the loop of the train step, with new draws in each.
    network, process = NETWORKS["dit"], processes.edm()
    log_likelihood = diffusion_log_likelihood(network.apply, process)
    reference = random_weights(network)
    images, labels, _, _ = inputs()

    def step(weights, key):
        draws = draw_times_and_noise(process, key, images.shape)

        def loss(weights):
            ratio = log_ratio(log_likelihood, weights, reference, images, labels, *draws)
            return ddo_loss(ratio, ratio, 1.0, 1.0)[0], ratio

        slope, ratio = jax.grad(loss, has_aux=True)(weights)
        return jax.tree.map(lambda w, s: w - 0 * s, weights, slope), ratio

    keys = jax.random.split(jax.random.key(2), 3)
    _, ratios = jax.jit(lambda w: jax.lax.scan(step, w, keys), compiler_options=OPTIMIZED)(
        reference
    )
    assert np.all(np.asarray(ratios) == 0)


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_weight_in_front_of_the_sum_leaves_no_rounding_error(differentiated):
    """Products may be contracted with the difference, and be rounded on one side only."""
    weights, _, x = trees()
    scale = jnp.linspace(0.3, 0.7, len(x))

    def ratio(weights):
        return log_ratio(lambda w, x, scale: scale * quadratic(w, x), weights, weights, x, scale)

    def of_sum(weights):
        return jax.grad(lambda w: (jnp.sum(ratio(w)), ratio(w)), has_aux=True)(weights)[1]

    function = of_sum if differentiated else ratio
    compiled = jax.jit(function, compiler_options=OPTIMIZED)
    assert np.all(np.asarray(compiled(weights)) == 0)


def quadratic(weights, x):
    return -jnp.sum((x * weights["a"] - weights["b"]) ** 2, axis=1)


def trees():
    rng = np.random.default_rng(4)
    make = lambda: {"a": rng.standard_normal(3), "b": rng.standard_normal(())}  # noqa: E731
    as_float32 = lambda tree: jax.tree.map(np.float32, tree)  # noqa: E731
    return as_float32(make()), as_float32(make()), np.float32(rng.standard_normal((5, 3)))


def test_value_and_gradient_are_those_of_the_difference():
    weights, reference, x = trees()
    scale = np.arange(5.0)
    ratio = lambda w, r: log_ratio(quadratic, w, r, x)  # noqa: E731
    plain = lambda w: quadratic(w, x) - quadratic(reference, x)  # noqa: E731
    np.testing.assert_allclose(ratio(weights, reference), plain(weights), rtol=1e-5)
    own, frozen = paired_log_likelihoods(quadratic, weights, reference, x)
    np.testing.assert_allclose(own, quadratic(weights, x), rtol=1e-5)
    np.testing.assert_allclose(frozen, quadratic(reference, x), rtol=1e-5)
    found, of_reference = jax.grad(lambda w, r: scale @ ratio(w, r), argnums=(0, 1))(
        weights, reference
    )
    expected = jax.grad(lambda w: scale @ plain(w))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(of_reference))


def test_the_reference_has_no_backward_pass():
    # Matrix products of a linear map: one forward for the two stacked, one backward for theta.
    x = np.ones((4, 8), np.float32)
    weights = np.ones((8, 8), np.float32)

    def rows(w, x):
        return -jnp.sum((x @ w) ** 2, axis=1)

    gradient = jax.grad(lambda w: log_ratio(rows, w, weights, x).sum())
    products = re.findall(r"f32(\S+) = dot_general", str(jax.make_jaxpr(gradient)(weights)))
    sizes = [np.prod(np.array(json.loads(shape))) for shape in products]
    assert sizes == [2 * 4 * 8, 1 * 8 * 8]


def test_members_have_their_own_ratios_and_gradients_and_one_reference():
    weights, reference, x = trees()
    members = jax.tree.map(lambda a, b: jnp.stack([a, b, a + b]), weights, reference)
    own, frozen = jax.jit(lambda m: member_log_likelihoods(quadratic, m, reference, x))(members)
    assert np.all(own[1] == frozen)
    np.testing.assert_allclose(own[0], quadratic(weights, x), rtol=1e-5)
    found = jax.grad(lambda m: member_log_likelihoods(quadratic, m, reference, x)[0].sum())(members)
    expected = jax.grad(lambda w: quadratic(w, x).sum())(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4), found, expected)


def test_a_reference_of_another_type_is_rounded_like_the_weights():
    weights, _, x = trees()
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), weights)
    assert np.all(np.asarray(log_ratio(quadratic, low, weights, x)) == 0)


def test_refuses_a_reference_of_another_network():
    weights, _, x = trees()
    with pytest.raises(ValueError, match=r"reference.*structure"):
        log_ratio(quadratic, weights, {"a": weights["a"]}, x)
    with pytest.raises(ValueError, match=r"reference\['a'\].*\[3\].*\[2\]"):
        log_ratio(quadratic, weights, weights | {"a": np.ones(2, np.float32)}, x)
    with pytest.raises(ValueError, match="one of the members"):
        member_log_likelihoods(quadratic, weights | {"b": np.ones(3)}, weights, x)
