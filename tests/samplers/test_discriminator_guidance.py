"""Discriminator guidance: with the best discriminator the model's denoiser becomes the data's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_target import PROCESSES, gaussian_denoiser
from jax.tree_util import Partial

from genjax_lab import networks, processes, samplers
from genjax_lab.samplers.denoising import one_evaluation

DATA, MODEL = (0.3, 0.5), (-0.4, 0.8)  # mean and standard deviation
EDM = processes.edm()
X = np.linspace(-2, 2, 6 * 4, dtype=np.float32).reshape(6, 2, 2, 1)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)


def best_log_odds(process, x, t, condition):
    """log p_data(x_t) / p_model(x_t) of two Gaussians."""
    alpha, sigma = (scale(t)[:, None, None, None] for scale in (process.alpha, process.sigma))

    def log_density(mean, std):
        variance = (alpha * std) ** 2 + sigma**2
        terms = (x - alpha * mean) ** 2 / variance + jnp.log(variance)
        return -0.5 * jnp.sum(terms, axis=(1, 2, 3))

    return log_density(*DATA) - log_density(*MODEL)


rows = []


def towards_its_class(goals, x, t, condition):
    """A log-odds with the gradient goals[condition] * log t; counts the rows that it is run on."""
    jax.debug.callback(lambda x: rows.append(len(x)), x)
    return jnp.sum(x, axis=(1, 2, 3)) * goals[condition] * jnp.log(t)


def half(memory, x, t, condition):
    return x / 2, memory


HALF = samplers.Denoiser(Partial(half), EDM, (), one_evaluation)


def guided(log_odds=None, **options):
    log_odds = log_odds or Partial(towards_its_class, jnp.array([1.0, -2.0, 0.5]))
    return samplers.discriminator_guidance(HALF, log_odds, EDM, **options)


def predict(denoise, t, condition=LABELS):
    rows.clear()
    x0 = denoise.predict(denoise.memory, jnp.asarray(X), jnp.asarray(t), condition)[0]
    jax.block_until_ready(x0)
    jax.effects_barrier()
    return x0


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("known_in", PROCESSES.values(), ids=[f"of_{name}" for name in PROCESSES])
def test_the_best_discriminator_makes_the_denoiser_that_of_the_data(process, known_in):
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        times = process.time_of_log_snr(jnp.linspace(-8, 10, 7))
        denoise = samplers.discriminator_guidance(
            gaussian_denoiser(process, *MODEL), Partial(best_log_odds, known_in), known_in
        )
        estimates = [
            jax.jit(jax.vmap(lambda t, which=which: which.predict((), x, t, None)[0]))(times)
            for which in (denoise, gaussian_denoiser(process, *DATA))
        ]
    np.testing.assert_allclose(*estimates, rtol=1e-6)


def test_samples_of_the_wrong_model_become_the_data():
    """In float32, from the largest noise to the smallest, and the probability flow of the data."""
    denoise = samplers.discriminator_guidance(
        gaussian_denoiser(EDM, *MODEL), Partial(best_log_odds, EDM), EDM
    )
    drawn = [
        samplers.sample(samplers.heun(which, num_steps=6), jax.random.key(0), shape=X.shape)
        for which in (denoise, gaussian_denoiser(EDM, *DATA))
    ]
    np.testing.assert_allclose(drawn[0][0], drawn[1][0], atol=1e-4)
    assert drawn[1][1].num_evaluations == 11
    assert drawn[0][1].num_evaluations == 22


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_correction_is_the_gradient_of_each_row_at_its_time_and_class(weight):
    t = np.array([0.3, 1.5, 2.0, 4.0, 0.1, 3.0], np.float32)
    goals = np.array([1.0, -2.0, 0.5])[LABELS]
    plain = X[:, 0, 0, 0] / 2
    expected = plain + weight * t**2 * goals * np.log(t)
    found = predict(guided(weight=weight), t)
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, rtol=1e-5, atol=1e-6)
    # Outside of the interval a row is left alone.
    inside = (t >= 1.5) & (t <= 3.0)
    found = predict(guided(weight=weight, interval=(1.5, 3.0)), t)
    expected = np.where(inside, expected, plain)
    np.testing.assert_allclose(found[:, 0, 0, 0], expected, rtol=1e-5, atol=1e-6)


def test_interval_limited_guidance_pays_only_inside():
    denoise = guided(interval=(0.5, 2.0))
    for t, cost in ((0.4, 1), (0.5, 2), (2.0, 2), (2.1, 1)):
        x0 = predict(denoise, t)
        assert sum(rows) == 6 * (cost - 1) == 6 * (int(denoise.evaluations(jnp.float32(t))) - 1)
        reference = guided() if cost == 2 else HALF
        np.testing.assert_allclose(x0, predict(reference, t), rtol=1e-6)


def test_there_is_no_guidance_where_no_signal_is_left():
    flow = processes.flow()
    for known_in in (flow, EDM):
        denoise = samplers.discriminator_guidance(
            gaussian_denoiser(flow, *MODEL), Partial(best_log_odds, known_in), known_in
        )
        np.testing.assert_array_equal(predict(denoise, 1.0), np.full_like(X, MODEL[0]))


def test_a_network_is_told_what_it_was_trained_on_and_other_weights_do_not_recompile():
    network = networks.Discriminator(networks.ResidualMLP(num_classes=3, width=8, num_blocks=1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), X, jnp.ones(6), LABELS)
    rng = np.random.default_rng(0)
    weights = [
        jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)
        for _ in range(2)
    ]
    odds = samplers.log_odds(network, weights[0], EDM)
    t = np.full(6, 1.5, np.float32)

    def by_hand(x):
        scaled = x / np.sqrt(1.5**2 + 0.5**2)
        return jnp.sum(network.apply(weights[0], scaled, jnp.log(t) / 4, LABELS))

    correction = 2.0 * 1.5**2 * jax.grad(by_hand)(jnp.asarray(X))
    assert np.abs(correction).max() > 1e-2
    expected = X / 2 + correction
    np.testing.assert_allclose(predict(guided(odds, weight=2.0), 1.5), expected, rtol=1e-4)

    drawn = []
    for variables, weight in ((weights[0], 1.0), (weights[1], 1.0), (weights[1], 0.5)):
        denoise = guided(samplers.log_odds(network, variables, EDM), weight=weight)
        sampler = samplers.euler(denoise, num_steps=2, times=[2.0, 1.0, 0.0])
        before = samplers.base._run._cache_size()
        x, _ = samplers.sample(sampler, jax.random.key(0), shape=X.shape, condition=LABELS)
        drawn.append(float(x.sum()))
    assert samplers.base._run._cache_size() == before
    assert len(set(drawn)) == 3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="interval is"):
        guided(interval=(2.0, 0.5))
    with pytest.raises(ValueError, match=r"each of the 6 examples, got shape \[6, 2, 2, 1\]"):
        predict(guided(lambda x, t, condition: x), 1.0)
