"""Which noise levels tell data from samples: log-ratios in bins of log sigma.

A diffusion model's log-ratio (arXiv 2503.01103) is a mean over noise levels of a difference of two
denoising errors. Where its means of data and of samples lie apart by more than they scatter, a
level discriminates; that says which law of training times a round should have.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from genjax_lab.objectives.discriminative_denoising import paired, paired_images
from genjax_lab.objectives.likelihood import diffusion_log_likelihood
from genjax_lab.objectives.log_ratio import paired_log_likelihoods
from genjax_lab.processes.gaussian import GaussianProcess


class NoiseLevelTable(NamedTuple):
    """Log-ratios by noise level; every row is a bin.

    Attributes:
      log_sigma: the bins' borders, log(sigma(t) / alpha(t)).
      real_mean, real_std: mean and standard deviation of the log-ratio of data.
      fake_mean, fake_std: the same of samples.
      accuracy: share of rows whose log-ratio has the right sign, positive for data; ties are half
        right.
    """

    log_sigma: Float[Array, "bins+1"]
    real_mean: Float[Array, "bins"]
    real_std: Float[Array, "bins"]
    fake_mean: Float[Array, "bins"]
    fake_std: Float[Array, "bins"]
    accuracy: Float[Array, "bins"]


def log_ratios_by_noise_level(
    apply: Callable[..., Array],
    process: GaussianProcess,
    variables: PyTree,
    reference: PyTree,
    key: PRNGKeyArray,
    *,
    real: Float[Array, "num *dims"],
    fake: Float[Array, "num *dims"],
    log_sigma: Sequence[float],
    real_label: Int[Array, "num"] | None = None,
    fake_label: Int[Array, "num"] | None = None,
    reduce: str = "sum",
) -> NoiseLevelTable:
    """The log-ratios of data and samples in each of some ranges of noise.

    In every bin each image and each sample is evaluated once, at a level of its own that is uniform
    in log(sigma / alpha); row i of both, network and reference share it and the noise.

    Args:
      apply: as for `ddo_denoising`.
      process: schedule, prediction kind and weighting.
      variables: of the network.
      reference: of the frozen one, in the same structure.
      key: of levels and noise.
      real: data; held out if generalisation is asked for.
      fake: samples of the reference, as many.
      log_sigma: borders of the bins, log(sigma / alpha), at least two, increasing.
      real_label: classes of the data, or None.
      fake_label: classes of the samples, given if those of the data are.
      reduce: "sum" or "mean" over dimensions.

    Raises:
      ValueError: if `log_sigma` is not as described, the arrays of data and samples do not match or
        are no float images, the two sets of variables differ in structure, or for another `reduce`.
    """
    borders = np.asarray(log_sigma, np.float32)
    if borders.ndim != 1 or len(borders) < 2 or not np.all(np.diff(borders) > 0):
        raise ValueError(
            f"log_sigma must be at least two increasing borders of bins, got {log_sigma!r}"
        )
    batch = {"image": real, "fake_image": fake, "label": real_label, "fake_label": fake_label}
    batch = {name: value for name, value in batch.items() if value is not None}
    images, samples, label = paired_images(batch)
    inputs = (variables, reference, images, samples, label)
    columns = _columns(apply, process, reduce, key, jnp.asarray(borders), inputs)
    return NoiseLevelTable(jnp.asarray(borders), *columns)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _columns(apply, process, reduce, key, borders, inputs):
    variables, reference, images, samples, label = inputs
    log_likelihood = diffusion_log_likelihood(apply, process, reduce=reduce)

    def of_bin(row):
        low, high, key = row
        level_key, noise_key = jax.random.split(key)
        levels = jax.random.uniform(level_key, images.shape[:1], minval=low, maxval=high)
        t = process.time_of_log_snr(-2 * levels)
        noise = jax.random.normal(noise_key, images.shape, images.dtype)
        rows = (paired(images, samples), label, paired(t, t), paired(noise, noise))
        own, frozen = paired_log_likelihoods(log_likelihood, variables, reference, *rows)
        delta = (own - frozen).reshape(-1, 2)
        signed = delta * jnp.array([1, -1], delta.dtype)
        accuracy = jnp.mean((jnp.sign(signed) + 1) / 2)
        mean, deviation = jnp.mean(delta, axis=0), jnp.std(delta, axis=0)
        return mean[0], deviation[0], mean[1], deviation[1], accuracy

    keys = jax.random.split(key, len(borders) - 1)
    return jax.lax.map(of_bin, (borders[:-1], borders[1:], keys))
