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
    with pytest.raises(ValueError, match="num_bins"):
        means_by_rate(jnp.arange(8.0), group, num_bins=0)
