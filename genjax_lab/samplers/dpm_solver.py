"""DPM-Solver++(2M), the multistep second-order solver in data prediction (arXiv 2211.01095).

With lambda = log(alpha/sigma) the probability-flow ODE is solved exactly but for the path of
x_0_hat, which is extrapolated from the two last evaluations (Alg. 2). A step from t to s of length
h = lambda_s - lambda_t, the one before it of length h_prev:

    D   = x_0_hat + h/(2 h_prev) (x_0_hat - x_0_hat_prev),
    x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) D,

and for the reverse SDE (the same paper's SDE-DPM-Solver++(2M))

    x_s = (sigma_s/sigma_t) e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z.

The first step, a step whose h is infinite (to clean data) and one after an infinite h_prev (from
alpha = 0) have nothing to extrapolate by and are of first order.
"""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import Denoiser, Sampler, normal_like
from genjax_lab.samplers.ddim import retained_noise
from genjax_lab.samplers.denoising import initial_state, predict_at
from genjax_lab.samplers.schedules import at_once, constant, resolve_times


def dpm_solver_pp_2m(
    denoise: Denoiser,
    *,
    num_steps: int,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
    lower_order_final: bool = True,
) -> Sampler:
    """DPM-Solver++(2M), second order; one evaluation for each of `num_steps` steps.

    Args:
      denoise: the denoiser.
      num_steps: number of steps.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.
      lower_order_final: whether the last step is of first order also where the grid ends before
        clean data; steadier for few steps.
    """
    return _multistep(denoise, num_steps, spacing, times, lower_order_final, _ode_transition)


def sde_dpm_solver_pp_2m(
    denoise: Denoiser,
    *,
    num_steps: int,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
    lower_order_final: bool = True,
) -> Sampler:
    """SDE-DPM-Solver++(2M): the same extrapolation with fresh noise in every step.

    Args:
      denoise: the denoiser.
      num_steps: number of steps, each one evaluation.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.
      lower_order_final: as in `dpm_solver_pp_2m`.
    """
    return _multistep(denoise, num_steps, spacing, times, lower_order_final, _sde_transition)


def _multistep(denoise, num_steps, spacing, times, lower_order_final, transition) -> Sampler:
    times = resolve_times(denoise.process, num_steps, spacing, times)
    extrapolation = constant(_extrapolation(denoise.process, times, lower_order_final))
    times = constant(times)
    return Sampler(
        init=Partial(_init, denoise, times),
        predict=Partial(predict_at, denoise, times),
        transition=Partial(transition, denoise.process, times, extrapolation),
        num_steps=num_steps,
    )


def _extrapolation(
    process: GaussianProcess, times: Float[np.ndarray, "num_steps+1"], lower_order_final: bool
) -> Float[np.ndarray, "num_steps"]:
    """h / (2 h_prev) of every step, 0 where the step is of first order."""
    steps = np.diff(at_once(process.log_snr, times))
    previous = np.append(np.inf, steps[:-1])
    extrapolates = np.isfinite(steps) & np.isfinite(previous)
    if lower_order_final:
        extrapolates[-1] = False
    return np.where(extrapolates, steps, 0) / (2 * previous)


def _init(denoise, times, keys, shape, condition):
    state = initial_state(denoise, times[0], keys, shape, condition)
    return state._replace(example=state.example._replace(history=jnp.zeros_like(state.sample)))


def _ode_transition(process, times, extrapolation, keys, state, x0):
    del keys
    t, s = times[state.step], times[state.step + 1]
    x0_extrapolated = x0 + extrapolation[state.step] * (x0 - state.example.history)
    x = (
        process.sigma(s) / process.sigma(t) * state.sample
        + process.alpha(s) * (1 - retained_noise(process, t, s)) * x0_extrapolated
    )
    return state._replace(example=state.example._replace(sample=x, history=x0))


def _sde_transition(process, times, extrapolation, keys, state, x0):
    t, s = times[state.step], times[state.step + 1]
    retained = retained_noise(process, t, s)
    fresh = 1 - retained**2
    x0_extrapolated = x0 + extrapolation[state.step] * (x0 - state.example.history)
    x = (
        process.sigma(s) / process.sigma(t) * retained * state.sample
        + process.alpha(s) * fresh * x0_extrapolated
        + process.sigma(s) * jnp.sqrt(fresh) * normal_like(keys, x0)
    )
    return state._replace(example=state.example._replace(sample=x, history=x0))
