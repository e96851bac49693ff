"""The stream of a decoder's own answers: on-policy at first, whole groups, resumable, shared."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular_answers import stream as tabular_stream
from tabular_answers import threshold_task

from genjax_lab.networks import Decoder
from genjax_lab.objectives import answer_objective, importance_weights, nft_loss
from genjax_lab.reasoning import AnswerStream, RolloutSettings, character_codec, digit_sum
from genjax_lab.samplers import generate, token_decoder

GROUPS, SAMPLES, TEMPERATURE = 4, 4, 0.8
TASK = digit_sum(1)
CODEC = character_codec(TASK.alphabet, prompt_length=4, answer_length=3)
NETWORK = Decoder(
    vocab_size=12, width=16, depth=1, num_heads=2, num_kv_heads=1, mlp_width=24, rope_theta=100.0
)


class Model(NamedTuple):
    variables: dict
    other: dict
    generate: object
    log_probs: object


@pytest.fixture(scope="module")
def model():
    """A decoder with random parameters, of which few answers are right, and others."""
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

    def variables(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)

    def answer(variables, key, prompts, mask):
        return generate(
            token_decoder(NETWORK.apply, variables, 12),
            key,
            prompts,
            mask,
            length=CODEC.answer_length,
            end_ids=CODEC.end_ids,
            num_samples=SAMPLES,
            temperature=TEMPERATURE,
        )

    @jax.jit
    def log_probs(variables, prompts, prompt_mask, answers, answer_mask):
        return NETWORK.apply(
            variables,
            jnp.concatenate([prompts, answers], axis=1),
            start=prompts.shape[1],
            token_mask=jnp.concatenate([prompt_mask, answer_mask], axis=1),
            temperature=TEMPERATURE,
            method="log_probs",
        )[0]

    return Model(variables(0), variables(1), answer, log_probs)


def make(model, *, seed=0, share=(0, 1), reference=None, **fields):
    settings = {"num_groups": GROUPS, "num_samples": SAMPLES, "minibatches": 2}
    settings |= {"batch_questions": 64, "max_batches": 4} | fields
    return AnswerStream(
        TASK,
        CODEC,
        generate=model.generate,
        log_probs=model.log_probs,
        settings=RolloutSettings(**settings),
        seed=seed,
        share=share,
        reference=reference,
    )


def following(model, **fields):
    result = make(model, **fields)
    result.follow(model.variables)
    return result


def take(rollouts, count):
    return [next(rollouts) for _ in range(count)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def rollout(model):
    """The two mini-batches of the first rollout."""
    return take(following(model), 2)


# What a mini-batch is.


def test_first_mini_batch_is_on_policy(model, rollout):
    """Check: R = 1 in the objective, up to 1e-5, at the temperature at which was answered."""

    @jax.jit
    def judged(variables, batch):
        objective = answer_objective(NETWORK.apply, nft_loss, temperature=TEMPERATURE)
        return objective(variables, batch, None)

    for batch in rollout:
        loss, metrics = judged(model.variables, batch)
        assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["max_ratio"] == pytest.approx(1, abs=1e-5)
        assert loss == pytest.approx(0, abs=1e-6) and metrics["old_kl"] < 1e-9
    # Of another policy it is not.
    assert judged(model.other, rollout[0])[1]["max_ratio"] > 1.05


def test_log_probs_of_training_are_those_of_the_sampler(model):
    rollouts = following(model, importance_cap=2.0)
    batch = next(rollouts)
    shown = batch["answer_mask"]
    np.testing.assert_allclose(batch["importance"][shown], 1, atol=1e-4)


def test_mini_batches_are_whole_groups_of_one_question(rollout):
    seen = []
    for batch in rollout:
        assert len(batch["answer"]) == GROUPS * SAMPLES // 2
        for rows in np.split(np.arange(len(batch["answer"])), GROUPS // 2):
            ids = batch["group_ids"][rows]
            assert len(set(ids)) == 1 and len(np.unique(batch["prompt"][rows], axis=0)) == 1
            assert set(batch["group_size"][rows]) == {SAMPLES}
            mean = batch["outcome"][rows].mean()
            np.testing.assert_allclose(batch["group_rate"][rows], mean, rtol=1e-6)
            np.testing.assert_allclose(batch["group_mean"][rows], mean, rtol=1e-6)
            assert 0 < mean < 1
            seen.append(ids[0])
    assert sorted(seen) == list(range(GROUPS))


def test_outcomes_are_the_verdict_on_the_texts_of_ended_answers(rollout):
    for batch in rollout:
        texts = CODEC.decode(batch["answer"], batch["answer_mask"])
        prompts = CODEC.decode(batch["prompt"], batch["prompt_mask"])
        expected = [t == p[1:2] and len(t) == 1 for t, p in zip(texts, prompts, strict=True)]
        np.testing.assert_array_equal(batch["outcome"], expected)
        ended = np.take_along_axis(
            batch["answer"], batch["answer_mask"].sum(axis=1, keepdims=True) - 1, axis=1
        )
        assert (ended[batch["outcome"] > 0] == 0).all()


def test_every_answer_is_seen_in_each_epoch_in_another_order(model):
    once = take(following(model), 2)
    rollouts = following(model, epochs=3)
    epochs = [take(rollouts, 2) for _ in range(3)]
    assert_same(epochs[0], once)

    def ids(batches):
        return np.concatenate([b["group_ids"] for b in batches])

    def rows(batches):
        """Each answer with what is known of it, but for the weights in its mini-batch."""
        names = ("prompt", "answer", "old_log_probs", "outcome", "group_rate")
        order = np.argsort(ids(batches), kind="stable")
        return {n: np.concatenate([b[n] for b in batches])[order] for n in names}

    assert len({tuple(ids(e)) for e in epochs}) > 1
    for epoch in epochs:
        assert_same([rows(epoch)], [rows(once)])
    assert rollouts.ledger.trained_tokens == 3 * rollouts.ledger.kept_tokens


def test_weights_are_of_the_mini_batch(model):
    for batch in take(following(model, aggregation="token-mean"), 2):
        expected = len(batch["weights"]) / batch["counted"].sum()
        np.testing.assert_allclose(batch["weights"], expected, rtol=1e-6)
    batch = next(following(model, aggregation="token-sum-const", constant=10.0))
    np.testing.assert_allclose(batch["weights"], len(batch["weights"]) / 10)


def test_a_reference_judges_the_same_answers(model, rollout):
    batch = next(following(model, reference=model.other))
    np.testing.assert_array_equal(batch["answer"], rollout[0]["answer"])
    names = ("prompt", "prompt_mask", "answer", "answer_mask")
    expected = model.log_probs(model.other, *(batch[name] for name in names))
    np.testing.assert_allclose(batch["reference_log_probs"], expected, atol=1e-6)
    assert np.abs(batch["reference_log_probs"] - batch["old_log_probs"]).max() > 0.1
    assert "reference_log_probs" not in rollout[0]


def test_importance_is_the_ratio_to_the_sampler_up_to_its_cap(model):
    """Where the trainer's law is another: here that of other parameters."""
    different = model._replace(log_probs=lambda _, *rows: model.log_probs(model.other, *rows))
    told = []

    def generating(*arguments):
        told.append(model.generate(*arguments))
        return told[-1]

    rollouts = following(different._replace(generate=generating), importance_cap=1.2)
    for batch in take(rollouts, 2):
        shown = batch["answer_mask"]
        assert batch["importance"][shown].max() == np.float32(1.2)
        assert batch["importance"][shown].min() < 0.9
        # The sampler's log-probabilities are found by question and answer.
        names = ("prompt", "prompt_mask", "answer", "answer_mask")
        drawn = np.asarray(model.log_probs(model.variables, *(batch[n] for n in names)))
        expected = importance_weights(batch["old_log_probs"], drawn, cap=1.2)
        np.testing.assert_allclose(
            batch["importance"][shown], np.asarray(expected)[shown], rtol=1e-3
        )
    assert len(told) == rollouts.ledger.batches


