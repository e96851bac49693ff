"""Masked models that are tables: every law of their samples can be enumerated."""

import itertools

import jax.numpy as jnp
import numpy as np

from genjax_lab.samplers import token_denoiser

LENGTH, VOCAB = 4, 3
STATES = list(itertools.product(range(VOCAB + 1), repeat=LENGTH))


def exact_table(joint):
    """Conditional laws [*states, LENGTH, VOCAB] of a joint law of all tokens."""
    table = np.zeros((VOCAB + 1,) * LENGTH + (LENGTH, VOCAB))
    for state in STATES:
        law = joint[tuple(slice(None) if token == VOCAB else token for token in state)]
        free = [i for i, token in enumerate(state) if token == VOCAB]
        for i, token in enumerate(state):
            if token < VOCAB:
                table[(*state, i, token)] = 1
                continue
            others = tuple(axis for axis, place in enumerate(free) if place != i)
            table[(*state, i)] = law.sum(others) / law.sum()
    return table


def random_table(seed=0):
    """Laws that belong to no joint law."""
    table = np.random.default_rng(seed).dirichlet(
        np.ones(VOCAB) / 2, size=(VOCAB + 1,) * LENGTH + (LENGTH,)
    )
    for state in STATES:
        for i, token in enumerate(state):
            if token < VOCAB:
                table[(*state, i)] = np.eye(VOCAB)[token]
    return table


def apply(table, tokens, t, condition, *, rows=None, train=False):
    del t, condition, train
    logits = jnp.log(table[tuple(tokens[:, i] for i in range(LENGTH))])
    return logits if rows is None else jnp.take_along_axis(logits, rows[..., None], axis=1)


def denoiser_of(table):
    return token_denoiser(apply, jnp.asarray(table, jnp.float32), VOCAB)


def first_hitting_law(table):
    """Law of the sequences that are unmasked one token after the other, in random order."""
    weights = {(VOCAB,) * LENGTH: 1.0}
    for masked in range(LENGTH, 0, -1):
        following = {}
        for state, weight in weights.items():
            for i in range(LENGTH):
                if state[i] != VOCAB:
                    continue
                for token in range(VOCAB):
                    new = (*state[:i], token, *state[i + 1 :])
                    part = weight / masked * table[(*state, i, token)]
                    following[new] = following.get(new, 0.0) + part
        weights = following
    return as_array(weights)


def ancestral_law(table, reveals):
    """Law of the sequences of ancestral steps with these probabilities of unmasking."""
    weights = {(VOCAB,) * LENGTH: 1.0}
    for reveal in reveals:
        following = {}
        for state, weight in weights.items():
            choices = []
            for i, token in enumerate(state):
                if token < VOCAB:
                    choices.append([(token, 1.0)])
                else:
                    law = reveal * table[(*state, i)]
                    choices.append([(VOCAB, 1 - reveal), *enumerate(law)])
            for picks in itertools.product(*choices):
                new = tuple(token for token, _ in picks)
                part = weight * np.prod([p for _, p in picks])
                following[new] = following.get(new, 0.0) + part
        weights = following
    return as_array(weights)


def as_array(weights):
    law = np.zeros((VOCAB,) * LENGTH)
    for state, weight in weights.items():
        if VOCAB not in state:
            law[state] = weight
    return law


def distance(left, right):
    """Total variation."""
    return 0.5 * np.abs(left - right).sum()


def counts(tokens):
    found = np.zeros((VOCAB,) * LENGTH)
    np.add.at(found, tuple(np.asarray(tokens).T), 1)
    return found
