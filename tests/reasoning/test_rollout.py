"""Rollouts: which questions are kept, how many, what is repeated, carried, left out and counted."""

import json

import jax
import numpy as np
import pytest
from tabular_answers import (
    CODEC,
    LENGTH,
    apply,
    generate,
    stream,
    threshold_task,
    uniform_digits,
)

from experiments.reasoning import METHODS
from genjax_lab.objectives import answer_objective
from genjax_lab.reasoning import (
    STATISTICS,
    AnsweredProblem,
    Collected,
    Ledger,
    RolloutSettings,
    ask,
    collect_groups,
    is_useful,
    rollout_statistics,
)

MIXED = range(2, 9)  # thresholds of questions that are mostly useful


def group(*outcome, number=0, lengths=None, truncated=None):
    """A question whose answers have these outcomes and lengths."""
    count = len(outcome)
    lengths = np.array([1] * count if lengths is None else lengths)
    mask = np.arange(LENGTH) < lengths[:, None]
    return AnsweredProblem(
        number,
        np.array([1, 1, 11], np.int32),
        np.array([False, True, True]),
        np.where(mask, number % 10 + 1, 0).astype(np.int32),
        mask,
        np.where(mask, -0.1 * (number + 1), 0).astype(np.float32),
        np.float32(outcome),
        np.zeros(count, bool) if truncated is None else np.array(truncated),
    )


def asking(*batches, slot_steps=10):
    """Gives the batches one after the other."""
    left = iter(batches)
    return lambda: (next(left), slot_steps)


def useful(*numbers):
    return [group(0, 1, number=n) for n in numbers]


def useless(*numbers, outcome=0):
    return [group(outcome, outcome, number=n) for n in numbers]


def numbers(groups):
    return [g.problem for g in groups]


# Which questions are kept.


@pytest.mark.parametrize("count", [2, 4, 8])
def test_share_of_kept_questions_is_that_of_known_rates(count):
    """4 standard deviations: a false alarm in 16,000 for each K."""
    thresholds = np.resize([0, 1, 3, 5, 8, 9, 10], 700)
    task = threshold_task(thresholds)

    def answers(prompts, mask):
        return generate(uniform_digits(), jax.random.key(count), prompts, mask, num_samples=count)

    problems = [p._replace(prompt=p.prompt[-3:]) for p in task.train]
    collected = collect_groups(lambda: ask(task, CODEC, problems, answers), num_groups=1)
    kept = len(collected.groups) + len(collected.left_over)
    rate = thresholds / 10
    expected = 1 - rate**count - (1 - rate) ** count
    deviation = np.sqrt((expected * (1 - expected)).sum())
    assert abs(kept - expected.sum()) < 4 * deviation
    right = collected.ledger.right - count * rate.sum()
    assert abs(right) < 4 * np.sqrt(count * (rate * (1 - rate)).sum())


@pytest.mark.parametrize(
    ("outcome", "band", "expected"),
    [
        ([0, 0, 0], (0.0, 1.0), False),
        ([1, 1, 1], (0.0, 1.0), False),
        ([0, 1, 0], (0.0, 1.0), True),
        ([0, 0, 0], None, True),
        ([1, 1, 1], None, True),
        # Edges are in the band: 1 of 5 and 4 of 5, whatever float32 makes of them.
        ([1, 0, 0, 0, 0], (0.2, 0.8), True),
        ([1, 1, 1, 1, 0], (0.2, 0.8), True),
        ([1, 0, 0, 0, 0], (0.3, 0.8), False),
        ([1, 1, 1, 1, 0], (0.2, 0.7), False),
        ([1, 0, 0, 0, 0, 0, 0], (0.0, 0.5), True),
        ([0.5, 0.5], (0.0, 1.0), True),
    ],
)
def test_rates_in_the_band_are_useful(outcome, band, expected):
    assert is_useful(np.float32(outcome), band) is expected


def test_rate_is_the_mean_of_outcomes():
    assert group(1, 1, 1, 1, 0).rate == 0.8


def test_asks_until_there_are_exactly_enough():
    batches = [useful(0) + useless(1), useless(2, 3), useful(4, 5, 6) + useless(7), useful(8)]
    collected = collect_groups(asking(*batches), num_groups=3)
    assert numbers(collected.groups) == [0, 4, 5]
    assert numbers(collected.left_over) == [6]
    ledger = collected.ledger
    assert (ledger.batches, ledger.questions, ledger.answers, ledger.slot_steps) == (3, 8, 16, 30)
    assert (ledger.right, ledger.kept_questions, ledger.kept_tokens) == (4, 3, 6)


