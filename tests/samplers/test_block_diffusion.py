"""Block diffusion is first hitting in one block, and autoregressive in blocks of one token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from genjax_lab.networks import MaskedTransformer
from genjax_lab.objectives import block_diffusion_mask, masked_diffusion_loss
from genjax_lab.samplers import (
    BlockDenoiser,
    block_denoiser,
    block_diffusion,
    first_hitting,
    sample,
    token_denoiser,
)

LENGTH, VOCAB = 4, 3


@pytest.fixture(scope="module")
def network():
    return MaskedTransformer(VOCAB, width=16, depth=2, num_heads=2, condition_width=0)


@pytest.fixture(scope="module")
def variables(network):
    fresh = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def denoiser(network, variables):
    return block_denoiser(network.apply, variables, VOCAB)


def in_order(network, variables, tokens, block):
    """Logits of every token, given the blocks before it and its own."""
    mask = block_diffusion_mask(tokens.shape[1], block)[tokens.shape[1] :, tokens.shape[1] :]
    return network.apply(variables, jnp.asarray(tokens), mask=jnp.asarray(mask))


def autoregressive_law(network, variables):
    """Log-probability of each of all sequences, token after token."""
    every = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    total = np.zeros(len(every))
    for i in range(LENGTH):
        masked = every.copy()
        masked[:, i:] = VOCAB
        logits = in_order(network, variables, masked, 1)[:, i]
        total += np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), every[:, i : i + 1], axis=1
        )[:, 0]
    return every, total


def test_one_block_is_first_hitting(network, variables, denoiser):
    key, shape = jax.random.key(0), (64, LENGTH)
    plain = first_hitting(token_denoiser(network.apply, variables, VOCAB), LENGTH)
    expected, _ = sample(plain, key, shape=shape)
    found, info = sample(block_diffusion(denoiser, LENGTH, block=LENGTH), key, shape=shape)
    np.testing.assert_array_equal(found, expected)
    assert info.num_evaluations == LENGTH


def test_blocks_of_one_token_are_an_autoregressive_model(network, variables, denoiser):
    every, log_law = autoregressive_law(network, variables)
    law = np.exp(log_law)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    sampler = block_diffusion(denoiser, LENGTH, block=1)
    tokens, info = sample(sampler, jax.random.key(1), shape=(20_000, LENGTH))
    assert info.num_evaluations == 2 * LENGTH - 1
    counts = np.bincount(np.ravel_multi_index(np.asarray(tokens).T, (VOCAB,) * LENGTH))
    counts = np.pad(counts, (0, len(every) - len(counts)))
    found = scipy.stats.chisquare(counts, law / law.sum() * counts.sum())
    assert 1e-4 < found.pvalue < 1 - 1e-4


@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_kept_keys_and_values_are_those_of_the_whole_sequence(
    network, variables, denoiser, tokens_per_step
):
    length, block, batch = 6, 2, 4
    sampler = block_diffusion(denoiser, length, block=block, tokens_per_step=tokens_per_step)
    _, info = sample(sampler, jax.random.key(2), shape=(batch, length), trajectory=True)
    before = np.full((batch, length), VOCAB)
    checked = 0
    for after, logits in zip(
        np.asarray(info.trajectory), np.asarray(info.predictions), strict=True
    ):
        whole = np.asarray(in_order(network, variables, before, block))
        for example, changed in enumerate(before != after):
            places = np.flatnonzero(changed)
            expected = whole[example, places]
            for row in expected:  # in whatever order they were drawn
                assert np.min(np.abs(logits[example] - row).max(axis=-1)) < 1e-5
                checked += 1
        before = after
    assert checked == batch * length


def test_tokens_that_stand_are_kept(denoiser):
    initial = np.full((2, 6), VOCAB)
    initial[0, :3], initial[1, 4] = (0, 1, 2), 1
    tokens, info = sample(
        block_diffusion(denoiser, 6, block=3), jax.random.key(0), shape=(2, 6), initial=initial
    )
    stands = initial < VOCAB
    np.testing.assert_array_equal(np.asarray(tokens)[stands], initial[stands])
    np.testing.assert_array_equal(np.asarray(info.report.revealed_at) < 0, stands)
    assert not np.any(info.report.masks_left) and np.all(np.asarray(tokens) < VOCAB)


def test_sequences_end_early_and_calls_are_saved():
    end, block, length = 2, 4, 16

    def predict(tokens, start, past, rows):
        """Ends the sequences of even examples in their second block, of odd ones in their third."""
        last = block * (1 + jnp.arange(len(tokens)) % 2)
        wins = jnp.where(start >= last, end, 0)
        logits = jnp.where(jnp.arange(VOCAB) == wins[:, None], 30.0, 0.0)
        shape = (*rows.shape, VOCAB)
        return jnp.broadcast_to(logits[:, None], shape), (jnp.zeros((*tokens.shape, 1)),)

    sampler = block_diffusion(BlockDenoiser(predict, VOCAB), length, block=block, end_token=end)
    tokens, info = sample(sampler, jax.random.key(0), shape=(4, length))
    np.testing.assert_array_equal(info.report.lengths, [5, 9, 5, 9])
    np.testing.assert_array_equal(np.asarray(tokens)[0], [0] * 4 + [end] * 12)
    assert not np.any(info.report.masks_left)
    assert info.num_evaluations == 3 * (block + 1) - 1
    with pytest.raises(ValueError, match="trajectory"):
        sample(sampler, jax.random.key(0), shape=(1, length), trajectory=True)


def test_end_tokens_of_a_prompt_end_nothing():
    end, block, length = 2, 4, 12

    def predict(tokens, start, past, rows):
        """The second block ends the sequence."""
        wins = jnp.where(start >= block, end, 0)
        logits = jnp.where(jnp.arange(VOCAB) == wins, 30.0, 0.0)
        shape = (*rows.shape, VOCAB)
        return jnp.broadcast_to(logits, shape), (jnp.zeros((*tokens.shape, 1)),)

    sampler = block_diffusion(BlockDenoiser(predict, VOCAB), length, block=block, end_token=end)
    initial = np.full((2, length), VOCAB)
    initial[0, [0, 1]] = (end, 1)  # begins with the separator
    initial[1, [9, 10]] = (end, 1)  # stands in a later block
    tokens, info = sample(sampler, jax.random.key(0), shape=(2, length), initial=initial)
    np.testing.assert_array_equal(tokens[0], [end, 1, 0, 0] + [end] * 8)
    np.testing.assert_array_equal(tokens[1], [0] * 4 + [end] * 6 + [1, end])
    np.testing.assert_array_equal(info.report.lengths, [5, 5])
    assert not np.any(info.report.masks_left)


def test_counts_are_spread_over_the_blocks_of_a_sequence():
    """All blocks of a sequence with nearly the same count would be a noisier loss."""
    seen = []

    def apply(variables, tokens, t, condition, *, rows, **options):
        seen.append(np.asarray(tokens[:, :64]) == VOCAB)
        return jnp.zeros((*rows.shape, VOCAB))

    tokens = np.zeros((16, 64), int)
    masked_diffusion_loss(apply, VOCAB, block=4)({}, {"tokens": tokens}, jax.random.key(0))
    counts = seen[0].reshape(16, 16, 4).sum(axis=-1)
    np.testing.assert_array_equal(np.bincount(counts.ravel()), [0, 64, 64, 64, 64])
    assert np.std(counts.sum(axis=1)) < 8  # 18 if all of a sequence were equal


def test_who_sees_whom():
    length, block = 6, 2
    mask = block_diffusion_mask(length, block)
    for row, column in itertools.product(range(2 * length), repeat=2):
        ours, theirs = row % length // block, column % length // block
        if row < length:
            expected = ours == theirs if column < length else theirs < ours
        else:
            expected = column >= length and theirs <= ours
        assert mask[row, column] == expected


def test_the_loss_of_one_block_is_that_of_masked_diffusion(network, variables):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, LENGTH))
    for rows in (None, 2):
        values = [
            float(
                masked_diffusion_loss(network.apply, VOCAB, block=block, max_rows=rows)(
                    variables, {"tokens": tokens}, jax.random.key(3)
                )[0]
            )
            for block in (None, LENGTH)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_loss_of_blocks_of_one_token_is_the_exact_likelihood(network, variables):
    every, log_law = autoregressive_law(network, variables)
    loss = masked_diffusion_loss(network.apply, VOCAB, block=1)
    found, _ = loss(variables, {"tokens": every}, jax.random.key(0))
    assert float(found) == pytest.approx(-np.mean(log_law) / LENGTH, rel=1e-5)


def test_the_loss_of_blocks_is_an_average_over_masks(network, variables):
    """By enumeration: sum over n of 1/n of the mean over subsets of n tokens of each block."""
    tokens = np.array([[0, 2, 1, 1]])
    expected = 0.0
    for start in (0, 2):
        block = range(start, start + 2)
        for subset in [(start,), (start + 1,), tuple(block)]:
            masked = tokens.copy()
            masked[:, start + 2 :] = VOCAB
            masked[:, list(subset)] = VOCAB
            log_p = np.asarray(jax.nn.log_softmax(in_order(network, variables, masked, 2)))[0]
            subsets = 2 if len(subset) == 1 else 1
            expected -= sum(log_p[i, tokens[0, i]] for i in subset) / len(subset) / subsets
    loss = masked_diffusion_loss(network.apply, VOCAB, block=2)
    batch = {"tokens": np.tile(tokens, (4000, 1))}
    found, _ = loss(variables, batch, jax.random.key(0))
    assert float(found) == pytest.approx(expected / LENGTH, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: block_diffusion(d, 4, block=3), "whole blocks"),
        (lambda d: block_diffusion(d, 4, block=2, tokens_per_step=3), "tokens_per_step"),
        (lambda d: block_diffusion(d, 4, block=2, end_token=VOCAB), "end_token"),
        (lambda d: block_diffusion(d, 4, block=2, top_p=2.0), "top_p"),
        (lambda d: block_denoiser(None, {}, 0), "vocab_size"),
        (lambda d: masked_diffusion_loss(None, 3, block=0), "block"),
        (lambda d: masked_diffusion_loss(None, 3, block=2, time_conditioned=True), "block"),
        (
            lambda d: masked_diffusion_loss(None, 3, block=3)(
                {}, {"tokens": np.zeros((1, 4), int)}, jax.random.key(0)
            ),
            "whole blocks",
        ),
    ],
)
def test_mistakes_are_named(denoiser, make, message):
    with pytest.raises(ValueError, match=message):
        make(denoiser)
