"""First hitting draws from the model's law, at any batch, from any start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tables import (
    LENGTH,
    VOCAB,
    apply,
    counts,
    denoiser_of,
    random_table,
)

from genjax_lab.evaluation import (
    ancestral_law,
    consistent_table,
    first_hitting_law,
    prediction_table,
    total_variation,
)
from genjax_lab.processes import masked
from genjax_lab.samplers import (
    ancestral,
    confidence,
    first_hitting,
    guide_tokens,
    remasking,
    sample,
    suppress_tokens,
    tau_leaping,
    token_denoiser,
)
from genjax_lab.samplers.base import example_keys, step_keys

MASK = VOCAB


@pytest.fixture(scope="module")
def joint():
    law = np.random.default_rng(0).random((VOCAB,) * LENGTH)
    return law / law.sum()


@pytest.fixture(scope="module")
def table():
    return random_table()


@functools.cache
def drawn(seed, batch, number):
    """Sequences of the random table, `number` batches of them."""
    sampler = first_hitting(denoiser_of(random_table()), LENGTH)
    keys = jax.random.split(jax.random.key(seed), number)
    return np.concatenate([sample(sampler, key, shape=(batch, LENGTH))[0] for key in keys])


def p_value(found, law):
    return scipy.stats.chisquare(found.ravel(), law.ravel() / law.sum() * found.sum()).pvalue


def test_the_law_of_a_consistent_model_is_its_joint_law(joint):
    assert total_variation(first_hitting_law(consistent_table(joint)), joint) < 1e-12


def test_a_table_can_be_read_from_a_network(table):
    found = prediction_table(denoiser_of(table), LENGTH)
    np.testing.assert_allclose(found, table, atol=1e-6)
    with pytest.raises(ValueError, match="states"):
        prediction_table(denoiser_of(table), 20)
    with pytest.raises(ValueError, match="states"):
        prediction_table(denoiser_of(table)._replace(vocab_size=999), 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table: first_hitting_law(table[0]), "a table is"),
        (lambda table: first_hitting_law(table * np.nan), "not finite"),
        (lambda table: ancestral_law(table, [1.5]), "reveals"),
        (lambda table: total_variation(np.ones(3), np.ones((3, 3))), "shapes"),
        (lambda table: consistent_table(np.array(1.0)), "joint"),
        (lambda table: consistent_table(np.zeros((2, 2))), "positive"),
    ],
)
def test_what_is_no_law_is_refused(table, make, message):
    with pytest.raises(ValueError, match=message):
        make(table)


def test_ancestral_sampling_tends_to_first_hitting_as_one_over_the_steps(table):
    limit = first_hitting_law(table)
    errors = {
        steps: total_variation(ancestral_law(table, 1 / np.arange(steps, 0, -1)), limit)
        for steps in (16, 32, 64)
    }
    assert errors[64] > 1e-4
    for steps in (16, 32):
        assert errors[steps] / errors[2 * steps] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("batch", [1, 8])
def test_samples_have_the_law_at_any_batch(table, batch):
    # 40 sets in all, whose statistics are pooled: the level was fixed beforehand.
    found = counts(drawn(1, batch, 320 // batch))
    for seed in range(2, 6 if batch == 1 else 40):
        found += counts(drawn(seed, batch, 320 // batch))
    assert 1e-4 < p_value(found, first_hitting_law(table)) < 1 - 1e-4


def test_many_samples_have_the_law_and_confidence_has_another(table):
    law = first_hitting_law(table)
    shape = (20_000, LENGTH)
    tokens, info = sample(first_hitting(denoiser_of(table), LENGTH), jax.random.key(0), shape=shape)
    assert 1e-4 < p_value(counts(tokens), law) < 1 - 1e-4
    assert info.num_evaluations == LENGTH
    ordered, _ = sample(
        confidence(denoiser_of(table), LENGTH, num_steps=LENGTH), jax.random.key(0), shape=shape
    )
    assert p_value(counts(ordered), law) < 1e-4


def test_the_report_says_when_and_how_probable(table):
    tokens, info = sample(
        first_hitting(denoiser_of(table), LENGTH), jax.random.key(0), shape=(50, LENGTH)
    )
    report = info.report
    assert np.all(np.sort(report.revealed_at, axis=1) == np.arange(LENGTH))
    assert not np.any(report.masks_left)
    expected = []
    for row, order in zip(np.asarray(tokens), np.argsort(report.revealed_at, axis=1), strict=True):
        state, total = [MASK] * LENGTH, 0.0
        for i in order:
            total += np.log(table[(*state, i, row[i])])
            state[i] = row[i]
        expected.append(total)
    np.testing.assert_allclose(report.log_probability, expected, rtol=1e-5)


def test_only_masks_are_filled_and_ragged_prompts_stop_when_all_are_done(joint):
    prompts = np.array([[1, MASK, 0, MASK], [2, 2, MASK, 0], [1, 1, 1, 1]] * 4000)
    sampler = first_hitting(denoiser_of(consistent_table(joint)), LENGTH, stop_early=True)
    tokens, info = sample(sampler, jax.random.key(3), shape=prompts.shape, initial=prompts)
    tokens = np.asarray(tokens)
    np.testing.assert_array_equal(np.where(prompts == MASK, MASK, tokens), prompts)
    assert np.all(tokens < MASK)
    assert info.num_evaluations == 2
    found = np.zeros((VOCAB, VOCAB))
    np.add.at(found, (tokens[::3, 1], tokens[::3, 3]), 1)
    assert 1e-4 < p_value(found, joint[1, :, 0, :]) < 1 - 1e-4


def test_a_sample_depends_on_its_own_key_alone(table):
    sampler = first_hitting(denoiser_of(table), LENGTH, tokens_per_step=2)
    key = jax.random.key(5)
    whole, _ = sample(sampler, key, shape=(6, LENGTH))
    part, _ = sample(sampler, key, shape=(2, LENGTH), seeds=np.array([4, 1]))
    np.testing.assert_array_equal(part, np.asarray(whole)[[4, 1]])


def test_sweeps_mend_what_drawing_together_breaks(joint):
    denoiser = denoiser_of(consistent_table(joint))
    errors = []
    for sweeps in (0, 6):
        sampler = first_hitting(denoiser, LENGTH, tokens_per_step=2, corrector_sweeps=sweeps)
        tokens, info = sample(sampler, jax.random.key(1), shape=(20_000, LENGTH))
        errors.append(total_variation(counts(tokens) / 20_000, joint))
        assert info.num_evaluations == 2 * (1 + 2 * sweeps)
    assert errors[0] > 0.1 > 0.04 > errors[1]


def test_extrapolation_follows_laws_that_change_with_the_time():
    """One token in two is known to be drawn from a law that is linear in the time."""
    early, late = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.1, 0.8])

    def of_time(variables, tokens, t, condition, *, rows=None, train=False):
        law = late + t[:, None] * (early - late)
        return jnp.broadcast_to(jnp.log(law)[:, None], (*tokens.shape, VOCAB))

    sampler = first_hitting(
        token_denoiser(of_time, {}, VOCAB),
        LENGTH,
        tokens_per_step=2,
        time_conditioned=True,
        extrapolate=True,
    )
    tokens, info = sample(sampler, jax.random.key(0), shape=(20_000, LENGTH))
    assert info.num_evaluations == 2
    # Later tokens have the later law; on average over all times both are as probable.
    at = np.asarray(info.report.revealed_at)
    first, last = (np.bincount(np.asarray(tokens)[at == step], minlength=3) for step in (0, 1))
    assert first[0] > first[2] and last[2] > last[0]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("draw", ["two_stage", "joint"])
def test_ancestral_samples_have_the_enumerated_law(table, draw, asynchronous):
    steps = 4
    law = ancestral_law(table, 1 / np.arange(steps, 0, -1))
    sampler = ancestral(
        denoiser_of(table), LENGTH, num_steps=steps, draw=draw, asynchronous=asynchronous
    )
    tokens, _ = sample(sampler, jax.random.key(2), shape=(20_000, LENGTH))
    assert 1e-4 < p_value(counts(tokens), law) < 1 - 1e-4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tau_leaping_unmasks_at_the_rates_of_the_beginning_of_each_step(table, asynchronous):
    # With 1 - alpha = t^2 and four steps the rates give 2 / 4, 2 / 3, 1.
    law = ancestral_law(table, np.array([1 / 2, 2 / 3, 1.0, 1.0]))
    options = {"num_steps": 4, "asynchronous": asynchronous}
    sampler = tau_leaping(denoiser_of(table), LENGTH, schedule=masked.polynomial(2.0), **options)
    tokens, _ = sample(sampler, jax.random.key(2), shape=(20_000, LENGTH))
    assert 1e-4 < p_value(counts(tokens), law) < 1 - 1e-4

    schedule = masked.cosine()
    times = jnp.array([1.0, 0.75, 0.5, 0.25])
    left = np.prod(1 - np.minimum(1, schedule.rate(times) / 4 / schedule.masked(times)))
    sampler = tau_leaping(denoiser_of(table), LENGTH, schedule=schedule, **options)
    tokens, info = sample(sampler, jax.random.key(3), shape=(20_000, LENGTH))
    filled = np.mean(info.report.masks_filled) / LENGTH
    assert abs(filled - left) < 4 * np.sqrt(left * (1 - left) / tokens.size)
    assert left > 0.01 and tokens.max() < VOCAB


def test_evaluations_of_cached_ancestral_sampling_are_those_of_the_formula():
    length, steps, batch = 32, 64, 4

    def uniform(variables, tokens, t, condition, *, rows=None, train=False):
        return jnp.zeros((*tokens.shape, VOCAB))

    sampler = ancestral(token_denoiser(uniform, {}, VOCAB), length, num_steps=steps)
    found = [
        int(sample(sampler, jax.random.key(i), shape=(batch, length))[1].num_evaluations)
        for i in range(8)
    ]
    # One at the start, and one after each step in which a token of the batch was unmasked.
    expected = steps * (1 - (1 - 1 / steps) ** (batch * length))
    assert np.mean(found) == pytest.approx(expected, abs=2.5)


@pytest.mark.parametrize("draw", ["two_stage", "joint_float32"])
def test_clocks_of_their_own_give_each_sequence_the_steps_it_would_make(table, draw):
    """Step by step, with the same keys, the sampler with one clock goes the same way."""
    steps, seed, shape = 16, 5, (1, LENGTH)
    settings = {"num_steps": steps, "draw": draw, "times": np.linspace(1, 0.1, steps + 1)}
    own, info = sample(
        ancestral(denoiser_of(table), LENGTH, asynchronous=True, **settings),
        jax.random.key(seed),
        shape=shape,
    )
    sampler = ancestral(denoiser_of(table), LENGTH, **settings)
    keys = example_keys(jax.random.key(seed), np.arange(1))
    state, call = sampler.init(keys, shape, None), 1
    for step in range(sampler.num_steps):
        prediction, state = sampler.predict(state)
        before = state.sample
        call_keys = step_keys(step_keys(keys, call), step)
        state = sampler.transition(call_keys, state, prediction)
        state = state._replace(shared=state.shared._replace(step=state.shared.step + 1))
        call += int(np.any(before != state.sample))
    np.testing.assert_array_equal(own, state.sample)
    np.testing.assert_array_equal(info.report.revealed_at, sampler.report(state).revealed_at)
    np.testing.assert_array_equal(info.report.masks_filled, sampler.report(state).masks_filled)


def test_clocks_of_their_own_need_at_most_an_evaluation_for_each_token(table):
    sampler = ancestral(denoiser_of(table), LENGTH, num_steps=512, asynchronous=True)
    tokens, info = sample(sampler, jax.random.key(0), shape=(64, LENGTH))
    assert LENGTH - 1 <= info.num_evaluations <= LENGTH + 1
    assert np.all(np.asarray(tokens) < MASK)
    # Steps are still those of the schedule: a token is revealed at a uniform time.
    assert np.mean(info.report.revealed_at) == pytest.approx(256, abs=40)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_masks_that_are_left_are_filled_and_counted(table, asynchronous):
    times = np.linspace(1, 0.5, 9)
    sampler = ancestral(
        denoiser_of(table), LENGTH, num_steps=8, times=times, asynchronous=asynchronous
    )
    tokens, info = sample(sampler, jax.random.key(0), shape=(4000, LENGTH))
    assert np.all(np.asarray(tokens) < MASK) and not np.any(info.report.masks_left)
    assert np.mean(info.report.masks_filled) == pytest.approx(LENGTH / 2, abs=0.1)


def test_no_remasking_is_ancestral_sampling_token_by_token(table):
    key, shape = jax.random.key(4), (64, LENGTH)
    plain, _ = sample(ancestral(denoiser_of(table), LENGTH, num_steps=8), key, shape=shape)
    same, _ = sample(
        remasking(denoiser_of(table), LENGTH, num_steps=8, strategy="cap", eta=0.0),
        key,
        shape=shape,
    )
    np.testing.assert_array_equal(plain, same)


@pytest.mark.parametrize("strategy", ["rescale", "forward_backward"])
def test_remasking_keeps_the_share_of_masks_and_the_law_at_every_time(joint, strategy):
    steps, number = 8, 8000
    sampler = remasking(
        denoiser_of(consistent_table(joint)), LENGTH, num_steps=steps, strategy=strategy, eta=0.5
    )
    _, info = sample(sampler, jax.random.key(0), shape=(number, LENGTH), trajectory=True)
    path = np.asarray(info.trajectory)
    again = (path[:-1] != MASK) & (path[1:] == MASK)
    assert np.any(again)
    for step in range(steps):
        share = 1 - (step + 1) / steps
        error = 5 * np.sqrt(share * (1 - share) / (number * LENGTH)) + 1e-9
        assert np.mean(path[step] == MASK) == pytest.approx(share, abs=error)
        tokens = path[step][:, 0]
        marginal = joint.sum((1, 2, 3))
        found = np.bincount(tokens[tokens != MASK], minlength=VOCAB)
        assert p_value(found, marginal) > 1e-5


def test_suppressed_tokens_are_never_drawn_nor_ranked(table):
    denoiser = suppress_tokens(denoiser_of(table), [1])
    tokens, _ = sample(first_hitting(denoiser, LENGTH), jax.random.key(0), shape=(500, LENGTH))
    assert set(np.unique(tokens)) == {0, 2}


def test_guidance_without_scale_changes_nothing_and_counts_its_evaluations(table):
    plain, key, shape = denoiser_of(table), jax.random.key(0), (64, LENGTH)
    prompt = np.array([True, False, False, False])
    initial = np.array([[1, MASK, MASK, MASK]] * 64)
    draw = lambda d: sample(first_hitting(d, LENGTH), key, shape=shape, initial=initial)  # noqa: E731
    expected, _ = draw(plain)
    found, info = draw(guide_tokens(plain, 0.0, prompt=prompt))
    np.testing.assert_array_equal(found, expected)
    assert info.num_evaluations == 2 * LENGTH
    strong, _ = draw(guide_tokens(plain, 5.0, prompt=prompt))
    assert np.any(np.asarray(strong) != np.asarray(expected))


def test_a_threshold_takes_all_that_are_sure_and_one_at_least(table):
    sampler = confidence(denoiser_of(table), LENGTH, threshold=0.6)
    tokens, info = sample(sampler, jax.random.key(0), shape=(200, LENGTH))
    assert np.all(np.asarray(tokens) < MASK) and not np.any(info.report.masks_left)
    assert np.all(np.asarray(info.report.revealed_at).min(axis=1) == 0)
    assert len(np.unique(np.asarray(info.report.revealed_at).max(axis=1))) > 1


@pytest.mark.parametrize("rank", ["margin", "entropy", "random"])
def test_calls_share_the_masks_out_evenly(table, rank):
    sampler = confidence(denoiser_of(table), LENGTH, num_steps=3, rank=rank)
    _, info = sample(sampler, jax.random.key(0), shape=(20, LENGTH))
    for row in np.asarray(info.report.revealed_at):
        np.testing.assert_array_equal(np.bincount(row, minlength=3), [2, 1, 1])


def test_nothing_finite_leaves_masks_that_are_counted():
    def broken(variables, tokens, t, condition, *, rows=None, train=False):
        width = LENGTH if rows is None else rows.shape[1]
        return jnp.full((len(tokens), width, VOCAB), jnp.nan)

    _, info = sample(
        first_hitting(token_denoiser(broken, {}, VOCAB), LENGTH),
        jax.random.key(0),
        shape=(2, LENGTH),
    )
    np.testing.assert_array_equal(info.report.masks_left, LENGTH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: first_hitting(d, 4, tokens_per_step=5), "tokens_per_step"),
        (lambda d: first_hitting(d, 4, temperature=-1.0), "temperature"),
        (lambda d: first_hitting(d, 4, top_p=2.0), "top_p"),
        (lambda d: first_hitting(d, 4, extrapolate=True, corrector_sweeps=1), "extrapolate"),
        (lambda d: ancestral(d, 4, num_steps=0), "num_steps"),
        (lambda d: ancestral(d, 4, num_steps=2, times=[1.0, 0.5, 0.6]), "times"),
        (lambda d: ancestral(d, 4, num_steps=2, draw="both"), "draw"),
        (lambda d: ancestral(d, 4, num_steps=2, draw="joint", top_k=2), "draw"),
        (
            lambda d: ancestral(d, 4, num_steps=2, time_conditioned=True, asynchronous=True),
            "asynchronous",
        ),
        (lambda d: remasking(d, 4, num_steps=2, strategy="none"), "strategy"),
        (lambda d: confidence(d, 4), "num_steps and threshold"),
        (lambda d: confidence(d, 4, num_steps=2, rank="luck"), "rank"),
        (lambda d: confidence(d, 4, threshold=0.5, rank="random"), "random"),
        (lambda d: suppress_tokens(d, [3]), "ids"),
        (lambda d: guide_tokens(d, 1.0), "null_condition or prompt"),
        (lambda d: token_denoiser(apply, {}, 0), "vocab_size"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(denoiser_of(random_table()))


def test_another_length_is_refused(table):
    with pytest.raises(ValueError, match="shape"):
        sample(first_hitting(denoiser_of(table), LENGTH), jax.random.key(0), shape=(2, 5))


def test_samplers_run_in_double_precision_too(table):
    """Where JAX's default types are 64 bits wide, tokens are the same."""

    def all_samples():
        denoiser, steps = denoiser_of(table), {"num_steps": 4}
        samplers = [
            first_hitting(denoiser, LENGTH),
            first_hitting(denoiser, LENGTH, tokens_per_step=2, extrapolate=True),
            first_hitting(denoiser, LENGTH, tokens_per_step=2, corrector_sweeps=1, top_p=0.9),
            ancestral(denoiser, LENGTH, times=np.linspace(1, 0.1, 5), **steps),
            ancestral(denoiser, LENGTH, asynchronous=True, **steps),
            ancestral(denoiser, LENGTH, draw="joint_float32", **steps),
            remasking(denoiser, LENGTH, strategy="confidence", **steps),
            confidence(denoiser, LENGTH, num_steps=2),
        ]
        key = jax.random.key(0)
        return [np.asarray(sample(made, key, shape=(4, LENGTH))[0]) for made in samplers]

    expected = all_samples()
    with jax.enable_x64(True):
        for left, right in zip(all_samples(), expected, strict=True):
            np.testing.assert_array_equal(left, right)


def test_float64_noise_gives_the_enumerated_law(table):
    with jax.enable_x64(True):
        sampler = ancestral(denoiser_of(table), LENGTH, num_steps=4, draw="joint_float64")
        tokens, _ = sample(sampler, jax.random.key(2), shape=(20_000, LENGTH))
    law = ancestral_law(table, 1 / np.arange(4, 0, -1))
    assert 1e-4 < p_value(counts(tokens), law) < 1 - 1e-4