def test_a_band_narrows_what_is_kept():
    batch = [group(1, 0, 0, 0, number=0), group(1, 1, 0, 0, number=1), group(1, 1, 1, 0, number=2)]
    collected = collect_groups(asking(batch), num_groups=1, band=(0.4, 0.6))
    assert numbers(collected.groups) == [1] and not collected.left_over
    collected = collect_groups(asking(useless(0, 1)), num_groups=2, band=None)
    assert numbers(collected.groups) == [0, 1]


def test_too_few_after_the_last_batch_is_an_error_that_says_what_there_was():
    batches = [useful(0) + useless(1, outcome=1)] + [useless(2, 3)] * 9
    with pytest.raises(ValueError) as error:
        collect_groups(asking(*batches), num_groups=2, max_batches=4)
    message = str(error.value)
    assert "only 1 of num_groups=2" in message and "in 4 batches of 2" in message
    assert "3 of 16 answers were right" in message and "max_batches" in message


@pytest.mark.parametrize(
    "change",
    [
        {"num_groups": 0},
        {"max_batches": 0},
        {"strategy": "hope"},
        {"band": (0.5, 0.5)},
        {"band": (-0.1, 1)},
        {"band": (0, 1.1)},
        {"band": (0.8, 0.2)},
    ],
)
def test_numbers_out_of_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        collect_groups(asking(useful(0)), **({"num_groups": 1} | change))


# Strategies.


def test_replacing_asks_once_and_repeats_what_is_useful():
    batch = useless(0) + useful(1) + useless(2) + useful(3)
    collected = collect_groups(asking(batch), num_groups=5, strategy="replace")
    assert numbers(collected.groups) == [1, 3, 1, 3, 1] and not collected.left_over
    assert collected.ledger.batches == 1 and collected.ledger.kept_questions == 5
    collected = collect_groups(asking(useful(0, 1, 2)), num_groups=2, strategy="replace")
    assert numbers(collected.groups) == [0, 1] and numbers(collected.left_over) == [2]
    with pytest.raises(ValueError, match="only 0 of num_groups=2"):
        collect_groups(asking(useless(0, 1)), num_groups=2, strategy="replace")


def test_partial_rollouts_are_filled_up_after_the_last_batch():
    batches = [useful(0) + useless(1), useful(2) + useless(3)]
    options = {"strategy": "partial", "max_batches": 2}
    collected = collect_groups(asking(*batches), num_groups=5, **options)
    assert numbers(collected.groups) == [0, 2, 1, 3, 1]
    assert collected.ledger.kept_questions == 2 and collected.ledger.kept_tokens == 4
    collected = collect_groups(asking(useful(0, 1, 2)), num_groups=2, **options)
    assert numbers(collected.groups) == [0, 1] and collected.ledger.kept_questions == 2


def test_carried_questions_come_first_and_may_be_enough():
    collected = collect_groups(asking(useful(5, 6)), num_groups=2, carried=useful(1))
    assert numbers(collected.groups) == [1, 5] and numbers(collected.left_over) == [6]
    collected = collect_groups(asking(), num_groups=2, carried=useful(1, 2, 3))
    assert numbers(collected.groups) == [1, 2] and numbers(collected.left_over) == [3]
    assert collected.ledger == Ledger(kept_questions=2, kept_tokens=4)


# What is counted.


PARTIAL = {"strategy": "partial", "max_batches": 1, "truncated_is_wrong": False}


def test_fillers_are_in_the_batch_and_never_counted():
    rollouts = stream(
        threshold_task([0, 5, 10]), **PARTIAL, num_groups=6, num_samples=8, batch_questions=3
    )
    batch = next(rollouts)
    fills = (batch["group_rate"] == 0) | (batch["group_rate"] == 1)
    np.testing.assert_array_equal(batch["counted"], batch["answer_mask"] & ~fills[:, None])
    assert fills.reshape(6, 8).all(axis=1).sum() == 5 and len(fills) == 48
    assert rollouts.ledger.kept_questions == 1
    assert rollouts.ledger.kept_tokens == rollouts.ledger.trained_tokens == batch["counted"].sum()


