"""Maximum likelihood of token models, against counting and against the log-likelihood itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import autoregressive, autoregressive_log_likelihood

ROWS, LENGTH, VOCAB, CLASSES = 400, 3, 4, 2
KEY = jax.random.key(0)


def unigrams(variables, tokens, condition, *, train):
    """Logits by class and place; class 2 is none."""
    assert train is False
    return variables["params"][condition]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)), "label": np.arange(ROWS) % CLASSES}


def frequencies(batch):
    counts = np.zeros((CLASSES + 1, LENGTH, VOCAB))
    for row, label in zip(batch["tokens"], batch["label"], strict=True):
        counts[label, np.arange(LENGTH), row] += 1
    counts[CLASSES] = counts[:CLASSES].sum(0)
    return counts / counts.sum(-1, keepdims=True)


def test_the_optimum_is_the_frequencies_and_its_value_their_entropy(batch):
    logits = jnp.log(frequencies(batch))
    objective = autoregressive(unigrams)
    (loss, metrics), slope = jax.value_and_grad(objective, has_aux=True)(
        {"params": logits}, batch, KEY
    )
    np.testing.assert_allclose(slope["params"], 0, atol=1e-6)
    entropy = -np.sum(frequencies(batch)[:CLASSES] * np.log(frequencies(batch)[:CLASSES]))
    np.testing.assert_allclose(loss, entropy / CLASSES / LENGTH, rtol=1e-5)
    best = np.mean(np.max(frequencies(batch)[:CLASSES], axis=-1))
    np.testing.assert_allclose(metrics["accuracy"], best, rtol=1e-5)
    exact = autoregressive_log_likelihood(unigrams)
    nll = -np.mean(exact({"params": logits}, batch["tokens"], batch["label"])) / LENGTH
    np.testing.assert_allclose(metrics["mle_loss"], nll, rtol=1e-5)


def test_dropped_labels_train_the_class_of_nobody(batch):
    logits = {"params": jnp.zeros((CLASSES + 1, LENGTH, VOCAB))}
    for rate in (0.0, 0.25, 1.0):
        objective = autoregressive(unigrams, null_label=CLASSES, label_dropout=rate)
        slope = jax.grad(lambda v, f=objective: f(v, batch, KEY)[0])(logits)["params"]
        # The gradient by a logit of class c is its share of the rows times (1/V - frequency).
        share = float(jnp.sum(jnp.abs(jnp.where(slope > 0, slope, 0))[CLASSES])) > 0
        assert share == (rate > 0)
        assert bool(jnp.any(slope[0] != 0)) == (rate < 1)
    rows = jax.random.bernoulli(KEY, 0.25, (ROWS,))
    expected = np.where(rows, CLASSES, batch["label"])
    found = autoregressive(unigrams, null_label=CLASSES, label_dropout=0.25)
    plain = autoregressive(unigrams)
    weights = {"params": jax.random.normal(KEY, logits["params"].shape)}
    np.testing.assert_allclose(
        found(weights, batch, KEY)[0], plain(weights, batch | {"label": expected}, KEY)[0]
    )


def test_inputs_come_with_the_label(batch):
    def doubled(variables, tokens, condition, *, train):
        label, inputs = condition
        return inputs[:, None, None] * variables["params"][label]

    weights = {"params": jax.random.normal(KEY, (CLASSES + 1, LENGTH, VOCAB))}
    inputs = np.full(ROWS, 2.0, np.float32)
    found = autoregressive(doubled)(weights, batch | {"inputs": inputs}, KEY)[0]
    twice = autoregressive(unigrams)({"params": 2 * weights["params"]}, batch, KEY)[0]
    np.testing.assert_allclose(found, twice, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, '"tokens"'),
        ({"tokens": np.zeros((ROWS, LENGTH))}, "integers.*float"),
        ({"tokens": np.zeros((0, LENGTH), int)}, "integers"),
        ({"label": None}, "no label"),
    ],
)
def test_refuses_batches_that_are_not_as_described(batch, change, message):
    batch = {name: value for name, value in (batch | change).items() if value is not None}
    objective = autoregressive(unigrams, null_label=CLASSES, label_dropout=0.1)
    with pytest.raises(ValueError, match=message):
        objective({"params": jnp.zeros((CLASSES + 1, LENGTH, VOCAB))}, batch, KEY)


@pytest.mark.parametrize("options", [{"label_dropout": 0.1}, {"label_dropout": 2, "null_label": 1}])
def test_refuses_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match="label_dropout"):
        autoregressive(unigrams, **options)
