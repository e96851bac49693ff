"""Asking a model questions, and having its answers judged, the same in all processes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from genjax_lab.reasoning.problems import Problem, Task
from genjax_lab.reasoning.rollout import AnsweredProblem
from genjax_lab.reasoning.tokens import Codec
from genjax_lab.samplers import Generation, to_host


def ask(
    task: Task,
    codec: Codec,
    problems: Sequence[Problem],
    generate: Callable[[Array, Array], Generation],
) -> tuple[list[AnsweredProblem], int]:
    """Answers to problems, judged by the task's verifier, and the slot steps they took.

    Args:
        task: whose verifier judges.
        codec: of the texts.
        problems: what is asked.
        generate: (prompts, mask) -> K answers each.

    Raises:
        ValueError: for outcomes that are not in [0, 1], and as `received`.
    """
    prompts, mask = codec.encode_prompts([problem.prompt for problem in problems])
    generation = received(generate(prompts, mask))
    _, outcome = judged(task, codec, problems, generation)
    report = generation.report
    answered = [
        AnsweredProblem(
            i,
            prompts[i],
            mask[i],
            generation.tokens[i],
            generation.mask[i],
            report.drawn_log_probs[i],
            outcome[i],
            report.truncated[i],
        )
        for i in range(len(problems))
    ]
    return answered, int(report.slot_steps)


def judged(
    task: Task, codec: Codec, problems: Sequence[Problem], generation: Generation
) -> tuple[list[str], Float[np.ndarray, "problems answers"]]:
    """Texts of answers, all of a problem's in a row, and their outcomes.

    Raises:
        ValueError: for outcomes that are not in [0, 1].
    """
    count = generation.tokens.shape[1]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    texts = codec.decode(flat(generation.tokens), flat(generation.mask))
    repeated = [problem for problem in problems for _ in range(count)]
    outcome = verified(task, repeated, texts).reshape(-1, count)
    if not ((outcome >= 0) & (outcome <= 1)).all():
        raise ValueError("task.verify must give outcomes in [0, 1]")
    return texts, outcome


def received(generation: Generation) -> Generation:
    """As numpy; a ValueError if the network gave NaN, of which no token can be drawn."""
    generation = jax.tree.map(to_host, generation)
    if np.isnan(generation.report.log_probs).any():
        raise ValueError("the network gives NaN for answers that it draws itself; it has diverged")
    return generation


def verified(task: Task, problems: Sequence, texts: Sequence[str]) -> np.ndarray:
    """What the task's verifier says in the first of several processes.

    A time limit may end otherwise in another, and all must go on alike.
    """
    return of_first_process("task.verify", lambda: task.verify(problems, texts), len(texts))


def of_first_process(
    name: str, values: Callable[[], Any], count: int
) -> Float[np.ndarray, "count"]:
    """What the first of several processes computes, in all of them.

    Args:
        name: of what gives the values, for the message.
        values: is called in the first process alone.
        count: of the values.

    Raises:
        ValueError: if there are not so many, one for each answer.
    """
    found = np.zeros(count, np.float32)
    if jax.process_index() == 0:
        found = np.asarray(values(), np.float32)
        if found.shape != (count,):
            raise ValueError(
                f"{name} must give {count} numbers, one for each answer, got shape {found.shape}"
            )
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    return found