def test_useful_questions_that_fill_up_are_not_counted_twice():
    rollouts = stream(
        threshold_task([5]), **PARTIAL, num_groups=3, num_samples=8, batch_questions=1
    )
    batch = next(rollouts)
    assert 0 < batch["group_rate"][0] < 1
    counted = batch["counted"].any(axis=1).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(counted.sum(axis=1)), [0, 0, 8])
    assert rollouts.ledger.trained_tokens == batch["counted"].sum()


@pytest.fixture(scope="module")
def losses_and_gradients():
    """Of every method, of batches of questions 0 of which all, 1 of which some are right."""

    def reward(answers):
        return 2 * answers.outcome - 1 - 0.1 * answers.lengths

    def batch(thresholds, method):
        fields = PARTIAL | {"batch_questions": 2, "aggregation": METHODS[method].aggregation}
        return next(stream(threshold_task(thresholds), **fields, options={"reward": reward}))

    @jax.jit
    def judge(batches):
        result = {}
        for name, method in METHODS.items():
            objective = answer_objective(apply, method.loss, takes_weights=method.takes_weights)
            both = jax.value_and_grad(
                lambda v, b, objective=objective: objective(v, b, None), has_aux=True
            )
            result[name] = both(uniform_digits(), batches[name])
        return result

    batches = [{name: batch(t, name) for name in METHODS} for t in ((0, 10), (5, 6))]
    for unlearnable, learnable in zip(*(b.values() for b in batches), strict=True):
        assert not unlearnable["counted"].any() and unlearnable["answer_mask"].any()
        assert learnable["counted"].any()
    return [judge(b) for b in batches]


@pytest.mark.parametrize("method", METHODS)
def test_batches_without_any_useful_question_have_no_gradient(losses_and_gradients, method):
    (value, metrics), gradient = losses_and_gradients[0][method]
    np.testing.assert_array_equal(gradient["params"]["table"], 0)
    assert value == 0 and all(np.isfinite(x) for x in metrics.values())
    # Those with one have.
    gradient = losses_and_gradients[1][method][1]["params"]["table"]
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_shaped_rewards_do_not_rescue_questions_that_are_wrong_as_a_whole():
    def reward(answers):
        assert all(task.verify(answers.problems, answers.texts) == answers.outcome)
        return answers.outcome - 0.25 * answers.lengths

    task = threshold_task([0, 0, 5, 0])
    options = {"options": {"reward": reward}, "batch_questions": 4, "num_groups": 2}
    options |= {"truncated_is_wrong": False}
    batch = next(stream(task, **options))
    wrong = np.asarray(batch["group_reward"]).reshape(2, 4)
    assert (wrong.std(axis=1) > 0).all()  # within each question rewards differ
    np.testing.assert_allclose(batch["group_reward"], batch["outcome"] - 0.25 * lengths_of(batch))
    # All are the question that has right answers, however rewards differ in the others.
    prompts = {tuple(row) for row in batch["prompt"]}
    assert prompts == {tuple(CODEC.encode_prompts(["02="])[0][0])}
    assert (batch["group_rate"] > 0).all() and (batch["group_rate"] < 1).all()
    with pytest.raises(ValueError, match="only 0 of num_groups=2"):
        next(stream(threshold_task([0, 10]), **options, max_batches=2))


def lengths_of(batch):
    return batch["answer_mask"].sum(axis=1)


def test_truncated_answers_are_wrong_whatever_the_verifier_says():
    task = threshold_task([10])  # all are right that begin with a digit, as all do
    rollouts = stream(task, num_groups=2, num_samples=8, batch_questions=2)
    batch = next(rollouts)
    ended = (batch["answer"] == 0).any(axis=1)
    np.testing.assert_array_equal(batch["outcome"], ended)
    assert 0 < ended.sum() < len(ended)
    assert rollouts.ledger.truncated == rollouts.ledger.answers - rollouts.ledger.right > 0
    rate = ended.reshape(2, 8).mean(axis=1).repeat(8)
    np.testing.assert_allclose(batch["group_rate"], rate, rtol=1e-6)
    # If they are not, no question is useful.
    with pytest.raises(ValueError, match="only 0 of num_groups"):
        next(stream(task, truncated_is_wrong=False, batch_questions=4, max_batches=2))


