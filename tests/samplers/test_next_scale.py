"""Next-scale sampling: its law, against all sequences of a tiny model, and the sampler contract."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh

from genjax_lab import samplers
from genjax_lab.networks import VAR, MultiScaleQuantizer
from genjax_lab.samplers import base
from genjax_lab.samplers.base import example_keys, step_keys
from genjax_lab.samplers.next_scale import draw_tokens, keep_top_k, keep_top_p

SIDES, CODES = (1, 2), 3
NET = VAR(
    num_classes=2,
    vocab_size=CODES,
    codebook_channels=3,
    patch_nums=SIDES,
    width=8,
    depth=1,
    num_heads=2,
)
QUANTIZER = MultiScaleQuantizer(vocab_size=CODES, channels=3, patch_nums=SIDES, num_phi=2)
SHAPE = (8, 5)
SEQUENCES = np.array(list(itertools.product(range(CODES), repeat=5)))


def random_variables(module, *inputs, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


VARIABLES = random_variables(NET, jnp.zeros((1, 4, 3)))
CODEBOOK = random_variables(QUANTIZER, jnp.zeros((1, 2, 2, 3)))


def make(scale=0.3, **settings):
    variables = jax.tree.map(lambda leaf: scale * leaf, VARIABLES)
    return samplers.next_scale(NET, variables, QUANTIZER, CODEBOOK, **settings)


@functools.cache
def logits_of_all_sequences(label, scale=0.3):
    """Teacher-forced logits [sequences, 5, 3], in float64."""
    variables = jax.tree.map(lambda leaf: scale * leaf, VARIABLES)
    seen = QUANTIZER.apply(CODEBOOK, SEQUENCES, method="tokens_to_inputs")
    labels = jnp.full(len(SEQUENCES), label)
    return np.asarray(jax.jit(NET.apply)(variables, seen, labels), np.float64)


def enumerated_law(label, cfg=0.0, temperature=1.0, top_k=0, top_p=0.0):
    """Probability of each sequence, one token after the other."""
    ramp = cfg * np.array([0, 1, 1, 1, 1])[:, None]
    with_class, without = logits_of_all_sequences(label), logits_of_all_sequences(2)
    logits = ((1 + ramp) * with_class - ramp * without) / temperature
    probabilities = np.ones(len(SEQUENCES))
    for row, sequence in enumerate(SEQUENCES):
        for token, values in zip(sequence, logits[row], strict=True):
            order = np.argsort(-values)[: top_k or CODES]
            p = np.exp(values[order] - values.max())
            p /= p.sum()
            if top_p:
                kept = 1 + np.sum(np.cumsum(p)[:-1] < top_p)
                order, p = order[:kept], p[:kept] / p[:kept].sum()
            probabilities[row] *= p[order == token].sum()
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)
    return probabilities


def p_value(tokens, probabilities):
    """Of the chi-square test; sequences expected less than five times are one cell."""
    index = tokens @ CODES ** np.arange(4, -1, -1)
    counts = np.bincount(index, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = len(tokens) * probabilities
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
    counts, expected = pool(counts), pool(expected)
    assert np.sum(expected > 0) > 4
    statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9))
    return scipy.stats.chi2.sf(statistic, np.sum(expected > 0) - 1)


@functools.cache
def drawn(**settings):
    num = 20_000
    labels = np.ones(num, np.int32)
    tokens, _ = samplers.sample(
        make(**settings), jax.random.key(0), shape=(num, 5), condition=labels
    )
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg": 1.5, "temperature": 0.8},
        {"top_k": 2},
        {"cfg": 0.7, "temperature": 2.0, "top_p": 0.8},
    ],
    ids=["plain", "guided", "top_k", "top_p"],
)
def test_sequences_are_drawn_from_the_enumerated_law(settings):
    # A right sampler fails here with probability 1e-6.
    assert p_value(drawn(**settings), enumerated_law(1, **settings)) > 1e-6


def test_another_class_or_no_guidance_would_be_seen():
    assert p_value(drawn(), enumerated_law(0)) < 1e-6
    assert p_value(drawn(cfg=1.5, temperature=0.8), enumerated_law(1, temperature=0.8)) < 1e-6


def test_predictions_are_the_teacher_forced_logits_of_what_was_drawn():
    labels = np.array([0, 1, 2, 2, 1, 0, 1, 0])  # 2 is no class
    tokens, info = samplers.sample(
        make(), jax.random.key(0), shape=SHAPE, condition=labels, trajectory=True
    )
    assert info.num_steps == info.num_evaluations == 2
    assert info.trajectory.shape == (2, *SHAPE)
    assert info.predictions.shape == (2, 8, 4, CODES)
    np.testing.assert_array_equal(info.trajectory[-1], tokens)
    np.testing.assert_array_equal(info.trajectory[0][:, 1:], 0)
    np.testing.assert_array_equal(info.predictions[0][:, 1:], 0)
    logits = np.concatenate([info.predictions[0][:, :1], info.predictions[1]], axis=1)
    index = np.asarray(tokens) @ CODES ** np.arange(4, -1, -1)
    expected = [logits_of_all_sequences(label)[i] for label, i in zip(labels, index, strict=True)]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_guidance_is_a_ramp_over_scales_and_costs_two_evaluations():
    labels = np.ones(8, np.int32)
    tokens, info = samplers.sample(
        make(cfg=2.0), jax.random.key(0), shape=SHAPE, condition=labels, trajectory=True
    )
    assert info.num_evaluations == 4
    index = np.asarray(tokens) @ CODES ** np.arange(4, -1, -1)
    with_class, without = (logits_of_all_sequences(label)[index] for label in (1, 2))
    np.testing.assert_allclose(info.predictions[0][:, 0], with_class[:, 0], atol=1e-5)
    expected = 3 * with_class - 2 * without
    np.testing.assert_allclose(info.predictions[1], expected[:, 1:], atol=1e-4)


def test_no_condition_is_no_class():
    null, _ = samplers.sample(
        make(), jax.random.key(0), shape=SHAPE, condition=np.full(8, 2, np.int32)
    )
    nothing, _ = samplers.sample(make(), jax.random.key(0), shape=SHAPE)
    np.testing.assert_array_equal(nothing, null)


def test_the_sample_of_a_foreign_label_has_no_tokens():
    labels = np.array([0, 3, 1, -1, 2, 2, 1, 0])
    tokens, _ = samplers.sample(make(), jax.random.key(0), shape=SHAPE, condition=labels)
    foreign = np.isin(labels, [3, -1])
    assert np.all(tokens[foreign] == CODES)
    assert np.all(tokens[~foreign] < CODES)


def test_a_sample_depends_on_its_own_key_alone():
    sampler, labels = make(cfg=1.0), np.arange(8) % 3
    together, _ = samplers.sample(sampler, jax.random.key(0), shape=SHAPE, condition=labels)
    chosen = np.array([5, 2])
    apart, _ = samplers.sample(
        sampler, jax.random.key(0), shape=(2, 5), condition=labels[chosen], seeds=chosen
    )
    np.testing.assert_array_equal(apart, together[chosen])
    assert len(np.unique(together, axis=0)) > 4


def test_vmap_over_keys_is_a_loop_over_keys():
    sampler = make()
    keys = jax.random.split(jax.random.key(3), 2)
    draw = jax.jit(lambda key: samplers.sample(sampler, key, shape=SHAPE)[0])
    together = jax.vmap(draw)(keys)
    np.testing.assert_array_equal(together, np.stack([draw(key) for key in keys]))
    assert np.any(together[0] != together[1])


def test_mesh_changes_nothing():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sampler, labels = make(cfg=1.0), np.arange(8) % 3
    single, _ = samplers.sample(sampler, jax.random.key(0), shape=SHAPE, condition=labels)
    sharded, _ = samplers.sample(
        sampler, jax.random.key(0), shape=SHAPE, condition=labels, mesh=mesh
    )
    assert sharded.addressable_shards[0].data.shape == (1, 5)
    np.testing.assert_array_equal(sharded, single)


def test_one_compilation_serves_all_variables_and_guidance_weights():
    draws, sizes = [], []
    for scale, cfg in ((0.3, 1.0), (0.6, 1.0), (0.3, 4.0)):
        sampler = make(scale, cfg=cfg)
        draws.append(samplers.sample(sampler, jax.random.key(0), shape=(64, 5))[0])
        sizes.append(base._run._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]
    assert np.any(draws[0] != draws[1])


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_selecting_examples_in_between_selects_all_that_they_remember(cfg):
    """A wrapper may keep, repeat and reorder examples without knowing the sampler."""
    sampler, labels = make(cfg=cfg), jnp.arange(8) % 3
    chosen = jnp.array([6, 6, 0, 3, 1, 7, 2, 5])

    @jax.jit
    def run(order):
        keys = example_keys(jax.random.key(0), jnp.arange(8))
        state = sampler.init(step_keys(keys, 0), SHAPE, labels)
        prediction, state = sampler.predict(state)
        state = sampler.transition(step_keys(keys, 1), state, prediction)
        example = jax.tree.map(lambda leaf: leaf[order], state.example)
        state = state._replace(example=example, shared=state.shared._replace(step=jnp.int32(1)))
        prediction, state = sampler.predict(state)
        return prediction, sampler.transition(step_keys(keys[order], 2), state, prediction).sample

    prediction, tokens = run(jnp.arange(8))
    moved_prediction, moved_tokens = run(chosen)
    np.testing.assert_allclose(moved_prediction, prediction[chosen], atol=1e-5)
    np.testing.assert_array_equal(moved_tokens, tokens[chosen])
    assert np.abs(prediction[0] - prediction[1]).max() > 1e-3


def test_transition_is_pure_and_moves_features_with_tokens():
    sampler = make()
    keys = example_keys(jax.random.key(0), jnp.arange(8))

    @jax.jit
    def moves():
        state = sampler.init(keys, SHAPE, None)
        prediction, state = sampler.predict(state)
        return [sampler.transition(step_keys(keys, n), state, prediction) for n in (1, 1, 2)]

    first, again, other = moves()
    np.testing.assert_array_equal(first.sample, again.sample)
    assert np.any(first.sample != other.sample)
    f_hat = jnp.zeros((8, 2, 2, 3))
    for state in (first, other):
        added = QUANTIZER.apply(CODEBOOK, f_hat, state.sample[:, :1], 0, method="add_scale")
        np.testing.assert_allclose(state.example.history.f_hat, added, atol=1e-6)


def test_top_k_keeps_ties_and_refuses_what_is_no_count():
    logits = jnp.array([0.0, 2.0, 1.0, 1.0, -1.0])
    kept = lambda k: np.isfinite(keep_top_k(logits, k)).tolist()  # noqa: E731
    assert kept(1) == [False, True, False, False, False]
    assert kept(2) == kept(3) == [False, True, True, True, False]
    assert kept(5) == [True] * 5
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=r"must be in \[1, 5\]"):
            keep_top_k(logits, top_k)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    probabilities = jnp.array([[0.1, 0.5, 0.15, 0.25]])
    logits = jnp.log(probabilities)
    for top_p, kept in ((0.01, [1]), (0.49, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, range(4))):
        result = np.asarray(keep_top_p(logits, top_p))[0]
        assert np.flatnonzero(np.isfinite(result)).tolist() == list(kept)
        np.testing.assert_array_equal(result[list(kept)], logits[0, list(kept)])


def test_draws_use_noise_whose_upper_tail_is_not_cut(monkeypatch):
    seen = []
    original = jax.random.gumbel

    def gumbel(key, shape, dtype, mode):
        seen.append((dtype, mode))
        return original(key, shape, dtype, mode)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = draw_tokens(keys, jnp.zeros((4, 2, 3), jnp.bfloat16))
    assert (tokens.shape, tokens.dtype) == ((4, 2), jnp.int32)
    assert seen == [(jnp.float32, "high")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cfg": -1.0}, "cfg is -1.0; it must be at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 4}, r"top_k is 4; it must be in \[0, 3\]"),
        ({"top_p": 1.5}, r"top_p is 1.5; it must be in \[0, 1\]"),
        ({"quantizer": {"patch_nums": (1, 3)}}, r"patch_nums of the network is \(1, 2\)"),
        ({"quantizer": {"vocab_size": 4}}, "vocab_size of the network is 3, but 4"),
        ({"quantizer": {"channels": 4}}, "channels of the network is 3, but 4"),
    ],
)
def test_bad_settings_are_named(settings, message):
    settings = dict(settings)
    quantizer = QUANTIZER.clone(**settings.pop("quantizer", {}))
    with pytest.raises(ValueError, match=message):
        samplers.next_scale(NET, VARIABLES, quantizer, CODEBOOK, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 4)}, r"shape is \(8, 4\); it must be \(batch, 5\)"),
        ({"shape": (8, 5, 1)}, r"it must be \(batch, 5\)"),
        ({"condition": np.zeros(8)}, "condition must be integer labels"),
        ({"condition": np.zeros((8, 2), np.int32)}, r"condition must be integer labels.*\(8, 2\)"),
    ],
)
def test_bad_arguments_of_sample_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(make(), jax.random.key(0), **{"shape": SHAPE, **arguments})
