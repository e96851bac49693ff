"""The discriminator of noised data and samples: what it is shown, and what it is best at."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax_lab import networks, processes
from genjax_lab.objectives import noisy_discriminator

PROCESS = processes.edm(log_sigma_mean=-0.5, log_sigma_std=1.0)
# By class: means of data and of samples, which differ in their scatter too.
DATA, DATA_STD = np.array([0.5, -0.3]), 0.5
MODEL, MODEL_STD = np.array([-0.1, 0.4]), 0.8
ROWS, SHAPE = 512, (1, 2, 1)


def make_batch(key, rows=ROWS):
    """Data and samples, with labels that know nothing of each other."""
    keys = jax.random.split(key, 4)
    label, fake_label = (jax.random.randint(k, (rows,), 0, 2) for k in keys[:2])
    noise, fake_noise = (jax.random.normal(k, (rows, *SHAPE)) for k in keys[2:])
    return {
        "image": jnp.asarray(DATA)[label][:, None, None, None] + DATA_STD * noise,
        "label": label,
        "fake_image": jnp.asarray(MODEL)[fake_label][:, None, None, None] + MODEL_STD * fake_noise,
        "fake_label": fake_label,
    }


def told(scaled, c_noise):
    """The noisy image and its time, from what a network under EDM is given."""
    t = jnp.exp(4 * c_noise)
    return scaled * jnp.sqrt(t**2 + 0.25)[:, None, None, None], t


def best_logits(x, t, label):
    def log_density(means, std):
        mean, variance = jnp.asarray(means)[label], std**2 + t**2
        terms = (x - mean[:, None, None, None]) ** 2 / variance[:, None, None, None]
        return -0.5 * jnp.sum(terms, axis=(1, 2, 3)) - x[0].size / 2 * jnp.log(variance)

    return log_density(DATA, DATA_STD) - log_density(MODEL, MODEL_STD)


@pytest.mark.parametrize(("factor", "is_best"), [(1.0, True), (0.7, False)])
def test_the_loss_is_least_at_the_exact_log_odds(factor, is_best):
    def apply(slope, scaled, c_noise, label, *, train, rngs):
        x, t = told(scaled, c_noise)
        mean, square = jnp.mean(x, axis=(1, 2, 3)), jnp.mean(x**2, axis=(1, 2, 3))
        features = jnp.stack([jnp.ones_like(t), mean, square / t, mean * label, jnp.log(t)])
        return factor * best_logits(x, t, label) + slope @ features

    objective = noisy_discriminator(apply, PROCESS)

    def gradient(key):
        batch_key, key = jax.random.split(key)
        return jax.grad(lambda slope: objective(slope, make_batch(batch_key), key)[0])(jnp.zeros(5))

    count = 64
    found = np.asarray(
        jax.jit(lambda keys: jax.lax.map(gradient, keys))(
            jax.random.split(jax.random.key(1), count)
        )
    )
    errors = np.abs(found.mean(0)) / (found.std(0, ddof=1) / np.sqrt(count))
    # Five features within 4 standard errors: false alarms of 3e-4, were the key not fixed.
    assert (errors.max() < 4) if is_best else (errors.max() > 10), errors


def test_the_two_rows_of_a_pair_share_time_and_noise_and_have_their_own_labels():
    seen = {}

    def apply(variables, scaled, c_noise, label, *, train, rngs):
        x, t = told(scaled, c_noise)
        seen.update(x=x, t=t, label=label, train=train, rngs=rngs)
        seen["logits"] = jnp.sin(jnp.arange(len(x)) * 1.0).at[3].set(0)
        return seen["logits"]

    batch = make_batch(jax.random.key(0), rows=6)
    key = jax.random.key(3)
    loss, metrics = noisy_discriminator(apply, PROCESS)({}, batch, key)
    assert seen["train"] is True and set(seen["rngs"]) == {"dropout"}
    np.testing.assert_array_equal(seen["label"][::2], batch["label"])
    np.testing.assert_array_equal(seen["label"][1::2], batch["fake_label"])
    np.testing.assert_array_equal(seen["t"][::2], seen["t"][1::2])
    assert len(set(seen["t"].tolist())) == 6
    noise = [
        (seen["x"][i::2] - batch[name]) / seen["t"][i::2, None, None, None]
        for i, name in enumerate(("image", "fake_image"))
    ]
    np.testing.assert_allclose(*noise, rtol=1e-3, atol=1e-3)
    assert 0.3 < np.std(noise[0]) < 2

    logits, is_data = seen["logits"], 1 - jnp.arange(12) % 2
    expected = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, is_data))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["js_estimate"], np.log(2) - expected, rtol=1e-5)
    right = [0.5 if z == 0 else (z > 0) == y for z, y in zip(logits, is_data, strict=True)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right))
    other = noisy_discriminator(apply, PROCESS)({}, batch, jax.random.key(4))
    assert other[0] == loss and not np.array_equal(seen["t"][::2], noise)


def test_a_network_begins_undecided_and_learns():
    backbone = networks.ResidualMLP(num_classes=2, width=16, num_blocks=1, dropout=0.1)
    network = networks.Discriminator(backbone)
    objective = noisy_discriminator(network.apply, PROCESS)
    batch = make_batch(jax.random.key(0))
    variables = jax.jit(network.init)(
        jax.random.key(0), batch["image"], jnp.ones(ROWS), batch["label"]
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state, key):
        batch = make_batch(key)
        loss_of = lambda params: objective({**variables, "params": params}, batch, key)  # noqa: E731
        (loss, metrics), slope = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, state = optimizer.update(slope, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, "params": params}, state, metrics | {"loss": loss}

    state, history = optimizer.init(variables["params"]), []
    for key in jax.random.split(jax.random.key(1), 60):
        variables, state, metrics = step(variables, state, key)
        history.append(metrics)
    np.testing.assert_allclose(history[0]["loss"], np.log(2), rtol=1e-6)
    assert history[0]["accuracy"] == 0.5 and abs(history[0]["js_estimate"]) < 1e-6
    assert np.mean([metrics["js_estimate"] for metrics in history[-10:]]) > 0.02
    assert np.mean([metrics["accuracy"] for metrics in history[-10:]]) > 0.6


def test_mistakes_are_named():
    batch = make_batch(jax.random.key(0), rows=4)
    objective = noisy_discriminator(lambda variables, x, *told, **options: x, PROCESS)
    with pytest.raises(ValueError, match=r"each of 8 rows, got shape \[8, 1, 2, 1\]"):
        objective({}, batch, jax.random.key(0))
    del batch["fake_label"]
    with pytest.raises(ValueError, match="both"):
        objective({}, batch, jax.random.key(0))
