"""Statistics of a denoiser by which DPM-Solver-v3 chooses what to solve exactly (arXiv 2310.13268).

With lambda = log(alpha/sigma), y = x/alpha and f = (1 - l) y - x_0_hat, and means over x diffused
from data, elementwise (Section 3.1):

    l = argmin E ||sigma d eps/dx - diag(l)||^2     = E[diag(sigma d eps/dx)],
    s, b = argmin E ||df/dlambda - (s f + b)||^2    = least squares of df/dlambda on f,

where df/dlambda is taken along the probability-flow ODE. sigma d eps/dx = 1 - alpha d x_0_hat/dx,
whose diagonal is estimated by random signs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import Denoiser
from genjax_lab.samplers.heun import derivative
from genjax_lab.samplers.schedules import at_once


class ModelStatistics(NamedTuple):
    """What DPM-Solver-v3 knows of a model; functions of lambda on a grid, in float64.

    Attributes:
      half_log_snr: lambda = log(alpha/sigma) of the grid points, increasing.
      l: coefficient of y that is solved exactly; `dims` broadcasts to the sample's.
      s: rate at which f grows of itself.
      b: rate at which f moves.
    """

    half_log_snr: Float[np.ndarray, "num_points"]
    l: Float[np.ndarray, "num_points *dims"]  # noqa: E741 (the paper's symbol)
    s: Float[np.ndarray, "num_points *dims"]
    b: Float[np.ndarray, "num_points *dims"]


def data_prediction_statistics(
    process: GaussianProcess,
    *,
    num_points: int = 250,
    t_min: float | None = None,
    t_max: float | None = None,
) -> ModelStatistics:
    """l = 1, s = 0, b = 0: the solver in data prediction, which needs no model.

    Args:
      process: the process whose noise levels the grid covers.
      num_points: points of the grid, uniform in lambda.
      t_min: smallest time; the process's own if None.
      t_max: largest time, with alpha(t_max) > 0; the process's own if None.

    Raises:
      ValueError: if the signal-to-noise ratio at an end is not finite.
    """
    half_log_snr = _grid(process, num_points, t_min, t_max)
    zeros = np.zeros(num_points)
    return ModelStatistics(half_log_snr, np.ones(num_points), zeros, zeros)


def estimate_statistics(
    denoise: Denoiser,
    data: Float[Array, "num *dims"],
    key: PRNGKeyArray,
    *,
    condition: PyTree = None,
    num_points: int = 250,
    t_min: float | None = None,
    t_max: float | None = None,
    batch_size: int | None = None,
) -> ModelStatistics:
    """Estimates a model's statistics from data; `num_points` x 3 evaluations for each example.

    Args:
      denoise: the denoiser.
      data: clean samples; the paper takes 1024 to 4096.
      key: for noise and random signs.
      condition: pytree with a leading axis like that of `data`.
      num_points: points of the grid, uniform in lambda.
      t_min: smallest time; the process's own if None.
      t_max: largest time, with alpha(t_max) > 0; the process's own if None.
      batch_size: examples evaluated at once, a divisor of their number; all if None.

    Raises:
      ValueError: if `batch_size` does not divide the data, or the signal-to-noise ratio at an end
        is not finite.
    """
    data = jnp.asarray(data, float)
    batch_size = len(data) if batch_size is None else batch_size
    if batch_size < 1 or len(data) % batch_size:
        raise ValueError(f"batch_size {batch_size} does not divide the {len(data)} examples")
    process = denoise.process
    half_log_snr = _grid(process, num_points, t_min, t_max)
    times = process.time_of_log_snr(jnp.asarray(2 * half_log_snr, float))
    batches = jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (-1, batch_size, *jnp.shape(leaf)[1:])), (data, condition)
    )

    over_data = functools.partial(_over_data, denoise, key, batches)

    def l_at(args):
        return over_data(_jacobian_diagonal, *args).mean(0)

    def moments_at(args):
        return _merge(*over_data(_moments, *args))

    indices = jnp.arange(num_points)
    l_grid = jax.jit(lambda: jax.lax.map(l_at, (times, indices)))()
    l_slope = np.gradient(np.asarray(l_grid, np.float64), half_log_snr, axis=0, edge_order=2)
    arguments = (times, indices, l_grid, jnp.asarray(l_slope, l_grid.dtype))
    moments = jax.jit(lambda arguments: jax.lax.map(moments_at, arguments))(arguments)
    f, rate, variance, covariance, magnitude = (np.asarray(part, np.float64) for part in moments)
    # Where f varies by no more than its rounding errors there is nothing to regress on.
    varies = variance > magnitude * (8 * jnp.finfo(data.dtype).eps) ** 2
    s = np.where(varies, covariance / np.where(varies, variance, 1), 0.0)
    return ModelStatistics(half_log_snr, np.asarray(l_grid, np.float64), s, rate - s * f)


def _grid(process, num_points, t_min, t_max):
    ends = (process.t_max if t_max is None else t_max, process.t_min if t_min is None else t_min)
    log_snr = at_once(process.log_snr, ends)
    if num_points < 3 or not np.all(np.isfinite(log_snr)) or log_snr[0] >= log_snr[1]:
        raise ValueError(
            f"needs num_points >= 3 and finite signal-to-noise ratios, increasing from t_max to "
            f"t_min; not num_points={num_points}, t_max={ends[0]}, t_min={ends[1]} of "
            f"{process.name!r}"
        )
    return np.linspace(*log_snr / 2, num_points)


def _over_data(denoise, key, batches, statistic, t, index, *args):
    """A statistic at time t of every batch of clean samples, stacked."""

    def one_batch(batch_and_number):
        (x0, condition), number = batch_and_number
        noise_key, sign_key = jax.random.split(
            jax.random.fold_in(jax.random.fold_in(key, index), number)
        )
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        x = denoise.process.diffuse(x0, t, noise)

        def predict(x, t):
            return denoise.predict(denoise.memory, x, t, condition)[0]

        return statistic(predict, denoise.process, x, t, sign_key, *args)

    return jax.lax.map(one_batch, (batches, jnp.arange(len(batches[0]))))


def _jacobian_diagonal(predict, process, x, t, key):
    """Mean of 1 - alpha diag(d x_0_hat / dx), each example with its own random signs."""
    signs = jax.random.rademacher(key, x.shape, x.dtype)
    product = jax.jvp(lambda x: predict(x, t), (x,), (signs,))[1]
    return 1 - process.alpha(t) * (signs * product).mean(0)


def _moments(predict, process, x, t, key, l_here, l_slope):
    """Means of f and df/dlambda, var f, their covariance, and what rounding is relative to."""
    del key
    slope_x = derivative(process, x, predict(x, t), t)
    x0, slope_x0 = jax.jvp(predict, (x, t), (slope_x, jnp.ones_like(t)))
    d_lambda = jax.jvp(process.log_snr, (t,), (jnp.ones_like(t),))[1] / 2
    y = x / process.alpha(t)
    f = (1 - l_here) * y - x0
    # dy/dlambda = -e^-lambda eps_hat = -(y - x_0_hat).
    rate = -l_slope * y - (1 - l_here) * (y - x0) - slope_x0 / d_lambda
    centred = f - f.mean(0)
    covariance = (centred * rate).mean(0)
    return f.mean(0), rate.mean(0), (centred**2).mean(0), covariance, (y**2 + x0**2).mean(0)


def _merge(f, rate, variance, covariance, magnitude):
    """Moments of all data from those of equally large batches.

    No difference of squares is taken, which would lose the digits of a small variance.
    """
    centred = f - f.mean(0)
    variance = variance.mean(0) + (centred**2).mean(0)
    covariance = covariance.mean(0) + (centred * rate).mean(0)
    return f.mean(0), rate.mean(0), variance, covariance, magnitude.mean(0)
