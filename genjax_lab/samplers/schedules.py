"""Where samplers for Gaussian processes evaluate the network: decreasing grids of times."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax_lab.processes.gaussian import GaussianProcess

SPACINGS = ("karras", "log_snr", "time")


def time_steps(
    process: GaussianProcess,
    num_steps: int,
    *,
    spacing: str = "karras",
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
    if spacing == "time":
        return jnp.linspace(t_max, 0.0, num_steps + 1)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {SPACINGS}")
    ends = process.log_snr(jnp.array([t_max, t_min]))
    if not bool(jnp.all(jnp.isfinite(ends))):
        raise ValueError(
            f"spacing={spacing!r} needs a finite signal-to-noise ratio at t_max={t_max} and "
            f"t_min={t_min} of {process.name!r}; give others, or spacing='time'"
        )
    fraction = jnp.arange(num_steps) / max(num_steps - 1, 1)
    if spacing == "karras":
        first, last = jnp.exp(-ends / 2) ** (1 / rho)
        noise_to_signal = (first + fraction * (last - first)) ** rho
        log_snr = -2 * jnp.log(noise_to_signal)
    else:
        log_snr = ends[0] + fraction * (ends[1] - ends[0])
    return jnp.append(process.time_of_log_snr(log_snr), 0.0)


def resolve_times(
    process: GaussianProcess,
    num_steps: int,
    spacing: str,
    times: Float[Array, "num_steps+1"] | None,
) -> Float[Array, "num_steps+1"]:
    """The grid that a sampler was given, checked, or the one that it asked for by name."""
    if times is None:
        return time_steps(process, num_steps, spacing=spacing)
    times = jnp.asarray(times, float)
    if times.shape != (num_steps + 1,):
        raise ValueError(f"times has shape {times.shape}; it must be ({num_steps + 1},)")
    if not bool(jnp.all(times[:-1] > times[1:])) or not bool(times[-1] >= 0):
        raise ValueError("times must decrease strictly and not fall below 0")
    return times
