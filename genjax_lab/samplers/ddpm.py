"""DDPM's ancestral sampler with a fixed variance (arXiv 2006.11239, Alg. 2), at any times.

A step from t to s draws x_s around the mean of the posterior of x_s given x_t and x_0_hat. Its
variance is the posterior's own, sigma_s^2 (1 - q^2), or that of the forward step,
sigma_t^2 (1 - q^2), with q as in `genjax_lab.samplers.ddim`: the paper's beta-tilde and beta, which
are right for data of zero and of unit variance in a variance-preserving process and agree as the
steps grow small. Learned variances are left out.
"""

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from genjax_lab.samplers.base import Denoiser, Sampler, normal_like
from genjax_lab.samplers.ddim import retained_noise
from genjax_lab.samplers.denoising import initial_state, predict_at
from genjax_lab.samplers.schedules import constant, resolve_times

VARIANCES = ("small", "large")


def ddpm(
    denoise: Denoiser,
    *,
    num_steps: int,
    variance: str = "small",
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
) -> Sampler:
    """Ancestral sampling; one evaluation for each of `num_steps` steps.

    The steps of a discrete-time model itself are those of
    `ddpm(denoise, num_steps=1000, spacing="time")` under `vp_from_betas` of 1000 betas.

    Args:
      denoise: the denoiser.
      num_steps: number of steps.
      variance: "small" (the posterior's) or "large" (the forward step's).
      spacing: see `time_steps`.
      times: a decreasing grid to use in place of `time_steps(denoise.process, num_steps)`.

    Raises:
      ValueError: if `variance` is another name.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; it must be one of {VARIANCES}")
    times = constant(resolve_times(denoise.process, num_steps, spacing, times))
    return Sampler(
        init=Partial(_init, denoise, times),
        predict=Partial(predict_at, denoise, times),
        transition=Partial(_transition, denoise.process, times, variance),
        num_steps=num_steps,
    )


def _init(denoise, times, keys, shape, condition):
    return initial_state(denoise, times[0], keys, shape, condition)


def _transition(process, times, variance, keys, state, x0):
    t, s = times[state.step], times[state.step + 1]
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    retained = retained_noise(process, t, s)
    noise = (state.sample - process.alpha(t) * x0) / sigma_t
    mean = process.alpha(s) * x0 + sigma_s * retained * noise
    # The step to clean data adds no noise (arXiv 2006.11239, Alg. 2, line 3).
    scale = sigma_s if variance == "small" else jnp.where(sigma_s > 0, sigma_t, 0.0)
    x = mean + scale * jnp.sqrt(1 - retained**2) * normal_like(keys, mean)
    return state._replace(example=state.example._replace(sample=x))
