"""Noise schedules, prediction kinds and the passage from one process to another."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab import processes
from genjax_lab.processes.gaussian import PREDICTIONS, same_noise_level

BETAS = np.linspace(1e-4, 0.02, 1000)
EPS = np.finfo(np.float32).eps

PROCESSES = {
    "edm": processes.edm(),
    "ve": processes.ve(),
    "vp_linear": processes.vp("linear"),
    "vp_scaled_linear": processes.vp("scaled_linear"),
    "vp_cosine": processes.vp("cosine"),
    "vp_from_betas": processes.vp_from_betas(BETAS),
    "flow": processes.flow(),
}
ALL = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def noise_levels(process, num=7):
    """Times that span a process, its two ends and their singularities excluded."""
    log_snr = jnp.linspace(
        *process.log_snr(jnp.array([min(process.t_max, 0.98 * process.t_max), process.t_min])), num
    )
    return process.time_of_log_snr(log_snr)


def examples(process):
    t = noise_levels(process)
    keys = jax.random.split(jax.random.key(0))
    x0, noise = (0.5 * jax.random.normal(key, (len(t), 4, 3)) for key in keys)
    return x0, noise, t, process.diffuse(x0, t, noise)


@ALL
def test_every_pair_of_predictions_converts_back_and_forth(process):
    x0, _, t, x = examples(process)
    outputs = {kind: process.from_data(x0, x, t, kind) for kind in PREDICTIONS}
    clean = {kind: process.to_data(outputs[kind], x, t, kind) for kind in PREDICTIONS}
    scales = {
        kind: [np.asarray(c)[:, None, None] for c in process.coefficients(t, kind)]
        for kind in PREDICTIONS
    }
    x0, x = np.asarray(x0), np.asarray(x)
    for first, (c_skip, c_out) in scales.items():
        # The sum cancels down to x0; its rounding errors are those of its two terms.
        rounding = 8 * EPS * (abs(c_skip * x) + abs(c_out * outputs[first]) + abs(x0))
        assert np.all(abs(clean[first] - x0) <= rounding)
        for second, (c_skip_second, c_out_second) in scales.items():
            converted = np.asarray(process.from_data(clean[first], x, t, second))
            rounding_second = 8 * EPS * (abs(x0) + abs(c_skip_second * x)) + rounding
            assert np.all(abs(converted - outputs[second]) <= rounding_second / abs(c_out_second))


@ALL
def test_predictions_mean_what_they_say(process):
    x0, noise, t, x = examples(process)
    outputs = {kind: process.from_data(x0, x, t, kind) for kind in PREDICTIONS}
    values = (process.alpha(t), process.sigma(t), *process.derivatives(t))
    alpha, sigma, slope_alpha, slope_sigma = (
        np.asarray(value, np.float64)[:, None, None] for value in values
    )
    x0, noise, x = (np.asarray(value, np.float64) for value in (x0, noise, x))
    std = process.sigma_data
    square = (alpha * std) ** 2 + sigma**2
    meanings = {
        "data": x0,
        "noise": noise,
        "scaled_score": -noise,
        "v": alpha * noise - sigma * x0,
        "velocity": slope_alpha * x0 + slope_sigma * noise,
        "edm": (x0 - alpha * std**2 / square * x) * np.sqrt(square) / (sigma * std),
    }
    assert set(meanings) == set(PREDICTIONS)
    for kind, meaning in meanings.items():
        c_skip, c_out = (np.asarray(c)[:, None, None] for c in process.coefficients(t, kind))
        rounding = 8 * EPS * ((abs(x0) + abs(c_skip * x)) / abs(c_out) + abs(meaning))
        assert np.all(abs(outputs[kind] - meaning) <= rounding), kind


def test_edm_weight_makes_the_loss_uniform_in_the_network_output():
    process = processes.edm(sigma_data=0.5)
    x0, noise, sigma, x = examples(process)
    output = 0.7 * jax.random.normal(jax.random.key(1), x.shape)
    s = np.asarray(sigma, np.float64)[:, None, None]
    # arXiv 2206.00364, Table 1 and Eq. 8, written out.
    target = (x0 - 0.25 / (s**2 + 0.25) * (x0 + s * noise)) * np.sqrt(s**2 + 0.25) / (0.5 * s)
    expected = np.sum((np.asarray(output) - target) ** 2, axis=(1, 2))
    denoised = process.to_data(output, x, sigma)
    np.testing.assert_allclose(
        process.loss_weight(sigma),
        (s[:, 0, 0] ** 2 + 0.25) / (0.5 * s[:, 0, 0]) ** 2,
        rtol=1e-5,
    )
    with jax.enable_x64(True):
        exact = process.to_data(*(jnp.asarray(v, float) for v in (output, x0 + s * noise, sigma)))
        loss = jnp.sum((exact - x0) ** 2, (1, 2)) * process.loss_weight(jnp.asarray(s[:, 0, 0]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # In float32 x0_hat - x0 loses digits where sigma is small beside x0; all else keeps 1e-5.
    visible = sigma > 0.05
    loss = jnp.sum((denoised - x0) ** 2, (1, 2)) * process.loss_weight(sigma)
    np.testing.assert_allclose(loss[visible], expected[visible], rtol=1e-5)


def test_edm_input_is_normalised_and_others_is_not():
    sigma = noise_levels(processes.edm())
    np.testing.assert_allclose(
        processes.edm().c_in(sigma), 1 / np.sqrt(np.asarray(sigma) ** 2 + 0.25), rtol=1e-6
    )
    np.testing.assert_allclose(processes.edm().c_noise(sigma), np.log(sigma) / 4, rtol=1e-6)
    for name in ("ve", "vp_linear", "flow"):
        assert jnp.all(PROCESSES[name].c_in(sigma) == 1)


@ALL
def test_time_0_is_clean_data(process):
    assert process.alpha(jnp.float32(0)) == 1
    assert process.sigma(jnp.float32(0)) == 0


@ALL
def test_signal_to_noise_ratio_inverts(process):
    t = noise_levels(process, 20)
    # At time t the ratio is known to a few units in the last place of log_snr, of magnitude 12.
    np.testing.assert_allclose(process.time_of_log_snr(process.log_snr(t)), t, rtol=2e-5)
    assert jnp.all(jnp.diff(process.log_snr(t)) > 0)


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("vp")])
def test_variance_is_preserved(name):
    process = PROCESSES[name]
    t = noise_levels(process, 20)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, rtol=1e-6)


@ALL
def test_derivatives_agree_with_finite_differences(process):
    with jax.enable_x64(True):
        # Off the knots at integer times, where vp_from_betas bends.
        t = (
            jnp.floor(noise_levels(process)) + 0.37
            if process.t_max > 500
            else noise_levels(process)
        )
        step = 1e-6 * t
        for analytic, function in zip(
            process.derivatives(t), (process.alpha, process.sigma), strict=True
        ):
            numeric = (function(t + step) - function(t - step)) / (2 * step)
            np.testing.assert_allclose(analytic, numeric, rtol=1e-4, atol=1e-9)


def test_linear_schedule_is_the_integral_of_beta():
    t = np.linspace(0.01, 1, 5)
    integral = 0.1 * t + (20 - 0.1) * t**2 / 2
    np.testing.assert_allclose(processes.vp("linear").alpha(t), np.exp(-integral / 2), rtol=1e-5)


def test_scaled_linear_schedule_is_the_integral_of_beta():
    t = np.linspace(0, 1, 100_001)
    beta = (math.sqrt(0.85) + (math.sqrt(12) - math.sqrt(0.85)) * t) ** 2
    integral = np.concatenate([[0], np.cumsum((beta[1:] + beta[:-1]) / 2) * (t[1] - t[0])])
    np.testing.assert_allclose(
        processes.vp("scaled_linear").alpha(t[::20_000]), np.exp(-integral / 2)[::20_000], rtol=1e-5
    )


def test_cosine_schedule_is_the_published_one():
    t = np.linspace(0.01, 0.99, 7)
    angle = lambda t: (t + 0.008) / 1.008 * np.pi / 2  # noqa: E731
    alpha_squared = np.cos(angle(t)) ** 2 / np.cos(angle(0)) ** 2
    np.testing.assert_allclose(processes.vp("cosine").alpha(t) ** 2, alpha_squared, rtol=2e-5)
    np.testing.assert_allclose(processes.vp("cosine").sigma(t) ** 2, 1 - alpha_squared, rtol=2e-5)


def test_discrete_process_is_exact_at_the_steps_of_the_model():
    process = processes.vp_from_betas(BETAS)
    t = jnp.arange(1, 1001.0)
    alphas_cumprod = np.cumprod(1 - BETAS)
    np.testing.assert_allclose(process.alpha(t) ** 2, alphas_cumprod, rtol=2e-6)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - alphas_cumprod, rtol=2e-6)
    np.testing.assert_array_equal(process.c_noise(t), np.arange(1000))
    times = process.sample_time(jax.random.key(0), (20_000,))
    assert {times.min().item(), times.max().item()} == {1.0, 1000.0}
    # Below the first step the noise grows in proportion to time.
    ratio = process.sigma(t[:1] / 4) / process.alpha(t[:1] / 4)
    np.testing.assert_allclose(ratio, process.sigma(t[:1]) / process.alpha(t[:1]) / 4, rtol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_process_agrees_with_diffusers(schedule):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule)
    process = processes.vp_from_betas(scheduler.betas.double().numpy())
    alpha_squared = process.alpha(jnp.arange(1, 1001.0)) ** 2
    # diffusers multiplies 1000 float32 factors.
    np.testing.assert_allclose(alpha_squared, scheduler.alphas_cumprod.numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    "names", list(itertools.permutations(PROCESSES, 2)), ids=lambda names: "-".join(names)
)
def test_moving_to_another_process_and_back_changes_nothing(names):
    source, target = (PROCESSES[name] for name in names)
    # Noise levels that both processes reach.
    log_snr = jnp.linspace(
        max(p.log_snr(noise_levels(p))[0] for p in (source, target)),
        min(p.log_snr(noise_levels(p))[-1] for p in (source, target)),
        9,
    )
    t = source.time_of_log_snr(log_snr)
    s, scale = same_noise_level(source, target, t)
    np.testing.assert_allclose(target.log_snr(s), source.log_snr(t), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scale * source.alpha(t), target.alpha(s), rtol=2e-5)
    np.testing.assert_allclose(scale * source.sigma(t), target.sigma(s), rtol=2e-5)
    back, scale_back = same_noise_level(target, source, s)
    np.testing.assert_allclose(back, t, rtol=2e-5)
    np.testing.assert_allclose(scale * scale_back, 1, rtol=2e-5)


def test_noise_levels_match_where_no_signal_is_left():
    s, scale = same_noise_level(processes.flow(), processes.flow(sigma_data=0.5), jnp.float32(1))
    assert (s, scale) == (1, 1)


def test_training_times_follow_their_laws():
    n, key = 100_000, jax.random.key(0)
    logs = jnp.log(processes.edm(log_sigma_mean=-0.8, log_sigma_std=1.6).sample_time(key, (n,)))
    logits = processes.flow(logit_mean=0.5, logit_std=1.0).sample_time(key, (n,))
    logits = jnp.log(logits / (1 - logits))
    uniform = processes.vp().sample_time(key, (n,))
    log_uniform = jnp.log(processes.ve().sample_time(key, (n,)))
    half_width = math.log(100 / 0.02) / 2
    # Five standard errors of mean and standard deviation: false alarms below 1e-5 in all.
    for values, mean, std in [
        (logs, -0.8, 1.6),
        (logits, 0.5, 1.0),
        (uniform, 0.5005, 0.999 / math.sqrt(12)),
        (log_uniform, math.log(0.02) + half_width, half_width / math.sqrt(3)),
    ]:
        assert abs(values.mean() - mean) < 5 * std / math.sqrt(n)
        assert abs(values.std() - std) < 5 * std / math.sqrt(2 * n) * 1.2


def test_equal_arguments_give_one_process():
    assert processes.edm(sigma_data=0.5) is processes.edm(sigma_data=0.5)
    assert processes.vp_from_betas(BETAS) is processes.vp_from_betas(list(BETAS))
    assert len({processes.flow(), processes.flow(), processes.flow(sigma_data=0.5)}) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: processes.vp("sigmoid"), "schedule is 'sigmoid'"),
        (lambda: processes.vp("cosine", beta_min=0.1), "do not apply"),
        (lambda: processes.vp(prediction="epsilon"), "prediction is 'epsilon'"),
        (lambda: processes.flow(weighting="snr"), "weighting is 'snr'"),
        (lambda: processes.edm(sigma_data=0.0), "sigma_data is 0.0"),
        (lambda: processes.edm(sigma_min=2.0, sigma_max=1.0), "t_min < t_max"),
        (lambda: processes.vp_from_betas([0.1]), "betas must be"),
        (lambda: processes.vp_from_betas([0.1, 1.0]), "betas must be"),
        (lambda: processes.edm().coefficients(jnp.ones(2), "epsilon"), "prediction is 'epsilon'"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
