"""The denoising objective: its formula, its optimum, and what it hands to the network."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab import processes
from genjax_lab.objectives import denoising
from genjax_lab.objectives.denoising import squared_error
from genjax_lab.parallel import batch_sharding, make_mesh
from genjax_lab.processes.gaussian import PREDICTIONS, expand

BETAS = np.linspace(1e-4, 0.02, 1000)
MEAN, STD = 0.2, 0.3  # of the Gaussian data law


def images(shape=(16, 4, 4, 2), seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


class Recorder:
    """A network that remembers what it was asked."""

    def __init__(self, output=0.3):
        self.output = output

    def __call__(self, variables, x, c_noise, labels, *, train, rngs, **options):
        self.variables, self.x, self.c_noise, self.labels = variables, x, c_noise, labels
        self.train, self.rngs, self.options = train, rngs, options
        return jnp.full_like(x, self.output)


# The optimum


def lognormal(error):
    """Mean over ln sigma ~ N(-1.2, 1.2^2) by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return weights @ error(np.exp(-1.2 + 1.2 * nodes)) / weights.sum()


def uniform(error):
    """Mean over times in [0.001, 0.999] by the midpoint rule."""
    return np.mean(error(0.001 + 0.998 * (np.arange(100_000) + 0.5) / 100_000))


def vp_square(t):
    return np.exp(-(0.1 * t + 19.9 * t**2 / 2))


# Process, time told by c_noise, mean over training times of weight(t) * posterior variance. For
# x_0 ~ N(m, s^2) the posterior variance is s^2 sigma^2 / (alpha^2 s^2 + sigma^2).
LAWS = {
    "edm": (
        processes.edm(sigma_data=0.5),
        lambda c: jnp.exp(4 * c),
        lognormal(lambda t: (t**2 + 0.25) / (t * 0.5) ** 2 * STD**2 * t**2 / (STD**2 + t**2)),
    ),
    "vp_noise": (
        processes.vp("linear", t_min=1e-3, time_scale=999.0),
        lambda c: c / 999,
        # Times reach 1 there and 0.999 here; the integrand is at most 1.
        uniform(lambda t: vp_square(t) * STD**2 / (vp_square(t) * STD**2 + 1 - vp_square(t))),
    ),
    "flow_velocity": (
        processes.flow(),
        lambda c: c / 1000,
        uniform(lambda t: STD**2 / ((1 - t) ** 2 * STD**2 + t**2)),
    ),
}
NUM_BATCHES, ROWS = 64, 1024


@pytest.fixture(scope="module", params=LAWS)
def gaussian_losses(request):
    """Losses of the analytic denoiser and of one with outputs 0.2 too large, and the true one."""
    process, time_of, expected = LAWS[request.param]

    def apply(offset, scaled, c_noise, labels, **_):
        t = time_of(c_noise)
        x = scaled / expand(process.c_in(t), scaled)
        alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        best = MEAN + gain * (x - alpha * MEAN)
        return process.from_data(best, x, t) + offset

    def loss(key):
        data_key, key = jax.random.split(key)
        batch = {"image": MEAN + STD * jax.random.normal(data_key, (ROWS, 2, 2, 1))}
        objective = denoising(apply, process)
        return objective(0.0, batch, key)[0], objective(0.2, batch, key)[0]

    keys = jax.random.split(jax.random.key(0), NUM_BATCHES)
    return *(np.asarray(x) for x in jax.jit(lambda keys: jax.lax.map(loss, keys))(keys)), expected


def test_the_analytic_denoiser_has_the_loss_of_the_closed_form(gaussian_losses):
    losses, _, expected = gaussian_losses
    # 5 standard errors of 64 means: a false alarm for one key in 200 000. The end of the midpoint
    # rule is worth at most 0.001.
    error = losses.std(ddof=1) / np.sqrt(NUM_BATCHES)
    assert error < 0.02 * expected
    assert abs(losses.mean() - expected) < 5 * error + 0.001


def test_any_other_denoiser_has_a_larger_loss_by_its_distance(gaussian_losses):
    # E (best + 0.2 - target)^2 = E (best - target)^2 + 0.04 since best is the conditional mean.
    losses, perturbed, _ = gaussian_losses
    excess = perturbed - losses
    error = excess.std(ddof=1) / np.sqrt(NUM_BATCHES)
    assert error < 0.01
    assert abs(excess.mean() - 0.04) < 5 * error


