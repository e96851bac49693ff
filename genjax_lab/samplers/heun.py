"""Euler's and Heun's methods for the probability-flow ODE, with churn (arXiv 2206.00364, Alg. 1-2).

The ODE is written in the process's own time, dx/dt = alpha'(t) x_0_hat + sigma'(t) eps_hat with
eps_hat = (x - alpha x_0_hat)/sigma, which is EDM's for x = x_0 + t eps and rectified flow's for x
= (1-t) x_0 + t eps. A step of the sampler is one network evaluation, so Heun alternates a
predictor step and a corrector step: 2N - 1 of them for N intervals, the last interval being
Euler's.
"""

import math

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import (
    Denoiser,
    ExampleState,
    Sampler,
    SamplerState,
    SharedState,
    normal_like,
)
from genjax_lab.samplers.schedules import time_steps


def euler(
    denoise: Denoiser,
    *,
    num_steps: int,
    spacing: str = "karras",
    times: Float[Array, "num_steps+1"] | None = None,
) -> Sampler:
    """Euler's method, first order; one evaluation for each of `num_steps` steps.

    Args:
      denoise: the denoiser.
      num_steps: number of intervals.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.
    """
    times = resolve_times(denoise.process, num_steps, spacing, times)
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
    spacing: str = "karras",
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
      churn: S_churn; an interval starts by raising its noise level by the factor
        1 + min(churn/N, sqrt(2) - 1). Needs a process with alpha = 1 (see `change_process`).
      churn_t_min: S_min, smallest time at which noise is added.
      churn_t_max: S_max, largest such time.
      churn_noise: S_noise, standard deviation of the added noise.

    Raises:
      ValueError: if churn is asked of a process whose alpha is not 1.
    """
    process = denoise.process
    times = resolve_times(process, num_steps, spacing, times)
    if churn < 0:
        raise ValueError(f"churn is {churn}; it must not be negative")
    if churn > 0 and not bool(jnp.all(process.alpha(times) == 1)):
        raise ValueError(
            f"churn needs a process with alpha = 1, not {process.name!r}; "
            "wrap the denoiser: change_process(denoise, processes.edm())"
        )
    gamma = jnp.where(
        (times >= churn_t_min) & (times <= churn_t_max),
        min(churn / num_steps, math.sqrt(2) - 1),
        0.0,
    )
    raised = times * (1 + gamma)
    noise_scale = churn_noise * jnp.sqrt(jnp.maximum(raised**2 - times**2, 0))
    grid = (times, raised, noise_scale)
    return Sampler(
        init=Partial(_init_heun, denoise, grid),
        predict=Partial(_predict_heun, denoise, grid),
        transition=Partial(_heun_transition, process, grid, churn > 0),
        num_steps=2 * num_steps - 1,
    )


def resolve_times(
    process: GaussianProcess,
    num_steps: int,
    spacing: str,
    times: Float[Array, "num_steps+1"] | None,
) -> Float[Array, "num_steps+1"]:
    """The grid that a sampler was given, checked, or the one that it asked for by name."""
    if times is None:
        return time_steps(process, num_steps, spacing=spacing)
    times = jnp.asarray(times, jnp.float32)
    if times.shape != (num_steps + 1,):
        raise ValueError(f"times has shape {times.shape}; it must be ({num_steps + 1},)")
    if not bool(jnp.all(times[:-1] > times[1:])):
        raise ValueError("times must decrease strictly")
    return times


def initial_state(denoise: Denoiser, t: Array, keys, shape, condition) -> SamplerState:
    """Pure noise at time t: sigma(t) N(0, I)."""
    noise = normal_like(keys, jnp.zeros(shape, jnp.float32))
    return SamplerState(
        ExampleState(denoise.process.sigma(t) * noise, condition),
        SharedState(jnp.int32(0), denoise.memory, jnp.int32(0)),
    )


def evaluate(denoise: Denoiser, state: SamplerState, t: Array) -> tuple[Array, SamplerState]:
    """The denoiser's estimate of x_0 at the current iterate, and the state that counts its cost."""
    shared = state.shared
    x0, memory = denoise.predict(shared.memory, state.sample, t, state.example.condition)
    evaluations = shared.evaluations + denoise.evaluations(t)
    return x0, state._replace(shared=shared._replace(memory=memory, evaluations=evaluations))


def predict_at(denoise: Denoiser, times, state: SamplerState) -> tuple[Array, SamplerState]:
    """`evaluate` at the time of the current step."""
    return evaluate(denoise, state, times[state.step])


def derivative(process: GaussianProcess, x: Array, x0: Array, t: Array) -> Array:
    """dx/dt of the probability-flow ODE at time t, where sigma(t) > 0."""
    d_alpha, d_sigma = process.derivatives(t)
    return d_alpha * x0 + d_sigma * (x - process.alpha(t) * x0) / process.sigma(t)


def _init_euler(denoise, times, keys, shape, condition):
    return initial_state(denoise, times[0], keys, shape, condition)


def _euler_transition(process, times, keys, state, x0):
    del keys
    t, t_next = times[state.step], times[state.step + 1]
    x = state.sample + (t_next - t) * derivative(process, state.sample, x0, t)
    return state._replace(example=state.example._replace(sample=x))


def _init_heun(denoise, grid, keys, shape, condition):
    times, raised, noise_scale = grid
    del times, noise_scale
    # Churn at the first time only rescales pure noise.
    state = initial_state(denoise, raised[0], keys, shape, condition)
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
    predicted = x + (end - start) * slope
    corrected = x_start + (end - start) * (slope_start + slope) / 2
    if has_churn:
        corrected = corrected + noise_scale[interval + 1] * normal_like(keys, x)
    sample = jnp.where(corrects, corrected, predicted)
    history = (jnp.where(corrects, corrected, x), slope)
    return state._replace(example=state.example._replace(sample=sample, history=history))
