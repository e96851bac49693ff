"""The batches of learning from one's own answers: made by the model as it stands, and resumable.

One rollout asks questions until enough of them are useful, computes the answers' log-probabilities
by the function that training uses, and is cut into mini-batches of whole groups, which are trained
on once or several times before the next (arXiv 2505.18116, Algorithm 1). Whatever is drawn depends
on the seed, the number of the batch of questions, and the question's and the answer's places in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from genjax_lab.data.batch_order import BatchOrder
from genjax_lab.objectives import AGGREGATIONS, answer_batch, group_statistics, importance_weights
from genjax_lab.reasoning.asking import ask, of_first_process
from genjax_lab.reasoning.problems import Problem, Task
from genjax_lab.reasoning.rollout import (
    STRATEGIES,
    AnsweredProblem,
    Collected,
    Ledger,
    check_band,
    collect_groups,
)
from genjax_lab.reasoning.tokens import Codec
from genjax_lab.samplers import Generation, to_host

# Means of a rollout that every row of its batches carries, so that the log has them.
STATISTICS = (
    "accuracy",
    "kept",
    "truncated",
    "length_right",
    "length_wrong",
    "tokens_per_kept",
    "utilisation",
)
STATISTIC = "rollout_"


RATES = ("mean", "leave_one_out", "beta", "history")
# Keeps the keys of rollouts apart from those of training, which are children of the same seed.
_ROLLOUT_STREAM = 2**31 + 1


class RolloutSettings(NamedTuple):
    """How rollouts are made.

    Attributes:
        num_groups: questions N_q of a rollout.
        num_samples: answers K to each.
        minibatches: optimiser steps in which all of them are seen once.
        epochs: how often they are seen.
        batch_questions: questions that are asked at a time.
        band, max_batches, strategy: see `collect_groups`.
        carry_over: whether useful questions that were not needed come first in the next rollout.
            They were then answered by an older policy, whose log-probabilities they keep: those of
            the law they were drawn from, which should have no cuts.
        rate: estimate of r_q, one of RATES: see `correctness_rate`; or "history", the share of
            right answers to the question in all rollouts, those of each rollout in which it was
            asked counting `history_decay` times as much as those of the next.
        history_decay: in [0, 1].
        aggregation, constant: see `aggregation_weights`.
        importance_cap: see `importance_weights`; None for weights of 1.
        truncated_is_wrong: whether answers without end have the outcome 0 whatever they say.
        mask_truncated: whether such answers are not trained on (overlong filtering).
        bucket: columns of answers that none in the rollout needs are cut off, down to a multiple of
            this; training is compiled for each such length. None keeps all.
    """

    num_groups: int
    num_samples: int
    minibatches: int = 1
    epochs: int = 1
    batch_questions: int = 64
    band: tuple[float, float] | None = (0.0, 1.0)
    max_batches: int = 10
    strategy: str = "backfill"
    carry_over: bool = False
    rate: str = "mean"
    history_decay: float = 0.5
    aggregation: str = "token-sum-const"
    constant: float | None = None
    importance_cap: float | None = None
    truncated_is_wrong: bool = True
    mask_truncated: bool = False
    bucket: int | None = None

    @property
    def batch_size(self) -> int:
        """Answers of a mini-batch."""
        return self.num_groups // self.minibatches * self.num_samples

    def checked(self) -> "RolloutSettings":
        """Itself; ValueError if numbers do not fit."""
        counts = ("num_groups", "minibatches", "epochs", "batch_questions", "max_batches")
        if bad := {n: getattr(self, n) for n in counts if getattr(self, n) < 1}:
            raise ValueError(f"{bad} must be positive")
        if self.num_samples < 2 or self.num_groups % self.minibatches:
            raise ValueError(
                f"num_samples={self.num_samples} must be at least 2, and num_groups="
                f"{self.num_groups} a multiple of minibatches={self.minibatches}"
            )
        for name, known in (
            ("rate", RATES),
            ("strategy", STRATEGIES),
            ("aggregation", AGGREGATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not in {known}")
        check_band(self.band)
        if not 0 <= self.history_decay <= 1 or (self.bucket is not None and self.bucket < 1):
            raise ValueError(
                f"history_decay={self.history_decay} must be in [0, 1], and bucket={self.bucket} "
                "positive"
            )
        return self


class JudgedAnswers(NamedTuple):
    """What rewards are made of.

    Attributes:
        problems: what was asked.
        texts: what was answered.
        outcome: what the task's verifier said, in [0, 1].
        lengths: in tokens, with the one that ends the answer.
        truncated: whether it did not end.
    """

    problems: Sequence[Problem]
    texts: Sequence[str]
    outcome: Float[np.ndarray, "answers"]
    lengths: Int[np.ndarray, "answers"]
    truncated: Bool[np.ndarray, "answers"]


Generate = Callable[[Any, PRNGKeyArray, Array, Array], Generation]
JudgeTokens = Callable[[Any, Array, Array, Array, Array], Array]
Reward = Callable[[JudgedAnswers], Float[np.ndarray, "answers"]]


class _Record(NamedTuple):
    """What is remembered of a question: right answers and answers, and the last rollout."""

    right: float
    count: float
    rollout: int


class AnswerStream:
    """Endless batches of `answer_batch`, of the model that `follow` was last given.

    Args:
        task: questions and their verifier.
        codec: their tokens.
        generate: (variables, key, prompts, mask) -> K answers each.
        log_probs: (variables, prompts, prompt_mask, answers, answer_mask) -> [rows, length], for
            `judged_rows` rows: the same function of the same shapes as in training.
        settings: of the rollouts.
        seed: of everything that is drawn.
        judged_rows: a divisor of the mini-batch, which it is if None.
        reward: of policy gradients; the outcome if None. Which questions are kept and r_q do not
            depend on it. The first of several processes asks for it; what it says twice must be the
            same for a run to be continued exactly.
        share: (index, count): which contiguous part of each batch is given here.
        reference: variables of a frozen model, whose log-probabilities batches are to have.
    """

    def __init__(
        self,
        task: Task,
        codec: Codec,
        *,
        generate: Generate,
        log_probs: JudgeTokens,
        settings: RolloutSettings,
        seed: int,
        judged_rows: int | None = None,
        reward: Reward | None = None,
        share: tuple[int, int] = (0, 1),
        reference: Any = None,
    ):
        self._problems = [p for p in task.train if codec.fits(p.prompt)]
        if not self._problems:
            raise ValueError(f"all prompts are longer than {codec.prompt_length} tokens")
        self._task, self._codec, self._settings = task, codec, settings.checked()
        self._generate, self._log_probs, self._reward = generate, log_probs, reward
        self._seed, self._share, self._reference = seed, share, reference
        self._order = BatchOrder(
            len(self._problems),
            settings.batch_questions,
            seed,
            num_epochs=None,
            shuffle=True,
            drop_remainder=False,
            shard_index=0,
            shard_count=1,
        )
        self._judged_rows = judged_rows or settings.batch_size
        self._variables: Any = None
        self._asked = self._rollouts = 0
        self._carried: list[AnsweredProblem] = []
        self._history: dict[int, _Record] = {}  # of problems by their numbers
        self._pending: list[dict[str, np.ndarray]] = []
        self.ledger = Ledger()

    def follow(self, variables: Any) -> None:
        """Takes the variables that the next rollout is made with."""
        self._variables = variables

    def counters(self) -> dict[str, int]:
        """The ledger, by the names of the log."""
        return {f"ledger/{name}": value for name, value in self.ledger._asdict().items()}

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next mini-batch."""
        if not self._pending:
            if self._variables is None:
                raise ValueError("follow(variables) must be called before the first batch")
            self._pending = self._rollout()
            self._rollouts += 1
        return self._pending.pop(0)

    def get_state(self) -> dict[str, Any]:
        """The position; between rollouts only.

        Raises:
            ValueError: if mini-batches of the last rollout are still to come.
        """
        if self._pending:
            raise ValueError(
                f"{len(self._pending)} mini-batches of the rollout are still to come; store after "
                "the last of them"
            )
        return {
            "asked": self._asked,
            "rollouts": self._rollouts,
            "seed": self._seed,
            "carried": [group.to_json() for group in self._carried],
            "history": [[problem, *record] for problem, record in self._history.items()],
            "ledger": self.ledger._asdict(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position of `get_state`.

        Raises:
            ValueError: if it is of another seed.
        """
        if state["seed"] != self._seed:
            raise ValueError(f"the position is of seed {state['seed']}, this one of {self._seed}")
        self._asked, self._rollouts = state["asked"], state["rollouts"]
        self._carried = [AnsweredProblem.from_json(group) for group in state["carried"]]
        self._history = {problem: _Record(*rest) for problem, *rest in state.get("history", ())}
        if self._settings.rate == "history":
            for group in self._carried:  # which a run may not have remembered until now
                record = _Record(float(group.outcome.sum()), len(group.outcome), -1)
                self._history.setdefault(group.problem, record)
        self.ledger, self._pending = Ledger(**state["ledger"]), []

    def _rollout(self) -> list[dict[str, np.ndarray]]:
        settings, carried = self._settings, self._carried
        collected = collect_groups(
            self._ask,
            num_groups=settings.num_groups,
            band=settings.band,
            max_batches=settings.max_batches,
            strategy=settings.strategy,
            carried=carried,
        )
        self._carried = collected.left_over if settings.carry_over else []
        rows = self._rows(collected, carried)
        trained = settings.epochs * int(rows["counted"].sum())
        self.ledger += collected.ledger + Ledger(trained_tokens=trained)
        return self._minibatches(rows)

    def _ask(self) -> tuple[list[AnsweredProblem], int]:
        numbers = self._order[self._asked].indices.tolist()
        chosen = [self._problems[i] for i in numbers]
        key = jax.random.fold_in(jax.random.key(self._seed), _ROLLOUT_STREAM)
        key = jax.random.fold_in(key, self._asked)
        self._asked += 1
        answered, steps = ask(
            self._task,
            self._codec,
            chosen,
            lambda prompts, mask: self._generate(self._variables, key, prompts, mask),
        )
        if self._settings.truncated_is_wrong:
            answered = [
                group._replace(outcome=np.where(group.truncated, 0, group.outcome))
                for group in answered
            ]
        answered = [group._replace(problem=n) for group, n in zip(answered, numbers, strict=True)]
        if self._settings.rate == "history":
            for group in answered:
                self._remember(group)
        return answered, steps

    def _remember(self, group: AnsweredProblem) -> None:
        right, count, rollout = self._history.get(group.problem, _Record(0.0, 0.0, -1))
        # A question may be asked several times in a rollout: these answers are all of one policy.
        decay = 1.0 if rollout == self._rollouts else self._settings.history_decay
        self._history[group.problem] = _Record(
            decay * right + float(group.outcome.sum()),
            decay * count + len(group.outcome),
            self._rollouts,
        )

    def _rows(
        self, collected: Collected, carried: Sequence[AnsweredProblem]
    ) -> dict[str, np.ndarray]:
        """All answers of a rollout, with what training needs."""
        groups, settings = collected.groups, self._settings
        count = settings.num_samples
        length = self._length(groups)
        rows = {
            "problem": np.repeat([g.problem for g in groups], count),
            "prompt": np.repeat([g.prompt for g in groups], count, axis=0),
            "prompt_mask": np.repeat([g.prompt_mask for g in groups], count, axis=0),
            "answer": np.concatenate([g.answers[:, :length] for g in groups]),
            "answer_mask": np.concatenate([g.answer_mask[:, :length] for g in groups]),
            "sampler_log_probs": np.concatenate([g.log_probs[:, :length] for g in groups]),
            "outcome": np.concatenate([g.outcome for g in groups]).astype(np.float32),
            "truncated": np.concatenate([g.truncated for g in groups]),
            "ids": np.repeat(np.arange(len(groups), dtype=np.int32), count),
        }
        # What only fills up is not learned from.
        useful = rows["ids"] < collected.ledger.kept_questions
        if settings.mask_truncated:
            useful &= ~rows["truncated"]
        rows["counted"] = rows["answer_mask"] & useful[:, None]
        rows["statistics"] = np.tile(
            np.float32(list(rollout_statistics(collected).values())), (len(rows["ids"]), 1)
        )
        rows["old_log_probs"] = self._judge(self._variables, rows)
        if self._reference is not None:
            rows["reference_log_probs"] = self._judge(self._reference, rows)
        # Those of an older policy are what its own sampler said.
        older = np.repeat([any(group is other for other in carried) for group in groups], count)
        rows["old_log_probs"][older] = rows["sampler_log_probs"][older]
        return rows

    def _length(self, groups: Sequence[AnsweredProblem]) -> int:
        """Columns that answers need, a multiple of the bucket."""
        limit, bucket = self._codec.answer_length, self._settings.bucket
        if bucket is None:
            return limit
        longest = max(int(group.answer_mask.sum(axis=1).max()) for group in groups)
        return min(-(-longest // bucket) * bucket, limit)

    def _judge(self, variables: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        size = self._judged_rows
        names = ("prompt", "prompt_mask", "answer", "answer_mask")
        parts = [
            to_host(self._log_probs(variables, *(rows[name][i : i + size] for name in names)))
            for i in range(0, len(rows["ids"]), size)
        ]
        return np.concatenate(parts)

    def _minibatches(self, rows: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        settings = self._settings
        reward = None
        if self._reward is not None:
            judged = JudgedAnswers(
                [self._problems[i] for i in rows["problem"]],
                self._codec.decode(rows["answer"], rows["answer_mask"]),
                rows["outcome"],
                rows["answer_mask"].sum(axis=1),
                rows["truncated"],
            )
            reward = of_first_process("reward", lambda: self._reward(judged), len(judged.outcome))
        if settings.rate == "history":
            records = [self._history[i] for i in rows["problem"].tolist()]
            estimate = {"rate": np.float32([r.right / r.count for r in records])}
        else:
            estimate = {"estimate": settings.rate}
        statistics = group_statistics(rows["outcome"], rows["ids"], reward=reward, **estimate)
        batches = []
        for epoch in range(settings.epochs):
            generator = np.random.default_rng([self._seed, self._rollouts, epoch])
            groups = generator.permutation(settings.num_groups)
            for part in np.split(groups, settings.minibatches):
                chosen = part[:, None] * settings.num_samples + np.arange(settings.num_samples)
                batches.append(self._minibatch(rows, statistics, chosen.reshape(-1)))
        return batches

    def _constant(self) -> float | None:
        """That of the aggregation; the limit of lengths does not depend on what is cut off."""
        settings = self._settings
        if settings.constant is None and settings.aggregation == "seq-mean-token-sum-norm":
            return float(self._codec.answer_length)
        return settings.constant

    def _minibatch(self, rows, statistics, chosen: np.ndarray) -> dict[str, np.ndarray]:
        settings = self._settings
        part = {name: array[chosen] for name, array in rows.items()}
        more = {}
        if settings.importance_cap is not None:
            more["importance"] = importance_weights(
                part["old_log_probs"], part["sampler_log_probs"], cap=settings.importance_cap
            )
        if "reference_log_probs" in part:
            more["reference_log_probs"] = part["reference_log_probs"]
        batch = answer_batch(
            part["prompt"],
            part["prompt_mask"],
            part["answer"],
            part["answer_mask"],
            part["old_log_probs"],
            part["outcome"],
            jax.tree.map(lambda x: np.asarray(x)[chosen], statistics),
            aggregation=settings.aggregation,
            constant=self._constant(),
            counted=part["counted"],
            **more,
        )
        batch |= {
            f"{STATISTIC}{name}": part["statistics"][:, i] for i, name in enumerate(STATISTICS)
        }
        index, count = self._share
        size = len(chosen)
        begin, end = index * size // count, (index + 1) * size // count
        return {name: array[begin:end] for name, array in batch.items()}


def rollout_statistics(collected: Collected) -> dict[str, float]:
    """The numbers of `STATISTICS`; lengths are of the answers that were kept.

    NaN where nothing was asked, since enough was left over.
    """
    ledger = collected.ledger
    kept = collected.groups[: ledger.kept_questions]
    lengths = np.concatenate([g.answer_mask.sum(axis=1) for g in kept] or [np.zeros(0)])
    right = np.concatenate([g.outcome for g in kept] or [np.zeros(0)]) > 0.5
    mean = lambda x: float(x.mean()) if x.size else 0.0  # noqa: E731
    share = lambda part, whole: part / whole if whole else float("nan")  # noqa: E731
    values = (
        share(ledger.right, ledger.answers),
        share(ledger.kept_questions, ledger.questions),
        share(ledger.truncated, ledger.answers),
        mean(lengths[right]),
        mean(lengths[~right]),
        ledger.generated_tokens / max(ledger.kept_tokens, 1),
        share(ledger.generated_tokens, ledger.slot_steps),
    )
    return dict(zip(STATISTICS, values, strict=True))
