"""Laws of samplers of masked sequences by enumeration: what a sampler is to be judged by.

For a few tokens of a small vocabulary every state of a masked sequence can be listed, [V + 1] for
each position with the mask last. A model is then a table of what it predicts in each state, and the
law of its samples, in whatever order they are unmasked, follows by sums: exactly, with no sampling.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from genjax_lab.samplers.tokens import TokenDenoiser

_MOST_NUMBERS = 20_000_000  # of a table


def prediction_table(
    denoiser: TokenDenoiser, length: int
) -> Float[np.ndarray, "*states length vocabulary"]:
    """What a network that is not told the time predicts in every state.

    Args:
        denoiser: of a vocabulary V; the table has at most twenty million numbers.
        length: tokens of a sequence.

    Returns:
        Probabilities in float64, [V + 1, ..., V + 1, length, V]; where a token stands, they are
        those of this token alone.

    Raises:
        ValueError: if there are too many states, or a prediction is not finite.
    """
    vocabulary = denoiser.vocab_size
    if length < 1 or (vocabulary + 1) ** length * length * vocabulary > _MOST_NUMBERS:
        raise ValueError(
            f"{length} tokens of a vocabulary of {vocabulary} have too many states, or none"
        )
    states = np.array(list(itertools.product(range(vocabulary + 1), repeat=length)), np.int32)
    logits = jax.jit(lambda tokens: denoiser.predict(tokens, None, None, None))(jnp.asarray(states))
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    table = weights / weights.sum(axis=-1, keepdims=True)
    stands = states < vocabulary
    table[stands] = np.eye(vocabulary)[states[stands]]
    if not np.all(np.isfinite(table)):
        raise ValueError("the network's predictions are not finite")
    return table.reshape(*(vocabulary + 1,) * length, length, vocabulary)


def consistent_table(
    joint: Float[np.ndarray, "*sequence"],
) -> Float[np.ndarray, "*states length vocabulary"]:
    """The predictions of a perfect model of a joint law, [V, ..., V], of positive numbers.

    Raises:
        ValueError: if the law has another shape, or a number is not positive and finite.
    """
    joint = np.asarray(joint)
    length, vocabulary = joint.ndim, len(joint) if joint.ndim else 0
    if not length or joint.shape != (vocabulary,) * length:
        raise ValueError(f"joint must be [V, ..., V], got {joint.shape}")
    if not np.all((joint > 0) & np.isfinite(joint)):
        raise ValueError("joint must be positive and finite")
    table = np.zeros((vocabulary + 1,) * length + (length, vocabulary))
    for state in itertools.product(range(vocabulary + 1), repeat=length):
        law = joint[tuple(slice(None) if token == vocabulary else token for token in state)]
        free = [i for i, token in enumerate(state) if token == vocabulary]
        for i, token in enumerate(state):
            if token < vocabulary:
                table[(*state, i, token)] = 1
                continue
            others = tuple(axis for axis, place in enumerate(free) if place != i)
            table[(*state, i)] = law.sum(others) / law.sum()
    return table


def first_hitting_law(
    table: Float[np.ndarray, "*states length vocabulary"],
) -> Float[np.ndarray, "*sequence"]:
    """Law [V, ..., V] of sequences that are unmasked one token after the other in random order.

    It is that of ancestral sampling in infinitely many steps (arXiv 2409.02908).

    Raises:
        ValueError: if the table has another shape, or a number is not finite.
    """
    length, vocabulary = _shape_of(table)
    weights = {(vocabulary,) * length: 1.0}
    for masked in range(length, 0, -1):
        following: dict[tuple[int, ...], float] = {}
        for state, weight in weights.items():
            for i in range(length):
                if state[i] != vocabulary:
                    continue
                for token, part in enumerate(table[(*state, i)]):
                    new = (*state[:i], token, *state[i + 1 :])
                    following[new] = following.get(new, 0.0) + weight / masked * part
        weights = following
    return _as_array(weights, length, vocabulary)


def ancestral_law(
    table: Float[np.ndarray, "*states length vocabulary"], reveals: Sequence[float]
) -> Float[np.ndarray, "*sequence"]:
    """Law [V, ..., V] of sequences of ancestral steps.

    Args:
        table: predictions.
        reveals: probability that a masked token is unmasked, of each step: 1 / T, 1 / (T - 1), ...,
            1 for T even steps of the linear schedule. What is masked in the end is left out of the
            law, whose sum is then smaller than 1.

    Raises:
        ValueError: as `first_hitting_law`, or if a probability is not in [0, 1].
    """
    length, vocabulary = _shape_of(table)
    if not all(0 <= reveal <= 1 for reveal in reveals):
        raise ValueError(f"reveals must be probabilities, got {list(reveals)}")
    weights = {(vocabulary,) * length: 1.0}
    for reveal in reveals:
        following: dict[tuple[int, ...], float] = {}
        for state, weight in weights.items():
            choices = []
            for i, token in enumerate(state):
                if token < vocabulary:
                    choices.append([(token, 1.0)])
                else:
                    drawn = (reveal * table[(*state, i)]).tolist()
                    choices.append([(vocabulary, 1 - reveal), *enumerate(drawn)])
            for picks in itertools.product(*choices):
                new = tuple(token for token, _ in picks)
                part = weight * math.prod(p for _, p in picks)
                following[new] = following.get(new, 0.0) + part
        weights = following
    return _as_array(weights, length, vocabulary)


def total_variation(left: np.ndarray, right: np.ndarray) -> float:
    """Half the sum of the absolute differences of two laws.

    Raises:
        ValueError: if their shapes differ.
    """
    if np.shape(left) != np.shape(right):
        raise ValueError(f"laws have different shapes, {np.shape(left)} and {np.shape(right)}")
    return 0.5 * float(np.abs(left - right).sum())


def _shape_of(table: np.ndarray) -> tuple[int, int]:
    length, vocabulary = np.shape(table)[-2:]
    if np.shape(table) != (vocabulary + 1,) * length + (length, vocabulary):
        raise ValueError(f"a table is [V + 1, ..., V + 1, length, V], got {np.shape(table)}")
    if not np.all(np.isfinite(table)):
        raise ValueError("the table is not finite")
    return length, vocabulary


def _as_array(weights: dict, length: int, vocabulary: int) -> np.ndarray:
    law = np.zeros((vocabulary,) * length)
    for state, weight in weights.items():
        if vocabulary not in state:
            law[state] = weight
    return law
