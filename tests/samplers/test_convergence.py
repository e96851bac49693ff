"""Every deterministic sampler approaches the exact flow at its own order."""

import jax
import numpy as np
import pytest
from gaussian_target import PROCESSES, SAMPLERS, exact_flow, gaussian_denoiser

from genjax_lab import processes, samplers

DETERMINISTIC = [name for name, (_, _, order) in SAMPLERS.items() if order]


def error(name, process, times):
    """Largest distance from the exact flow that starts from the given points at times[0]."""
    build, settings, _ = SAMPLERS[name]
    if name == "dpm_solver_v3":
        # So many points that moving the times upon them does not disturb the order.
        statistics = samplers.data_prediction_statistics(
            process, num_points=30_000, t_max=times[0], t_min=times[-1] or process.t_min
        )
        settings = {"statistics": statistics}
    sampler = build(gaussian_denoiser(process), num_steps=len(times) - 1, times=times, **settings)
    x = np.linspace(-2, 2, 5)[:, None] * process.sigma(times[0])
    result, _ = samplers.sample(sampler, jax.random.key(0), shape=x.shape, initial=x)
    return np.abs(result - exact_flow(process, x, times[0], times[-1])).max()


@pytest.mark.parametrize("process_name", PROCESSES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_deterministic_sampler_converges_at_its_order(name, process_name):
    process = PROCESSES[process_name]
    # The leading error terms of DPM-Solver-v3 nearly cancel, so that it shows its order late.
    numbers = (1024, 2048) if name == "dpm_solver_v3" else (128, 256)
    # Grids that end before clean data, with whose last step the order has nothing to do.
    t_max = 0.999 if process_name == "flow" else process.t_max
    with jax.enable_x64(True):
        coarse, fine = (
            error(name, process, samplers.time_steps(process, n + 1, t_max=t_max)[:-1])
            for n in numbers
        )
    assert abs(np.log2(coarse / fine) - SAMPLERS[name][2]) < 0.12


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "dpm_solver_v3"])
def test_order_holds_for_flow_from_pure_noise_to_clean_data(name):
    with jax.enable_x64(True):
        coarse, fine = (
            error(name, processes.flow(), np.linspace(1, 0, n + 1)) for n in (1024, 2048)
        )
    # DPM-Solver++ sees infinite log-SNR at both ends, which costs it a logarithm.
    assert SAMPLERS[name][2] - 0.2 < np.log2(coarse / fine) < SAMPLERS[name][2] + 0.1


@pytest.mark.parametrize("num_evaluations", [11, 25])
def test_dpm_solver_v3_beats_heun_at_equal_evaluations(num_evaluations):
    process = processes.edm()
    errors = {}
    for name, num_steps in (
        ("heun", (num_evaluations + 1) // 2),
        ("dpm_solver_v3", num_evaluations),
    ):
        times = samplers.time_steps(process, num_steps + 1)[:-1]
        settings = {"lower_order_final": True} if name == "dpm_solver_v3" else {}
        sampler = SAMPLERS[name][0](
            gaussian_denoiser(process), num_steps=num_steps, times=times, **settings
        )
        x = np.linspace(-2, 2, 5, dtype=np.float32)[:, None] * 80
        result, info = samplers.sample(sampler, jax.random.key(0), shape=x.shape, initial=x)
        assert info.num_evaluations == num_evaluations
        errors[name] = np.abs(result - exact_flow(process, x, 80.0, times[-1])).max()
    assert errors["dpm_solver_v3"] < errors["heun"] / 2