def test_rate_may_leave_the_answer_out(model):
    batch = next(following(model, rate="leave_one_out"))
    total = batch["group_mean"] * SAMPLES
    # Within half an answer of 0 and 1, where groups would teach nothing.
    edge = 0.5 / SAMPLES
    expected = np.clip((total - batch["outcome"]) / (SAMPLES - 1), edge, 1 - edge)
    np.testing.assert_allclose(batch["group_rate"], expected, atol=1e-6)


# Positions.


def test_follow_comes_first(model):
    with pytest.raises(ValueError, match="follow"):
        next(make(model))


def test_positions_are_between_rollouts_and_of_one_seed(model):
    rollouts = following(model)
    next(rollouts)
    with pytest.raises(ValueError, match="1 mini-batches of the rollout are still to come"):
        rollouts.get_state()
    next(rollouts)
    state = rollouts.get_state()
    assert state["rollouts"] == 1 and state["asked"] == rollouts.ledger.batches
    with pytest.raises(ValueError, match="seed 0, this one of 5"):
        make(model, seed=5).set_state(state)


@pytest.mark.parametrize("carry_over", [False, True])
def test_resumed_streams_give_the_same_batches_bit_for_bit(model, carry_over):
    fields = {"carry_over": carry_over, "epochs": 2, "num_groups": 2, "batch_questions": 256}
    whole = following(model, **fields)
    take(whole, 4)
    state = json.loads(json.dumps(whole.get_state()))
    assert bool(state["carried"]) == carry_over
    whole.follow(model.other)
    expected = take(whole, 8)
    resumed = make(model, **fields)
    resumed.set_state(state)
    resumed.follow(model.other)
    assert_same(take(resumed, 8), expected)
    assert resumed.ledger == whole.ledger
    assert resumed.get_state() == whole.get_state()
    if carry_over:
        # Of an older policy, so off-policy already in the first epoch.
        names = ("prompt", "prompt_mask", "answer", "answer_mask")
        now = model.log_probs(model.other, *(expected[0][n] for n in names))
        assert np.abs(now - expected[0]["old_log_probs"])[expected[0]["answer_mask"]].max() > 0.01


