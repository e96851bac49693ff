"""Log-likelihoods of diffusion and token networks against enumeration and closed forms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab import processes
from genjax_lab.objectives import (
    autoregressive_log_likelihood,
    ddo_loss,
    diffusion_log_likelihood,
    draw_times_and_masks,
    draw_times_and_noise,
    masked_log_likelihood,
    seeded_times_and_noise,
    token_log_probabilities,
)
from genjax_lab.processes.gaussian import PREDICTIONS, expand


def images(shape=(16, 4, 4, 2), seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def constant(variables, x, c_noise, label, *, train):
    assert train is False
    return jnp.full_like(x, variables)


# Diffusion


def test_for_edm_it_is_the_weighted_error_of_the_denoiser_and_of_the_network():
    process, clean = processes.edm(), images()
    t = np.geomspace(0.02, 80, 16).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal(clean.shape).astype(np.float32)
    noisy = clean + t[:, None, None, None] * noise
    denoised = np.asarray(process.to_data(jnp.full_like(noisy, 0.3), noisy, t))
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    expected = -weight * np.sum((denoised - clean) ** 2, axis=(1, 2, 3))
    found = diffusion_log_likelihood(constant, process)(0.3, clean, None, t, noise)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    target = process.from_data(clean, noisy, t)
    np.testing.assert_allclose(found, -np.sum((0.3 - target) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    mean = diffusion_log_likelihood(constant, process, reduce="mean")(0.3, clean, None, t, noise)
    np.testing.assert_allclose(32 * mean, found, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_of_the_same_clean_image_has_the_same_likelihood(prediction):
    # All kinds, asked for the same x_0_hat, under one weighting.
    clean = images()
    for make in (processes.vp, processes.flow):
        process = make(prediction=prediction, weighting="noise")
        t, noise = draw_times_and_noise(process, jax.random.key(0), clean.shape)
        t = 0.1 + 0.8 * t

        def apply(_, x, c_noise, label, *, train, process=process, t=t):
            return process.from_data(0.2 * x, x, t)

        found = diffusion_log_likelihood(apply, process)(None, clean, None, t, noise)
        noisy = process.diffuse(clean, t, noise)
        snr = np.exp(process.log_snr(t))
        expected = -snr * np.sum((0.2 * noisy - clean) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_with_the_weight_of_the_elbo_the_mean_ratio_is_that_of_two_gaussians():
    # log p_1(x) - log p_2(x) = -E int (||D_1 - x||^2 - ||D_2 - x||^2) d sigma / sigma^3 over noise:
    # a process uniform in log sigma with the squared error of the noise has that weight.
    process = processes.ve(sigma_min=0.005, sigma_max=200.0)
    laws = jnp.array([[0.3, 0.8], [-0.2, 1.1]])  # means and standard deviations

    def apply(law, x, c_noise, label, *, train):
        t = expand(2 * jnp.exp(c_noise), x)
        best = law[0] + law[1] ** 2 / (law[1] ** 2 + t**2) * (x - law[0])
        return process.from_data(best, x, t[:, 0])

    log_likelihood = diffusion_log_likelihood(apply, process)
    x, rows = np.array([-1.0, 0.4, 1.5], np.float32), 40_000

    def ratio(point, key):
        clean = jnp.full((rows, 1), point)
        # The same noise with both signs, which leaves out the term that is odd in it.
        t, noise = draw_times_and_noise(process, key, clean.shape)
        one = [
            log_likelihood(laws[0], clean, None, t, sign * noise)
            - log_likelihood(laws[1], clean, None, t, sign * noise)
            for sign in (1, -1)
        ]
        return (one[0] + one[1]) / 2

    ratios = jax.jit(jax.vmap(ratio))(x, jax.random.split(jax.random.key(0), 3))
    # d sigma / sigma^3 times ||D - x||^2 is d log sigma times the squared error of the noise; the
    # density of log sigma is 1 / log(200 / 0.005).
    ratios = np.asarray(ratios, float) * np.log(200 / 0.005)
    log_p = -(((x - laws[:, :1]) / laws[:, 1:]) ** 2) / 2 - np.log(laws[:, 1:])
    error = ratios.std(axis=1, ddof=1) / np.sqrt(rows)
    assert np.all(error < 0.03)
    # 4 standard errors: one false alarm in 5000 keys; the ends of the integral are worth 0.001.
    assert np.all(np.abs(ratios.mean(axis=1) - (log_p[0] - log_p[1])) < 4 * error + 0.001)


def test_the_sum_is_in_float32_when_the_network_computes_in_bfloat16():
    clean = images((4, 32, 32, 3))
    t, noise = draw_times_and_noise(processes.edm(), jax.random.key(0), clean.shape)

    def low(variables, x, c_noise, label, *, train):
        return jnp.full_like(x, variables, jnp.bfloat16)

    found = diffusion_log_likelihood(low, processes.edm())(0.5, clean, None, t, noise)
    expected = diffusion_log_likelihood(constant, processes.edm())(0.5, clean, None, t, noise)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_autodiff_gives_the_gradient_of_the_paper_for_a_small_edm_network():
    with jax.enable_x64(True):
        alpha, beta, rows = 3.0, 0.2, 6
        rng = np.random.default_rng(0)
        real, fake, noise = rng.standard_normal((3, rows, 2, 2, 1))
        t = np.exp(rng.standard_normal(rows))
        w, w_ref = rng.standard_normal((2, 4, 5))

        def apply(w, x, c_noise, label, *, train):
            flat = jnp.concatenate([x.reshape(rows, -1), c_noise[:, None]], axis=1)
            return jnp.sin(flat @ w.T).reshape(x.shape)

        log_likelihood = diffusion_log_likelihood(apply, processes.edm())
        log_p = lambda w, x: log_likelihood(w, x, None, t, noise)  # noqa: E731
        ratio = lambda w, x: log_p(w, x) - log_p(w_ref, x)  # noqa: E731
        found = jax.grad(lambda w: ddo_loss(ratio(w, real), ratio(w, fake), alpha, beta)[0])(w)
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        score_real, score_fake = jax.jacobian(log_p)(w, real), jax.jacobian(log_p)(w, fake)
        expected = -beta * np.einsum("b,bij->ij", sigmoid(-beta * ratio(w, real)), score_real)
        expected += (
            alpha * beta * np.einsum("b,bij->ij", sigmoid(beta * ratio(w, fake)), score_fake)
        )
        np.testing.assert_allclose(found, expected / rows, rtol=1e-6)


# Tokens

VOCAB, LENGTH = 3, 4


def markov(weights, tokens, condition=None, *, train):
    """A network whose logits depend on the position and the token before."""
    before = jnp.concatenate([jnp.full_like(tokens[:, :1], VOCAB), tokens[:, :-1]], axis=1)
    return weights[jnp.arange(tokens.shape[1]), before]


def test_the_probabilities_of_all_sequences_sum_to_one():
    weights = np.random.default_rng(0).standard_normal((LENGTH, VOCAB + 1, VOCAB)) * 2
    every = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    log_p = autoregressive_log_likelihood(markov)(jnp.float32(weights), every)
    np.testing.assert_allclose(np.exp(np.asarray(log_p, float)).sum(), 1, atol=1e-6)
    # One of them by hand.
    row, by_hand = every[17], 0.0
    for i, token in enumerate(row):
        logits = weights[i, VOCAB if i == 0 else row[i - 1]]
        by_hand += logits[token] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(log_p[17], by_hand, rtol=1e-5)


def test_logits_in_bfloat16_are_normalised_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 1000)), jnp.bfloat16)
    tokens = np.array([[1, 999, 5], [7, 0, 42]])
    exact = np.asarray(logits, float)
    expected = np.take_along_axis(exact, tokens[..., None], axis=-1)[..., 0]
    expected -= np.log(np.exp(exact).sum(axis=-1))
    found = token_log_probabilities(logits, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masked_out_positions_do_not_count():
    weights = jnp.float32(np.random.default_rng(0).standard_normal((LENGTH, VOCAB + 1, VOCAB)))
    tokens = np.array([[0, 1, 2, 1], [2, 2, 0, 1]])
    log_p = autoregressive_log_likelihood(markov)
    terms = token_log_probabilities(markov(weights, tokens, train=False), tokens)
    mask = np.array([[0, 1, 1, 1], [0, 0, 1, 0]])
    np.testing.assert_allclose(
        log_p(weights, tokens, None, mask), (terms * mask).sum(axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(log_p(weights, tokens), terms.sum(axis=1), rtol=1e-6)


def independent(weights, tokens, t, condition, *, train):
    """A network of independent positions, which sees nothing but the masks."""
    assert train is False
    seen.append(tokens)
    return jnp.broadcast_to(weights, (*tokens.shape, VOCAB))


seen = []


def test_the_masked_integrand_averages_to_the_log_likelihood_of_independent_tokens():
    # E_t[1/t sum_masked log p_i] = sum_i log p_i, as each is masked with probability t.
    weights = jnp.array([[0.3, -1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.2, -2.0], [0.1, 0.1, 0.4]])
    tokens = np.tile([0, 1, 2, 1], (60_000, 1))
    t, mask = draw_times_and_masks(jax.random.key(0), tokens.shape)
    seen.clear()
    values = masked_log_likelihood(independent, mask_id=VOCAB)(weights, tokens, None, t, mask)
    np.testing.assert_array_equal(seen[0], np.where(mask, VOCAB, tokens))
    expected = token_log_probabilities(weights[None], tokens[:1]).sum()
    values = np.asarray(values, float)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert error < 0.02 * abs(expected)
    assert abs(values.mean() - expected) < 4 * error  # one false alarm in 15 000 keys
    # One row by hand, with a weight of its own.
    log_likelihood = masked_log_likelihood(independent, mask_id=VOCAB, weight=lambda t: t + 1)
    hidden = np.array([[True, False, True, False]])
    found = log_likelihood(weights, tokens[:1], None, np.array([0.5]), hidden)
    terms = token_log_probabilities(weights[None], tokens[:1])[0]
    np.testing.assert_allclose(found, [1.5 * (terms[0] + terms[2])], rtol=1e-6)


# Draws


def test_times_are_evenly_spaced_and_positions_hidden_with_their_probability():
    t, mask = draw_times_and_masks(jax.random.key(3), (256, 200))
    np.testing.assert_allclose(np.diff(np.sort(t)), 0.999 / 256, rtol=1e-3)
    assert t.min() >= 1e-3
    # Binomial shares, each within 5 standard deviations.
    assert np.all(np.abs(mask.mean(axis=1) - t) < 5 * np.sqrt(t * (1 - t) / 200) + 0.01)


def test_seeded_draws_depend_on_their_own_seed_alone():
    process, seeds = processes.edm(), np.array([5, 9, 5, 2])
    t, noise = seeded_times_and_noise(process, seeds, (4, 3, 2))
    assert t[0] == t[2]
    assert len(set(np.asarray(t).tolist())) == 3
    np.testing.assert_array_equal(noise[0], noise[2])
    other_t, other_noise = seeded_times_and_noise(process, seeds[1:3], (2, 3, 2))
    np.testing.assert_array_equal(other_t, t[1:3])
    np.testing.assert_array_equal(other_noise, noise[1:3])
    assert np.all(seeded_times_and_noise(process, seeds, (4, 3, 2), draw=1)[0] != t)


def test_times_and_noise_have_keys_of_their_own():
    used = []
    process = dataclasses.replace(
        processes.edm(), sample_time=lambda key, shape: used.append(key) or jnp.ones(shape)
    )
    _, noise = draw_times_and_noise(process, jax.random.key(0), (4, 3))
    for key in (jax.random.key(0), *used):
        assert np.all(noise != jax.random.normal(key, (4, 3)))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion_log_likelihood(constant, processes.edm(), reduce="max"), "'max'.*'sum'"),
        (
            lambda: diffusion_log_likelihood(constant, processes.edm())(
                0.3, images(), None, np.ones(16), images((16, 4, 4, 1))
            ),
            r"noise.*\[16, 4, 4, 2\].*\[16, 4, 4, 1\]",
        ),
        (lambda: token_log_probabilities(jnp.ones((2, 3)), jnp.ones((2, 3), int)), "vocab"),
        (lambda: token_log_probabilities(jnp.ones((2, 3, 4)), jnp.ones((2, 3))), "integers"),
        (
            lambda: autoregressive_log_likelihood(markov)(
                jnp.ones((4, 4, 3)), jnp.ones((2, 4), int), None, jnp.ones(4)
            ),
            r"mask.*\[2, 4\].*\[4\]",
        ),
        (lambda: seeded_times_and_noise(processes.edm(), np.ones(3), (3, 2)), "seeds.*float"),
        (lambda: seeded_times_and_noise(processes.edm(), np.arange(3), (4, 2)), r"seeds.*\[4\]"),
    ],
)
def test_refuses_bad_input_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
