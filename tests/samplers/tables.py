"""Masked models that are tables: every law of their samples can be enumerated."""

import itertools

import jax.numpy as jnp
import numpy as np

from genjax_lab.samplers import token_denoiser

LENGTH, VOCAB = 4, 3
STATES = list(itertools.product(range(VOCAB + 1), repeat=LENGTH))


def random_table(seed=0):
    """Laws that belong to no joint law."""
    table = np.random.default_rng(seed).dirichlet(
        np.ones(VOCAB) / 2, size=(VOCAB + 1,) * LENGTH + (LENGTH,)
    )
    for state in STATES:
        for i, token in enumerate(state):
            if token < VOCAB:
                table[(*state, i, slice(None))] = np.eye(VOCAB)[token]
    return table


def apply(table, tokens, t, condition, *, rows=None, train=False):
    del t, condition, train
    logits = jnp.log(table[tuple(tokens[:, i] for i in range(LENGTH))])
    return logits if rows is None else jnp.take_along_axis(logits, rows[..., None], axis=1)


def denoiser_of(table):
    return token_denoiser(apply, jnp.asarray(table, jnp.float32), VOCAB)


def counts(tokens):
    found = np.zeros((VOCAB,) * LENGTH)
    np.add.at(found, tuple(np.asarray(tokens).T), 1)
    return found
