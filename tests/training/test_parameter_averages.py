"""Section "EMA": closed forms, and reconstruction after the fact against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.training.ema import (
    ema_from_config,
    exp_to_std,
    half_life_decay,
    half_life_ema,
    posthoc_ema,
    posthoc_weights,
    power_decay,
    power_ema,
    std_to_exp,
)


def averages_along(average, trajectory, batch_size=1):
    """The average after every step of a trajectory [steps, features], in one compiled scan."""

    def body(mean, inputs):
        step, params = inputs
        mean = average.update(mean, params, step, batch_size)
        return mean, mean

    steps = jnp.arange(1, len(trajectory) + 1)
    trajectory = jnp.asarray(trajectory, jnp.float32)
    return np.asarray(jax.lax.scan(body, average.init(trajectory[0]), (steps, trajectory))[1])


def trajectory(steps, features=4, seed=0):
    """Parameters that drift and jitter: a slow curve and a random walk."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(steps, features)), axis=0) / np.sqrt(steps)
    return walk + np.sqrt(np.arange(1, steps + 1) / steps)[:, None]


def power_weights(steps, gamma):
    """Weight of each past step: the profile's mass between consecutive steps."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1.0)
    return np.diff(edges)


def test_half_life_without_ramp_halves_the_past():
    batch_size, half_life = 50, 400
    values = np.concatenate([np.ones((1, 1)), np.zeros((16, 1))])
    means = averages_along(half_life_ema(half_life, rampup_ratio=None), values, batch_size)
    # The first vector entered with everything; it halves every 400 images = 8 steps.
    np.testing.assert_allclose(means[[8, 16], 0], [0.5, 0.25], rtol=1e-6)


def test_half_life_is_ramped_up_as_edm_does():
    half_life, ratio, batch = 10_000.0, 0.05, 256
    steps = np.arange(1, 2_000)
    seen = (steps - 1) * batch
    expected = 0.5 ** (batch / np.maximum(np.minimum(half_life, ratio * seen), 1e-8))
    np.testing.assert_allclose(
        half_life_decay(jnp.asarray(steps), batch, half_life, ratio), expected, rtol=1e-5
    )
    assert half_life_decay(1, batch, half_life, ratio) == 0.0


def test_std_to_exp_gives_the_published_exponents():
    np.testing.assert_allclose(
        std_to_exp(np.array([0.05, 0.10, 0.165])), [16.972, 6.937, 2.935], atol=5e-4
    )


@pytest.mark.parametrize("gamma", [0.01, 2.0, 16.972, 500.0])
def test_exp_to_std_is_the_width_of_the_profile_and_std_to_exp_its_inverse(gamma):
    tau = (np.arange(100_000) + 0.5) / 100_000
    weights = tau**gamma / np.sum(tau**gamma)
    mean = np.sum(weights * tau)
    width = np.sqrt(np.sum(weights * (tau - mean) ** 2))
    np.testing.assert_allclose(exp_to_std(gamma), width, rtol=1e-4)
    np.testing.assert_allclose(std_to_exp(exp_to_std(gamma)), gamma, rtol=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.2])
def test_power_average_weighs_the_past_by_its_profile(sigma_rel):
    steps = 300
    values = trajectory(steps)
    means = averages_along(power_ema(sigma_rel), values)
    gamma = float(std_to_exp(sigma_rel))
    for count in (1, 7, steps):
        np.testing.assert_allclose(
            means[count - 1], power_weights(count, gamma) @ values[:count], rtol=2e-5, atol=2e-6
        )
    assert power_decay(1, gamma) == 0.0


def snapshots(values, widths, every):
    steps, sigma_rels, means = [], [], []
    for sigma_rel in widths:
        along = averages_along(power_ema(sigma_rel), values)
        for step in range(every, len(values) + 1, every):
            steps.append(step)
            sigma_rels.append(sigma_rel)
            means.append({"w": along[step - 1]})
    return steps, sigma_rels, means


def test_posthoc_solution_reproduces_a_stored_profile_exactly():
    steps = [100, 200, 300, 400] * 2
    sigma_rels = [0.05] * 4 + [0.10] * 4
    for index in (1, 3, 6):
        weights = posthoc_weights(
            steps, sigma_rels, target_step=steps[index], target_sigma_rel=sigma_rels[index]
        )
        np.testing.assert_allclose(weights, np.eye(8)[index], atol=1e-9)


@pytest.mark.parametrize("target", [0.03, 0.07, 0.14])
def test_posthoc_average_of_an_unstored_width_matches_the_direct_one(target):
    values = trajectory(2_048, features=64)
    steps, sigma_rels, means = snapshots(values, (0.05, 0.10), every=128)
    direct = averages_along(power_ema(target), values)[-1]
    weights = posthoc_weights(steps, sigma_rels, target_step=2_048, target_sigma_rel=target)
    assert abs(weights.sum() - 1.0) < 1e-12
    rebuilt = posthoc_ema(weights, iter(means))["w"]
    assert rebuilt.dtype == np.float32
    stored = [means[index]["w"] for index, step in enumerate(steps) if step == 2_048]
    nearest = min(np.linalg.norm(mean - direct) for mean in stored)
    # Inside and beyond the stored widths the residual is 0.2 % of what the nearest stored average
    # would leave; 3 % at 0.03, whose narrow profile falls between two snapshots.
    tolerance = 0.05 if target < 0.05 else 0.005
    assert np.linalg.norm(rebuilt - direct) < tolerance * nearest


def test_posthoc_rejects_what_has_no_solution():
    with pytest.raises(ValueError, match="no pair twice"):
        posthoc_weights([10, 10], [0.1, 0.1], target_step=10, target_sigma_rel=0.1)
    with pytest.raises(ValueError, match="equally long"):
        posthoc_weights([10, 20], [0.1], target_step=10, target_sigma_rel=0.1)
    with pytest.raises(ValueError, match="target_step=30"):
        posthoc_weights([10, 20], [0.1, 0.1], target_step=30, target_sigma_rel=0.1)
    with pytest.raises(ValueError):
        posthoc_ema(np.ones(2), [{"w": np.ones(3)}])


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, np.nan])
def test_widths_without_an_exponent_are_rejected(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel"):
        power_ema(sigma_rel)


def test_averages_are_built_from_plain_settings():
    built = ema_from_config(
        {
            "short": {"half_life_images": 100.0, "rampup_ratio": None},
            "wide": {"sigma_rel": 0.1},
        }
    )
    values = trajectory(20)
    for name, direct in (("short", half_life_ema(100.0, None)), ("wide", power_ema(0.1))):
        np.testing.assert_array_equal(
            averages_along(built[name], values, 10), averages_along(direct, values, 10)
        )
    for bad in ({"decay": 0.999}, {"sigma_rel": 0.1, "half_life_images": 5.0}, {}):
        with pytest.raises(ValueError, match=r"ema\.name"):
            ema_from_config({"name": bad})
    with pytest.raises(ValueError, match="half_life_images"):
        half_life_ema(0.0)
