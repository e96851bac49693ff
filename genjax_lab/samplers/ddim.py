"""DDIM: one family from the deterministic to the ancestral sampler (arXiv 2010.02502, Eq. 12).

Written for any Gaussian process by the share of the noise that a step from t to s < t retains,

    q = (alpha_t / sigma_t) / (alpha_s / sigma_s),    0 <= q <= 1,

by which x_s given x_t and x_0 has mean alpha_s x_0 + sigma_s q eps and variance
sigma_s^2 (1 - q^2). With the `eta`-th part of that standard deviation drawn afresh,

    x_s = alpha_s x_0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c z,    c = eta sigma_s sqrt(1 - q^2).

Nothing is divided by alpha_t, so a process may start from alpha = 0.
"""

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import Denoiser, Sampler, normal_like
from genjax_lab.samplers.denoising import initial_state, predict_at
from genjax_lab.samplers.schedules import constant, resolve_times


def ddim(
    denoise: Denoiser,
    *,
    num_steps: int,
    eta: float = 0.0,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
) -> Sampler:
    """DDIM, first order; one evaluation for each of `num_steps` steps.

    Args:
      denoise: the denoiser.
      num_steps: number of steps.
      eta: share of fresh noise in [0, 1]; 0 is deterministic, 1 is DDPM with the small variance.
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.

    Raises:
      ValueError: if `eta` is out of range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1]")
    times = constant(resolve_times(denoise.process, num_steps, spacing, times))
    return Sampler(
        init=Partial(_init, denoise, times),
        predict=Partial(predict_at, denoise, times),
        transition=Partial(_transition, denoise.process, times, constant(eta), eta > 0),
        num_steps=num_steps,
    )


def retained_noise(
    process: GaussianProcess, t: Float[Array, "*batch"], s: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """q = alpha_t sigma_s / (alpha_s sigma_t) for s < t: 0 if alpha_t or sigma_s is 0."""
    return process.alpha(t) * process.sigma(s) / (process.alpha(s) * process.sigma(t))


def _init(denoise, times, keys, shape, condition):
    return initial_state(denoise, times[0], keys, shape, condition)


def _transition(process, times, eta, is_random, keys, state, x0):
    t, s = times[state.step], times[state.step + 1]
    noise = (state.sample - process.alpha(t) * x0) / process.sigma(t)
    fresh = eta**2 * (1 - retained_noise(process, t, s) ** 2)
    x = process.alpha(s) * x0 + process.sigma(s) * jnp.sqrt(1 - fresh) * noise
    if is_random:
        x = x + process.sigma(s) * jnp.sqrt(fresh) * normal_like(keys, x)
    return state._replace(example=state.example._replace(sample=x))
