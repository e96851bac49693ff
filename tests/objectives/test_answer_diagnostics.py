"""Numbers that say what right and wrong answers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.objectives import (
    answer_batch,
    answer_objective,
    group_statistics,
    means_by_rate,
    nft_loss,
    online_dpo_loss,
    ratio_quantiles,
    split_gradient,
)


def lookup(variables, tokens, *, start, token_mask, temperature, chunk, method):
    """A model of one logit for each token, whatever came before."""
    del token_mask, temperature, chunk, method
    log_probs = jax.nn.log_softmax(variables["params"])
    answers = log_probs[tokens[:, start:]]
    return answers, jnp.zeros_like(answers)


def test_gradients_of_right_and_wrong_answers_add_up_and_oppose_each_other():
    answers = np.array([[0, 1], [0, 2], [1, 1], [2, 2]])
    outcome = np.array([1.0, 1.0, 0.0, 0.0])
    params = jnp.array([0.3, -0.2, 0.1])
    batch = answer_batch(
        np.zeros((4, 1), int),
        np.ones((4, 1), bool),
        answers,
        np.ones((4, 2), bool),
        np.asarray(jax.nn.log_softmax(params)[answers]),
        outcome,
        group_statistics(outcome, np.zeros(4, int)),
        aggregation="token-mean",
    )
    objective = answer_objective(lookup, nft_loss)
    found = split_gradient(objective, {"params": params}, batch)
    # At R = 1 an answer's gradient is -A times that of its log-probability, A = 0.5 or -0.5.
    scores = np.eye(3)[answers] - np.asarray(jax.nn.softmax(params))
    each = -(outcome - 0.5)[:, None] * scores.sum(axis=1) / 8
    right, wrong = each[:2].sum(axis=0), each[2:].sum(axis=0)
    norms = np.linalg.norm(right), np.linalg.norm(wrong)
    np.testing.assert_allclose(found["right_norm"], norms[0], rtol=1e-5)
    np.testing.assert_allclose(found["wrong_norm"], norms[1], rtol=1e-5)
    np.testing.assert_allclose(found["cosine"], right @ wrong / np.prod(norms), rtol=1e-5)
    everything = split_gradient(objective, {"params": params}, {**batch, "outcome": outcome * 0})
    assert everything["right_norm"] == everything["cosine"] == 0


def test_quantiles_are_of_the_tokens_of_answers():
    log_ratio = jnp.log(jnp.array([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0]]))
    mask = jnp.array([[True, True, False], [True, False, False]])
    found = ratio_quantiles(log_ratio, mask, (0.0, 0.5, 1.0))
    np.testing.assert_allclose(list(found.values()), [1.0, 2.0, 3.0], rtol=1e-6)
    assert list(found) == ["ratio_0.0", "ratio_0.5", "ratio_1.0"]


def test_means_are_of_questions_of_like_rates():
    outcome = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    group = group_statistics(outcome, np.array([0, 0, 1, 1, 2, 2, 2, 2]))  # rates 1/2, 1, 1/4
    found = means_by_rate(jnp.arange(8.0), group, num_bins=4)
    np.testing.assert_array_equal(found, [np.nan, 5.5, 0.5, 2.5])
    where = np.arange(8) % 4 > 1  # no answer of the first question, half of those of the third
    values = jnp.where(where, jnp.arange(8.0), jnp.nan)
    found = means_by_rate(values, group, num_bins=4, where=where)
    np.testing.assert_array_equal(found, [np.nan, 6.5, np.nan, 2.5])
    with pytest.raises(ValueError, match="num_bins"):
        means_by_rate(jnp.arange(8.0), group, num_bins=0)


def test_diagnostics_change_nothing_that_is_learned():
    generator = np.random.default_rng(0)
    answers = generator.integers(0, 3, (12, 2))
    # Rates 1/4 and 3/4, and a question that only fills up.
    outcome = np.array([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    params = jnp.array([0.3, -0.2, 0.1])
    old = np.array(jax.nn.log_softmax(jnp.array([0.1, 0.2, -0.3]))[answers])
    group = group_statistics(outcome, np.repeat([0, 1, 2], 4))
    counted = np.ones((12, 2), bool)
    counted[3, 1], old[3, 1] = False, np.nan
    counted[8:] = False
    batch = answer_batch(
        *(np.zeros((12, 1), int), np.ones((12, 1), bool), answers, np.ones((12, 2), bool)),
        *(old, outcome, group),
        aggregation="token-mean",
        counted=counted,
    )

    def found(**options):
        objective = answer_objective(lookup, nft_loss, **options)
        return jax.value_and_grad(
            lambda p: objective({"params": p}, batch, jax.random.key(0)), has_aux=True
        )(params)

    (plain, metrics), gradient = found()
    (value, more), same = found(diagnostics=True)
    assert value == plain
    np.testing.assert_array_equal(same, gradient)
    assert all(more[name] == metrics[name] for name in metrics)
    split = [more[f"gradient_{name}"] for name in ("right_norm", "wrong_norm", "cosine")]
    total = split[0] ** 2 + split[1] ** 2 + 2 * np.prod(split)
    np.testing.assert_allclose(total, np.sum(np.square(gradient)), rtol=1e-4)
    # Of each rate there are equally many answers, and as many that do not count.
    means = [more[f"loss_at_rate_{center}"] for center in ("0.375", "0.875")]
    np.testing.assert_allclose(np.sum(means) / 3, plain, rtol=1e-5)
    assert np.isnan(more["loss_at_rate_0.125"]) and np.isfinite(more["ratio_0.99"])
    pairs = answer_objective(lookup, online_dpo_loss, takes_weights=False, diagnostics=True)
    told = pairs({"params": params}, batch, jax.random.key(0))[1]
    assert "ratio_0.5" in told
    assert not any(name.startswith(("gradient", "loss_at")) for name in told)
