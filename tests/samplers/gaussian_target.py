"""A target whose denoiser and probability flow are known in closed form, and every sampler's name.

Data N(mean, std^2) elementwise: the best estimate of x_0 is

    E[x_0 | x_t = x] = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x - alpha mean),

and the probability flow keeps (x_t - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) constant.
"""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from genjax_lab import processes, samplers
from genjax_lab.samplers.denoising import one_evaluation

PROCESSES = {"edm": processes.edm(), "vp": processes.vp(), "flow": processes.flow()}

# A sampler's name, what to call it with, and its order: None if it is stochastic.
SAMPLERS = {
    "euler": (samplers.euler, {}, 1),
    "heun": (samplers.heun, {}, 2),
    "heun_churn": (samplers.heun, {"churn": 10.0}, None),
    "ddim": (samplers.ddim, {}, 1),
    "ddim_eta_1": (samplers.ddim, {"eta": 1.0}, None),
    "ddpm_small": (samplers.ddpm, {}, None),
    "ddpm_large": (samplers.ddpm, {"variance": "large"}, None),
    "dpm_solver_pp_2m": (samplers.dpm_solver_pp_2m, {}, 2),
    "sde_dpm_solver_pp_2m": (samplers.sde_dpm_solver_pp_2m, {}, None),
    "dpm_solver_v3": (samplers.dpm_solver_v3, {}, 2),
}


traces = []


def best_estimate(process, target, memory, x, t, condition):
    """A denoiser's `predict`; `traces` grows whenever JAX traces it."""
    traces.append(process.name)
    mean, std = target
    del condition
    alpha, sigma = process.alpha(t), process.sigma(t)
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x - alpha * mean), memory


def gaussian_denoiser(process, mean=0.3, std=0.5):
    target = (jnp.asarray(mean, float), jnp.asarray(std, float))
    return samplers.Denoiser(Partial(best_estimate, process, target), process, (), one_evaluation)


def exact_flow(process, x, t, s, mean=0.3, std=0.5):
    """Where the probability flow carries x from time t to time s."""
    spread = [np.hypot(process.alpha(r) * std, process.sigma(r)) for r in (t, s)]
    return process.alpha(s) * mean + (x - process.alpha(t) * mean) * spread[1] / spread[0]