# The formula


def test_edm_weights_turn_the_denoising_error_into_that_of_the_network():
    # w ||D - x||^2 = ||F - F_hat||^2. Below sigma = 0.02 the rounding of D - x alone, 6e-8 / sigma,
    # comes near the tolerance.
    process = processes.edm()
    rng = np.random.default_rng(0)
    t = np.geomspace(0.02, 80, 16).astype(np.float32)
    clean = images()
    noisy = clean + t[:, None, None, None] * rng.standard_normal(clean.shape).astype(np.float32)
    output = rng.standard_normal(clean.shape).astype(np.float32)
    denoised = process.to_data(output, noisy, t)
    weight = (t**2 + 0.25) / (t * 0.5) ** 2
    expected = weight * np.mean((np.asarray(denoised) - clean) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(process.loss_weight(t), weight, rtol=1e-6)
    np.testing.assert_allclose(squared_error(process, output, clean, noisy, t), expected, rtol=1e-5)


def explicit_vp(t, sigma_data):
    """(alpha, sigma, x_0 of an output by kind, scale by kind of an error of x_0), in float64."""
    alpha, sigma = np.sqrt(vp_square(t)), np.sqrt(1 - vp_square(t))
    slope_alpha = -0.5 * (0.1 + 19.9 * t) * alpha
    slope_sigma = -alpha * slope_alpha / sigma
    root = np.sqrt(alpha**2 * sigma_data**2 + sigma**2)
    clean = {
        "data": lambda x, out: out,
        "noise": lambda x, out: (x - sigma * out) / alpha,
        "scaled_score": lambda x, out: (x + sigma * out) / alpha,
        "v": lambda x, out: alpha * x - sigma * out,
        "velocity": lambda x, out: (
            (slope_sigma * x - sigma * out) / (alpha * slope_sigma - sigma * slope_alpha)
        ),
        "edm": lambda x, out: alpha * sigma_data**2 / root**2 * x + sigma * sigma_data / root * out,
    }
    # With x_t fixed, an error d of x_0 is one of -alpha d / sigma in the noise.
    scale = {
        "data": 1.0,
        "noise": alpha / sigma,
        "scaled_score": alpha / sigma,
        "v": sigma + alpha**2 / sigma,
        "velocity": slope_alpha - slope_sigma * alpha / sigma,
        "edm": root / (sigma * sigma_data),
    }
    return alpha, sigma, clean, scale


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_under_every_weighting_is_the_explicit_formula(prediction):
    rng = np.random.default_rng(1)
    t = np.linspace(0.05, 0.9, 16).astype(np.float32)
    clean = images()
    alpha, sigma, clean_of, scale = explicit_vp(t.astype(float)[:, None, None, None], 0.7)
    noisy = (alpha * clean + sigma * rng.standard_normal(clean.shape)).astype(np.float32)
    output = rng.standard_normal(clean.shape).astype(np.float32)
    error = clean_of[prediction](noisy.astype(float), output.astype(float)) - clean
    for weighting in PREDICTIONS:
        process = processes.vp(prediction=prediction, weighting=weighting, sigma_data=0.7)
        expected = np.mean((scale[weighting] * error) ** 2, axis=(1, 2, 3))
        found = squared_error(process, output, clean, noisy, t)
        # float32 knows alpha(t) and sigma(t) to a few 1e-6 here.
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=weighting)


def test_the_loss_is_the_mean_error_of_the_scaled_noisy_images():
    process, clean = processes.edm(), images((512, 4, 4, 2))
    network = Recorder()
    loss, metrics = denoising(network, process)({}, {"image": clean}, jax.random.key(0))
    t = np.exp(4 * np.asarray(network.c_noise, float))[:, None, None, None]
    noisy = np.asarray(network.x, float) * np.sqrt(t**2 + 0.25)
    target = (clean - 0.25 / (t**2 + 0.25) * noisy) / (0.5 * t / np.sqrt(t**2 + 0.25))
    np.testing.assert_allclose(loss, np.mean((0.3 - target) ** 2), rtol=1e-5)
    assert metrics == {}
    # 16384 normal numbers and 512 times, each within 5 standard errors of its law.
    noise = (noisy - clean) / t
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(np.mean(noise**2) - 1) < 5 * np.sqrt(2 / noise.size)
    level = (np.log(t).ravel() + 1.2) / 1.2
    assert abs(level.mean()) < 5 / np.sqrt(level.size)
    assert abs(np.mean(level**2) - 1) < 5 * np.sqrt(2 / level.size)


