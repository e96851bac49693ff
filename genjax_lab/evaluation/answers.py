"""How often are sampled answers right: avg@k, pass@k, maj@k, and how sure that is.

Of n answers sampled for each question, avg@n is the mean, pass@k the chance that one of k is right
(the unbiased estimate of arXiv 2107.03374), maj@k the chance that the most frequent of k is (arXiv
2203.11171). Spreads: over the n runs, and over questions by the bootstrap. Whether an answer is
right is decided elsewhere (`reasoning.verifier`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

_CHUNK = 1 << 22  # resampled values that are held at once


def pass_at_k(
    num_samples: Int[np.ndarray, "*questions"] | int,
    num_correct: Int[np.ndarray, "*questions"] | int,
    k: int,
) -> Float[np.ndarray, "*questions"]:
    """Chance that k of n samples, drawn without replacement, have a right one among them.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i < k} (1 - c / (n - i))

    It is unbiased for 1 - (1 - p)^k, and 1 where n - c < k.

    Args:
        num_samples: n, at least k; broadcast against c.
        num_correct: c in [0, n].
        k: at least 1.

    Returns:
        float64 in [0, 1], one value for each question.

    Raises:
        ValueError: if a count is no integer or out of its range, or there are none.
    """
    n, c = np.broadcast_arrays(num_samples, num_correct)
    if not n.size or not all(np.issubdtype(x.dtype, np.integer) for x in (n, c)):
        raise ValueError(f"counts must be integers, at least one, got {n.dtype} and {c.dtype}")
    if np.any(c < 0) or np.any(c > n):
        raise ValueError("num_correct must be in [0, num_samples]")
    _check_k(k, int(n.min()))
    log_fail = np.zeros(n.shape)
    for i in range(k):
        # Where n - c < k a factor is 0 or below: the product is 0.
        log_fail += np.log1p(-np.minimum(c, n - i - 1) / (n - i))
    return np.where(n - c < k, 1.0, 0.0 - np.expm1(log_fail))  # not -0


def avg_at_k(outcomes: Bool[np.ndarray, "questions samples"]) -> float:
    """Share of right answers: the mean over a question's samples, then over questions.

    Args:
        outcomes: right or not, as truth values or 0 and 1.

    Raises:
        ValueError: if outcomes are empty, or not of that shape or those values.
    """
    return float(np.mean(np.mean(_outcomes(outcomes), axis=1)))


def maj_at_k(
    answers: Sequence[Sequence[str | None]],
    outcomes: Bool[np.ndarray, "questions samples"],
    k: int,
) -> Float[np.ndarray, "questions"]:
    """How often the most frequent of k answers is right, for each question.

    The n samples are cut into floor(n / k) groups of k as they come, each of which votes: as
    samples are independent, the mean over groups is unbiased, also where k < n. Among answers with
    equally many votes one is drawn evenly: its expectation is returned, nothing is drawn. Answers
    are one if their texts are equal, so let equivalent ones be written alike; the outcome of an
    answer is the mean over its samples.

    Args:
        answers: [questions][samples] extracted answers; None votes for nothing, and a group without
            votes is wrong.
        outcomes: right or not.
        k: votes in a group, in [1, n].

    Returns:
        float64 in [0, 1].

    Raises:
        ValueError: if shapes do not fit, outcomes are not 0 or 1, or k is out of its range.
    """
    outcomes = _outcomes(outcomes)
    num_questions, num_samples = outcomes.shape
    if len(answers) != num_questions or any(len(row) != num_samples for row in answers):
        raise ValueError(f"answers must have the shape of outcomes, {outcomes.shape}")
    _check_k(k, num_samples)
    result = np.empty(num_questions)
    for question, (row, right) in enumerate(zip(answers, outcomes, strict=True)):
        starts = range(0, num_samples - k + 1, k)
        result[question] = np.mean([_vote(row[s : s + k], right[s : s + k]) for s in starts])
    return result


def _vote(answers: Sequence[str | None], right: np.ndarray) -> float:
    ballots: dict[str, list[float]] = {}
    for answer, value in zip(answers, right, strict=True):
        if answer is not None:
            ballots.setdefault(answer, []).append(value)
    if not ballots:
        return 0.0
    most = max(map(len, ballots.values()))
    return float(np.mean([np.mean(values) for values in ballots.values() if len(values) == most]))


def std_at_n(outcomes: Bool[np.ndarray, "questions samples"]) -> float:
    """Standard deviation (of n - 1 degrees) of the accuracy over all questions of one run.

    Sample i of every question is run i: this is what a score with one sample varies by.

    Raises:
        ValueError: if there are fewer than 2 samples, or outcomes are not as in `avg_at_k`.
    """
    outcomes = _outcomes(outcomes)
    if outcomes.shape[1] < 2:
        raise ValueError("std_at_n needs at least 2 samples for each question")
    return float(np.std(np.mean(outcomes, axis=0), ddof=1))


def bootstrap_interval(
    values_per_question: Float[np.ndarray, "questions"],
    *,
    names: Sequence | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval for the mean over questions, by drawing questions with replacement.

    Args:
        values_per_question: finite, at least one.
        names: of the questions, hashable; those of one name are drawn together. All different if
            None.
        level: in (0, 1): share of resamples inside.
        num_resamples: how many.
        seed: of the draws.

    Returns:
        (low, high).

    Raises:
        ValueError: if an argument is outside its range.
    """
    values = np.asarray(values_per_question, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.all(np.isfinite(values)):
        raise ValueError(f"values must be finite and [questions], got the shape {values.shape}")
    if not 0 < level < 1 or num_resamples < 1:
        raise ValueError(
            f"level must be in (0, 1) and num_resamples positive, got {level} and {num_resamples}"
        )
    totals, counts = values, np.ones_like(values)
    if names is not None:
        which = _numbers(names, len(values))
        totals, counts = np.bincount(which, values), np.bincount(which).astype(np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(totals))
    means = []
    for start in range(0, num_resamples, rows):
        size = (min(rows, num_resamples - start), len(totals))
        drawn = generator.integers(len(totals), size=size)
        means.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def answer_summary(
    outcomes: Bool[np.ndarray, "questions samples"],
    lengths: Int[np.ndarray, "questions samples"],
    truncated: Bool[np.ndarray, "questions samples"],
    ks: Sequence[int] = (1,),
    *,
    answers: Sequence[Sequence[str | None]] | None = None,
    names: Sequence | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """All of the above for n samples of each question.

    Args:
        outcomes: right or not.
        lengths: of responses, in tokens.
        truncated: which responses were cut at the greatest length.
        ks: for pass@k and maj@k, each in [1, n].
        answers: extracted answers, for maj@k.
        names: of the questions, see `bootstrap_interval`; a question may be there several times.
        level: of the intervals.
        num_resamples: of the bootstrap over questions.
        seed: of the bootstrap.

    Returns:
        `avg_at_{n}`, `pass_at_{k}` and, if answers are given, `maj_at_{k}`, each with `_low` and
        `_high` of its interval; `std_at_{n}` if n > 1; `mean_length`, and where there are such
        responses `mean_length_right` and `mean_length_wrong` (they differ where length pays);
        `truncation_rate`, `num_questions` that are different, `num_samples`.

    Raises:
        ValueError: if shapes differ, or an argument is outside its range.
    """
    outcomes = _outcomes(outcomes)
    num_questions, n = outcomes.shape
    truncated = _outcomes(truncated, "truncated")
    lengths = np.asarray(lengths, dtype=np.float64)
    if lengths.shape != outcomes.shape or truncated.shape != outcomes.shape:
        raise ValueError(
            f"outcomes, lengths and truncated must have one shape, got {outcomes.shape}, "
            f"{lengths.shape} and {truncated.shape}"
        )
    if not np.all(np.isfinite(lengths)) or np.any(lengths < 0):
        raise ValueError("lengths must be finite and not negative")
    correct = np.sum(outcomes, axis=1).astype(np.int64)
    values = {f"avg_at_{n}": np.mean(outcomes, axis=1)}
    for k in ks:
        values[f"pass_at_{k}"] = pass_at_k(n, correct, k)
        if answers is not None:
            values[f"maj_at_{k}"] = maj_at_k(answers, outcomes, k)
    summary = {}
    for name, per_question in values.items():
        summary[name] = float(np.mean(per_question))
        summary[f"{name}_low"], summary[f"{name}_high"] = bootstrap_interval(
            per_question, names=names, level=level, num_resamples=num_resamples, seed=seed
        )
    if n > 1:
        summary[f"std_at_{n}"] = std_at_n(outcomes)
    summary["mean_length"] = float(np.mean(lengths))
    for name, chosen in (("right", outcomes == 1), ("wrong", outcomes == 0)):
        if np.any(chosen):
            summary[f"mean_length_{name}"] = float(np.mean(lengths[chosen]))
    summary["truncation_rate"] = float(np.mean(truncated))
    different = num_questions if names is None else len(set(names))
    return summary | {"num_questions": different, "num_samples": n}


def _numbers(names: Sequence, count: int) -> np.ndarray:
    if len(names) != count:
        raise ValueError(f"names must be {count}, one for each question, got {len(names)}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _outcomes(values, name: str = "outcomes") -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} must be [questions, samples], not empty, got {values.shape}")
    values = values.astype(np.float64)
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(f"{name} must be 0 or 1")
    return values


def _check_k(k: int, num_samples: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= num_samples:
        raise ValueError(f"k must be an integer in [1, {num_samples}], got {k!r}")
