"""Euler's and Heun's methods for the probability-flow ODE, with churn (arXiv 2206.00364, Alg. 1-2).

The ODE is written in the process's own time, dx/dt = alpha'(t) x_0_hat + sigma'(t) eps_hat with
eps_hat = (x - alpha x_0_hat)/sigma, which is EDM's for x = x_0 + t eps and rectified flow's for x
= (1-t) x_0 + t eps. A step of the sampler is one network evaluation, so Heun alternates a
predictor step and a corrector step: 2N - 1 of them for N intervals, the last interval being
Euler's. A step to sigma = 0 returns alpha x_0_hat, which is Euler's step for both processes above;
for a variance-preserving one, whose d sigma/dt diverges there, Euler's would leave noise behind.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import Denoiser, Sampler, normal_like
from genjax_lab.samplers.denoising import evaluate, initial_state, predict_at
from genjax_lab.samplers.schedules import at_once, constant, resolve_times


def euler(
    denoise: Denoiser,
    *,
    num_steps: int,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
) -> Sampler:
    """Euler's method, first order; one evaluation for each of `num_steps` steps.

    Args:
      denoise: the denoiser.
      num_steps: number of intervals.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.
    """
    times = constant(resolve_times(denoise.process, num_steps, spacing, times))
    return Sampler(
        init=Partial(_init_euler, denoise, times),
        predict=Partial(predict_at, denoise, times),
        transition=Partial(_euler_transition, denoise.process, times),
        num_steps=num_steps,
    )


def heun(
    denoise: Denoiser,
    *,
    num_steps: int,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
    churn: float = 0.0,
    churn_t_min: float = 0.0,
    churn_t_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Sampler:
    """Heun's method, second order; 2 `num_steps` - 1 evaluations (arXiv 2206.00364, Alg. 2).

    Args:
      denoise: the denoiser.
      num_steps: number of intervals N.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.
      churn: S_churn; every interval but the first, which starts from pure noise, starts by
        raising its noise level by the factor 1 + min(churn/N, sqrt(2) - 1). Needs a process with
        alpha = 1 (see `change_process`).
      churn_t_min: S_min, smallest time at which noise is added.
      churn_t_max: S_max, largest such time.
      churn_noise: S_noise, standard deviation of the added noise.

    Raises:
      ValueError: if churn is asked of a process whose alpha is not 1.
    """
    process = denoise.process
    t = resolve_times(process, num_steps, spacing, times)
    if churn < 0:
        raise ValueError(f"churn is {churn}; it must not be negative")
    if churn > 0 and not np.all(at_once(process.alpha, t) == 1):
        raise ValueError(
            f"churn needs a process with alpha = 1, not {process.name!r}; "
            "wrap the denoiser: change_process(denoise, processes.edm())"
        )
    churned = (t >= churn_t_min) & (t <= churn_t_max) & (np.arange(num_steps + 1) > 0)
    gamma = np.where(churned, min(churn / num_steps, math.sqrt(2) - 1), 0.0)
    noise_scale = churn_noise * t * np.sqrt(gamma * (2 + gamma))
    grid = (constant(t), constant(t * (1 + gamma)), constant(noise_scale))
    return Sampler(
        init=Partial(_init_heun, denoise, grid),
        predict=Partial(_predict_heun, denoise, grid),
        transition=Partial(_heun_transition, process, grid, churn > 0),
        num_steps=2 * num_steps - 1,
    )


def derivative(process: GaussianProcess, x: Array, x0: Array, t: Array) -> Array:
    """dx/dt of the probability-flow ODE at time t, where sigma(t) > 0."""
    d_alpha, d_sigma = process.derivatives(t)
    return d_alpha * x0 + d_sigma * (x - process.alpha(t) * x0) / process.sigma(t)


def _euler_step(process, x, x0, slope, t, t_next):
    clean = process.sigma(t_next) == 0
    return jnp.where(clean, process.alpha(t_next) * x0, x + (t_next - t) * slope)


def _init_euler(denoise, times, keys, shape, condition):
    return initial_state(denoise, times[0], keys, shape, condition)


def _euler_transition(process, times, keys, state, x0):
    del keys
    t, t_next = times[state.step], times[state.step + 1]
    slope = derivative(process, state.sample, x0, t)
    x = _euler_step(process, state.sample, x0, slope, t, t_next)
    return state._replace(example=state.example._replace(sample=x))


def _init_heun(denoise, grid, keys, shape, condition):
    state = initial_state(denoise, grid[0][0], keys, shape, condition)
    return state._replace(
        example=state.example._replace(
            history=(state.sample, jnp.zeros_like(state.sample))  # interval's start, slope there
        )
    )


def _predict_heun(denoise, grid, state):
    times, raised, _ = grid
    interval, corrects = state.step // 2, state.step % 2 == 1
    return evaluate(denoise, state, jnp.where(corrects, times[interval + 1], raised[interval]))


def _heun_transition(process, grid, has_churn, keys, state, x0):
    times, raised, noise_scale = grid
    interval, corrects = state.step // 2, state.step % 2 == 1
    start, end = raised[interval], times[interval + 1]
    here = jnp.where(corrects, end, start)
    x, (x_start, slope_start) = state.sample, state.example.history
    slope = derivative(process, x, x0, here)
    predicted = _euler_step(process, x, x0, slope, start, end)
    corrected = x_start + (end - start) * (slope_start + slope) / 2
    if has_churn:
        corrected = corrected + noise_scale[interval + 1] * normal_like(keys, x)
    sample = jnp.where(corrects, corrected, predicted)
    history = (jnp.where(corrects, corrected, x), slope)
    return state._replace(example=state.example._replace(sample=sample, history=history))
