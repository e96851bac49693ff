"""What negative-aware fine-tuning converges to, for one question with 50 answers in a table.

All expectations are exact: every answer is in the batch, right and wrong, weighted by its
probability, so that its answers' outcomes may be soft.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax_lab.objectives import (
    group_statistics,
    implicit_negative_ratio,
    nft_loss,
    rft_loss,
)

ANSWERS, STEPS = 50, 4000
OUTCOME = np.repeat([1.0, 0.0], ANSWERS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def policy(seed, scale=1.0):
    return np.asarray(jax.nn.softmax(scale * np.random.default_rng(seed).normal(size=ANSWERS)))


def loss(logits, old, correct, weights, *, loss=nft_loss, **options):
    """sum over a of weights[0, a] times the loss of the right answer a, [1, a] of the wrong one."""
    log_probs = jnp.tile(jax.nn.log_softmax(logits), 2)[:, None]
    old_log_probs = jnp.tile(jnp.log(old), 2)[:, None]
    mask, count = jnp.ones_like(log_probs, bool), 2 * ANSWERS
    rate = jnp.full(count, jnp.sum(old * correct))
    group = group_statistics(jnp.asarray(OUTCOME), jnp.zeros(count, int), rate=rate)
    weights = count * jnp.ravel(weights)
    return loss(log_probs, old_log_probs, mask, OUTCOME, group, weights=weights, **options)[0]


def joint(old, correct):
    """Probability of (right, a) and (wrong, a)."""
    return np.stack([old * correct, old * (1 - correct)])


def variation(p, q):
    return np.sum(np.abs(p - q), axis=-1) / 2


def test_policies_of_right_and_of_wrong_answers_mix_to_the_policy():
    old, correct = policy(0), np.random.default_rng(1).random(ANSWERS)
    rate = np.sum(old * correct)
    right, wrong = old * correct / rate, old * (1 - correct) / (1 - rate)
    assert np.max(np.abs(rate * right + (1 - rate) * wrong - old)) < 1e-15
    implied = old * np.asarray(implicit_negative_ratio(np.log(right / old), rate))
    assert np.max(np.abs(implied - wrong)) < 1e-15


@pytest.fixture(scope="module")
def optima():
    """Policies after 1000 and 4000 steps of Adam, of several problems in one program.

    The first three have hard outcomes (30 % are right) and a learning rate of 0.1: positives alone,
    negatives alone, both. The others have soft outcomes and a learning rate that falls to 0: both
    with epsilon 1e-6, 0.1, 0.5 and 1, and negatives alone with epsilon 1.
    """
    with jax.enable_x64(True):
        old = policy(2)
        hard = (np.random.default_rng(3).permutation(ANSWERS) < 0.3 * ANSWERS).astype(float)
        soft = np.random.default_rng(4).random(ANSWERS)
        correct = np.stack([hard] * 3 + [soft] * 5)
        kinds = np.array([[1, 0], [0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [0, 1]])
        weights = kinds[:, :, None] * np.stack([joint(old, c) for c in correct])
        epsilon = jnp.array([1, 1, 1, 1e-6, 0.1, 0.5, 1, 1])
        time = np.arange(STEPS)[:, None] / STEPS
        rates = np.where(np.arange(8) < 3, 0.1, 0.02 * (1 - time) * 10.0 ** (-5 * time))
        # Where epsilon is 1e-6 gradients are now and then enormous: they must be forgotten.
        adam = optax.scale_by_adam(b2=np.where(np.arange(8) < 3, 0.999, 0.99)[:, None])
        gradient = jax.vmap(
            jax.grad(lambda x, c, w, e: loss(x, old, c, w, epsilon=e, weighting="uniform"))
        )

        def step(carry, rates):
            logits, state = carry
            updates, state = adam.update(gradient(logits, correct, weights, epsilon), state)
            return (logits - rates[:, None] * updates, state), logits

        logits = jnp.tile(jnp.log(old), (8, 1))
        run = jax.jit(lambda x: jax.lax.scan(step, (x, adam.init(x)), rates))
        (last, _), history = run(logits)
        policies = jax.nn.softmax(jnp.stack([history[1000], last]))
    ideal = old * correct
    return old, correct, ideal / ideal.sum(axis=1, keepdims=True), np.asarray(policies)


def test_right_answers_wrong_answers_and_both_lead_to_the_policy_of_right_answers(optima):
    """Seen: 3.5e-4, 2.0e-4 and 2.7e-4 after 1000 steps; 2.4e-5, 1.7e-4 and 1.9e-5 after 4000."""
    _, _, ideal, (early, late) = optima
    assert np.all(variation(early, ideal)[:3] < 1e-3)
    assert np.all(variation(late, ideal)[:3] < 3e-4)


def test_with_soft_outcomes_the_optimum_is_greedier_the_larger_epsilon(optima):
    """Seen: variations 1.4e-16, .037, .129, .146; accuracies .711, .727, .765, .772; first .607."""
    old, correct, ideal, (_, late) = optima
    distance, accuracy = variation(late, ideal)[3:7], np.sum(late * correct, axis=1)[3:7]
    assert distance[0] < 1e-10
    assert np.all(np.diff(distance) > 0.01)
    assert accuracy[0] == pytest.approx(np.sum(ideal * correct, axis=1)[3], abs=1e-10)
    assert np.all(np.diff(accuracy) > 0.005) and accuracy[0] > np.sum(old * correct[3])


def test_wrong_answers_alone_collapse_the_policy_if_outcomes_are_soft_and_epsilon_is_one(optima):
    """Seen: variation .896, and .90 of the probability on a single answer of 50."""
    _, correct, ideal, (_, late) = optima
    assert variation(late, ideal)[7] > 0.8
    assert late[7].max() > 0.8 > 0.2 > ideal[7].max()
    assert correct[7][late[7].argmax()] > 0.9


@jax.jit
def gradients(old, correct):
    """Of RFT's and NFT's loss of each right and each wrong answer by logits, at R = 1."""

    def losses(logits, weights):
        rft = loss(logits, old, correct, weights, loss=rft_loss)
        return jnp.stack([rft, loss(logits, old, correct, weights, weighting="dr_grpo")])

    each = jax.vmap(jax.jacrev(losses), (None, 0), out_axes=1)
    return each(jnp.log(old), jnp.eye(2 * ANSWERS))


def test_wrong_answers_are_a_baseline_which_changes_nothing_but_the_variance():
    """The variances' ratio RFT / NFT grows from 1 with r, about as 1 / (1 - r).

    Seen of equal probabilities: 1.02, 1.26, 3.17 and 25.5 at r = .02, .20, .68 and .96; of random
    ones: 1.03, 1.28, 2.80 and 12.3 at r = .03, .21, .62 and .90.
    """
    ratios = []
    for right in (1, 10, 34, 48):
        correct = (np.arange(ANSWERS) < right).astype(float)
        for old in (np.full(ANSWERS, 1 / ANSWERS), policy(37)):
            rate = np.sum(old * correct)
            assert 0.02 <= rate <= 0.98  # where the loss takes it as it is
            chance, each = np.ravel(joint(old, correct)), np.asarray(gradients(old, correct))
            mean = chance @ each
            variance = np.sum(np.square(each), axis=-1) @ chance - np.sum(np.square(mean), axis=-1)
            climb = old * (correct - rate)  # the gradient of sum pi r
            assert np.max(np.abs(mean + climb)) < 1e-15
            # |grad log pi(a)|^2 = 1 - 2 pi(a) + sum pi^2
            norms = old * (1 - 2 * old + np.sum(old**2))
            expected = [norms @ correct, norms @ np.square(correct - rate)] - climb @ climb
            np.testing.assert_allclose(variance, expected, rtol=1e-12)
            ratios.append(variance[0] / variance[1])
    assert np.all(np.diff(ratios[::2]) > 0) and np.all(np.diff(ratios[1::2]) > 0)
    np.testing.assert_allclose(ratios[::2], [1.0208, 1.2552, 3.1693, 25.5], rtol=1e-4)
    assert min(ratios) > 1
