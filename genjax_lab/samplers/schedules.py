"""Where samplers for Gaussian processes evaluate the network: decreasing grids of times.

Grids are made by numpy, which unlike JAX compiles nothing anew for another number of steps, and at
once, so that a sampler may be built inside of a function that JAX compiles.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess

SPACINGS = ("karras", "log_snr", "time")


def time_steps(
    process: GaussianProcess,
    num_steps: int,
    *,
    spacing: str | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    rho: float = 7.0,
) -> Float[Array, "num_steps+1"]:
    """t_0 > t_1 > ... > t_{N-1} >= t_min, followed by 0.

    Args:
      process: the process whose times these are.
      num_steps: N, at least 1.
      spacing: "karras" (uniform in (sigma/alpha)^(1/rho), arXiv 2206.00364 Eq. 5),
        "log_snr" (uniform in log(alpha/sigma)) or "time" (uniform in t, where t_min is not used).
        None is "karras", and "time" where alpha(t_max) = 0.
      t_min: last time before 0; the process's own if None.
      t_max: first time; the process's own if None. The first two spacings need alpha(t_max) > 0.
      rho: exponent of the "karras" spacing.

    Raises:
      ValueError: if `spacing` or `num_steps` is not as above.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    t_min = process.t_min if t_min is None else t_min
    t_max = process.t_max if t_max is None else t_max
    if not 0 <= t_min < t_max:
        raise ValueError(f"needs 0 <= t_min < t_max, not {t_min} and {t_max}")
    if spacing is None:
        spacing = "karras" if at_once(process.alpha, [t_max])[0] > 0 else "time"
    if spacing == "time":
        return constant(np.linspace(t_max, 0.0, num_steps + 1))
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {SPACINGS}")
    ends = at_once(process.log_snr, [t_max, t_min])
    if not np.all(np.isfinite(ends)):
        raise ValueError(
            f"spacing={spacing!r} needs a finite signal-to-noise ratio at t_max={t_max} and "
            f"t_min={t_min} of {process.name!r}; give others, or spacing='time'"
        )
    fraction = np.arange(num_steps) / max(num_steps - 1, 1)
    if spacing == "karras":
        first, last = np.exp(-ends / 2) ** (1 / rho)
        log_snr = -2 * rho * np.log(first + fraction * (last - first))
    else:
        log_snr = ends[0] + fraction * (ends[1] - ends[0])
    return constant(np.append(at_once(process.time_of_log_snr, log_snr), 0.0))


def resolve_times(
    process: GaussianProcess,
    num_steps: int,
    spacing: str | None,
    times: Float[Array, "num_steps+1"] | None,
) -> Float[np.ndarray, "num_steps+1"]:
    """The grid that a sampler was given, checked, or the one that it asked for by name."""
    if times is None:
        times = time_steps(process, num_steps, spacing=spacing)
    times = np.asarray(times, np.float64)
    if times.shape != (num_steps + 1,):
        raise ValueError(f"times has shape {times.shape}; it must be ({num_steps + 1},)")
    if not np.all(times[:-1] > times[1:]) or not times[-1] >= 0:
        raise ValueError("times must decrease strictly and not fall below 0")
    return times


def at_once(function: Callable[[Array], Array], values: Float[np.ndarray, "num"]) -> np.ndarray:
    """A process's function of known values, in float64, evaluated even while JAX traces."""
    with jax.ensure_compile_time_eval():
        return np.asarray(function(jnp.asarray(values, float)), np.float64)


def constant(values: Float[np.ndarray, "*dims"]) -> Float[Array, "*dims"]:
    """Known values in the platform's precision, an array and no tracer even while JAX traces."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(values, float)
