"""Log-ratios by noise level, against two Gaussians of which they are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from genjax_lab import processes
from genjax_lab.objectives import log_ratios_by_noise_level

PROCESS = processes.flow(prediction="data", weighting="velocity")  # the weight is 1 / t^2
MEAN, REFERENCE_MEAN, STD = 0.6, -0.2, 0.5
ROWS, DIMENSIONS = 20_000, 2
BORDERS = (-2.0, -1.0, 0.5, 1.0)


def apply(variables, x, c_noise, label, *, train):
    """The best estimate of N(mean, STD^2), the mean being that of the class where there are any."""
    assert train is False
    mean = variables["params"]["mean"]
    if label is not None:
        mean = mean[label][:, None, None, None]
    t = (c_noise / 1000)[:, None, None, None]
    gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    return mean + gain * (x - (1 - t) * mean)


def of_mean(mean):
    return {"params": {"mean": jnp.asarray(mean, jnp.float32)}}


def gaussian(mean, seed, rows=ROWS):
    noise = np.random.default_rng(seed).normal(size=(rows, 1, DIMENSIONS, 1))
    return (mean + STD * noise).astype(np.float32)


def table(variables, reference, rows=ROWS, log_sigma=BORDERS, **options):
    images = {"real": gaussian(MEAN, 0, rows), "fake": gaussian(REFERENCE_MEAN, 1, rows)}
    return log_ratios_by_noise_level(
        apply,
        PROCESS,
        variables,
        reference,
        jax.random.key(0),
        log_sigma=log_sigma,
        **(images | options),
    )


def expected(low, high):
    """(mean, standard deviation, accuracy) for data; for samples the mean has the other sign.

    With the gain g and c = 1 - g alpha the two errors are c (m - x) + g sigma eps, so that the
    difference of their squares is linear in x and eps.
    """
    level = np.linspace(low, high, 2001)
    t = 1 / (1 + np.exp(-level))
    gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
    c, weight, gap = 1 - gain * (1 - t), t**-2, MEAN - REFERENCE_MEAN
    mean = DIMENSIONS * weight * (c * gap) ** 2
    scatter = 2 * weight * c * gap * np.sqrt(DIMENSIONS * ((c * STD) ** 2 + (gain * t) ** 2))
    within, between = np.mean(scatter**2), np.var(mean)
    return np.mean(mean), np.sqrt(within + between), np.mean(norm.cdf(mean / scatter))


def test_every_bin_has_the_log_ratios_of_its_noise_levels():
    found = table(of_mean(MEAN), of_mean(REFERENCE_MEAN))
    np.testing.assert_allclose(found.log_sigma, BORDERS)
    for i in range(3):
        mean, std, accuracy = expected(*BORDERS[i : i + 2])
        # 5 standard errors of each; that of a standard deviation with kurtosis up to 6.
        margin = 5 * std / np.sqrt(ROWS)
        np.testing.assert_allclose(found.real_mean[i], mean, atol=margin)
        np.testing.assert_allclose(found.fake_mean[i], -mean, atol=margin)
        np.testing.assert_allclose(found.real_std[i], std, atol=1.2 * margin)
        np.testing.assert_allclose(found.fake_std[i], std, atol=1.2 * margin)
        np.testing.assert_allclose(found.accuracy[i], accuracy, atol=2.5 / np.sqrt(2 * ROWS))
    per_dimension = table(of_mean(MEAN), of_mean(REFERENCE_MEAN), reduce="mean")
    np.testing.assert_allclose(found.real_mean, DIMENSIONS * per_dimension.real_mean, rtol=1e-4)


def test_equal_networks_discriminate_nowhere():
    found = table(of_mean(MEAN), of_mean(MEAN), rows=16)
    for name, column in found._asdict().items():
        if name != "log_sigma":
            np.testing.assert_array_equal(column, np.full(3, 0.5 if name == "accuracy" else 0.0))


def test_data_and_samples_have_their_own_labels():
    labels = {"real_label": np.zeros(16, np.int32), "fake_label": np.ones(16, np.int32)}
    found = table(of_mean([0.6, 0.1]), of_mean([-0.2, 0.1]), rows=16, **labels)
    assert np.all(found.real_mean != 0)
    np.testing.assert_array_equal(found.fake_mean, np.zeros(3))
    with pytest.raises(ValueError, match="both"):
        table(of_mean([0.6]), of_mean([0.1]), rows=16, real_label=labels["real_label"])


@pytest.mark.parametrize("log_sigma", [(1.0,), (1.0, 0.0), (0.0, 0.0), ((0.0, 1.0),)])
def test_borders_must_increase(log_sigma):
    with pytest.raises(ValueError, match="increasing borders"):
        table(of_mean(0.0), of_mean(0.0), rows=2, log_sigma=log_sigma)
