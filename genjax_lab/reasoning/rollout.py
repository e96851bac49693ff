"""Rollouts: answers of the present policy, judged, until enough questions are worth learning from.

A question that all answers get right, or none, teaches nothing to any method that compares answers
with each other, so it is left out and others are asked instead (dynamic sampling, arXiv 2503.14476,
section 3.2; arXiv 2505.18116, Algorithm 1). What decides is the verifier's outcome itself: shaped
rewards differ within a group that is wrong as a whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

STRATEGIES = ("backfill", "replace", "partial")


class AnsweredProblem(NamedTuple):
    """A question and K answers to it.

    Attributes:
        problem: number of the question.
        prompt, prompt_mask: [columns], left-padded.
        answers, answer_mask: [K, length].
        log_probs: [K, length], under the law that they were drawn from.
        outcome: [K], in [0, 1].
        truncated: [K], whether the answer did not end.
    """

    problem: int
    prompt: Int[np.ndarray, "columns"]
    prompt_mask: Bool[np.ndarray, "columns"]
    answers: Int[np.ndarray, "answers length"]
    answer_mask: Bool[np.ndarray, "answers length"]
    log_probs: Float[np.ndarray, "answers length"]
    outcome: Float[np.ndarray, "answers"]
    truncated: Bool[np.ndarray, "answers"]

    @property
    def rate(self) -> float:
        """Mean of the outcomes."""
        return _rate(self.outcome)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the same again."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in self._asdict().items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "AnsweredProblem":
        """Undoes `to_json`."""
        types = {"prompt": np.int32, "prompt_mask": bool, "answers": np.int32, "answer_mask": bool}
        types |= {"log_probs": np.float32, "outcome": np.float32, "truncated": bool}
        arrays = {name: np.asarray(values[name], dtype) for name, dtype in types.items()}
        return cls(problem=int(values["problem"]), **arrays)


class Ledger(NamedTuple):
    """What rollouts have cost and given, in whole numbers.

    Attributes:
        batches: of questions that were asked.
        questions, answers: asked and given.
        right: answers with an outcome above one half.
        truncated: answers that did not end.
        generated_tokens: of all answers.
        slot_steps: tokens that the sampler had room for.
        kept_questions: of which answers are trained on.
        kept_tokens: of their answers.
        trained_tokens: counted once for each time that they are trained on.
    """

    batches: int = 0
    questions: int = 0
    answers: int = 0
    right: int = 0
    truncated: int = 0
    generated_tokens: int = 0
    slot_steps: int = 0
    kept_questions: int = 0
    kept_tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: "Ledger") -> "Ledger":  # type: ignore[override]
        return Ledger(*(a + b for a, b in zip(self, other, strict=True)))

    def floating_point_operations(self, num_params: int) -> dict[str, float]:
        """Of generation (2 a token and parameter), of judging again (2) and of training (6)."""
        return {
            "generation": 2.0 * num_params * self.generated_tokens,
            "old_log_probs": 2.0 * num_params * self.kept_tokens,
            "training": 6.0 * num_params * self.trained_tokens,
        }


class Collected(NamedTuple):
    """A rollout.

    Attributes:
        groups: as many questions with their answers as were wanted; those behind the first
            `ledger.kept_questions` only fill up.
        left_over: more of them that are worth learning from.
        ledger: what was asked and kept.
    """

    groups: list[AnsweredProblem]
    left_over: list[AnsweredProblem]
    ledger: Ledger


def is_useful(outcome: Float[np.ndarray, "answers"], band: tuple[float, float] | None) -> bool:
    """Whether the rate of right answers is in the band, and not 0 or 1; without a band all are."""
    rate = _rate(outcome)
    return band is None or (0.0 < rate < 1.0 and band[0] <= rate <= band[1])


def collect_groups(
    ask: Callable[[], tuple[Sequence[AnsweredProblem], int]],
    *,
    num_groups: int,
    band: tuple[float, float] | None = (0.0, 1.0),
    max_batches: int = 10,
    strategy: str = "backfill",
    carried: Sequence[AnsweredProblem] = (),
) -> Collected:
    """Asks until there are enough questions that some answers get right and others wrong.

    Args:
        ask: gives the next batch of questions with judged answers, and its slot steps.
        num_groups: questions wanted.
        band: the least and the largest rate of right answers that are kept, beside 0 and 1, which
            never are. None keeps all.
        max_batches: batches that may be asked for.
        strategy: "backfill" asks until there are enough; "replace" asks once and repeats what was
            kept, in its order, for what is missing; "partial" goes on with what there is after
            `max_batches`, and fills up with others, which are not to be learned from.
        carried: useful ones of before, which come first.

    Raises:
        ValueError: if numbers are out of range, or there were not enough in so many batches.
    """
    if num_groups < 1 or max_batches < 1 or strategy not in STRATEGIES:
        raise ValueError(
            f"num_groups={num_groups} and max_batches={max_batches} must be positive, and "
            f"strategy={strategy!r} one of {STRATEGIES}"
        )
    check_band(band)
    useful, useless, ledger = list(carried), [], Ledger()
    while len(useful) < num_groups and ledger.batches < max_batches:
        if strategy == "replace" and ledger.batches:
            break
        answered, slot_steps = ask()
        ledger += _count(answered, slot_steps)
        for group in answered:
            (useful if is_useful(group.outcome, band) else useless).append(group)
    if strategy == "replace" and useful:
        useful = [useful[i % len(useful)] for i in range(max(num_groups, len(useful)))]
    groups, left_over = useful[:num_groups], useful[num_groups:]
    kept = sum(int(group.answer_mask.sum()) for group in groups)
    ledger += Ledger(kept_questions=len(groups), kept_tokens=kept)
    if strategy == "partial":
        missing = num_groups - len(groups)
        fillers = useless or useful
        groups = groups + [fillers[i % len(fillers)] for i in range(missing)]
    if len(groups) < num_groups:
        raise ValueError(
            f"only {len(useful)} of num_groups={num_groups} questions had both right and wrong "
            f"answers{_inside(band)} in {ledger.batches} batches of "
            f"{ledger.questions // ledger.batches}: {ledger.right} of {ledger.answers} answers "
            "were right. Ask more at a time, allow more batches (max_batches), widen the band if "
            "it is narrow, or begin with a model that is neither so good nor so bad"
        )
    return Collected(groups, left_over, ledger)


def check_band(band: tuple[float, float] | None) -> None:
    """Raises a ValueError unless a band is None or two increasing numbers in [0, 1]."""
    if band is not None and not (len(band) == 2 and 0 <= band[0] < band[1] <= 1):
        raise ValueError(f"band={band} must be two increasing numbers in [0, 1]")


def _inside(band: tuple[float, float] | None) -> str:
    return "" if band in (None, (0.0, 1.0)) else f", at a rate in band={band},"


def _rate(outcome: Float[np.ndarray, "answers"]) -> float:
    # 4 of 5 are to be 0.8 exactly, the edge of a band, which they are not in float32.
    return float(np.mean(outcome, dtype=np.float64))


def _count(answered: Sequence[AnsweredProblem], slot_steps: int) -> Ledger:
    return Ledger(
        batches=1,
        questions=len(answered),
        answers=sum(len(group.outcome) for group in answered),
        right=sum(int((group.outcome > 0.5).sum()) for group in answered),
        truncated=sum(int(group.truncated.sum()) for group in answered),
        generated_tokens=sum(int(group.answer_mask.sum()) for group in answered),
        slot_steps=int(slot_steps),
    )