def test_truncated_answers_may_be_left_out_of_training():
    fields = {"num_groups": 6, "num_samples": 8}
    rollouts = stream(threshold_task(MIXED), mask_truncated=True, **fields)
    masked, whole = next(rollouts), next(stream(threshold_task(MIXED), **fields))
    truncated = ~(masked["answer"] == 0).any(axis=1)
    assert 0 < truncated.sum() < len(truncated)
    np.testing.assert_array_equal(whole["counted"], whole["answer_mask"])
    np.testing.assert_array_equal(masked["counted"], masked["answer_mask"] & ~truncated[:, None])
    # The group still knows of them.
    np.testing.assert_array_equal(masked["group_rate"], whole["group_rate"])
    assert rollouts.ledger.trained_tokens == masked["counted"].sum()


# Left-overs.


def test_left_overs_come_first_in_the_next_rollout_with_the_log_probs_of_their_policy():
    task = threshold_task(MIXED)
    fields = {"num_groups": 3, "num_samples": 4, "batch_questions": 5, "seed": 10}
    rollouts = stream(task, carry_over=True, **fields)
    next(rollouts)
    carried = rollouts.get_state()["carried"]
    assert len(carried) == 2, "another seed is needed"
    later = uniform_digits(end=0.5)
    rollouts.follow(later)
    second = next(rollouts)
    # Groups are shuffled in a rollout: they are found by their answers.
    found = second["answer"].reshape(3, 4, LENGTH)
    old = second["old_log_probs"].reshape(3, 4, LENGTH)
    mask = second["answer_mask"].reshape(3, 4, LENGTH)
    now = apply(later, second["answer"], start=0)[0].reshape(3, 4, LENGTH)
    matched = 0
    for place in range(3):
        for other in carried:
            if np.array_equal(found[place], other["answers"]):
                np.testing.assert_array_equal(old[place], np.float32(other["log_probs"]))
                assert np.abs(old[place] - now[place])[mask[place]].min() > 0.01
                matched += 1
                break
        else:  # answered by the later policy
            np.testing.assert_allclose(old[place], now[place], atol=1e-6)
    assert matched == 2
    # Without the switch they are forgotten.
    rollouts = stream(task, **fields)
    next(rollouts)
    assert rollouts.get_state()["carried"] == []


@pytest.mark.parametrize("strategy", ["replace", "partial"])
def test_repeated_left_overs_keep_the_log_probs_of_their_policy_too(strategy):
    fields = {"num_groups": 6, "batch_questions": 1, "max_batches": 1, "strategy": strategy}
    rollouts = stream(threshold_task([0]), carry_over=True, **fields)
    rollouts._carried = useful_with_four_answers()
    batch = next(rollouts)
    shown = batch["counted"] if strategy == "partial" else batch["answer_mask"]
    ours = shown & (batch["answer"] == 3)
    assert ours.any(axis=1).sum() == 4 * (6 if strategy == "replace" else 1)
    np.testing.assert_array_equal(batch["old_log_probs"][ours], np.float32(-0.3))


def useful_with_four_answers():
    return [group(0, 1, 0, 1, number=2)]


# Numbers.


