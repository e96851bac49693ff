"""Gaussian corruption x_t = alpha(t) x_0 + sigma(t) eps, and what a network predicts of it.

EDM and VE (arXiv 2206.00364), variance preserving (arXiv 2011.13456; linear, cosine and
scaled-linear), and rectified flow (arXiv 2209.03003) are one type. Every kind of prediction is an
affine map of the clean sample,

    x_0 = c_skip(t) x_t + c_out(t) output,

so any kind converts into any other exactly, and "mean squared error in the space of kind k" is the
loss weight 1 / c_out_k(t)^2 on ||x_0_hat - x_0||^2. Discretisation belongs to the samplers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

TimeFunction = Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]

PREDICTIONS = ("data", "noise", "scaled_score", "v", "velocity", "edm")


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
    """A noise schedule together with the way a network is asked about it.

    Build one with `edm`, `ve`, `vp`, `vp_from_betas` or `flow`; equal arguments give the same
    object, so a process is a static (hashable) argument of a compiled function.

    Attributes:
      name: what error messages call it.
      alpha: t -> signal scale, at least 0.
      sigma: t -> noise scale, at least 0.
      time_of_log_snr: inverse of `log_snr`.
      t_min: smallest time that training sees (above 0).
      t_max: largest time; sampling starts there.
      prediction: one of `PREDICTIONS`, what the network's output means.
      weighting: a prediction kind, whose space the squared error is uniform in.
      sigma_data: standard deviation of the data, used by the "edm" kind and by `c_in`.
      scale_input: whether `c_in` normalises the network input to unit variance.
      c_noise: t -> the number by which the network is told the time.
      sample_time: (key, shape) -> training times.
    """

    name: str
    alpha: TimeFunction
    sigma: TimeFunction
    time_of_log_snr: TimeFunction
    t_min: float
    t_max: float
    prediction: str
    weighting: str
    sigma_data: float
    scale_input: bool
    c_noise: TimeFunction
    sample_time: Callable[[PRNGKeyArray, tuple[int, ...]], Array]

    def __post_init__(self):
        for field in ("prediction", "weighting"):
            if getattr(self, field) not in PREDICTIONS:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; it must be one of {PREDICTIONS}"
                )
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data is {self.sigma_data}; it must be positive")
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"needs 0 <= t_min < t_max, not {self.t_min} and {self.t_max}")

    def log_snr(self, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """log(alpha(t)^2 / sigma(t)^2), decreasing in t."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def c_in(self, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Scale of the network input: 1/sqrt(alpha^2 sigma_data^2 + sigma^2), or 1."""
        if not self.scale_input:
            return jnp.ones_like(t)
        return 1 / jnp.sqrt((self.alpha(t) * self.sigma_data) ** 2 + self.sigma(t) ** 2)

    def coefficients(
        self, t: Float[Array, "*batch"], prediction: str | None = None
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """(c_skip, c_out) such that x_0 = c_skip x_t + c_out output.

        Args:
          t: times.
          prediction: one of `PREDICTIONS`; this process's own if None. With eps the noise:
            "data" x_0; "noise" eps; "scaled_score" -eps (sigma times the score);
            "v" alpha eps - sigma x_0 (arXiv 2202.00512);
            "velocity" dx_t/dt = alpha' x_0 + sigma' eps;
            "edm" the unit-variance target F of arXiv 2206.00364, Eq. 7.
        """
        kind = self.prediction if prediction is None else prediction
        alpha, sigma = self.alpha(t), self.sigma(t)
        if kind == "data":
            return jnp.zeros_like(t), jnp.ones_like(t)
        if kind == "noise":
            return 1 / alpha, -sigma / alpha
        if kind == "scaled_score":
            return 1 / alpha, sigma / alpha
        if kind == "v":
            square = alpha**2 + sigma**2
            return alpha / square, -sigma / square
        if kind == "velocity":
            d_alpha, d_sigma = self.derivatives(t)
            wronskian = alpha * d_sigma - sigma * d_alpha
            return d_sigma / wronskian, -sigma / wronskian
        if kind == "edm":
            square = (alpha * self.sigma_data) ** 2 + sigma**2
            return alpha * self.sigma_data**2 / square, sigma * self.sigma_data / jnp.sqrt(square)
        raise ValueError(f"prediction is {kind!r}; it must be one of {PREDICTIONS}")

    def derivatives(
        self, t: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """(d alpha / dt, d sigma / dt)."""
        one = jnp.ones_like(t)
        return jax.jvp(self.alpha, (t,), (one,))[1], jax.jvp(self.sigma, (t,), (one,))[1]

    def loss_weight(self, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Weight of ||x_0_hat - x_0||^2: 1/c_out^2 of the kind named by `weighting`."""
        return self.coefficients(t, self.weighting)[1] ** -2

    def diffuse(
        self,
        x0: Float[Array, "batch *dims"],
        t: Float[Array, "batch"],
        noise: Float[Array, "batch *dims"],
    ) -> Float[Array, "batch *dims"]:
        """x_t = alpha(t) x_0 + sigma(t) noise."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def to_data(
        self,
        output: Float[Array, "batch *dims"],
        x: Float[Array, "batch *dims"],
        t: Float[Array, "batch"],
        prediction: str | None = None,
    ) -> Float[Array, "batch *dims"]:
        """The clean sample that an output of the given kind stands for."""
        c_skip, c_out = self.coefficients(t, prediction)
        return expand(c_skip, x) * x + expand(c_out, x) * output

    def from_data(
        self,
        x0: Float[Array, "batch *dims"],
        x: Float[Array, "batch *dims"],
        t: Float[Array, "batch"],
        prediction: str | None = None,
    ) -> Float[Array, "batch *dims"]:
        """The output of the given kind that stands for `x0`; inverse of `to_data`."""
        c_skip, c_out = self.coefficients(t, prediction)
        return (x0 - expand(c_skip, x) * x) / expand(c_out, x)


def expand(value: Float[Array, "..."], like: Float[Array, "batch *dims"]) -> Array:
    """Appends axes of size 1 to `value` ([batch] or scalar) until it broadcasts against `like`."""
    if value.ndim == 0:
        return value
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def same_noise_level(
    source: GaussianProcess, target: GaussianProcess, t: Float[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Where a point of one process lies in another, exactly.

    Args:
      source: the process that `t` is a time of.
      target: the process to move to.
      t: times of `source`; where alpha(t) = 0, `target` must reach alpha = 0 too.

    Returns:
      (s, scale) with equal signal-to-noise ratio: if x_t follows `source` then scale * x_t follows
      `target` at time s.
    """
    s = target.time_of_log_snr(source.log_snr(t))
    # The ratio of alphas and that of sigmas are equal; this form needs neither to be positive.
    return s, jnp.hypot(target.alpha(s), target.sigma(s)) / jnp.hypot(
        source.alpha(t), source.sigma(t)
    )


@functools.cache
def edm(
    *,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
) -> GaussianProcess:
    """EDM (arXiv 2206.00364, Table 1): x_t = x_0 + t eps.

    In training ln t ~ N(log_sigma_mean, log_sigma_std^2). The network is told ln(t)/4; its
    output is the unit-variance target F; the loss is uniform in F.
    """
    return GaussianProcess(
        name="edm",
        alpha=jnp.ones_like,
        sigma=_identity,
        time_of_log_snr=_noise_to_signal,
        t_min=sigma_min,
        t_max=sigma_max,
        prediction="edm",
        weighting="edm",
        sigma_data=sigma_data,
        scale_input=True,
        c_noise=lambda t: jnp.log(t) / 4,
        sample_time=lambda key, shape: jnp.exp(
            log_sigma_mean + log_sigma_std * jax.random.normal(key, shape)
        ),
    )


@functools.cache
def ve(*, sigma_min: float = 0.02, sigma_max: float = 100.0) -> GaussianProcess:
    """Variance exploding (arXiv 2011.13456, in the form of arXiv 2206.00364, Table 1).

    In training ln t is uniform. The network is told ln(t/2); its output is the scaled score; the
    loss is uniform in the noise.
    """
    low, high = math.log(sigma_min), math.log(sigma_max)
    return GaussianProcess(
        name="ve",
        alpha=jnp.ones_like,
        sigma=_identity,
        time_of_log_snr=_noise_to_signal,
        t_min=sigma_min,
        t_max=sigma_max,
        prediction="scaled_score",
        weighting="scaled_score",
        sigma_data=1.0,
        scale_input=False,
        c_noise=lambda t: jnp.log(t / 2),
        sample_time=lambda key, shape: jnp.exp(
            jax.random.uniform(key, shape, minval=low, maxval=high)
        ),
    )


@functools.cache
def vp(
    schedule: str = "linear",
    *,
    prediction: str = "noise",
    weighting: str | None = None,
    sigma_data: float = 1.0,
    beta_min: float | None = None,
    beta_max: float | None = None,
    t_min: float = 1e-3,
    time_scale: float = 999.0,
) -> GaussianProcess:
    """Variance preserving, alpha^2 + sigma^2 = 1, time in [0, 1], uniform in training.

    Args:
      schedule: "linear" (beta grows linearly, arXiv 2011.13456 Eq. 32; 0.1 to 20), "scaled_linear"
        (sqrt(beta) grows linearly, latent diffusion, arXiv 2112.10752; 0.85 to 12), or "cosine"
        (arXiv 2102.09672 Eq. 17 with s = 0.008).
      prediction: what the network's output means.
      weighting: the kind whose squared error is uniform; `prediction` if None.
      sigma_data: standard deviation of the data (used by the "edm" kind only).
      beta_min: beta(0) per unit of time; the schedule's default if None.
      beta_max: beta(1) per unit of time; the schedule's default if None.
      t_min: smallest training time.
      time_scale: the network is told time_scale * t.
    """
    if schedule == "cosine":
        if beta_min is not None or beta_max is not None:
            raise ValueError("beta_min and beta_max do not apply to schedule='cosine'")
        alpha, sigma, inverse, t_max = _cosine_schedule()
    elif schedule in ("linear", "scaled_linear"):
        default_min, default_max = (0.1, 20.0) if schedule == "linear" else (0.85, 12.0)
        build = _linear_integral if schedule == "linear" else _scaled_linear_integral
        integral, integral_inverse = build(
            default_min if beta_min is None else beta_min,
            default_max if beta_max is None else beta_max,
        )
        alpha = lambda t: jnp.exp(-integral(t) / 2)  # noqa: E731
        sigma = lambda t: jnp.sqrt(-jnp.expm1(-integral(t)))  # noqa: E731
        # alpha^2 = sigmoid(log_snr), hence integral = -log alpha^2 = softplus(-log_snr).
        inverse = lambda log_snr: integral_inverse(jax.nn.softplus(-log_snr))  # noqa: E731
        t_max = 1.0
    else:
        raise ValueError(f"schedule is {schedule!r}; it must be linear, scaled_linear or cosine")
    return GaussianProcess(
        name=f"vp_{schedule}",
        alpha=alpha,
        sigma=sigma,
        time_of_log_snr=inverse,
        t_min=t_min,
        t_max=t_max,
        prediction=prediction,
        weighting=prediction if weighting is None else weighting,
        sigma_data=sigma_data,
        scale_input=False,
        c_noise=lambda t: time_scale * t,
        sample_time=lambda key, shape: jax.random.uniform(key, shape, minval=t_min, maxval=t_max),
    )


def vp_from_betas(
    betas: Sequence[float], *, prediction: str = "noise", weighting: str | None = None
) -> GaussianProcess:
    """The process of a discrete-time model (DDPM, arXiv 2006.11239), exact at its own steps.

    Args:
      betas: variances of the forward steps 0..T-1, each in (0, 1).
      prediction: what the network's output means.
      weighting: the kind whose squared error is uniform; `prediction` if None.

    Returns:
      A process in which step n = 0..T-1 of the model is time t = n + 1, since time 0 is clean data
      (the network is told n = t - 1). Between steps log(sigma/alpha) is interpolated linearly,
      below time 1 sigma/alpha is proportional to t. Training times are the integers 1..T.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("betas must be a vector of at least two values in (0, 1)")
    return _vp_from_betas(tuple(betas.tolist()), prediction, weighting or prediction)


@functools.cache
def _vp_from_betas(betas: tuple[float, ...], prediction: str, weighting: str) -> GaussianProcess:
    log_alpha_squared = np.cumsum(np.log1p(-np.asarray(betas)))
    log_snr = log_alpha_squared - np.log(-np.expm1(log_alpha_squared))
    steps = np.arange(1, len(betas) + 1, dtype=np.float32)
    table = log_snr.astype(np.float32)

    def of_time(t):
        return jnp.interp(t, steps, table) - 2 * jnp.log(jnp.minimum(t, 1))

    def inverse(value):
        below_one = jnp.exp(jnp.minimum(table[0] - value, 0) / 2)
        return jnp.interp(value, table[::-1], steps[::-1]) * below_one

    return GaussianProcess(
        name=f"vp_discrete_{len(betas)}",
        alpha=lambda t: jnp.sqrt(jax.nn.sigmoid(of_time(t))),
        sigma=lambda t: jnp.sqrt(jax.nn.sigmoid(-of_time(t))),
        time_of_log_snr=inverse,
        t_min=1.0,
        t_max=float(len(betas)),
        prediction=prediction,
        weighting=weighting,
        sigma_data=1.0,
        scale_input=False,
        c_noise=lambda t: t - 1,
        sample_time=lambda key, shape: jax.random.randint(key, shape, 1, len(betas) + 1).astype(
            jnp.float32
        ),
    )


@functools.cache
def flow(
    *,
    prediction: str = "velocity",
    weighting: str | None = None,
    sigma_data: float = 1.0,
    t_min: float = 1e-3,
    logit_mean: float = 0.0,
    logit_std: float | None = None,
    time_scale: float = 1000.0,
) -> GaussianProcess:
    """Rectified flow (arXiv 2209.03003): x_t = (1 - t) x_0 + t eps, t in [0, 1].

    Args:
      prediction: what the network's output means; "velocity" is eps - x_0.
      weighting: the kind whose squared error is uniform; `prediction` if None.
      sigma_data: standard deviation of the data (used by the "edm" kind only).
      t_min: training times lie in [t_min, 1 - t_min].
      logit_mean: mean of logit(t) where `logit_std` is given.
      logit_std: standard deviation of logit(t) (arXiv 2403.03206, Eq. 19); uniform times if None.
      time_scale: the network is told time_scale * t.
    """

    def sample_time(key, shape):
        if logit_std is None:
            return jax.random.uniform(key, shape, minval=t_min, maxval=1 - t_min)
        t = jax.nn.sigmoid(logit_mean + logit_std * jax.random.normal(key, shape))
        return jnp.clip(t, t_min, 1 - t_min)

    return GaussianProcess(
        name="flow",
        alpha=lambda t: 1 - t,
        sigma=_identity,
        time_of_log_snr=lambda log_snr: jax.nn.sigmoid(-log_snr / 2),
        t_min=t_min,
        t_max=1.0,
        prediction=prediction,
        weighting=prediction if weighting is None else weighting,
        sigma_data=sigma_data,
        scale_input=False,
        c_noise=lambda t: time_scale * t,
        sample_time=sample_time,
    )


def _identity(t):
    return jnp.asarray(t) * 1.0


def _noise_to_signal(log_snr):
    return jnp.exp(-log_snr / 2)


def _linear_integral(beta_min: float, beta_max: float):
    """int_0^t beta for linear beta, and its inverse."""
    slope = beta_max - beta_min

    def integral(t):
        return t * (beta_min + slope * t / 2)

    def inverse(value):
        # The positive root in the form that keeps digits for small values.
        return 2 * value / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * value))

    return integral, inverse


def _scaled_linear_integral(beta_min: float, beta_max: float):
    """int_0^t beta for linear sqrt(beta), and its inverse."""
    root = math.sqrt(beta_min)
    slope = math.sqrt(beta_max) - root

    def integral(t):
        return t * (beta_min + slope * t * (root + slope * t / 3))

    def inverse(value):
        return (jnp.cbrt(root**3 + 3 * slope * value) - root) / slope

    return integral, inverse


def _cosine_schedule(offset: float = 0.008, largest_angle: float = 0.9999):
    """alpha = cos(angle(t)) / cos(angle(0)), cut where beta would diverge."""
    start = offset / (1 + offset) * math.pi / 2

    def angle(t):
        return (t + offset) / (1 + offset) * math.pi / 2

    def alpha(t):
        return jnp.cos(angle(t)) / math.cos(start)

    def sigma(t):
        # With angle = start + turn: cos^2(start) - cos^2(angle) = sin(turn) sin(turn + 2 start),
        # free of cancellation and 0 at time 0.
        turn = t / (1 + offset) * math.pi / 2
        return jnp.sqrt(jnp.sin(turn) * jnp.sin(turn + 2 * start)) / math.cos(start)

    def inverse(log_snr):
        # cos(angle) = alpha cos(start), and `sigma` read backwards gives the sine of the turn.
        signal, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        cosine = jnp.sqrt(signal) * math.cos(start)
        sine = jnp.sqrt(noise + signal * math.sin(start) ** 2)
        sine_turn = (
            noise * math.cos(start) ** 2 / (sine * math.cos(start) + cosine * math.sin(start))
        )
        cosine_turn = cosine * math.cos(start) + sine * math.sin(start)
        return jnp.arctan2(sine_turn, cosine_turn) * (1 + offset) * 2 / math.pi

    return alpha, sigma, inverse, largest_angle
