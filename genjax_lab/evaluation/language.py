"""How good text is: the bound on its likelihood, perplexity under a judge, and its entropy.

Generative perplexity falls when samples repeat themselves, so it says nothing without the entropy
of the samples' own tokens beside it (arXiv 2409.02908): `generative_perplexity` returns both.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from genjax_lab.objectives.denoising import Objective

# tokens [batch, length] -> (log-probability of each token, logarithm of the sum of its law)
Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_NORMALISED = 1e-3


class GenerativePerplexity(NamedTuple):
    """Perplexity of samples under a judge, and what tells whether it may be believed.

    Attributes:
        perplexity: exp of the mean negative log-probability of a token.
        nats: that mean.
        standard_error: of `nats`, over sequences.
        entropy: mean over sequences of the entropy of its token counts, in nats.
        entropy_error: its standard error.
    """

    perplexity: float
    nats: float
    standard_error: float
    entropy: float
    entropy_error: float


def generative_perplexity(
    judge: Judge, tokens: Int[np.ndarray, "sequences length"], *, batch_size: int = 64
) -> GenerativePerplexity:
    """Perplexity of samples under a judge, every token of every sequence counted once.

    Args:
        judge: tokens [batch, length] -> (log-probabilities [batch, length], log-totals [batch,
            length]): the latter are the logarithms of the sums of the laws that the former are of,
            and must be 0, or the judge is none.
        tokens: samples.
        batch_size: sequences that are judged at once; the last batch may be smaller.

    Raises:
        ValueError: if the judge's laws do not sum to 1 or it gives other shapes, or tokens are not
            integers [sequences, length].
    """
    tokens = _sequences(tokens)
    nats = []
    for start in range(0, len(tokens), batch_size):
        part = tokens[start : start + batch_size]
        log_probs, totals = (np.asarray(x, np.float64) for x in judge(part))
        if log_probs.shape != part.shape or totals.shape != part.shape:
            raise ValueError(
                f"judge must give two arrays {part.shape}, got {log_probs.shape} and {totals.shape}"
            )
        worst = np.max(np.abs(totals))
        if not worst < _NORMALISED:
            raise ValueError(f"the judge's laws do not sum to 1: the logarithm is off by {worst}")
        nats.append(-np.mean(log_probs, axis=1))
    nats = np.concatenate(nats)
    entropy = unigram_entropy(tokens)
    return GenerativePerplexity(
        math.exp(np.mean(nats)),
        float(np.mean(nats)),
        _standard_error(nats),
        float(np.mean(entropy)),
        _standard_error(entropy),
    )


def unigram_entropy(tokens: Int[np.ndarray, "sequences length"]) -> Float[np.ndarray, "sequences"]:
    """Entropy in nats of each sequence's token counts; at most log(length).

    Raises:
        ValueError: if tokens are not integers [sequences, length].
    """
    tokens = np.sort(_sequences(tokens), axis=1)
    length = tokens.shape[1]
    result = []
    for row in tokens:
        edges = np.flatnonzero(np.diff(row)) + 1
        counts = np.diff(np.concatenate([[0], edges, [length]]))
        result.append(np.sum(counts * -np.log(counts / length)) / length)
    return np.asarray(result)


def nelbo(
    objective: Objective,
    variables: object,
    tokens: Int[np.ndarray, "sequences length"],
    key: PRNGKeyArray,
    *,
    batch_size: int = 64,
    num_draws: int = 8,
) -> tuple[float, float]:
    """The bound on the negative log-likelihood of sequences, in nats for each token.

    Args:
        objective: of `masked_diffusion_loss`, whose draws are spread evenly over a batch.
        variables: of the network.
        tokens: sequences; the last are left out where they fill no batch.
        key: of the draws.
        batch_size: sequences at once.
        num_draws: of masks for each sequence.

    Returns:
        (mean, standard error over batches).

    Raises:
        ValueError: if there is no whole batch, or tokens are not integers [sequences, length].
    """
    tokens = _sequences(tokens)
    batches = len(tokens) // batch_size
    if batches < 1 or num_draws < 1:
        raise ValueError(
            f"{len(tokens)} sequences are no batch of {batch_size}, or num_draws={num_draws} is "
            "not positive"
        )
    run = _loss(objective)
    losses = [
        [
            float(run(variables, tokens[b * batch_size :][:batch_size], jax.random.fold_in(key, i)))
            for i in range(b * num_draws, (b + 1) * num_draws)
        ]
        for b in range(batches)
    ]
    means = np.mean(losses, axis=1)
    return float(np.mean(means)), _standard_error(means)


def _loss(objective: Objective) -> Callable[..., Array]:
    return jax.jit(
        lambda variables, tokens, key: objective(variables, {"tokens": jnp.asarray(tokens)}, key)[0]
    )


def _standard_error(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _sequences(tokens) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [sequences, length], got {tokens.dtype} {tokens.shape}"
        )
    return tokens


class TrigramJudge:
    """An interpolated trigram model, counted from text, as a judge that needs no weights.

        p(c | a, b) = l_3 f(c | a, b) + l_2 f(c | b) + l_1 f(c) + l_0 / V

    with relative frequencies f; where a context was not seen, its weight goes to the shorter one.
    """

    def __init__(
        self,
        tokens: Int[np.ndarray, "sequences length"],
        vocab_size: int,
        weights: tuple[float, float, float, float] = (0.05, 0.25, 0.35, 0.35),
    ):
        """Counts.

        Args:
            tokens: text in [0, vocab_size).
            vocab_size: V.
            weights: l_0 .. l_3, positive, whose sum is 1.

        Raises:
            ValueError: if tokens are no such integers, or the weights do not fit.
        """
        tokens = _sequences(tokens).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"tokens must be in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}"
            )
        if len(weights) != 4 or min(weights) <= 0 or abs(sum(weights) - 1) > 1e-9:
            raise ValueError(f"weights must be four positive numbers of sum 1, got {weights}")
        self.vocab_size, self.weights = vocab_size, weights
        self._counts = [_Counts(tokens, order, vocab_size) for order in (1, 2, 3)]

    def __call__(
        self, tokens: Int[np.ndarray, "batch length"]
    ) -> tuple[Float[np.ndarray, "batch length"], Float[np.ndarray, "batch length"]]:
        """Log-probability of each token given the two before it, and the logs of the laws' sums.

        Raises:
            ValueError: if tokens are not in [0, vocab_size), as masks are not.
        """
        tokens = _sequences(tokens).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(
                f"tokens must be in [0, {self.vocab_size}), got {tokens.min()} to {tokens.max()}"
            )
        weights = [np.full(tokens.shape, self.weights[0])]
        shares = [np.full(tokens.shape, 1 / self.vocab_size)]
        totals = [np.ones(tokens.shape)]
        carried = np.zeros(tokens.shape)
        for order in (3, 2, 1):
            share, total = self._counts[order - 1].shares(tokens)
            weight = self.weights[order] + carried
            carried = np.where(total > 0, 0.0, weight)
            weights.append(np.where(total > 0, weight, 0.0))
            shares.append(share)
            totals.append(total)
        probability = sum(w * s for w, s in zip(weights, shares, strict=True))
        total = sum(w * t for w, t in zip(weights, totals, strict=True)) + carried
        return np.log(probability), np.log(total)


class _Counts:
    """How often runs of `order` tokens, and their contexts, were seen."""

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        self._order, self._base = order, vocab_size
        ids = self._ids(tokens)[:, order - 1 :]
        self._runs, self._numbers = np.unique(ids, return_counts=True)
        contexts = self._runs // self._base
        self._contexts, where = np.unique(contexts, return_inverse=True)
        self._sums = np.bincount(where, weights=self._numbers)

    def _ids(self, tokens: np.ndarray) -> np.ndarray:
        """The number of the run that ends at each token; meaningless where it would start early."""
        ids = np.zeros(tokens.shape, np.int64)
        for back in reversed(range(self._order)):
            ids = ids * self._base + np.roll(tokens, back, axis=1)
        return ids

    def shares(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(f(token | context), sum of the law: 1 where the context was seen, else 0)."""
        ids = self._ids(tokens)
        number = _look_up(self._runs, self._numbers, ids)
        seen = _look_up(self._contexts, self._sums, ids // self._base)
        seen[:, : self._order - 1] = 0
        return np.where(seen > 0, number / np.maximum(seen, 1), 0.0), (seen > 0).astype(float)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(float)