# What the network is given


def test_labels_and_augmentation_labels_reach_the_network_only_if_there_are_any():
    network = Recorder()
    objective = denoising(network, processes.edm())
    objective("weights", {"image": images()}, jax.random.key(0))
    assert network.labels is None
    assert network.options == {}
    assert (network.train, network.variables) == (True, "weights")
    batch = {"image": images(), "label": np.arange(16), "augment_label": np.ones((16, 9))}
    objective("weights", batch, jax.random.key(0))
    np.testing.assert_array_equal(network.labels, batch["label"])
    np.testing.assert_array_equal(network.options["augment_labels"], batch["augment_label"])


class Network(nn.Module):
    """A small network with everything that the objective has to serve."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, c_noise, labels=None, *, augment_labels=None, train=False):
        told = [c_noise[:, None]]
        if labels is not None:
            told.append(jax.nn.one_hot(labels, 3))
        if augment_labels is not None:
            told.append(augment_labels)
        hidden = nn.Dense(16)(jnp.concatenate([x.reshape(len(x), -1), *told], axis=-1))
        hidden = nn.Dropout(self.rate, deterministic=not train)(nn.silu(hidden))
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


@pytest.fixture(scope="module")
def batch():
    return {
        "image": images((16, 8, 8, 1)),
        "label": np.arange(16, dtype=np.int32) % 3,
        "augment_label": images((16, 9), seed=3),
    }


@pytest.fixture(scope="module")
def variables(batch):
    shapes = jax.eval_shape(
        Network().init,
        jax.random.key(0),
        batch["image"],
        np.ones(16),
        batch["label"],
        augment_labels=batch["augment_label"],
    )
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape).astype(np.float32), shapes)


def test_dropout_is_on_and_follows_the_key():
    class Mask(nn.Module):
        @nn.compact
        def __call__(self, x, c_noise, labels, *, train):
            kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x))
            masks.append(np.asarray(kept))
            return kept

    masks = []
    objective = denoising(Mask().apply, processes.edm())
    for seed in (0, 0, 1):
        objective({}, {"image": images()}, jax.random.key(seed))
    assert 0.4 < np.mean(masks[0] == 0) < 0.6  # of 512 entries: 4.5 standard deviations
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.any(masks[0] != masks[2])


def test_dropout_time_and_noise_have_keys_of_their_own():
    used = []
    process = dataclasses.replace(
        processes.edm(), sample_time=lambda key, shape: used.append(key) or jnp.ones(shape)
    )
    network = Recorder()
    key = jax.random.key(0)
    denoising(network, process)({}, {"image": images()}, key)
    noise = np.asarray(network.x) * np.sqrt(1.25) - images()
    used.append(network.rngs["dropout"])
    assert used[0] != used[1]
    assert key not in used
    for other in (key, *used):
        assert np.abs(noise - np.asarray(jax.random.normal(other, noise.shape))).max() > 0.1


# Uncertainty


def test_the_uncertainty_is_best_at_the_log_of_the_expected_error():
    def with_uncertainty(u):
        objective = denoising(
            Recorder(),
            processes.edm(),
            log_variance=lambda variables, c_noise: variables + 0 * c_noise,
        )
        return objective(u, {"image": images()}, jax.random.key(0))

    plain, _ = denoising(Recorder(), processes.edm())({}, {"image": images()}, jax.random.key(0))
    best = jnp.log(plain)
    (loss, metrics), slope = jax.value_and_grad(with_uncertainty, has_aux=True)(best)
    np.testing.assert_allclose(loss, 1 + best, rtol=1e-6)
    assert abs(slope) < 1e-5
    np.testing.assert_allclose(metrics["unweighted_loss"], plain, rtol=1e-6)
    # exp(-u) plain + u rises by exp(-h) + h - 1 from there.
    for step in (-0.5, 0.5):
        rise = with_uncertainty(best + step)[0] - loss
        np.testing.assert_allclose(rise, np.exp(-step) + step - 1, rtol=1e-4)


def test_the_uncertainty_is_asked_at_the_noise_levels_of_the_network():
    network, asked = Recorder(), []
    objective = denoising(
        network,
        processes.edm(),
        log_variance=lambda variables, c_noise: asked.append((variables, c_noise)) or c_noise,
    )
    loss, _ = objective("weights", {"image": images()}, jax.random.key(0))
    ((variables, c_noise),) = asked
    assert variables == "weights"
    np.testing.assert_array_equal(c_noise, network.c_noise)
    t, noisy = (
        jnp.exp(4 * c_noise),
        network.x * expand(jnp.sqrt(jnp.exp(8 * c_noise) + 0.25), network.x),
    )
    errors = squared_error(processes.edm(), jnp.full_like(noisy, 0.3), images(), noisy, t)
    np.testing.assert_allclose(loss, jnp.mean(errors * jnp.exp(-c_noise) + c_noise), rtol=1e-4)


# Scale


def test_sharded_loss_and_gradient_equal_those_of_one_device(batch, variables):
    objective = denoising(Network().apply, processes.edm())
    gradient = jax.value_and_grad(lambda *args: objective(*args)[0])
    key = jax.random.key(1)
    expected = jax.jit(gradient)(variables, batch, key)
    mesh = make_mesh(data=8)
    whole = jax.NamedSharding(mesh, jax.P())
    split = jax.jit(gradient, in_shardings=(whole, batch_sharding(mesh), whole))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        split(variables, batch, key),
        expected,
    )


EXTREMES = {
    "edm": (processes.edm(), (1e-3, 0.002, 80.0, 400.0)),  # 400: 6 standard deviations
    "ve": (processes.ve(), (0.02, 100.0)),
    "vp_cosine": (processes.vp("cosine"), (1e-3, 0.9999)),
    "vp_scaled_linear": (processes.vp("scaled_linear"), (1e-3, 1.0)),
    "vp_from_betas": (processes.vp_from_betas(BETAS), (1.0, 1000.0)),
} | {
    f"{name}_{kind}": (make(prediction=kind), times)
    for (name, make, times), kind in itertools.product(
        [("vp_linear", processes.vp, (1e-3, 1.0)), ("flow", processes.flow, (1e-3, 0.999))],
        PREDICTIONS,
    )
}


@pytest.mark.parametrize("name", EXTREMES)
def test_gradients_are_finite_at_the_ends_of_training_times(name):
    process, times = EXTREMES[name]
    process = dataclasses.replace(
        process, sample_time=lambda key, shape: jnp.resize(jnp.array(times), shape)
    )

    def apply(weight, x, c_noise, labels, **_):
        return weight * x + jnp.sin(weight * expand(c_noise, x))

    objective = denoising(apply, process)
    loss, slope = jax.value_and_grad(lambda *args: objective(*args)[0])(
        jnp.float32(0.5), {"image": images((4, 2, 2, 1))}, jax.random.key(0)
    )
    assert jnp.isfinite(loss)
    assert jnp.isfinite(slope)
    assert slope != 0


# Bad input


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"label": np.zeros(3)}, r"\"image\".*label"),
        ({"image": np.zeros((3, 4, 4, 1), np.uint8)}, "floating.*uint8"),
        ({"image": np.zeros(3, np.float32)}, r"\[3\]"),
        ({"image": np.zeros((0, 4, 4, 1), np.float32)}, "empty"),
    ],
)
def test_refuses_what_is_no_batch_of_images(batch, message):
    objective = denoising(Recorder(), processes.edm())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(objective, {}, batch, jax.random.key(0))


def test_refuses_an_output_that_would_broadcast_against_the_images():
    objective = denoising(lambda variables, x, *_, **__: x[..., :1], processes.edm())
    with pytest.raises(ValueError, match=r"\[16, 4, 4, 1\].*\[16, 4, 4, 2\]"):
        jax.eval_shape(objective, {}, {"image": images()}, jax.random.key(0))
