"""DPM-Solver-v3, second order, with predictor and corrector (arXiv 2310.13268).

With lambda = log(alpha/sigma) and y = x/alpha the probability-flow ODE is dy/dlambda =
-e^-lambda eps. Statistics l, s, b of the model, functions of lambda (see `ModelStatistics`),
split it into a part that is solved exactly and a rest g that hardly moves (Section 3.1):

    dy/dlambda = -l y - f,    f = (1 - l) y - x_0_hat = e^S (g + int e^-S b dlambda),

with S = int s dlambda from the step's start. A predictor step takes g to be linear through the two
last evaluations, a corrector step through the two ends of the interval (Section 3.2); the
evaluation at the predicted point serves both, so a step costs one evaluation. With l = 1, s = 0,
b = 0, which needs no statistics at all, g is -x_0_hat and this is a data-prediction solver like
DPM-Solver++ with a corrector.

The statistics live on a grid of lambda, to whose points the steps are moved. Orders above two and
the paper's pseudo-order differences are left out.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from genjax_lab.processes.gaussian import GaussianProcess
from genjax_lab.samplers.base import Denoiser, Sampler
from genjax_lab.samplers.denoising import initial_state, predict_at
from genjax_lab.samplers.model_statistics import ModelStatistics, data_prediction_statistics
from genjax_lab.samplers.schedules import at_once, constant, resolve_times, time_steps


class _Weights(NamedTuple):
    """Of every step from lambda_s to lambda_t.

    y_t = start y_s - constant g_s - linear dg/dlambda - offset, and with the step's own S and
    int e^-S b, g_s = f_s and g_t = end f_t - end_offset.

    Attributes:
      l: at lambda_s.
      length: lambda_t - lambda_s.
      is_second_order: whether the predictor extrapolates g.
      is_corrected: whether the corrector renews y_s first.
    """

    start: Float[Array, "num_steps *dims"]
    constant: Float[Array, "num_steps *dims"]
    linear: Float[Array, "num_steps *dims"]
    offset: Float[Array, "num_steps *dims"]
    end: Float[Array, "num_steps *dims"]
    end_offset: Float[Array, "num_steps *dims"]
    l: Float[Array, "num_steps *dims"]  # noqa: E741 (the paper's symbol)
    length: Float[Array, "num_steps"]
    is_second_order: Bool[Array, "num_steps"]
    is_corrected: Bool[Array, "num_steps"]


def dpm_solver_v3(
    denoise: Denoiser,
    *,
    num_steps: int = 25,
    spacing: str | None = None,
    times: Float[Array, "num_steps+1"] | None = None,
    statistics: ModelStatistics | None = None,
    lower_order_final: bool = True,
) -> Sampler:
    """DPM-Solver-v3, second order; one evaluation for each of `num_steps` steps.

    Args:
      denoise: the denoiser.
      num_steps: number of steps.
      spacing: see `time_steps`.
      times: a decreasing grid; if None, `num_steps` intervals from the process's t_max to its
        t_min, where the paper's sampler ends. The last step of a grid that goes on to 0 returns
        alpha(0) x_0_hat. All other times are moved to the nearest point of the statistics.
      statistics: of the model; if None, `data_prediction_statistics` over the span of the times.
      lower_order_final: whether the last step is of first order; steadier for few steps.

    Raises:
      ValueError: if the statistics are malformed, the times leave their range, or two times fall
        upon one of their points.
    """
    process = denoise.process
    if times is None:
        times = np.asarray(time_steps(process, num_steps + 1, spacing=spacing))[:-1]
    times = resolve_times(process, num_steps, spacing, times)
    ends_clean = at_once(process.sigma, times)[-1] == 0
    noisy = times[:-1] if ends_clean else times
    if statistics is None:
        # A grid of two points at least, also where a single step starts and ends.
        last = noisy[-1] if len(noisy) > 1 else process.t_min
        statistics = data_prediction_statistics(process, t_max=noisy[0], t_min=last)
    statistics = _check(statistics)
    indices = _nearest(statistics, at_once(process.log_snr, noisy) / 2, num_steps)
    snapped = at_once(process.time_of_log_snr, 2 * statistics.half_log_snr[indices])
    times = constant(np.append(snapped, times[-1]) if ends_clean else snapped)
    weights = _weights(statistics, indices, ends_clean, lower_order_final)
    return Sampler(
        init=Partial(_init, denoise, times),
        predict=Partial(predict_at, denoise, times),
        transition=Partial(_transition, process, times, weights),
        num_steps=num_steps,
    )


def _check(statistics: ModelStatistics) -> ModelStatistics:
    statistics = ModelStatistics(*(np.asarray(part, np.float64) for part in statistics))
    grid = statistics.half_log_snr
    if grid.ndim != 1 or len(grid) < 2 or not np.all(np.diff(grid) > 0):
        raise ValueError("statistics.half_log_snr must be an increasing vector of several values")
    for name in ("l", "s", "b"):
        part = getattr(statistics, name)
        if part.shape != (*grid.shape, *statistics.l.shape[1:]) or not np.all(np.isfinite(part)):
            raise ValueError(
                f"statistics.{name} has shape {part.shape}; l, s and b must have one shape, with a "
                f"leading axis of {len(grid)}, and finite values"
            )
    return statistics


def _nearest(
    statistics: ModelStatistics, half_log_snr: Float[np.ndarray, "num"], num_steps: int
) -> Int[np.ndarray, "num"]:
    grid = statistics.half_log_snr
    half_cell = np.diff(grid).max() / 2
    if not np.all((half_log_snr > grid[0] - half_cell) & (half_log_snr < grid[-1] + half_cell)):
        raise ValueError(
            f"times reach from log(alpha/sigma) = {half_log_snr[0]:.4g} to {half_log_snr[-1]:.4g}; "
            f"the statistics cover {grid[0]:.4g} to {grid[-1]:.4g}"
        )
    indices = np.searchsorted((grid[1:] + grid[:-1]) / 2, half_log_snr)
    if not np.all(np.diff(indices) > 0):
        raise ValueError(
            f"num_steps={num_steps} puts two times upon one of the statistics' {len(grid)} points; "
            "take fewer steps, or statistics with more points (see data_prediction_statistics)"
        )
    return indices


def _weights(
    statistics: ModelStatistics,
    indices: Int[np.ndarray, "num"],
    ends_clean: bool,
    lower_order_final: bool,
) -> _Weights:
    steps = [_interval(statistics, *ends) for ends in itertools.pairwise(indices)]
    l_start = statistics.l[indices if ends_clean else indices[:-1]]
    if ends_clean:
        # y_t = x_0_hat = (1 - l) y_s - f_s.
        zero = np.zeros_like(l_start[0])
        steps.append((1 - l_start[-1], zero + 1, zero, zero, zero + 1, zero, 1.0))
    *parts, length = (constant(np.stack(part)) for part in zip(*steps, strict=True))
    step = np.arange(len(steps))
    is_second_order = (step > 0) & ((step < len(steps) - 1) | (not lower_order_final))
    return _Weights(
        *parts, constant(l_start), length, jnp.asarray(is_second_order), jnp.asarray(step > 1)
    )


def _interval(statistics: ModelStatistics, first: int, last: int) -> tuple[np.ndarray, ...]:
    """The integrals over grid points first..last by which one step is made."""
    part = ModelStatistics(*(array[first : last + 1] for array in statistics))
    delta = part.half_log_snr - part.half_log_snr[0]
    delta = delta.reshape((-1,) + (1,) * (part.l.ndim - 1))
    l_integral = _cumulative(part.l, 0 * part.l, delta)
    s_integral = _cumulative(part.s, 0 * part.s, delta)
    b_integral = _cumulative(part.b, -s_integral, delta)
    exponent = l_integral - l_integral[-1] + s_integral
    return (
        np.exp(-l_integral[-1]),
        _cumulative(np.ones_like(exponent), exponent, delta)[-1],
        _cumulative(delta + 0 * exponent, exponent, delta)[-1],
        _cumulative(b_integral, exponent, delta)[-1],
        np.exp(-s_integral[-1]),
        b_integral[-1],
        delta[-1].item(),
    )


def _cumulative(
    factor: Float[np.ndarray, "num *dims"],
    exponent: Float[np.ndarray, "num *dims"],
    position: Float[np.ndarray, "num *ones"],
) -> Float[np.ndarray, "num *dims"]:
    """int factor e^exponent up to every point, exact where both are linear between points."""
    rise = np.diff(exponent, axis=0)
    # int_0^1 e^(r u) du and int_0^1 u e^(r u) du, by series where the closed forms cancel.
    small = np.abs(rise) < 1e-3
    safe = np.where(small, 1.0, rise)
    whole = np.where(small, 1 + rise / 2 + rise**2 / 6, np.expm1(safe) / safe)
    first = np.where(
        small, 1 / 2 + rise / 3 + rise**2 / 8, (np.exp(safe) * (safe - 1) + 1) / safe**2
    )
    cells = np.exp(exponent[:-1]) * (factor[:-1] * whole + np.diff(factor, axis=0) * first)
    total = np.cumsum(np.diff(position, axis=0) * cells, axis=0)
    return np.concatenate([np.zeros_like(total[:1]), total])


def _init(denoise, times, keys, shape, condition):
    state = initial_state(denoise, times[0], keys, shape, condition)
    zeros = jnp.zeros_like(state.sample)
    return state._replace(example=state.example._replace(history=(zeros, zeros)))


def _transition(process: GaussianProcess, times, weights: _Weights, keys, state, x0):
    del keys
    step = state.step
    here = jax.tree.map(lambda array: array[step], weights)
    before = jax.tree.map(lambda array: array[jnp.maximum(step - 1, 0)], weights)
    y_before, f_before = state.example.history
    y = state.sample / process.alpha(times[step])
    f = (1 - here.l) * y - x0
    slope = (before.end * f - before.end_offset - f_before) / before.length
    corrected = _step(before, y_before, f_before, slope)
    y = jnp.where(here.is_corrected, corrected, y)
    slope = (f - (f_before + before.end_offset) / before.end) / before.length
    slope = jnp.where(here.is_second_order, slope, 0.0)
    x = process.alpha(times[step + 1]) * _step(here, y, f, slope)
    return state._replace(example=state.example._replace(sample=x, history=(y, f)))


def _step(weights: _Weights, y, g, slope):
    return weights.start * y - weights.constant * g - weights.linear * slope - weights.offset
