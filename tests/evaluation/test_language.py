"""Perplexity with a judge that must be one, entropy, and the bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax_lab.evaluation import TrigramJudge, generative_perplexity, nelbo, unigram_entropy
from genjax_lab.objectives import masked_diffusion_loss

VOCAB = 7


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, VOCAB - 1, (30, 20))  # the last token is not seen


@pytest.fixture(scope="module")
def judge(text):
    return TrigramJudge(text, VOCAB)


def test_laws_of_the_judge_sum_to_one_everywhere(judge):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 6))
    for place in range(6):
        total = 0.0
        for token in range(VOCAB):
            changed = tokens.copy()
            changed[0, place] = token
            total += math.exp(judge(changed)[0][0, place])
        assert total == pytest.approx(1, abs=1e-12)


def test_probabilities_are_interpolated_counts(judge, text):
    a, b, c = text[0, :3]
    runs = np.concatenate([text[:, i : i + 3] for i in range(18)])
    pairs = np.concatenate([text[:, i : i + 2] for i in range(19)])
    after = runs[(runs[:, 0] == a) & (runs[:, 1] == b)]
    parts = [1 / VOCAB, np.mean(text == c), np.mean(pairs[pairs[:, 0] == b][:, 1] == c)]
    parts.append(np.mean(after[:, 2] == c))
    expected = np.dot(judge.weights, parts)
    assert math.exp(judge(text[:1])[0][0, 2]) == pytest.approx(expected, rel=1e-12)


def test_perplexity_counts_every_token_of_every_sequence(judge, text):
    found = generative_perplexity(judge, text, batch_size=7)  # 30 is no multiple
    assert found.nats == pytest.approx(-np.mean(judge(text)[0]), rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert found.entropy == pytest.approx(np.mean(unigram_entropy(text)))
    assert 0 < found.standard_error < 0.1


def test_a_judge_that_does_not_sum_to_one_is_none(judge, text):
    def generous(tokens):
        log_probs, totals = judge(tokens)
        return log_probs + 1, totals + 1

    with pytest.raises(ValueError, match="sum to 1"):
        generative_perplexity(generous, text)


def test_entropy_is_that_of_each_sequences_counts():
    tokens = np.array([[3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 1, 1]])
    np.testing.assert_allclose(unigram_entropy(tokens), [0, math.log(4), math.log(2)], atol=1e-12)


def test_the_bound_of_a_model_without_context_is_its_cross_entropy(text):
    logits = jnp.linspace(-1, 1, VOCAB)

    def apply(variables, tokens, t, condition, *, rows=None, train=False, rngs=None):
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB))

    objective = masked_diffusion_loss(apply, VOCAB)
    mean, error = nelbo(objective, {}, text, jax.random.key(0), batch_size=10, num_draws=20)
    expected = -np.mean(np.asarray(jax.nn.log_softmax(logits))[text])
    assert mean == pytest.approx(expected, abs=5 * error + 0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda judge: judge(np.array([[VOCAB]])),
        lambda judge: unigram_entropy(np.zeros(3, int)),
        lambda judge: unigram_entropy(np.zeros((3, 2))),
        lambda judge: generative_perplexity(lambda x: (x, x[:1]), np.zeros((2, 2), int)),
        lambda judge: TrigramJudge(np.array([[9]]), VOCAB),
        lambda judge: TrigramJudge(np.array([[1]]), VOCAB, (0.5, 0.5, 0.0, 0.0)),
        lambda judge: nelbo(None, {}, np.zeros((2, 2), int), None, batch_size=3),
    ],
)
def test_mistakes_are_named(judge, call):
    with pytest.raises(ValueError):
        call(judge)
