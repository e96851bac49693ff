"""Every sampler, deterministic or stochastic, draws from the target."""

import jax
import numpy as np
import pytest
import scipy.stats
from gaussian_target import PROCESSES, SAMPLERS, gaussian_denoiser

from genjax_lab import samplers

MEAN, STD, NUM = 0.3, 0.5, 2048


def draw(name, process, num_steps):
    build, settings, _ = SAMPLERS[name]
    if process.name == "flow":
        times = samplers.time_steps(process, num_steps, spacing="time")
        if name == "dpm_solver_v3":  # needs a finite log-SNR
            times = samplers.time_steps(process, num_steps, t_max=0.999)
    else:
        times = samplers.time_steps(process, num_steps)
    sampler = build(
        gaussian_denoiser(process, MEAN, STD), num_steps=num_steps, times=times, **settings
    )
    return np.asarray(samplers.sample(sampler, jax.random.key(0), shape=(NUM, 1))[0])[:, 0]


def standard_errors(x):
    """Mean and standard deviation, as deviations from the target in standard errors."""
    return (x.mean() - MEAN) / (STD / np.sqrt(NUM)), (x.std() / STD - 1) * np.sqrt(2 * NUM)


CASES = [
    (name, process)
    for name, (_, _, order) in SAMPLERS.items()
    for process in PROCESSES
    # Deterministic samplers converge under every process (see test_convergence), DDPM with the
    # small variance is DDIM with eta = 1 (see test_contract), and churn needs alpha = 1.
    if process == "edm" or not (order or name in ("ddpm_small", "heun_churn"))
]


@pytest.mark.parametrize(("name", "process_name"), CASES)
def test_every_sampler_targets_the_right_law(name, process_name):
    # More steps of DPM-Solver-v3 would crowd upon the 250 points of its default statistics.
    x = draw(name, PROCESSES[process_name], 60 if name == "dpm_solver_v3" else 100)
    # First-order samplers are biased by 4 standard errors with 100 steps (measured with 40 000
    # samples). A deviation of 5 beyond that has probability 6e-7 in each of 32 comparisons.
    assert np.abs(standard_errors(x)).max() < 9
    # That bias shifts the distribution function by less than 0.02. A Kolmogorov statistic of 0.07
    # beyond it has probability 2 exp(-2 NUM 0.07^2) = 4e-9.
    assert scipy.stats.kstest(x, scipy.stats.norm(MEAN, STD).cdf).statistic < 0.09


@pytest.mark.parametrize("name", ["ddim_eta_1", "ddpm_large", "heun_churn"])
def test_few_steps_of_a_stochastic_sampler_miss_the_law_visibly(name):
    # So the test above would see it too.
    assert np.abs(standard_errors(draw(name, PROCESSES["edm"], 12))).max() > 9