def test_a_position_forgets_mini_batches_that_were_to_come(model):
    rollouts = following(model)
    take(rollouts, 2)
    state, expected = rollouts.get_state(), take(rollouts, 2)
    next(rollouts)
    rollouts.set_state(state)
    assert_same(take(rollouts, 2), expected)


def test_shares_of_processes_are_the_whole_batch(model, rollout):
    halves = [take(following(model, share=(i, 2)), 2) for i in range(2)]
    together = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*halves, strict=True)
    ]
    assert_same(together, rollout)
    third = next(following(model, share=(1, 3)))  # 8 rows: 2, 3 and 3
    np.testing.assert_array_equal(third["answer"], rollout[0]["answer"][2:5])


def test_seeds_and_rollouts_differ(model, rollout):
    def answers(batches):
        return np.concatenate([b["answer"] for b in batches])

    other = take(following(model, seed=1), 2)
    assert not np.array_equal(answers(other), answers(rollout))
    rollouts = following(model)
    first, second = take(rollouts, 2), take(rollouts, 2)
    assert_same(first, rollout)
    assert not np.array_equal(answers(second), answers(first))


def test_questions_come_in_epochs_of_all_of_them():
    """Without a band everything that is asked is in the batch."""
    rollouts = tabular_stream(
        threshold_task([5] * 6), band=None, num_groups=3, batch_questions=3, num_samples=2
    )
    for _ in range(3):
        prompts = np.concatenate([next(rollouts)["prompt"] for _ in range(2)])
        assert len(np.unique(prompts, axis=0)) == 6


def test_answers_to_the_same_question_follow_from_seed_and_batch():
    fields = {"band": None, "num_groups": 1, "batch_questions": 1, "num_samples": 8}

    def answers(seed):
        rollouts = tabular_stream(threshold_task([5]), seed=seed, **fields)
        return [next(rollouts)["answer"].tobytes() for _ in range(3)]

    assert len({*answers(0), *answers(1)}) == 6
    assert answers(0) == answers(0)
