"""Magnitudes measured on random inputs, and the projection of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.networks.magnitude_preserving import (
    EPSILON,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_magnitude,
    normalize_weights,
)

# The mean square of n independent unit normals has standard deviation sqrt(2 / n); with n >= 1e5
# and a few fold more for products, 3 % is beyond five standard deviations.
TOLERANCE = 0.03


def magnitude(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_silu_of_a_standard_normal_has_unit_magnitude():
    assert abs(magnitude(mp_silu(normal(0, 100_000))) - 1) < TOLERANCE


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.5, 1.0])
def test_sum_of_uncorrelated_inputs_has_unit_magnitude(balance):
    a, b = normal(0, 100_000), normal(1, 100_000)
    out = mp_sum(a, b, balance)
    assert abs(magnitude(out) - 1) < TOLERANCE
    share = float(jnp.mean(out * b)) / np.hypot(1 - balance, balance)
    expected = balance / ((1 - balance) ** 2 + balance**2)
    assert abs(share - expected) < TOLERANCE


@pytest.mark.parametrize("balance", [0.2, 0.5])
def test_concatenation_shares_the_squared_sum_whatever_the_channel_counts(balance):
    a, b = normal(0, 2000, 48), normal(1, 2000, 80)
    out = mp_cat(a, b, balance)
    assert abs(magnitude(out) - 1) < TOLERANCE
    ratio = float(jnp.sum(out[:, 48:] ** 2) / jnp.sum(out[:, :48] ** 2))
    assert abs(ratio / (balance / (1 - balance)) ** 2 - 1) < 2 * TOLERANCE


@pytest.mark.parametrize("kernel_size", [(), (1, 1), (3, 3)])
def test_layer_keeps_unit_magnitude_whatever_the_size_of_its_kernel(kernel_size, quick_jit):
    layer = MPConv(64, kernel_size)
    x = normal(0, 8, 18, 18, 32)
    variables = {"params": {"kernel": 7 * normal(1, *kernel_size, 32, 64)}}
    apply = quick_jit(layer.apply)
    for gain in (1.0, 0.25):
        out = apply(variables, x, gain)
        assert out.shape == (8, 18, 18, 64)
        inside = out[:, 1:-1, 1:-1]  # the zeros around the image lower the border's magnitude
        assert abs(magnitude(inside) - gain) < TOLERANCE * gain


def test_fourier_features_have_unit_magnitude_at_every_noise_level():
    out, variables = MPFourier(20_000).init_with_output(jax.random.key(0), jnp.linspace(-2, 2, 9))
    assert set(variables) == {"buffers"}
    per_level = jnp.sqrt(jnp.mean(jnp.square(out), axis=-1))
    np.testing.assert_allclose(per_level, 1.0, atol=TOLERANCE)


def test_normalised_zeros_stay_zero_with_finite_gradient():
    grad = jax.grad(lambda x: jnp.sum(normalize_magnitude(x, -1) ** 2))(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(grad, 0.0)


def test_gradient_is_orthogonal_to_the_kernel(quick_jit):
    layer = MPConv(8, (3, 3))
    x = normal(0, 4, 6, 6, 5)
    target = normal(2, 4, 6, 6, 8)
    params = {"kernel": normal(1, 3, 3, 5, 8)}

    def loss(params):
        return jnp.mean((layer.apply({"params": params}, x) - target) ** 2)

    kernel, grad = params["kernel"], quick_jit(jax.grad(loss))(params)["kernel"]
    cosine = jnp.sum(kernel * grad, (0, 1, 2)) / (
        jnp.linalg.norm(kernel.reshape(-1, 8), axis=0)
        * jnp.linalg.norm(grad.reshape(-1, 8), axis=0)
    )
    # Exactly orthogonal without epsilon; with it the radial part is a share EPSILON of the whole.
    np.testing.assert_allclose(cosine, 0.0, atol=2 * EPSILON)


def test_kernels_start_projected():
    params = MPConv(16).init(jax.random.key(0), jnp.zeros((1, 72)))["params"]
    again = normalize_weights({"dense": params})["dense"]["kernel"]
    # The magnitude of 72 normal draws lies within 40 % of one, so |1 - 1/r| < 1.
    np.testing.assert_allclose(again, params["kernel"], rtol=EPSILON + 1e-6)


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0, 3.0])
def test_projecting_twice_changes_what_the_epsilon_explains(size):
    kernel = normalize_magnitude(normal(0, 3, 3, 8, 16), (0, 1, 2)) * (1 + EPSILON) * size
    once = normalize_weights({"conv": {"kernel": kernel}})
    twice = normalize_weights(once)
    once, twice = once["conv"]["kernel"], twice["conv"]["kernel"]
    np.testing.assert_allclose(
        jnp.sqrt(jnp.mean(once**2, (0, 1, 2))), 1.0, atol=1.01 * EPSILON / size
    )
    change = float(jnp.max(jnp.abs(twice / once - 1)))
    assert change <= 1.01 * EPSILON * abs(1 - 1 / size) + 5e-7


def test_projection_spares_gains_and_what_is_skipped():
    params = {
        "block": {"emb_gain": jnp.float32(0.3), "conv": {"kernel": 5 * normal(0, 4, 6)}},
        "logvar_linear": {"kernel": 5 * normal(1, 4, 1)},
        "out_gain": jnp.float32(2.0),
    }
    out = normalize_weights(params, skip=("logvar_linear",))
    assert jax.tree.structure(out) == jax.tree.structure(params)
    assert out["block"]["emb_gain"] == params["block"]["emb_gain"]
    assert out["out_gain"] == params["out_gain"]
    np.testing.assert_array_equal(out["logvar_linear"]["kernel"], params["logvar_linear"]["kernel"])
    assert abs(magnitude(out["block"]["conv"]["kernel"]) - 1) < 1e-3
    assert abs(magnitude(normalize_weights(params)["logvar_linear"]["kernel"]) - 1) < 1e-3


def test_projection_refuses_parameters_of_other_networks():
    with pytest.raises(ValueError, match="bias"):
        normalize_weights({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
    with pytest.raises(ValueError, match="skip"):
        normalize_weights({"dense": {"kernel": jnp.ones((2, 2))}}, skip=("logvar_linear",))