def test_ledgers_add_up_and_tell_operations():
    a = Ledger(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert a + Ledger() == a
    assert a + a == Ledger(2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    assert a.floating_point_operations(100) == {
        "generation": 2 * 100 * 6,
        "old_log_probs": 2 * 100 * 9,
        "training": 6 * 100 * 10,
    }


def test_ledger_of_a_stream_is_the_sum_of_its_rollouts():
    rollouts = stream(threshold_task(MIXED), epochs=3, num_groups=2, batch_questions=5)
    batches = [next(rollouts) for _ in range(6)]
    ledger = rollouts.ledger
    assert ledger.questions == 5 * ledger.batches and ledger.answers == 4 * ledger.questions
    assert ledger.kept_questions == 4
    assert ledger.trained_tokens == sum(int(b["counted"].sum()) for b in batches)
    assert ledger.trained_tokens == 3 * ledger.kept_tokens
    assert ledger.right <= ledger.answers and ledger.generated_tokens <= ledger.slot_steps
    assert all(type(value) is int for value in ledger)


def test_answered_problems_survive_json():
    rng = np.random.default_rng(0)
    original = group(0.25, 1, 0, number=12, lengths=[1, 3, 4], truncated=[0, 0, 1])
    original = original._replace(log_probs=rng.normal(size=(3, LENGTH)).astype(np.float32))
    original = original._replace(truncated=np.array([False, False, True]))
    again = AnsweredProblem.from_json(json.loads(json.dumps(original.to_json())))
    assert again.problem == 12
    for name, expected in original._asdict().items():
        if isinstance(expected, np.ndarray):
            assert getattr(again, name).dtype == expected.dtype, name
            np.testing.assert_array_equal(getattr(again, name), expected)


def test_statistics_of_a_rollout():
    groups = [
        group(1, 0, number=0, lengths=[2, 4], truncated=[0, 1]),
        group(1, 1, number=1, lengths=[3, 3]),
        group(0, 0, number=2, lengths=[4, 4], truncated=[1, 1]),
    ]
    collected = collect_groups(asking(groups, slot_steps=40), num_groups=1)
    expected = {
        "accuracy": 3 / 6,
        "kept": 1 / 3,
        "truncated": 3 / 6,
        "length_right": 2,
        "length_wrong": 4,
        "tokens_per_kept": 20 / 6,
        "utilisation": 20 / 40,
    }
    assert tuple(expected) == STATISTICS
    assert rollout_statistics(collected) == pytest.approx(expected)
    # What fills up has not been kept.
    filled = collect_groups(
        asking(groups, slot_steps=40), num_groups=3, strategy="partial", max_batches=1
    )
    assert rollout_statistics(filled) == pytest.approx(expected)
    nothing = Collected(useless(0), [], Ledger(1, questions=1, answers=2, slot_steps=8))
    assert set(rollout_statistics(nothing).values()) == {0.0}
    # What was not asked has no shares.
    found = rollout_statistics(Collected(groups, [], Ledger(kept_questions=3, kept_tokens=20)))
    assert np.isnan(
        [found[name] for name in ("accuracy", "kept", "truncated", "utilisation")]
    ).all()


def test_every_row_of_a_batch_carries_the_statistics():
    rollouts = stream(threshold_task(MIXED), minibatches=2)
    batches = [next(rollouts) for _ in range(2)]
    ledger = rollouts.ledger
    for batch in batches:
        np.testing.assert_allclose(batch["rollout_accuracy"], ledger.right / ledger.answers)
        np.testing.assert_allclose(
            batch["rollout_utilisation"], ledger.generated_tokens / ledger.slot_steps, rtol=1e-6
        )
        assert {f"rollout_{name}" for name in STATISTICS} <= set(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 0}, "num_groups"),
        ({"minibatches": 0}, "minibatches"),
        ({"epochs": -1}, "epochs"),
        ({"batch_questions": 0}, "batch_questions"),
        ({"max_batches": 0}, "max_batches"),
        ({"num_samples": 1}, "num_samples=1"),
        ({"minibatches": 3}, r"num_groups=4 a multiple of minibatches=3"),
        ({"rate": "histroy"}, "rate is 'histroy', not in"),
        ({"history_decay": 1.5}, "history_decay=1.5"),
        ({"bucket": 0}, "bucket=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, message):
    fields = {"num_groups": 4, "num_samples": 4} | change
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**fields).checked()
    with pytest.raises(ValueError, match=message):
        stream(threshold_task(MIXED), **fields)


@pytest.mark.parametrize("value", [-0.5, 2.0, np.nan])
def test_verifiers_that_do_not_give_outcomes_are_refused(value):
    task = threshold_task(MIXED)
    task = task._replace(verify=lambda problems, answers: np.full(len(answers), value))
    with pytest.raises(ValueError, match=r"task\.verify"):
        next(stream(task))


def test_questions_that_are_too_long_are_not_asked():
    task = threshold_task(MIXED)
    longer = tuple(p._replace(prompt="000000=") for p in task.train)
    batch = next(stream(task._replace(train=longer[:3] + task.train[3:])))
    assert batch["prompt"].shape[1] == 3
    with pytest.raises(ValueError, match="longer than 3 tokens"):
        stream(task._replace(train=longer))


# What earlier rollouts know of a question, and columns that no answer needs.


def test_rates_of_a_history_forget_by_the_decay_and_survive_a_restart():
    fields = {"rate": "history", "history_decay": 0.25, "band": None, "num_groups": 2}
    fields |= {"batch_questions": 2, "truncated_is_wrong": False}
    task = threshold_task([3, 7])

    def resumed(rollouts):
        other = stream(task, **fields)
        other.set_state(json.loads(json.dumps(rollouts.get_state())))
        return other

    rollouts = stream(task, **fields)
    counts = {}
    for number in range(4):
        batch = next(rollouts)
        for prompt, outcome in zip(
            batch["prompt"][::4], batch["outcome"].reshape(2, 4), strict=True
        ):
            before = counts.get(tuple(prompt), (0.0, 0.0))
            counts[tuple(prompt)] = (0.25 * before[0] + outcome.sum(), 0.25 * before[1] + 4)
        expected = [counts[tuple(prompt)] for prompt in batch["prompt"]]
        np.testing.assert_allclose(
            batch["group_rate"], [right / count for right, count in expected], rtol=1e-6
        )
        if number == 1:
            rollouts = resumed(rollouts)
    assert len(counts) == 2
    fresh = next(stream(task, **(fields | {"history_decay": 0.0})))
    np.testing.assert_allclose(
        fresh["group_rate"], np.repeat(fresh["outcome"].reshape(2, 4).mean(axis=1), 4), rtol=1e-6
    )


def test_answers_to_a_question_that_is_asked_twice_are_all_of_one_rollout():
    """None of them is forgotten, so that a question with right answers has no rate of 0."""
    fields = {"rate": "history", "history_decay": 0.0, "num_groups": 3, "batch_questions": 1}
    rollouts = stream(threshold_task([5]), **fields, truncated_is_wrong=False)
    for _ in range(3):
        batch = next(rollouts)
        answers = rollouts.get_state()["history"][0][2]
        assert answers >= 12  # those of questions that were not kept, too
        rate = np.unique(batch["group_rate"])
        assert len(rate) == 1 and 0 < rate[0] < 1
        right = round(float(rate[0]) * answers)
        assert rate[0] == pytest.approx(right / answers, rel=1e-6)
        assert right >= batch["outcome"].sum()


def test_carried_questions_have_a_history_when_it_begins_to_be_kept():
    fields = {"num_groups": 2, "batch_questions": 9, "carry_over": True}
    before = stream(threshold_task(MIXED), **fields)
    next(before)
    assert before.get_state()["carried"] and not before.get_state()["history"]
    after = stream(threshold_task(MIXED), **fields, rate="history")
    after.set_state(before.get_state())
    batch = next(after)
    outcome = batch["outcome"].reshape(2, 4)
    np.testing.assert_allclose(batch["group_rate"][::4], outcome.mean(axis=1), rtol=1e-6)


def short(variables, key, prompts, mask, *, num_samples):
    """Answers of `generate` that end after two tokens at most, of which the second is the end."""
    drawn = generate(variables, key, prompts, mask, num_samples=num_samples)
    tokens, shown = np.array(drawn.tokens), np.array(drawn.mask)
    tokens[..., 1:], shown[..., 2:] = 0, False
    report = drawn.report._replace(
        lengths=shown.sum(axis=-1),
        truncated=np.zeros(shown.shape[:2], bool),
        drawn_log_probs=np.where(shown, drawn.report.drawn_log_probs, 0),
    )
    return drawn._replace(tokens=tokens, mask=shown, report=report)


@pytest.mark.parametrize(("bucket", "columns"), [(None, 4), (1, 2), (2, 2), (3, 3), (5, 4)])
def test_columns_that_no_answer_needs_are_cut_off(bucket, columns):
    # Divided by the limit of lengths, not by the columns that are left.
    fields = {"aggregation": "seq-mean-token-sum-norm", "bucket": bucket}
    task = threshold_task(MIXED)
    options = {"generate": lambda *a: short(*a, num_samples=4)}
    batch = next(stream(task, **fields, options=options))
    whole = next(stream(task, **fields | {"bucket": None}, options=options))
    assert batch["answer"].shape[1] == columns and whole["answer"].shape[1] == LENGTH
    for name, array in whole.items():
        if array.ndim == 2 and array.shape[1] == LENGTH:
            array = array[:, :columns]
        np.testing.assert_array_equal(batch[name], array)


def test_the_log_has_the_ledger():
    rollouts = stream(threshold_task(MIXED))
    next(rollouts)
    counters = rollouts.counters()
    assert counters == {f"ledger/{name}": n for name, n in rollouts.ledger._asdict().items()}
    assert counters["ledger/kept_tokens"] == counters["ledger/trained_tokens"] > 0
